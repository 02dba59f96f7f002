"""`Adapter`: the format-neutral record where live models and files meet.

It holds the settings of each target, a mapping of tensors (in memory, or read lazily from a file)
and the fingerprint of the base it was made on. It never computes anything on the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from lora_param.errors import FingerprintError, MismatchError, NonFiniteError, OptionError
from lora_param.fingerprint import BaseWeight
from lora_param.names.table import Names
from lora_param.targets.plan import PlannedTarget
from lora_param.targets.regions import Target
from lora_param.targets.settings import INITIAL, Settings
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Adapter",
    "AdapterTarget",
    "Host",
    "Layer",
    "LazyTensors",
    "check_fit",
    "check_name",
    "is_dead",
]


Layer = Literal["", "linear", "conv1d", "embedding", "conv", "attention", "parameter", "in_first"]
"""The kind of layer that has a weight, "" where it is not known. `conv1d` is transformers' Linear
with W as (in, out); `parameter` is any other (*, out, in), `in_first` any other (*, in, out)."""


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
        layer: what kind of layer has the weight, where a file of another tool tells it.
    """

    target: Target
    settings: Settings
    strength: float = 1.0
    enabled: bool = True
    also: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    layer: Layer = ""

    def __post_init__(self) -> None:
        if self.target.region.picked is not None and self.settings.variant != "copy":
            accepted = "copy, for single rows that are picked"
            raise OptionError(f"variant of {self.target}", self.settings.variant, accepted)

    @property
    def scale(self) -> float:
        """What multiplies B @ A: that of rank, alpha and scaling."""
        return self.settings.scale

    @classmethod
    def from_plan(cls, planned: PlannedTarget) -> AdapterTarget:
        """The record of a target about to be created."""
        return cls(planned.target, planned.settings, also=planned.also, apart=planned.apart)


@dataclass(frozen=True)
class Host:
    """A base that is at hand, live or in a file.

    Attributes:
        name: what to call it in messages.
        weights: its weights by name, with the classes of their modules where they are known.
        value: gives a weight's numbers, dense; for what depends on them.
        model_type: the kind of model, where its config says so.
        names: rules between names, where others than the packaged ones are to be used.
        config: the model's config.json, where there is one.
    """

    name: str
    weights: Mapping[str, Weight]
    value: Callable[[str], Tensor]
    model_type: str | None = None
    names: Names | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors that are made when they are asked for, such as another tool's in our layout.

    >>> LazyTensors({"a": lambda: torch.zeros(2)})["a"].shape
    torch.Size([2])
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


@dataclass
class Adapter:
    """A named set of factors and settings over targets.

    An adapter of another tool may leave open what only its base tells: whether a weight is stored
    as (out, in), what its parameters are called, or which values an update is relative to. Until
    `on` has been given the base, it is what the file says: targets, scales and norms hold, the
    layout of W may not.

    Attributes:
        targets: settings, by target key (the weight's full name with its slice).
        tensors: what each target's variant trains, for LoRA `KEY.lora_A` (rank × in) and
            `KEY.lora_B` (out × rank), and what is kept beside it (`KEY.initial_A`, ...).
        base: fingerprint of each targeted weight, by weight name; of a file of another tool the
            shape at most.
        name: its name on a model.
        source: where it came from, for messages.
        extra: by format, what its file says beside this, for that format to write again.
        format: the name of the format it was read from, or "native".
        notes: what could not be checked, or is left out; one sentence each.
        weights_at_hand: the weights of the base that it is on, where there is one.
        config_at_hand: the config of that base.
        settle: settles for a base what the file leaves open; None where nothing is.
        names: rules between its names and a base's, where others than the packaged ones are given.
    """

    targets: dict[str, AdapterTarget]
    tensors: Mapping[str, Tensor] = field(repr=False)
    base: dict[str, BaseWeight] = field(repr=False, default_factory=dict)
    name: str = "default"
    source: str = "the adapter"
    extra: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)
    format: str = "native"
    notes: tuple[str, ...] = ()
    weights_at_hand: Mapping[str, Weight] = field(repr=False, default_factory=dict)
    config_at_hand: Mapping[str, Any] = field(repr=False, default_factory=dict)
    settle: Callable[[Host], Adapter] | None = field(repr=False, default=None)
    names: Names | None = field(repr=False, default=None)

    def on(self, host: Host) -> Adapter:
        """The adapter for this base, with nothing left open.

        Raises:
            AdapterError: it does not fit, or fits in several ways.
        """
        settled = self if self.settle is None else self.settle(host)
        return replace(
            settled,
            weights_at_hand=host.weights,
            config_at_hand=host.config,
            names=self.names,
        )

    def factors(self, key: str) -> dict[str, Tensor]:
        """The tensors of one target, by their short names."""
        return {n: self.tensors[f"{key}.{n}"] for n in self.tensor_names(key)}

    def check_finite(self) -> None:
        """Refuse tensors that are no numbers.

        Raises:
            NonFiniteError: one holds NaN or infinity.
        """
        for key in self.targets:
            for name, tensor in self.factors(key).items():
                if not tensor.isfinite().all():
                    raise NonFiniteError(f"{name} of {key} in {self.source}")

    def tensor_names(self, key: str) -> list[str]:
        """The short names of one target's tensors."""
        named = self.targets[key].settings.all_axes
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


_FACTORS = ("lora_", "hada_", "lokr_", "oft_", "diff")
"""How the names of tensors begin that make an update zero where they are."""

_ROUNDING = 1e-5  # of ‖W‖: what rounding alone makes of an update that is zero


def is_dead(
    tensors: Mapping[str, Any], update_norm: float | None = None, weight_norm: float | None = None
) -> bool:
    """A target's update is zero because its factors have not been trained.

    A variant multiplies its factors: one that is zero makes the update zero, or leaves what else
    it has (DoRA's magnitude) to the norms.

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
        untrained = not all(bool(t.any()) for n, t in tensors.items() if n.startswith(_FACTORS))
    if not untrained or update_norm is None or weight_norm is None:
        return untrained
    return not update_norm > _ROUNDING * weight_norm  # of NaN nothing is known: untrained
