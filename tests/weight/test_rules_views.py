from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from rules_samples import STACK, check, check_functorch, counting_builds, make, normal, regions
from torch import Tensor

from lora_param.errors import ComputedWeightError
from lora_param.targets.regions import WHOLE, Region
from lora_param.weight import pieces
from lora_param.weight.adapted import AdaptedWeight
from lora_param.weight.update import merge


@pytest.fixture(autouse=True, scope="module")
def _one_by_one() -> Iterator[None]:
    """Small stacks are built as a whole, see test_rules_pieces; here each view stays factored."""
    with mock.patch.object(pieces, "_READ", 0):
        yield


def same(found: Any, expected: Tensor) -> None:
    """A lazy view reads as the view of the built weight."""
    assert isinstance(found, AdaptedWeight)
    assert found.shape == expected.shape
    assert found.base.shape == expected.shape
    torch.testing.assert_close(found.build(), expected)


@draws(150)
@given(st.data(), st.integers(1, 7), st.integers(1, 7))
def test_slices(data: Any, m: int, n: int) -> None:
    w = make((m, n), data.draw(regions(m, n)), frozen=data.draw(st.booleans()))
    dense = merge(w.base, w.updates)
    dim, size = data.draw(st.sampled_from([(0, m), (1, n), (-1, n), (-2, m)]))
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    index = [slice(None)] * 2
    index[dim] = slice(start, start + length)
    same(w.narrow(dim, start, length), dense.narrow(dim, start, length))
    same(w[tuple(index)], dense[tuple(index)])
    x = normal(3, w[tuple(index)].shape[1])
    check(lambda w, x: F.linear(x, w[tuple(index)]), w, x)
    check(lambda w, x: (x @ w[tuple(index)].T).tanh(), w, x)
    pieces = data.draw(st.integers(1, size))
    for found, expected in zip(w.chunk(pieces, dim), dense.chunk(pieces, dim), strict=True):
        same(found, expected)
    for found, expected in zip(w.split(length, dim), dense.split(length, dim), strict=True):
        same(found, expected)
    sizes = [start, length, size - start - length]
    parts = torch.split(w, sizes, dim), w.split_with_sizes(sizes, dim)
    for found, other, expected in zip(*parts, dense.split(sizes, dim), strict=True):
        same(found, expected)
        same(other, expected)


INDICES = {
    "slice": (slice(1, 4), WHOLE),
    "open": (slice(None, 3), Region((2, 5))),
    "negative": (slice(-2, None), WHOLE),
    "both": ((slice(1, 4), slice(2, None)), Region((0, 2), (1, 4))),
    "ellipsis": ((..., slice(1, 3)), WHOLE),
    "ellipsis first": ((slice(0, 2), ...), WHOLE),
    "all": (slice(None), Region(None, (1, 3))),
    "beyond": (slice(3, 99), WHOLE),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_stay_lazy(name: str) -> None:
    index, region = INDICES[name]
    w = make((6, 5), [region])
    same(w[index], merge(w.base, w.updates)[index])


DENSE = {
    "row": 2,
    "rows": [0, 3],
    "tensor": torch.tensor([1, 1]),
    "mask": torch.arange(6) > 2,
    "element": (1, 2),
    "row and columns": (1, slice(1, 3)),
    "none": None,
    "step": slice(None, None, 2),
    "empty": slice(4, 2),
    "bool": True,
    "too many": (..., slice(None), slice(None), None),
}


@pytest.mark.parametrize("name", DENSE)
def test_other_indices_build_it(name: str) -> None:
    w = make((6, 5))
    found, expected = w[DENSE[name]], merge(w.base, w.updates)[DENSE[name]]
    assert not isinstance(found, AdaptedWeight)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert w.updates[0].A.grad is not None


def test_iteration_and_unpacking() -> None:
    w = make((3, 5))
    for found, expected in zip(w, merge(w.base, w.updates), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(IndexError):
        w[7]
    with pytest.raises(IndexError):
        w[1, 2, 3]


STACKED = {
    "int": lambda w: w[1],
    "negative": lambda w: w[-1],
    "numpy": lambda w: w[torch.tensor(2)],
    "select": lambda w: w.select(0, 1),
    "select negative": lambda w: torch.select(w, -3, 0),
    "unbind": lambda w: w.unbind()[2],
    "unbind function": lambda w: torch.unbind(w, 0)[0],
    "iteration": lambda w: list(w)[1],
    "slice": lambda w: w[1:3],
    "int and rows": lambda w: w[1, 2:5],
    "int and columns": lambda w: w[1, :, 1:3],
    "rows": lambda w: w[:, 1:4],
    "columns": lambda w: w[..., 1:4],
    "gather": lambda w: w[torch.tensor([2, 0, 0, 1])],
    "gather and columns": lambda w: w[torch.tensor([2, 0]), :, 1:3],
    "chunk": lambda w: w.chunk(2, 1)[1],
    "chunk columns": lambda w: w.chunk(2, -1)[1],
    "split": lambda w: w.split([1, 2])[1],
    "transposed part": lambda w: w.mT[1][1:3],
}


@pytest.mark.parametrize("name", STACKED)
def test_stacks(name: str) -> None:
    w = make((3, 6, 5), [STACK, STACK], frozen=False)
    dense = merge(w.base, w.updates)
    same(STACKED[name](w), STACKED[name](dense))
    wanted = [w.base, *(f for u in w.updates for f in (u.A, u.B))]
    g = torch.randn_like(STACKED[name](dense))
    x = torch.randn(4, g.shape[-1], dtype=torch.float64)
    found = torch.autograd.grad((x @ STACKED[name](w).mT).sin().sum(), wanted)
    expected = torch.autograd.grad((x @ STACKED[name](dense).mT).sin().sum(), wanted)
    torch.testing.assert_close(found, expected)


STACKED_DENSE = {
    "mask": lambda w: w[torch.tensor([True, False, True])],
    "table": lambda w: w[torch.tensor([[0, 1], [2, 0]])],
    "row of one": lambda w: w[1, 2],
    "rows 1": lambda w: w.select(1, 2),
    "unbind rows": lambda w: w.unbind(1)[0],
    "permute": lambda w: w.permute(1, 0, 2),
    "transpose": lambda w: w.transpose(0, 1),
    "view": lambda w: w.view(18, 5),
}


@pytest.mark.parametrize("name", STACKED_DENSE)
def test_other_parts_of_stacks_are_built(name: str) -> None:
    w = make((3, 6, 5), [STACK])
    found = STACKED_DENSE[name](w)
    assert not isinstance(found, AdaptedWeight)
    torch.testing.assert_close(found, STACKED_DENSE[name](merge(w.base, w.updates)))


@pytest.mark.parametrize("region", [WHOLE, Region((1, 3)), Region((1, 3), (2, 4))], ids=str)
def test_weights_of_more_dimensions(region: Region) -> None:
    """A convolution's weight is a matrix over two or more dimensions."""
    w = make((4, 5, 3), [region])
    dense = merge(w.base, w.updates)
    same(w[1:3], dense[1:3])
    same(w[:, 1:4], dense[:, 1:4])
    same(w.chunk(2, 1)[1], dense.chunk(2, 1)[1])
    for built in (w[..., 1:2], w[1], w.mT, w.chunk(3, 2)[0]):
        assert not isinstance(built, AdaptedWeight)


def test_a_slice_without_an_update_is_the_base() -> None:
    w = make((6, 4), [Region((0, 2))])
    part = w[3:]
    assert part.updates == ()
    assert torch.equal(part.build(), w.base[3:])
    assert not part.requires_grad
    with pytest.raises(ComputedWeightError):
        part.add_(1)
    assert torch.equal(F.linear(torch.eye(4).double(), part), w.base[3:].T)


def test_views_of_views_copy_and_pickle() -> None:
    w = make((6, 4))
    view = w.T[1:3].t()[2:]
    same(view, merge(w.base, w.updates)[2:, 1:3])
    for twin in (copy.deepcopy(make((6, 4)).T.detach()), pickle.loads(pickle.dumps(view))):
        assert isinstance(twin, Tensor)
    assert torch.equal(pickle.loads(pickle.dumps(view)).build(), view.build())


def test_function_transforms() -> None:
    check_functorch(lambda w, x: F.linear(x, w[1:4].chunk(3, 1)[0]), make((5, 6)), normal(3, 2))
    check_functorch(lambda w, x: x @ w[1], make((2, 5, 6), [STACK]), normal(3, 5))


def test_no_view_builds() -> None:
    w, x = make((6, 4)), normal(3, 4)
    with counting_builds() as built:
        for part in w.chunk(3):
            F.linear(x, part).sum().backward()
    assert not built
