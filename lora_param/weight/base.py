"""What W is as numbers: the one place that knows how a weight may be stored.

A plain tensor is what it is. A packed one (quantized, scaled) is a tensor of another class, whose
`Storage` says what it stands for: register that for the class, and LoRA works on it. It is never
written to; what replaces it, as in `bake`, is dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Storage", "dense", "gather", "identity", "left_product", "linear", "logical_dim"]
__all__ += ["logical_dtype", "logical_shape", "register_storage", "storage_of", "take"]


class Storage:
    """How a class of packed tensors is read; derive from it, override what differs.

    The base class is for a class of tensors that reads as its logical shape and dtype and has
    `dequantize`.
    """

    def shape(self, W: Tensor) -> tuple[int, ...]:
        """The shape of the numbers."""
        return tuple(W.shape)

    def dtype(self, W: Tensor) -> torch.dtype:
        """The dtype that the numbers are computed in."""
        return W.dtype

    def dense(self, W: Tensor) -> Tensor:
        """The numbers, as a plain tensor of `shape` and `dtype`."""
        return W.dequantize()

    def take(self, W: Tensor, index: Any) -> Tensor:
        """W[index] as a plain tensor: rows of a table, matrices of a stack."""
        return self.dense(W)[index]

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b, for a matrix (m, n). x (*, n) → (*, m)"""
        return F.linear(x, self.dense(W).to(x.dtype), bias)

    def left_product(self, g: Tensor, W: Tensor) -> Tensor:
        """g W, for a matrix (m, n): the gradient of x. g (T, m) → (T, n)"""
        return g @ self.dense(W).to(g.dtype)


_STORAGES: dict[type[Tensor], Storage] = {}


def register_storage(cls: type[Tensor], storage: Storage) -> None:
    """Have weights of this class read by `storage`."""
    _STORAGES[cls] = storage


def storage_of(W: Tensor) -> Storage | None:
    """What reads this tensor, or None where it is plain."""
    return _STORAGES.get(type(W))


def logical_shape(W: Tensor) -> tuple[int, ...]:
    """The shape of the numbers that W stands for."""
    storage = _STORAGES.get(type(W))
    return tuple(W.shape) if storage is None else storage.shape(W)


def logical_dim(W: Tensor) -> int:
    """How many dimensions `logical_shape` has."""
    storage = _STORAGES.get(type(W))
    return W.dim() if storage is None else len(storage.shape(W))


def logical_dtype(W: Tensor) -> torch.dtype:
    """The dtype that W's numbers are computed in."""
    storage = _STORAGES.get(type(W))
    return W.dtype if storage is None else storage.dtype(W)


def dense(W: Tensor) -> Tensor:
    """W as a plain tensor: itself, where it is one."""
    storage = _STORAGES.get(type(W))
    return W if storage is None else storage.dense(W)


def take(W: Tensor, index: Any) -> Tensor:
    """W[index], by its first dimension."""
    storage = _STORAGES.get(type(W))
    return W[index] if storage is None else storage.take(W, index)


def gather(ids: Tensor, W: Tensor, padding_idx: int | None) -> Tensor:
    """Rows of a table, of which that of padding learns nothing. ids (*), W (V, D) → (*, D)"""
    storage = _STORAGES.get(type(W))
    return F.embedding(ids, W, padding_idx) if storage is None else storage.take(W, ids)


def linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. x (*, n), W (m, n) → (*, m)"""
    storage = _STORAGES.get(type(W))
    return F.linear(x, W, bias) if storage is None else storage.linear(x, W, bias)


def left_product(g: Tensor, W: Tensor) -> Tensor:
    """g W. g (T, m), W (m, n) → (T, n)"""
    storage = _STORAGES.get(type(W))
    return g @ W if storage is None else storage.left_product(g, W)


def identity(W: Tensor) -> tuple[int, int]:
    """Where its data are, and how often they were written to, which inference tensors hide."""
    where = W.data_ptr() if type(W) not in _STORAGES else id(W)
    return where, 0 if W.is_inference() else W._version
