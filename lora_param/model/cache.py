"""Keeping built weights between reads, where no gradient asks for them: `cached`.

An adapted weight is worth building once when it is read many times unchanged, as in generating
token by token. What is kept belongs to one thread and one `with` block, and is used only while W,
the factors, the scales and the toggles are what they were when it was built.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_param.weight.adapted import AdaptedWeight

__all__ = ["cached", "kept"]

_local = threading.local()

Kept = dict[nn.Module, tuple[tuple[Any, ...], Tensor] | None]


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Keep each adapted weight that is read without gradients, within a `with` block.

    Reads that need gradients are as they are outside. A weight is built again when W, a factor, a
    scale or a toggle has changed (writes through `.data` go unseen, as everywhere in torch), when
    another thread reads it, and within `torch.inference_mode` apart from outside of it.

    Memory: a full-size copy of each adapted weight that is read, until the block ends.

    Example:
        >>> import lora_param as lp
        >>> model = lp.apply(nn.Linear(8, 8), ["weight"], rank=2)
        >>> with torch.no_grad(), cached(model):
        ...     for _ in range(3):
        ...         y = model(torch.ones(1, 8))  # W + ΔW is built once
    """
    found: Kept = {
        chain: None
        for module in model.modules()
        for chain in (module._modules.get("parametrizations") or nn.ModuleDict()).children()
    }
    blocks: list[Kept] = _local.__dict__.setdefault("blocks", [])
    blocks.append(found)
    try:
        yield
    finally:
        blocks.remove(found)


def kept(chain: nn.Module, value: Tensor) -> Tensor:
    """The built weight in place of `value`, if one may be kept here; else `value`."""
    blocks: list[Kept] | None = _local.__dict__.get("blocks")
    if not blocks or not isinstance(value, AdaptedWeight) or torch.compiler.is_compiling():
        return value
    if torch.is_grad_enabled() and value.differentiable:
        return value
    block = next((b for b in reversed(blocks) if chain in b), None)
    if block is None or any(u.dropout for u in value.updates):
        return value
    state = _state(value)
    known = block[chain]
    if known is None or known[0] != state:
        with torch.no_grad():
            known = block[chain] = state, value.build()
    return known[1]


def _state(value: AdaptedWeight) -> tuple[Any, ...]:
    """All that the built weight depends on. Equal states give equal weights."""
    tensors = [value.base]
    for u in value.updates:
        tensors += (u.A, u.B)
    written = [cast(Any, 0 if t.is_inference() else t._version) for t in tensors]
    where = [t.data_ptr() for t in tensors]
    updates = [(u.scale, u.region) for u in value.updates]
    return (torch.is_inference_mode_enabled(), *written, *where, *updates)
