"""Keeping built weights between reads, where no gradient asks for them.

An adapted weight is worth building once when it is read many times unchanged, as in generating
token by token. What is kept belongs to one thread and one `with` block, and is used only while W,
the factors, the scales and the toggles are what they were when it was built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_param.model.lora import LoRA
from lora_param.weight.adapted import AdaptedWeight
from lora_param.weight.base import identity

__all__ = ["keeping", "kept"]

_local = threading.local()

Kept = dict[nn.Module, tuple[tuple[Any, ...], Tensor] | None]


@contextmanager
def keeping(chains: Iterable[nn.Module]) -> Iterator[None]:
    """Keep what `kept` reads of these parametrizations in this thread, within a `with` block."""
    found: Kept = dict.fromkeys(chains)
    blocks: list[Kept] = _local.__dict__.setdefault("blocks", [])
    blocks.append(found)
    try:
        yield
    finally:
        blocks.remove(found)


def kept(chain: nn.Module, read: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `read` gives for a weight's parametrizations, or what was built of it before."""
    blocks: list[Kept] | None = _local.__dict__.get("blocks")
    if not blocks or torch.compiler.is_compiling():
        return read(chain)
    block = next((b for b in reversed(blocks) if chain in b), None)
    state = None if block is None else _state(chain)
    if block is None or state is None:
        return read(chain)
    known = block[chain]
    if known is None or known[0] != state:
        with torch.no_grad():
            value = read(chain)
            built = value.build() if isinstance(value, AdaptedWeight) else value
        known = block[chain] = state, built
    return known[1]


def _state(chain: nn.Module) -> tuple[Any, ...] | None:
    """All that the built weight depends on, or None where it may not be kept.

    Equal states give equal weights. It is asked for at every read: no look-up by name in it.
    """
    W = chain._parameters.get("original")
    if W is None:
        return None
    grad = torch.is_grad_enabled()
    if grad and W.requires_grad:
        return None
    state: list[Any] = [torch.is_inference_mode_enabled(), id(W), *identity(W)]
    for lora in chain._modules.values():
        if not isinstance(lora, LoRA) or (lora.dropout and lora.training):
            return None
        state += (lora.enabled, lora.scale, lora.strength)
        for t in (*lora._parameters.values(), *lora._buffers.values()):
            if t is None or t.dim() == 0:  # the scale as a tensor
                continue
            if grad and t.requires_grad:
                return None
            state += (id(t), *identity(t))
    return tuple(state)
