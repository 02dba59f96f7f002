"""Tensors that are computed from others: writing into them would be lost, and is refused.

Two classes are such: `AdaptedWeight`, which is W + ΔW without being built, and `BuiltView`, for
whatever shares memory with a weight that an operation had to build (`.data`, `.detach()`,
`w.view(-1)`, a row). Results that have memory of their own are plain tensors.

What never asks the tensor cannot be refused: a data pointer, DLPack, a tensor made from a storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from lora_param.errors import ComputedWeightError
from lora_param.weight.private import as_plain_tensors, transforms_active

__all__ = ["BuiltView", "Computed", "protect", "refuse_writes", "refuse_writes_below"]

_IN_PLACE = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
_WRITES = {"__setitem__", "__set__", "__delete__", "retain_grad"}
_WRITES |= {f"__i{name}__" for name in _IN_PLACE.split()}


class Computed(Tensor):
    """A tensor whose values are computed from others; the base of both classes."""

    # torch does not ask __torch_function__ about these two.

    def set_(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise ComputedWeightError("set_")

    def _use_count(self) -> NoReturn:  # torch.utils.swap_tensors asks for it, and nobody else
        raise ComputedWeightError("swap_tensors")


class BuiltView(Computed):
    """Memory of a built weight, or a part of it: reads as any tensor, refuses to be written to."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(t is not cls and issubclass(t, Computed) for t in types):
            return NotImplemented  # an adapted weight is built first
        if torch.compiler.is_dynamo_compiling():
            with as_plain_tensors():
                return func(*args, **kwargs)
        if func not in _OF_THE_OBJECT:
            refuse_writes(func, args, kwargs)
        with as_plain_tensors():
            result = func(*args, **kwargs)
            operands = (v for a in (*args, *kwargs.values()) for v in _flat(a))
            return protect(result, (v for v in operands if isinstance(v, cls)))

    def _plain(self) -> Tensor:
        with as_plain_tensors():
            return self.as_subclass(Tensor)

    # A Parameter made of it has the memory for its own, as one made of any tensor's `.data` has.
    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self._plain())


class _ReadOnlyStorage(torch.UntypedStorage):
    """The storage of a built weight, which refuses what would write to it."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ComputedWeightError("writing to the storage")

    __setitem__ = fill_ = copy_ = resize_ = byteswap = _refuse


# What changes the tensor object, and no values: it may start a graph of its own.
_OF_THE_OBJECT = {
    *(Tensor.requires_grad_, Tensor.retain_grad),
    *(cast(Any, getattr(Tensor, name)).__set__ for name in ("requires_grad", "grad")),
    *(cast(Any, getattr(Tensor, name)).__delete__ for name in ("grad",)),
}


def refuse_writes(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse an operation that writes into a computed tensor, alone or in a list.

    Raises:
        ComputedWeightError: it does.
    """
    name = getattr(func, "__name__", "")
    written: list[Any] = []
    in_place = name.endswith("_") and not name.endswith("__")
    if name in _WRITES or in_place or kwargs.get("inplace"):
        written += _flat(args[0] if args else kwargs.get("tensor", kwargs.get("input")))
    if kwargs.get("out") is not None:
        written += _flat(kwargs["out"])
    if any(isinstance(t, Computed) for t in written):
        raise ComputedWeightError("assignment" if name == "__set__" else name)


def refuse_writes_below(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """As `refuse_writes`, of an operation below autograd, whose schema says what it writes to."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = args[i] if i < len(args) else kwargs.get(argument.name)
        if any(isinstance(t, Computed) for t in _flat(written)):
            raise ComputedWeightError(func.overloadpacket.__name__)


def protect(result: Any, computed: Iterable[Tensor]) -> Any:
    """The result of an operation; as a `BuiltView` where it shares memory with a computed tensor.

    Args:
        result: what the operation gave.
        computed: what was built for it, and views of such.
    """
    kind = type(result)
    if kind is Tensor:
        if transforms_active() or not _has_memory(result):
            return result
        memory = result.untyped_storage()._cdata
        for t in computed:
            if _has_memory(t) and t.untyped_storage()._cdata == memory:
                return result.as_subclass(BuiltView)
        return result
    if kind is tuple or kind is list:
        computed = list(computed)
        return kind(protect(item, computed) for item in result)
    if kind is torch.UntypedStorage:
        result.__class__ = _ReadOnlyStorage
    elif kind.__name__ == "ndarray" and not result.flags.owndata:
        result.flags.writeable = False
    return result


def _has_memory(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_meta


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
