"""Which LoRAs stand in `disabled` blocks, and what they are outside of them.

Whether an update acts is one attribute, `LoRA.enabled`, which costs nothing to read. The blocks are
counted beside it, so that they may overlap in any order, in any threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from lora_param.model.lora import LoRA

__all__ = ["enabled_outside", "hold", "switch_lora"]


@dataclass(slots=True)
class _Held:
    """A LoRA within `disabled` blocks: how many, and what it will be when the last one ends."""

    blocks: int
    after: bool


_lock = threading.Lock()
_held: WeakKeyDictionary[LoRA, _Held] = WeakKeyDictionary()


def switch_lora(lora: LoRA, enabled: bool) -> None:
    """Set whether an update acts; while `disabled` blocks hold it, what it will be after them."""
    with _lock:
        if held := _held.get(lora):
            held.after = enabled
        else:
            lora.enabled = enabled


def enabled_outside(lora: LoRA) -> bool:
    """Whether an update acts, or will when the `disabled` blocks over it have ended."""
    with _lock:
        held = _held.get(lora)
        return lora.enabled if held is None else held.after


@contextmanager
def hold(loras: Iterable[LoRA]) -> Iterator[None]:
    """Leave updates out within a `with` block."""
    loras = list(dict.fromkeys(loras))
    with _lock:
        for lora in loras:
            held = _held.setdefault(lora, _Held(0, lora.enabled))
            held.blocks += 1
            lora.enabled = False
    try:
        yield
    finally:
        with _lock:
            for lora in loras:
                held = _held[lora]
                held.blocks -= 1
                if not held.blocks:
                    lora.enabled = held.after
                    del _held[lora]
