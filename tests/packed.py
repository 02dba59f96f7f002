"""Packed weights for the laws: int8 with a scale for each row, as quantized tensors are made.

`Int8Rows` reads as the float tensor that it stands for; `Int8Flat` as what it stores, a row of
bytes, so that its shape and dtype are known to its `Storage` alone. What a plain module asks of a
packed weight is answered by unpacking, and noted in `asked`: the library has no need of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_param.weight.base import Storage, register_storage

aten = torch.ops.aten
_READ = {
    F.linear,
    F.embedding,
    F.conv2d,
    F.multi_head_attention_forward,
    torch.bmm,
    torch.lstm_cell,
}
_READ |= {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.__getitem__}
asked: list[str] = []
"""Names of the operations that were answered by unpacking."""


class Int8Rows(Tensor):
    """q ∘ scales: q (m, n) int8, scales (m, 1); reads as a float tensor, has no such data."""

    q: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, scales: Tensor) -> Int8Rows:
        shape, dtype = cls.read_as(q, scales)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=q.device)

    def __init__(self, q: Tensor, scales: Tensor) -> None:
        self.q, self.scales = q, scales

    @staticmethod
    def read_as(q: Tensor, scales: Tensor) -> tuple[torch.Size, torch.dtype]:
        return q.shape, scales.dtype

    @classmethod
    def pack(cls, W: Tensor) -> Int8Rows:
        scales = W.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
        return cls((W / scales).round().to(torch.int8), scales)

    def dequantize(self) -> Tensor:
        return self.q.to(self.scales.dtype) * self.scales

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}{tuple(self.q.shape)}"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Int8Rows:
        return cls(inner["q"], inner["scales"])

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
            asked.append(func.__name__)
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
        if func in (aten.detach.default, aten.clone.default):
            return cls(*(func(t) for t in (first.q, first.scales)))
        if func is aten._to_copy.default:
            to = kwargs or {}
            return cls(func(first.q, **{**to, "dtype": None}), func(first.scales, **to))
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
    if not isinstance(value, Int8Rows):
        return value
    # torch takes other kernels for a weight that trains
    return value.dequantize().requires_grad_(value.requires_grad)


class Int8Flat(Int8Rows):
    """The same, reads as a row of bytes."""

    @staticmethod
    def read_as(q: Tensor, scales: Tensor) -> tuple[torch.Size, torch.dtype]:  # noqa: ARG004
        return torch.Size([q.numel()]), torch.int8


class FlatStorage(Storage):
    def shape(self, W: Tensor) -> tuple[int, ...]:
        assert isinstance(W, Int8Rows)
        return tuple(W.q.shape)

    def dtype(self, W: Tensor) -> torch.dtype:
        assert isinstance(W, Int8Rows)
        return W.scales.dtype


register_storage(Int8Rows, Storage())
register_storage(Int8Flat, FlatStorage())


class PackedNet(nn.Module):
    """A table, layers, and bare matrices, all packed."""

    def __init__(self, kind: type[Int8Rows] = Int8Rows) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)
        self.bare = nn.Parameter(torch.zeros(5, 4))
        pack(self, kind)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.fc(torch.tanh(self.table(ids)))) @ self.bare


class PackedLayers(nn.Module):
    """Attention, a convolution, a stack of experts and a recurrent cell, all packed."""

    def __init__(self, kind: type[Int8Rows] = Int8Rows) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
        self.stack = nn.Parameter(torch.zeros(3, 4, 5))
        self.cell = nn.LSTMCell(5, 4)
        pack(self, kind)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.conv(x)).flatten(2).mT  # (N, T, 4)
        y = self.mha(tokens, tokens, tokens)[0]
        each = torch.bmm(y.flatten(0, 1).expand(3, -1, 4), self.stack)  # (3, N·T, 5)
        one = y.flatten(0, 1) @ self.stack[1]  # (N·T, 5)
        state = y.flatten(0, 1)
        return self.cell(torch.tanh(each.sum(0) + one), (state, state))[0]


def pack(model: nn.Module, kind: type[Int8Rows]) -> None:
    """Put packed weights of random numbers in place of all parameters of two dimensions or more."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.dim() > 1:
                W = kind.pack(torch.randn(p.shape) * 0.5)
                module._parameters[name] = nn.Parameter(W, requires_grad=False)
