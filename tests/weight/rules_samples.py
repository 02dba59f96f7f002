"""Adapted weights for the rules' tests, and the checks that every rule has to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import lora_param.weight.rules  # noqa: F401
from lora_param.targets.regions import WHOLE, Region
from lora_param.weight import pieces
from lora_param.weight.adapted import AdaptedWeight, adapted
from lora_param.weight.rules import common, embedding
from lora_param.weight.update import Update, merge

STACK = Region(stacked=True)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def make(
    shape: tuple[int, ...],
    regions: Sequence[Region] = (WHOLE,),
    *,
    rank: int = 2,
    frozen: bool = True,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    dropout: float = 0.0,
) -> AdaptedWeight:
    """An adapted weight whose base and factors are leaves."""
    W = torch.randn(shape, dtype=dtype)
    if layout == "strided":
        W = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT
    W.requires_grad_(not frozen)
    updates = []
    factor = torch.promote_types(dtype, torch.float32)
    for region in regions:
        *lead, m, n = region.matrix(shape)
        A, B = normal(*lead, rank, n, dtype=factor), normal(*lead, m, rank, dtype=factor)
        updates.append(Update(A, B, 0.7, region, dropout))
    return adapted(W, updates)


def leaves(w: AdaptedWeight) -> list[Tensor]:
    tensors = [w.base, *(f for u in w.updates for f in (u.A, u.B))]
    return [t for t in tensors if t.requires_grad]


def clone(w: AdaptedWeight) -> AdaptedWeight:
    """The same leaves under a weight that has built nothing."""
    return adapted(w.base, w.updates)


@contextmanager
def never_dense() -> Iterator[None]:
    """Rules take the factored way whatever it costs, and building is an error."""
    error = AssertionError("the weight was built")
    with ExitStack() as stack:
        for module in (common, embedding):
            stack.enter_context(mock.patch.object(module, "prefers_built", return_value=False))
        stack.enter_context(mock.patch.object(pieces, "_READ", 0))
        for cls in (AdaptedWeight, *AdaptedWeight.__subclasses__()):
            stack.enter_context(mock.patch.object(cls, "build", side_effect=error))
        yield


@contextmanager
def counting_builds() -> Iterator[list[AdaptedWeight]]:
    """Each weight that is asked for its matrix."""
    asked: list[AdaptedWeight] = []
    with ExitStack() as stack:
        for cls in (AdaptedWeight, *AdaptedWeight.__subclasses__()):
            if "build" not in cls.__dict__:
                continue
            build = cls.__dict__["build"]

            def counted(self: AdaptedWeight, build: Any = build) -> Any:
                asked.append(self)
                return build(self)

            stack.enter_context(mock.patch.object(cls, "build", counted))
        yield asked


Operation = Callable[..., Any]


def check(operation: Operation, w: AdaptedWeight, *inputs: Tensor, lazy: bool = True) -> None:
    """Value and gradients equal those of a plain weight; the matrix is not built."""
    expected = operation(merge(w.base, w.updates), *inputs)
    wanted = [t for t in (*inputs, *leaves(w)) if t.requires_grad]
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wanted, g, allow_unused=True, materialize_grads=True)
    with never_dense() if lazy else ExitStack():
        found = operation(clone(w), *inputs)
        assert type(found) is Tensor
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
        same = torch.autograd.grad(found, wanted, g, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(same, gradients)
        with torch.no_grad():
            torch.testing.assert_close(operation(clone(w), *inputs), expected)
    plain = operation(clone(w), *inputs)  # by whichever way is cheaper
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(
        torch.autograd.grad(plain, wanted, g, allow_unused=True, materialize_grads=True), gradients
    )
    with torch.no_grad():
        torch.testing.assert_close(operation(clone(w), *inputs), expected)


def check_derivatives(operation: Operation, w: AdaptedWeight, *inputs: Tensor) -> None:
    """First and second derivatives by finite differences."""
    u = w.updates[0]

    def function(*tensors: Tensor) -> Tensor:
        A, B, W, *rest = tensors
        update = Update(A, B, u.scale, u.region)
        return operation(adapted(W, [update]), *rest)

    given = (u.A, u.B, w.base, *inputs)
    with never_dense():
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def check_functorch(operation: Operation, w: AdaptedWeight, *inputs: Tensor) -> None:
    """The same gradients through torch.func, where only torch's own operations may be used."""
    u = w.updates[0]

    def loss(A: Tensor, B: Tensor) -> Tensor:
        return operation(adapted(w.base, [Update(A, B, u.scale, u.region)]), *inputs).sin().sum()

    expected = operation(merge(w.base, [u]), *inputs).sin().sum()
    found = torch.func.grad(loss, (0, 1))(u.A.detach(), u.B.detach())
    torch.testing.assert_close(found, torch.autograd.grad(expected, (u.A, u.B)))


def saved_beyond(operation: Operation, w: AdaptedWeight, *inputs: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps that is as large as the weight, and neither W nor an input."""
    own = {t.untyped_storage().data_ptr() for t in (w.base, *inputs)}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = operation(w, *inputs)
        assert result.requires_grad
    size = w.base.numel()
    return [
        tuple(t.shape)
        for t in kept
        if t.untyped_storage().data_ptr() not in own
        and min(t.numel(), t.untyped_storage().nbytes() // t.element_size()) >= size
    ]


@st.composite
def spans(draw: st.DrawFn, size: int) -> tuple[int, int] | None:
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    return None if draw(st.booleans()) or (start, stop) == (0, size) else (start, stop)


@st.composite
def regions(draw: st.DrawFn, m: int, n: int) -> list[Region]:
    """One or two regions of an (m, n) weight; they may overlap."""
    count = draw(st.integers(1, 2))
    return [Region(draw(spans(m)), draw(spans(n))) for _ in range(count)]
