"""A packed weight for the laws: int8 with a scale for each row, as quantized tensors are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_param.weight.base import Storage, register_storage

aten = torch.ops.aten
_READ = (F.linear, F.embedding, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__)


class Int8Rows(Tensor):
    """q ∘ scales: q (m, n) int8, scales (m, 1); reads as a float tensor, has no such data."""

    q: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, scales: Tensor) -> Int8Rows:
        return Tensor._make_wrapper_subclass(cls, q.shape, dtype=scales.dtype, device=q.device)

    def __init__(self, q: Tensor, scales: Tensor) -> None:
        self.q, self.scales = q, scales

    @classmethod
    def pack(cls, W: Tensor) -> Int8Rows:
        scales = W.abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
        return cls((W / scales).round().to(torch.int8), scales)

    def dequantize(self) -> Tensor:
        return self.q.to(self.scales.dtype) * self.scales

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Int8Rows{tuple(self.shape)}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = (type(self), (self.q, self.scales))
        return made if not isinstance(self, nn.Parameter) else (_parameter, (*made,))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _READ:
            return func(*(_dense(a) for a in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = args[0]
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            return cls(*(func(t) for t in (first.q, first.scales)))
        if func is aten.copy_.default and isinstance(first, Int8Rows):
            other = args[1] if isinstance(args[1], Int8Rows) else cls.pack(args[1])
            first.q.copy_(other.q)
            first.scales.copy_(other.scales)
            return first
        if func is aten.mul_.Tensor and isinstance(first, Int8Rows):
            first.scales.mul_(args[1])
            return first
        if func is aten.equal.default:
            return torch.equal(_dense(first), _dense(args[1]))
        raise NotImplementedError(f"{func} on a packed weight")


def _parameter(cls: type[Int8Rows], parts: tuple[Tensor, Tensor]) -> nn.Parameter:
    return nn.Parameter(cls(*parts), requires_grad=False)


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Int8Rows) else value


register_storage(Int8Rows, Storage())


class PackedNet(nn.Module):
    """A table, a linear layer and a bare matrix, all packed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)
        self.bare = nn.Parameter(torch.zeros(5, 4))
        for owner, name in ((self.table, "weight"), (self.fc, "weight"), (self, "bare")):
            W = Int8Rows.pack(torch.randn(getattr(owner, name).shape))
            setattr(owner, name, nn.Parameter(W, requires_grad=False))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.tanh(self.table(ids)))) @ self.bare
