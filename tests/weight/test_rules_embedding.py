from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from rules_samples import (
    check,
    check_derivatives,
    check_functorch,
    clone,
    counting_builds,
    make,
    never_dense,
    regions,
    saved_beyond,
)
from torch import Tensor, nn

import lora_param as lp
from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.adapted import adapted
from lora_param.weight.update import Update, merge

shapes = st.sampled_from([(), (1,), (4,), (2, 3), (0,), (2, 1, 2), (20,)])


@draws(150)
@given(st.data(), shapes, st.booleans(), st.sampled_from([None, 0, 2, -1]), st.booleans())
def test_embedding(
    data: Any, shape: tuple[int, ...], frozen: bool, padding: int | None, short: bool
) -> None:
    w = make((7, 5), data.draw(regions(7, 5)), frozen=frozen)
    ids = torch.randint(0, 7, shape, dtype=torch.int32 if short else torch.int64)
    check(lambda w: F.embedding(ids, w, padding), w)


@draws(80)
@given(
    st.data(),
    st.sampled_from(["sum", "mean"]),
    st.booleans(),
    st.sampled_from([None, 0, -1]),
    st.sampled_from(["table", "offsets", "last offset"]),
    st.booleans(),
)
def test_embedding_bag(
    data: Any, mode: str, frozen: bool, padding: int | None, bags: str, weighted: bool
) -> None:
    columns = data.draw(regions(7, 5))
    w = make((7, 5), [Region(None, r.columns) for r in columns], frozen=frozen)
    ids = torch.randint(0, 7, (3, 4) if bags == "table" else (9,))
    options: dict[str, Any] = {"mode": mode, "padding_idx": padding}
    if bags != "table":
        options["offsets"] = torch.tensor([0, 0, 4, 9] if bags == "last offset" else [0, 2, 2, 6])
        options["include_last_offset"] = bags == "last offset"
    samples = torch.randn(ids.shape, dtype=torch.float64).requires_grad_()
    if not weighted or mode == "mean":
        check(lambda w: F.embedding_bag(ids, w, **options), w)
    else:
        check(lambda w, s: F.embedding_bag(ids, w, per_sample_weights=s, **options), w, samples)


ids = torch.tensor([[1, 1, 4], [0, 6, 1]])
DENSE = {
    "frequency": lambda w: F.embedding(ids, w, scale_grad_by_freq=True),
    "bag max": lambda w: F.embedding_bag(ids, w, mode="max"),
    "bag frequency": lambda w: F.embedding_bag(ids, w, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_is_not_linear_in_the_table_is_built(name: str) -> None:
    check(DENSE[name], make((7, 5)), lazy=False)


def test_rows_of_a_bag_are_built() -> None:
    check(lambda w: F.embedding_bag(ids, w), make((7, 5), [Region((1, 4))]), lazy=False)


def test_max_norm_renormalizes_what_is_built() -> None:
    w = make((7, 5))
    with torch.no_grad():
        expected = F.embedding(ids, merge(w.base, w.updates), max_norm=0.5)
        torch.testing.assert_close(F.embedding(ids, clone(w), max_norm=0.5), expected)


def test_the_padding_row_learns_nothing() -> None:
    w = make((7, 5))
    with never_dense():
        F.embedding(torch.tensor([3, 3]), w, padding_idx=3).sum().backward()
    u = w.updates[0]
    assert u.A.grad is not None
    assert u.B.grad is not None
    assert not u.A.grad.any()
    assert not u.B.grad.any()


def test_derivatives() -> None:
    ids = torch.tensor([2, 0, 2])
    for region in (WHOLE, Region((1, 3), (0, 2))):
        w = make((4, 3), [region], rank=1, frozen=False)
        check_derivatives(lambda w: F.embedding(ids, w), w)
        check_functorch(lambda w: F.embedding(ids, w, 0), w)
    w = make((4, 3), frozen=False)
    u = w.updates[0]

    def bags(A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        return F.embedding_bag(ids[None], adapted(W, [Update(A, B, 0.7)]), mode="sum")

    with never_dense():  # torch has no second derivative of a bag
        assert torch.autograd.gradcheck(bags, (u.A, u.B, w.base))


def test_no_table_is_saved_or_built() -> None:
    w = make((40, 16))
    with counting_builds() as built:
        assert saved_beyond(lambda w: F.embedding(ids, w, 1), w) == []
        assert saved_beyond(lambda w: F.embedding_bag(ids, w), w) == []
        with torch.no_grad():
            F.embedding(ids, w)
    assert not built


def test_more_rows_than_the_table_has_are_built() -> None:
    w = make((7, 5))
    with counting_builds() as built:
        F.embedding(torch.arange(7).repeat(5), w)
    assert len(built) == 1


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_low_precision(mode: str) -> None:
    """Autocast leaves embeddings alone; a table of low precision has factors in fp32."""
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    w = make((40, 16), dtype=dtype)
    exact = w.base.double() + 0.7 * (w.updates[0].B.double() @ w.updates[0].A.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        found = F.embedding(ids, w)
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if mode == "autocast" else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found.double(), F.embedding(ids, exact), **tolerance)
    found.sum().backward()
    assert w.updates[0].B.grad is not None
    assert w.updates[0].B.grad.dtype == torch.float32


def test_dropout_says_that_it_has_no_effect() -> None:
    w = make((40, 16), dropout=0.5)
    with pytest.warns(UserWarning, match="no effect on an embedding"):
        found = F.embedding(ids, w)
    torch.testing.assert_close(found, F.embedding(ids, merge(w.base, w.updates)))


def test_a_table_with_sparse_gradients_trains() -> None:
    torch.manual_seed(0)
    dense = lp.apply(nn.Embedding(5, 8), ["weight"], rank=2)
    torch.manual_seed(0)
    sparse = lp.apply(nn.Embedding(5, 8, sparse=True), ["weight"], rank=2)
    for model in (dense, sparse):
        nn.init.ones_(lp.parameters(model)[1])
        model(torch.tensor([1, 2, 2])).square().sum().backward()
    for a, b in zip(lp.parameters(dense), lp.parameters(sparse), strict=True):
        assert torch.equal(a.grad, b.grad)
