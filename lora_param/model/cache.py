"""Keeping built weights between reads, where no gradient asks for them.

An adapted weight is worth building once when it is read many times unchanged, as in generating
token by token. What is kept belongs to one thread and one `with` block, and is used only while W,
the factors, the scales and the toggles are what they were when it was built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_param.model.lora import LoRA
from lora_param.weight.adapted import AdaptedWeight
from lora_param.weight.base import identity
from lora_param.weight.private import transforms_active

__all__ = ["keeping", "kept", "kept_once"]

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


def kept_once(
    chain: nn.Module, read: Callable[[nn.Module], Tensor], store: dict[Any, Any]
) -> Tensor:
    """The weight as a plain tensor, gradients included, computed once for each gradient mode.

    What `torch.nn.utils.parametrize.cached` promises, whose own `store` it is: the graph of the
    weight is shared by all that read it. It is computed again when what it depends on has changed.
    With dropout, which acts on an input, it stays an adapted weight, the same for all.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return read(chain)
    state = torch.is_grad_enabled(), _state(chain, trained=True)
    known = store.get(chain)
    if known is None or known[0] != state:
        value = read(chain)
        whole = isinstance(value, AdaptedWeight) and not any(u.dropout for u in value.updates)
        built = cast(AdaptedWeight, value).build() if whole else value
        known = store[chain] = state, built
    return cast(Tensor, known[1])


def _state(chain: nn.Module, *, trained: bool = False) -> tuple[Any, ...] | None:
    """All that the built weight depends on, or None where it may not be kept.

    Equal states give equal weights. It is asked for at every read: no look-up by name in it.
    Unless it may be `trained`, it is not kept where gradients or dropout ask for the factors.
    """
    W = chain._parameters.get("original")
    if W is None:
        return None
    grad = torch.is_grad_enabled() and not trained
    if grad and W.requires_grad:
        return None
    state: list[Any] = [torch.is_inference_mode_enabled(), id(W), *identity(W)]
    for lora in chain._modules.values():
        if not isinstance(lora, LoRA):
            return None
        drops = bool(lora.dropout) and lora.training
        if drops and not trained:
            return None
        state += (lora.enabled, lora.scale, lora.strength, drops)
        for t in (*lora._parameters.values(), *lora._buffers.values()):
            if t is None or t.dim() == 0:  # the scale as a tensor
                continue
            if grad and t.requires_grad:
                return None
            state += (id(t), *identity(t))
    return tuple(state)
