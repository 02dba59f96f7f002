"""An adapter while it is written down for a base of another layout: what `relayout` adds to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.errors import LayoutError
from lora_param.fingerprint import BaseWeight
from lora_param.targets.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STACK", "Makers", "Parts", "Rewritten", "reader", "share_A"]

Makers = dict[str, Callable[[], "Tensor"]]
Parts = dict[tuple[int, int | None], str]  # (which part of the whole, which expert) → target key
STACK = Region(stacked=True)


@dataclass
class Rewritten:
    """An adapter while it is written down for another base.

    Attributes:
        source: the adapter as it was.
        shapes: the base's weights.
        targets: the targets in the base, by key.
        tensors: what makes each of their tensors.
        base: what is known of the weights that they are on.
    """

    source: Adapter
    shapes: Mapping[str, BaseWeight]
    targets: dict[str, AdapterTarget] = field(default_factory=dict)
    tensors: Makers = field(default_factory=dict)
    base: dict[str, BaseWeight] = field(default_factory=dict)

    def add(self, target: AdapterTarget, tensors: Makers) -> None:
        """Put a target into the base, with what makes its tensors.

        Raises:
            LayoutError: another one stands there.
        """
        key, name = str(target.target), target.target.name
        if key in self.targets:
            raise self.refuse(key, "two of its targets stand there")
        self.targets[key] = target
        self.tensors.update({f"{key}.{n}": make for n, make in tensors.items()})
        if name not in self.base:
            self.base[name] = replace(self.shapes[name], hash=None)

    def refuse(self, key: str, why: str) -> LayoutError:
        """The error for a target that has no form in the base."""
        return LayoutError(self.source.source, key, why)


def reader(adapter: Adapter, key: str, name: str) -> Callable[[], Tensor]:
    """Reads a tensor of a target as it is."""
    return lambda: adapter.tensors[f"{key}.{name}"]


def share_A(adapter: Adapter, keys: list[str]) -> bool:
    """All parts are LoRA of one and the same A: they were split from one matrix."""
    if any(adapter.targets[k].settings.variant != "lora" for k in keys):
        return False
    first, *rest = (adapter.tensors[f"{k}.lora_A"] for k in keys)
    return all(t.shape == first.shape and bool((t == first).all()) for t in rest)
