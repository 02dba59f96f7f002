"""`Adapter`: the format-neutral record where live models and files meet.

It holds the settings of each target, a mapping of tensors (in memory, or read lazily from a file)
and the fingerprint of the base it was made on. It never computes anything on the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from lora_param.errors import FingerprintError, MismatchError, OptionError
from lora_param.fingerprint import BaseWeight
from lora_param.targets.plan import PlannedTarget
from lora_param.targets.regions import Target
from lora_param.targets.settings import INITIAL, VARIANTS, Settings
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Adapter",
    "AdapterTarget",
    "check_fit",
    "check_name",
    "is_dead",
]


@dataclass(frozen=True)
class AdapterTarget:
    """The settings of one target.

    Attributes:
        target: the weight or the part of it.
        settings: rank, alpha, scaling, dropout, initialisation and variant.
        strength: multiplies the update; what `set_scale` set, 1.0 as trained.
        enabled: the update takes part in the weight.
        also: further names of the same (tied) tensor that share the factors.
        apart: further names of the same tensor that keep the base.
    """

    target: Target
    settings: Settings
    strength: float = 1.0
    enabled: bool = True
    also: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What multiplies B @ A: that of rank, alpha and scaling."""
        return self.settings.scale

    @classmethod
    def from_plan(cls, planned: PlannedTarget) -> AdapterTarget:
        """The record of a target about to be created."""
        return cls(planned.target, planned.settings, also=planned.also, apart=planned.apart)


@dataclass
class Adapter:
    """A named set of factors and settings over targets.

    Attributes:
        targets: settings, by target key (the weight's full name with its slice).
        tensors: what each target's variant trains, for LoRA `KEY.lora_A` (rank × in) and
            `KEY.lora_B` (out × rank), and what is kept beside it (`KEY.initial_A`, ...).
        base: fingerprint of each targeted weight, by weight name.
        name: its name on a model.
        source: where it came from, for messages.
        extra: by format, what its file says beside this, for that format to write again.
    """

    targets: dict[str, AdapterTarget]
    tensors: Mapping[str, Tensor] = field(repr=False)
    base: dict[str, BaseWeight] = field(repr=False, default_factory=dict)
    name: str = "default"
    source: str = "the adapter"
    extra: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)

    def factors(self, key: str) -> dict[str, Tensor]:
        """The tensors of one target, by their short names."""
        return {n: self.tensors[f"{key}.{n}"] for n in self.tensor_names(key)}

    def tensor_names(self, key: str) -> list[str]:
        """The short names of one target's tensors."""
        named = (*VARIANTS[self.targets[key].settings.variant], *INITIAL)
        return [n for n in named if f"{key}.{n}" in self.tensors]

    def weights(self) -> dict[str, Weight]:
        """The weight behind each target key."""
        return {
            key: Weight(t.target.name, b.shape, b.dtype)
            for key, t in self.targets.items()
            for b in [self.base[t.target.name]]
        }

    @property
    def trainable(self) -> int:
        """Number of trainable elements, from the settings and shapes alone."""
        total = 0
        for t in self.targets.values():
            matrix = t.target.region.matrix(self.base[t.target.name].shape)
            total += sum(prod(shape) for shape in t.settings.shapes(matrix).values())
        return total


def check_name(name: object) -> str:
    """The name of an adapter, where it may be one.

    Raises:
        OptionError: it is no text, as a list of patterns is not, or empty, or cannot be printed.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise OptionError("adapter", name, "the name of one adapter, a printable text")
    return name


def check_fit(
    adapter: Adapter,
    base: Mapping[str, BaseWeight],
    base_name: str,
    *,
    check_fingerprint: bool = True,
) -> None:
    """Check that every target of the adapter has its weight in the base.

    Args:
        adapter: what should fit.
        base: the fingerprints of the base's weights, by name.
        base_name: what to call the base in messages.
        check_fingerprint: also compare dtypes and sampled values.

    Raises:
        MismatchError: a name that the base lacks, or a shape that differs.
        FingerprintError: the base holds other values than the one the adapter was made on.
    """
    unexpected, shapes, differing = [], [], []
    for key, t in adapter.targets.items():
        mine = adapter.base[t.target.name]
        names = [n for n in (t.target.name, *t.also) if n in base]
        if not names:
            unexpected.append(key)
            continue
        if t.apart and not any(n in base for n in t.apart):
            shapes.append(f"{key} is adapted apart from {t.apart[0]}, which the base does not hold")
        for name in names:
            theirs = base[name]
            if theirs.shape != mine.shape:
                shapes.append(f"{name} is {theirs.shape}, the adapter was made on {mine.shape}")
            elif difference := mine.differs(theirs):
                differing.append(f"{name} ({difference})")
    if unexpected or shapes:
        wanted = len(adapter.targets)
        raise MismatchError(
            adapter.source,
            base_name,
            unexpected=unexpected,
            shapes=shapes,
            matched=wanted - len(unexpected) - len(shapes),
            wanted=wanted,
        )
    if check_fingerprint and differing:
        raise FingerprintError(adapter.source, base_name, differing)


_ROUNDING = 1e-5  # of ‖W‖: what rounding alone makes of an update that is zero


def is_dead(
    tensors: Mapping[str, Any], update_norm: float | None = None, weight_norm: float | None = None
) -> bool:
    """A target's update is zero because its factors have not been trained.

    A variant multiplies its factors, whose names begin with `lora_`: one that is zero makes the
    update zero, or leaves what else it has (DoRA's magnitude) to the norms.

    Args:
        tensors: the target's tensors or arrays, by their short names.
        update_norm: ‖ΔW‖, where it was measured.
        weight_norm: ‖W‖ of the adapted part, where it was measured.

    >>> is_dead({"lora_A": torch.ones(1, 3), "lora_B": torch.zeros(2, 1)})
    True
    """
    if all(n in tensors for n in INITIAL):  # they start at a difference of equals
        untrained = all(bool((tensors[i] == tensors[f]).all()) for i, f in INITIAL.items())
    else:
        untrained = not all(bool(t.any()) for n, t in tensors.items() if n.startswith("lora_"))
    if not untrained or update_norm is None or weight_norm is None:
        return untrained
    return not update_norm > _ROUNDING * weight_norm  # of NaN nothing is known: untrained
