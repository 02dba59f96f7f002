"""`AdaptedWeight`: the tensor that is W + ΔW without being built.

It equals W + Σ scale·(B @ A) for every operation. Operations with a rule (`rules/`) work on W and
the factors directly; any other builds the weight first. Nothing is kept beyond the object's life.

It is one file, however long: all that a tensor is asked besides operations with rules.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lora_param.errors import BelowAutogradError, ComputedWeightError
from lora_param.weight.base import dense, logical_dtype, logical_shape, storage_of
from lora_param.weight.computed import Computed, protect, refuse_writes, refuse_writes_below
from lora_param.weight.private import TensorMeta, as_plain_tensors, forward_level, parse_to
from lora_param.weight.update import Deferred, NormalForm, Update, lower_all, merge

__all__ = ["RULES", "AdaptedWeight", "EagerAdaptedWeight", "Pieces", "adapt", "adapted"]
__all__ += ["built", "implements", "lower"]

Rule = Callable[..., Any]

RULES: dict[Callable[..., Any], Rule] = {}
"""Operation → rule. A rule takes the operation's arguments and returns its result, or
`NotImplemented` where the weight has to be built."""


def implements(*operations: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for operations."""

    def register(rule: Rule) -> Rule:
        for operation in operations:
            RULES[operation] = rule
        return rule

    return register


def _getter(name: str) -> Callable[..., Any]:
    return getattr(Tensor, name).__get__  # type: ignore[no-any-return]


# Answered by the wrapper itself, which has W's shape, dtype, device and layout.
_PROPERTIES = "shape dtype device ndim layout itemsize nbytes is_cuda is_cpu is_mps is_xpu is_meta"
_PROPERTIES += " is_sparse is_quantized is_nested"
_METHODS = "size dim numel nelement element_size is_floating_point is_complex get_device"
_METHODS += " __len__ __hash__"
# Both are dicts: torch.compile looks into sets of methods only in newer versions of torch.
_METADATA = dict.fromkeys(
    [
        *(_getter(name) for name in _PROPERTIES.split()),
        *(getattr(Tensor, name) for name in _METHODS.split()),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    ]
)
_NO_DROPOUT = (
    "dropout has no effect on a weight that is built as a whole: it acts on the input of A, which "
    "only some operations show (F.linear does)"
)
_LAYOUT = dict.fromkeys([Tensor.stride, Tensor.is_contiguous])


class AdaptedWeight(Computed):
    """A tensor equal to α ∘ W + ΔW of each update, built only where an operation needs the matrix.

    Two classes make it: this one can be traced by torch.compile and is made while compiling; the
    eager one has no data at all, so that code which takes its data pointer fails.

    Attributes:
        base: W.
        updates: what is added, in order; as the LoRAs give them, or lowered for the rules.
        alpha: what multiplies W, broadcastable to it, once the updates are lowered; None is 1.
    """

    base: Tensor
    updates: tuple[Update | Deferred, ...]
    alpha: Tensor | None

    def build(self) -> Tensor:
        """α ∘ W + ΔW as a plain tensor of W's shape and dtype."""
        return merge(self.base, self.updates, self.alpha)

    @property
    def differentiable(self) -> bool:
        """Gradients flow into W or into some factor."""
        return any(t.requires_grad for t in self.parts)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors that it is made of."""
        trained = (t for u in self.updates for t in u.trained)
        return (self.base, *trained) if self.alpha is None else (self.base, self.alpha, *trained)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if rule := RULES.get(func):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _LAYOUT:
            return func(dense(args[0].base), *args[1:], **kwargs)
        if func in _METADATA:
            with as_plain_tensors():
                return func(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():  # which cannot trace the checks
            return func(*_build_all(args), **_build_all(kwargs))
        refuse_writes(func, args, kwargs)
        built: list[Tensor] = []
        return protect(func(*_build_all(args, built), **_build_all(kwargs, built)), built)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AdaptedWeight({self.build()!r}, updates={len(self.updates)})"


class Pieces:
    """The matrices of a stack, built of tensors at their versions, in a gradient mode."""

    __slots__ = ("grad", "matrices", "versions")

    def __init__(self, parts: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
        self.grad = torch.is_grad_enabled()
        self.versions = [(t, t._version) for t in parts]
        self.matrices = matrices

    def current(self) -> Sequence[Tensor] | None:
        """The matrices, or None where they would be others now."""
        if torch.is_grad_enabled() is not self.grad:
            return None
        for t, version in self.versions:
            if t._version != version:
                return None
        return self.matrices


class _Comparable(TensorMeta):
    """Counts parameters among the instances: `torch.testing` compares a weight with a parameter
    only where one is an instance of the other's class."""

    def __instancecheck__(self, instance: Any) -> bool:
        return issubclass(type(instance), nn.Parameter) or super().__instancecheck__(instance)


class EagerAdaptedWeight(AdaptedWeight, metaclass=_Comparable):
    """An `AdaptedWeight` without data, for everything but tracing."""

    _built: dict[bool, tuple[tuple[int, ...], Tensor]]
    pieces: Pieces | None = None
    """The matrices of a stack, where they have been built."""
    reads: int = 0
    """How many matrices of a stack have been asked for."""

    @staticmethod
    def __new__(
        cls, base: Tensor, updates: Sequence[Update | Deferred], alpha: Tensor | None = None
    ) -> EagerAdaptedWeight:
        """A tensor of W's shape, dtype and device that has no data."""
        if storage_of(base) is None:
            size, strides, dtype, layout = base.size(), base.stride(), base.dtype, base.layout
        else:
            size, strides, layout = torch.Size(logical_shape(base)), None, torch.strided
            dtype = logical_dtype(base)
        self: EagerAdaptedWeight = Tensor._make_wrapper_subclass(
            cls, size, strides=strides, dtype=dtype, layout=layout, device=base.device
        )
        self.base = base
        self.updates = tuple(updates)
        self.alpha = alpha
        self._built = {}
        return self

    def __init__(
        self, base: Tensor, updates: Sequence[Update | Deferred], alpha: Tensor | None = None
    ) -> None:
        """Everything is done in __new__, which torch's subclass construction requires."""

    def build(self) -> Tensor:
        """W + ΔW as a plain tensor of W's shape and dtype.

        Built once for each gradient mode, and again when W or a factor has been written to.
        """
        if any(u.dropout for u in self.updates):
            warnings.warn(_NO_DROPOUT, stacklevel=4)
        versions = tuple(0 if t.is_inference() else t._version for t in self.parts)
        grad = torch.is_grad_enabled()
        known = self._built.get(grad)
        if known is None or known[0] != versions:
            known = self._built[grad] = versions, merge(self.base, self.updates, self.alpha)
        return known[1]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What reaches the weight below autograd: right without gradients, refused with them."""
        kwargs = kwargs or {}
        refuse_writes_below(func, args, kwargs)
        if _any_differentiable((args, kwargs)):
            raise BelowAutogradError(str(func))
        return func(*_build_all(args), **_build_all(kwargs))

    def __getitem__(self, index: Any) -> Any:
        """As any operation, but for the matrices of a stack that are there already."""
        if self.pieces is not None and (
            type(index) is int
            or (type(index) is Tensor and index.dtype is torch.int64 and not index.dim())
        ):
            matrices = self.pieces.current()
            if matrices is not None:
                return matrices[int(index)]
        return super().__getitem__(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedWeight:
        for t in self.parts:
            if (
                not t.is_leaf
            ):  # made of others, an initial pair among them; torch copies leaves alone
                memo[id(t)] = t.detach().clone().requires_grad_()
        base, updates, alpha = deepcopy((self.base, self.updates, self.alpha), memo)
        copy = memo[id(self)] = EagerAdaptedWeight(base, updates, alpha)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return EagerAdaptedWeight, (self.base, self.updates, self.alpha)


def adapt(W: Tensor, update: Update | Deferred) -> Tensor:
    """W, which may be adapted already, with one more update; as a plain tensor within `built`."""
    if _local.__dict__.get("built"):
        return adapted(W, (update,)).build()
    if isinstance(W, AdaptedWeight):
        return adapted(W.base, (*W.updates, update))
    return adapted(W, (update,))


_local = threading.local()


@contextmanager
def built() -> Iterator[None]:
    """Read adapted weights as plain tensors in this thread, within a `with` block."""
    before = _local.__dict__.get("built", False)
    _local.built = True
    try:
        yield
    finally:
        _local.built = before


def adapted(
    W: Tensor, updates: Sequence[Update | Deferred], alpha: Tensor | None = None
) -> AdaptedWeight:
    """The weight that is α ∘ W plus these updates."""
    if not torch.compiler.is_dynamo_compiling():
        return EagerAdaptedWeight(W, updates, alpha)
    # Not W itself: an operation that torch.compile does not ask about would read W as if it were
    # W + ΔW. Of NaN, which no result can hide.
    nan = torch.full((), float("nan"), dtype=logical_dtype(W), device=W.device)
    empty = nan.expand(logical_shape(W))
    weight = empty.as_subclass(AdaptedWeight)
    weight.base = W
    weight.updates = tuple(updates)
    weight.alpha = alpha
    return weight


def lower(weight: AdaptedWeight) -> NormalForm | None:
    """The weight in normal form, or None where one of its updates has none."""
    for u in weight.updates:
        if type(u) is not Update:
            return lower_all(weight.base, weight.updates)
    return NormalForm(weight.base, cast(Sequence[Update], weight.updates), weight.alpha)


@implements(_getter("requires_grad"))
def _requires_grad(weight: AdaptedWeight, *_: object) -> bool:
    return torch.is_grad_enabled() and weight.differentiable


@implements(_getter("is_leaf"))
def _is_leaf(weight: AdaptedWeight, *_: object) -> bool:
    return not (torch.is_grad_enabled() and weight.differentiable)


@implements(Tensor.to)
def _to(weight: AdaptedWeight, *args: Any, **kwargs: Any) -> Any:
    """The weight itself where it is there already, as of any tensor; moved or cast it is built."""
    if "copy" in kwargs or any(isinstance(a, (bool, Tensor)) for a in args):
        return NotImplemented
    device, dtype, *_ = parse_to(*args, **kwargs)
    there = device is None or torch.empty(0, device=device).device == weight.device
    return weight if there and dtype in (None, weight.dtype) else NotImplemented


@implements(Tensor.register_hook)
def _register_hook(weight: AdaptedWeight, hook: Callable[[Tensor], Any]) -> _Handles:
    """Called with the gradient of each tensor that trains, as the weight itself has none.

    It may look, as torch's own tools do; a gradient that it returns would have to be the weight's.
    """

    def look(grad: Tensor) -> None:
        if hook(grad) is not None:
            raise ComputedWeightError("replacing the gradient in a hook")

    trained = [t for t in weight.parts if t.requires_grad]
    return _Handles([t.register_hook(look) for t in trained])  # type: ignore[no-untyped-call]


class _Handles:
    """What `register_hook` gives, of several tensors."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Take the hook off again."""
        for handle in self.handles:
            handle.remove()


@implements(_getter("grad"))
def _grad(weight: AdaptedWeight, *_: object) -> None:
    """A computed tensor gathers no gradient; W and the factors do."""


def _any_differentiable(values: Any) -> bool:
    """An adapted weight through which gradients or tangents flow is among them."""
    weights = [v for v in tree_leaves(values) if isinstance(v, AdaptedWeight)]
    if torch.is_grad_enabled() and any(w.differentiable for w in weights):
        return True
    return any(_has_tangent(t) for w in weights for t in w.parts)


def _has_tangent(t: Tensor) -> bool:
    if forward_level() < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def _build_all(value: Any, built: list[Tensor] | None = None) -> Any:
    """`value` with every adapted weight in it built, at any depth of tuples, lists and dicts.

    What is built is added to the list `built`.
    """
    if isinstance(value, AdaptedWeight):
        W = value.build()
        if built is not None:
            built.append(W)
        return W
    if isinstance(value, (tuple, list)):
        items = [_build_all(v, built) for v in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    if isinstance(value, dict):
        return {k: _build_all(v, built) for k, v in value.items()}
    return value
