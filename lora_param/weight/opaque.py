"""An adapted weight for torch's fused kernels of attention and encoders, where nothing trains.

torch leaves these kernels, and with them the zeros that they write where a batch is padded, as soon
as a weight overrides torch's functions. This one does not: kernels are given W + ΔW below autograd,
built when the first one asks. All that Python asks of it is answered by an `AdaptedWeight`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, EagerAdaptedWeight
from lora_param.weight.private import no_torch_function
from lora_param.weight.rules.common import tracing

__all__ = ["opaque"]


class _OpaqueAdaptedWeight(EagerAdaptedWeight):
    """The weight of another object, and that object for all but kernels."""

    @staticmethod
    def __new__(cls, weight: AdaptedWeight) -> _OpaqueAdaptedWeight:
        """A tensor of the weight's shape, dtype and device that has no data."""
        self: _OpaqueAdaptedWeight = Tensor._make_wrapper_subclass(
            cls,
            weight.size(),
            strides=weight.stride(),
            dtype=weight.dtype,
            layout=weight.layout,
            device=weight.device,
        )
        self.__dict__["weight"] = weight
        return self

    def __init__(self, weight: AdaptedWeight) -> None:
        """Everything is done in __new__, which torch's subclass construction requires."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__torch_function__":
            return no_torch_function
        if name == "__torch_dispatch__":  # which older torch asks the object for, while it is made
            return object.__getattribute__(self, name)
        own = object.__getattribute__(self, "__dict__")
        return own if name == "__dict__" else getattr(own["weight"], name)

    # Python asks the type for these.
    def __getitem__(self, index: Any) -> Tensor:
        return cast(Tensor, self.__dict__["weight"][index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.__dict__["weight"][index] = value


def opaque(weight: AdaptedWeight) -> Tensor:
    """The same weight, whose gradients nobody asks for, as torch's fused kernels take it.

    Itself under transforms, which would not see the factors, and in traces, which torch compares
    with and without gradients.
    """
    if torch.compiler.is_compiling():
        return weight.build()
    return weight if tracing() else _OpaqueAdaptedWeight(weight)
