from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from rules_samples import (
    STACK,
    check,
    check_derivatives,
    check_functorch,
    clone,
    counting_builds,
    make,
    never_dense,
    normal,
    regions,
    saved_beyond,
)

from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.update import merge

sizes = st.integers(1, 5)
batches = st.sampled_from([(), (1,), (3,), (2, 3), (70,), (0,), (2, 1, 3)])
layouts = st.sampled_from(["contiguous", "strided"])

# name → what is done with x (*, n) and w (m, n)
WITH_TRANSPOSE = {
    "T": lambda w, x: x @ w.T,
    "t": lambda w, x: x @ w.t(),
    "mT": lambda w, x: torch.matmul(x, w.mT),
    "H": lambda w, x: x.matmul(w.H),
    "adjoint": lambda w, x: x @ w.adjoint(),
    "transpose": lambda w, x: x @ w.transpose(0, 1),
    "transpose negative": lambda w, x: x @ torch.transpose(w, -1, -2),
    "swapaxes": lambda w, x: x @ w.swapaxes(-1, 0),
    "permute": lambda w, x: x @ w.permute(1, 0),
    "permute tuple": lambda w, x: x @ torch.permute(w, (1, 0)),
    "twice": lambda w, x: torch.nn.functional.linear(x, w.T.t()),
    "left": lambda w, x: w @ x.mT if x.dim() > 1 else w @ x,
    "rmatmul": lambda w, x: w.T.__rmatmul__(x),
}


@draws(150)
@given(st.data(), sizes, sizes, batches, layouts, st.booleans(), st.sampled_from([*WITH_TRANSPOSE]))
def test_products_with_the_transpose(
    data: Any, m: int, n: int, batch: tuple[int, ...], layout: str, frozen: bool, name: str
) -> None:
    w = make((m, n), data.draw(regions(m, n)), frozen=frozen, layout=layout)
    check(WITH_TRANSPOSE[name], w, normal(*batch, n))


@draws(80)
@given(st.data(), sizes, sizes, batches, layouts, st.booleans())
def test_products_with_the_weight(
    data: Any, k: int, n: int, batch: tuple[int, ...], layout: str, frozen: bool
) -> None:
    w = make((k, n), data.draw(regions(k, n)), frozen=frozen, layout=layout)
    check(lambda w, x: x @ w, w, normal(*batch, k))
    check(lambda w, x: torch.matmul(x, w), w, normal(*batch, k))
    check(lambda w, x: w.T @ x.mT if x.dim() > 1 else w.T @ x, w, normal(*batch, k))


MATRICES = {
    "mm": lambda w, x: torch.mm(x, w),
    "mm method": lambda w, x: x.mm(w),
    "mm left": lambda w, x: torch.mm(w.t(), x.t()),
    "mv": lambda w, x: torch.mv(w.t(), x[0]),
    "mv method": lambda w, x: w.t().mv(x[0]),
    "addmm": lambda w, x: torch.addmm(torch.arange(4.0, dtype=x.dtype), x, w),
    "addmm matrix": lambda w, x: torch.ones(6, 4, dtype=x.dtype).addmm(x, w),
    "addmm scaled": lambda w, x: torch.addmm(x[0, :4], x, w, beta=0.3, alpha=-2),
    "addmm left": lambda w, x: torch.addmm(x.t()[:4], w.t(), x.t(), alpha=0.5),
    "addmm scalar": lambda w, x: torch.addmm(torch.ones((), dtype=x.dtype), x, w),
}


@pytest.mark.parametrize("region", [WHOLE, Region((1, 4), (1, 3))], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_products_of_matrices(name: str, region: Region) -> None:
    check(MATRICES[name], make((5, 4), [region], frozen=False), normal(6, 5))


STACKS = {  # w (3, 5, 4), x (3, 2, 5)
    "bmm": lambda w, x: torch.bmm(x, w),
    "bmm method": lambda w, x: x.bmm(w),
    "bmm left": lambda w, x: torch.bmm(w.mT, x.mT),
    "bmm transposed": lambda w, x: torch.bmm(x, w.transpose(1, 2).transpose(-1, -2)),
    "matmul": lambda w, x: x @ w,
    "matmul broadcast": lambda w, x: x[0] @ w,
    "matmul broadcast left": lambda w, x: w.mT @ x[0].mT,
    "matmul four": lambda w, x: x.expand(2, 3, 2, 5) @ w,
    "matmul four left": lambda w, x: w.permute(0, 2, 1) @ x.mT.expand(2, 3, 5, 2),
    "baddbmm": lambda w, x: torch.baddbmm(x[..., :4], x, w, beta=0.2, alpha=3),
    "baddbmm bias": lambda w, x: torch.baddbmm(x[:, :1, :4], x, w),
    "baddbmm left": lambda w, x: x.mT[:, :4].baddbmm(w.mT, x.mT, alpha=0.5),
    "one": lambda w, x: x[1] @ w[1],
    "some": lambda w, x: torch.bmm(x[:2], w[torch.tensor([2, 0])]),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_products_of_stacks(name: str, layout: str) -> None:
    w = make((3, 5, 4), [STACK, STACK], frozen=False, layout=layout)
    check(STACKS[name], w, normal(3, 2, 5))


DENSE = {  # right, but by building
    "vector and stack": lambda w, x: x[0, 0] @ w,
    "stack and vector": lambda w, x: w.mT @ x[0, 0],
    "out": lambda w, x: (
        torch.bmm(x.detach(), w.detach(), out=torch.empty(3, 2, 4).double()) + w[0, 0]
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_has_no_factored_form_is_built(name: str) -> None:
    check(DENSE[name], make((3, 5, 4), [STACK], frozen=False), normal(3, 2, 5), lazy=False)


def test_a_stack_of_one_update_over_all_is_built() -> None:
    check(lambda w, x: torch.bmm(x, w), make((3, 5, 4)), normal(3, 2, 5), lazy=False)


def test_two_adapted_weights() -> None:
    w, v = make((4, 5)), make((5, 3))
    expected = merge(w.base, w.updates) @ merge(v.base, v.updates)
    torch.testing.assert_close(w @ v, expected)
    torch.testing.assert_close(torch.addmm(make((4, 3)), w, v).shape, expected.shape)


def test_out_is_written_without_gradients() -> None:
    w, x = make((5, 4)), normal(3, 5)
    with torch.no_grad():
        out = torch.empty(3, 4, dtype=torch.float64)
        assert torch.mm(x, w, out=out) is out
        torch.testing.assert_close(out, x @ merge(w.base, w.updates))
        torch.testing.assert_close(torch.matmul(x, w, out=torch.empty_like(out)), out)
        torch.testing.assert_close(torch.addmm(out, x, w, out=torch.empty_like(out)), 2 * out)


EINSUMS = {  # the weight second; x's shape
    "bi,oi->bo": ((3, 5), (4, 5)),
    "bi,io->bo": ((3, 4), (4, 5)),
    "i,oi->o": ((5,), (4, 5)),
    "bsi,oi->bso": ((2, 3, 5), (4, 5)),
    "...i,oi->...o": ((2, 3, 5), (4, 5)),
    "bis,oi->bos": ((2, 5, 3), (4, 5)),
    "bis,oi->sob": ((2, 5, 3), (4, 5)),
    "b i, o i -> o b": ((3, 5), (4, 5)),
    "bi,oi->o": ((3, 5), (4, 5)),
    "eti,eoi->eto": ((3, 2, 5), (3, 4, 5)),
    "ei,eoi->eo": ((3, 5), (3, 4, 5)),
    "ei,eio->eo": ((3, 4), (3, 4, 5)),
    "ti,eio->teo": ((2, 4), (3, 4, 5)),
    "tei,eio->to": ((2, 3, 4), (3, 4, 5)),
    "ti,eoi->to": ((2, 5), (3, 4, 5)),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation: str) -> None:
    shape, matrix = EINSUMS[equation]
    w = make(matrix, [STACK if len(matrix) == 3 else WHOLE] * 2, frozen=False)
    check(lambda w, x: torch.einsum(equation, x, w), w, normal(*shape))
    (first, second), out = equation.split("->")[0].split(","), equation.split("->")[1]
    swapped = f"{second},{first}->{out}"
    check(lambda w, x: torch.einsum(swapped, [w, x]), w, normal(*shape))


@pytest.mark.parametrize(
    "equation", ["oi,oi->oi", "oi,oi->", "bo,oi->b", "bb,ob->bo", "bi,oi", "bi,...i->b..."]
)
def test_other_einsums_are_built(equation: str) -> None:
    shape = {"bo": (3, 4), "bb": (5, 5), "bi": (3, 5), "oi": (4, 5)}[equation[:2]]
    w = make((4, 5), frozen=False)
    check(lambda w, x: torch.einsum(equation, x, w), w, normal(*shape), lazy=False)


def test_einsum_with_part_of_a_weight_is_built() -> None:
    w = make((4, 5), [Region((0, 2))])
    check(lambda w, x: torch.einsum("bi,oi->bo", x, w), w, normal(3, 5), lazy=False)


GRADCHECK = {
    "right": ((4, 3), WHOLE, lambda w, x: x @ w, (2, 4)),
    "transpose": ((4, 3), Region((1, 3)), lambda w, x: x @ w.T, (2, 3)),
    "left": ((4, 3), Region(None, (0, 2)), lambda w, x: w @ x, (2, 3, 2)),
    "addmm": ((4, 3), WHOLE, lambda w, x: torch.addmm(x[0, :3], x, w, alpha=2), (2, 4)),
    "bmm": ((2, 3, 4), STACK, lambda w, x: torch.bmm(x, w), (2, 2, 3)),
    "einsum": ((2, 3, 4), STACK, lambda w, x: torch.einsum("ti,eio->teo", x, w), (2, 3)),
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_derivatives(name: str) -> None:
    shape, region, operation, x = GRADCHECK[name]
    check_derivatives(operation, make(shape, [region], rank=1, frozen=False), normal(*x))


@pytest.mark.parametrize("name", GRADCHECK)
def test_function_transforms(name: str) -> None:
    shape, region, operation, x = GRADCHECK[name]
    check_functorch(operation, make(shape, [region]), normal(*x))


SAVED = {
    "right": ((32, 24), WHOLE, lambda w, x: x @ w, (4, 32)),
    "transpose": ((32, 24), WHOLE, lambda w, x: x @ w.T, (4, 24)),
    "left": ((32, 24), WHOLE, lambda w, x: w @ x, (24, 4)),
    "addmm": ((32, 24), WHOLE, lambda w, x: torch.addmm(x[0, :24], x, w), (4, 32)),
    "bmm": ((3, 32, 24), STACK, lambda w, x: torch.bmm(x, w), (3, 4, 32)),
    "bmm transposed": ((3, 24, 32), STACK, lambda w, x: torch.bmm(x, w.mT), (3, 4, 32)),
    "one by one": (
        (3, 32, 24),
        STACK,
        lambda w, x: torch.stack([x @ w[e] for e in range(3)]),
        (4, 32),
    ),
    "einsum": ((3, 32, 24), STACK, lambda w, x: torch.einsum("eti,eio->eto", x, w), (3, 4, 32)),
}


@pytest.mark.parametrize("name", SAVED)
def test_no_matrix_is_saved(name: str) -> None:
    shape, region, operation, x = SAVED[name]
    with counting_builds() as built:
        assert saved_beyond(operation, make(shape, [region]), normal(*x)) == []
    assert not built


@pytest.mark.parametrize("name", ["right", "left", "bmm", "einsum"])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16", "float16"])
def test_low_precision(name: str, mode: str) -> None:
    shape, region, operation, x = SAVED[name]
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    w, x = make(shape, [region], dtype=dtype), normal(*x, dtype=dtype)
    u = w.updates[0]
    exact = w.base.double() + 0.7 * (u.B.double() @ u.A.double())
    expected = operation(exact, x.detach().double())
    gradients = torch.autograd.grad(expected.square().sum(), (u.A, u.B))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), never_dense():
        found = operation(clone(w), x)
    assert found.dtype == (torch.bfloat16 if mode == "autocast" else dtype)
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.5)
    for grad, other in zip(
        torch.autograd.grad(found.double().square().sum(), (u.A, u.B)), gradients, strict=True
    ):
        assert grad.dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), other.flatten(), 0) > 0.999


def test_dropout_acts_on_the_input() -> None:
    """Doubled or dropped: each output is one of the two for every input that is one-hot."""
    w = make((4, 4), dropout=0.5)
    full = 0.7 * (w.updates[0].B @ w.updates[0].A).detach()
    torch.manual_seed(0)
    for operation, delta in (
        (lambda w, x: x @ w, full),
        (lambda w, x: x @ w.T, full.T),
        (lambda w, x: (w @ x.T).T, full.T),
        (lambda w, x: torch.addmm(torch.zeros(4).double(), x, w), full),
    ):
        found = (
            operation(clone(w), torch.eye(4).double()) - (w.base if delta is full else w.base.T)
        ).detach()
        for row, kept in zip(found, delta, strict=True):
            assert torch.allclose(row, kept * 2) or torch.allclose(row, kept * 0, atol=1e-12)
    stack = make((3, 4, 4), [STACK], dropout=0.5)
    x = normal(3, 2, 4)
    assert not torch.equal(torch.bmm(x, stack), torch.bmm(x, stack))


def test_without_gradients_the_cheaper_way() -> None:
    """A stack is built where its rows are more than the factored way is worth."""
    for rows, expected in ((1, 0), (40, 1)):
        w = make((2, 6, 6), [STACK])
        with torch.no_grad(), counting_builds() as built:
            torch.bmm(normal(2, rows, 6), w)
        assert len(built) == expected


def test_mismatched_shapes_raise_torchs_error() -> None:
    w = make((5, 4))
    for bad in (
        lambda: normal(3, 4) @ w,
        lambda: torch.mm(normal(3, 4), w),
        lambda: torch.bmm(normal(3, 5, 2), w),
        lambda: w @ normal(3, 4),
        lambda: torch.mv(w, normal(5)),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            bad()
