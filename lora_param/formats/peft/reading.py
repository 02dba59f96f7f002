"""What reading one adapter has at hand, and what it finds on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_param.adapter import Host, Layer
from lora_param.errors import BrokenFileError, MismatchError, UnsettledError, listed, worded
from lora_param.formats.base import LAYOUTS
from lora_param.formats.peft.keys import Keys, LayerKeys
from lora_param.formats.peft.source import Source
from lora_param.targets.lora_config import names_module
from lora_param.targets.regions import WHOLE, Region, Target
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IN_FIRST", "OUT_FIRST", "Placed", "Reading", "by_layout"]

OUT_FIRST, IN_FIRST = LAYOUTS


def by_layout() -> str:
    """The option that says how square weights are stored, for messages."""
    return worded(
        f"layout={OUT_FIRST!r} or {IN_FIRST!r}", f"--layout {OUT_FIRST} or --layout {IN_FIRST}"
    )


@dataclass
class Placed:
    """One target, with what makes its tensors in our layout.

    Attributes:
        name, region: the part of a weight.
        settings: as of any target.
        shape: of the whole weight.
        makers: short name of a tensor → what makes it.
        layer: the kind of layer, to write it again.
        strength: minus one for a negative alpha, zero for none.
        also, apart: tied names, as of `AdapterTarget`.
    """

    name: str
    settings: Settings
    shape: tuple[int, ...]
    makers: dict[str, Callable[[], Tensor]]
    layer: Layer = ""
    region: Region = WHOLE
    strength: float = 1.0
    also: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The target's key."""
        return str(Target(self.name, self.region))


@dataclass
class Reading:
    """One adapter as it is read, with its base where that is at hand.

    Attributes:
        source: the files.
        keys: the tensors' names, sorted.
        layout: how square weights are stored: "out-in" or "in-out", where the caller said so.
        host: the base.
        missing: names that the base lacks.
        shapes: what differs in shape.
        open: names that the base does not settle either.
        notes: what is to be said.
    """

    source: Source
    keys: Keys
    layout: str | None
    host: Host | None
    missing: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def weight(self, name: str) -> Weight | None:
        """The base's weight of this name; a name that it lacks is remembered."""
        found = None if self.host is None else self.host.weights.get(name)
        if found is None and self.host is not None:
            self.missing.append(name)
        return found

    def has(self, name: str) -> bool:
        """The base is at hand and has this weight."""
        return self.host is not None and name in self.host.weights

    def differ(self, name: str, W: Weight, wanted: str) -> None:
        """Remember that the shapes of a base's weight and of the tensors for it do not agree."""
        self.shapes.append(f"{name} is {W.shape}, the adapter's tensors are for {wanted}")

    def stands_for_head(self, W: Weight) -> bool:
        """The base is a file without an output head, for which W stands in when it is loaded."""
        config = {} if self.host is None else self.host.config
        return not W.tied and not W.classes and config.get("tie_word_embeddings") is True

    def check_chosen(self, module: str) -> None:
        """Remember a module that has factors and that the config does not choose."""
        if not names_module(self.source.config.chosen, module):
            self.left_out.append(module)

    def tensor(self, key: str) -> Callable[[], Tensor]:
        """What reads a tensor of the file."""
        return lambda: self.source.tensors[key]

    def settings(
        self, name: str, rank: int, variant: str = "lora", init: str = "kaiming"
    ) -> tuple[Settings, float]:
        """Settings and strength of a module or parameter, by its path.

        Raises:
            BrokenFileError: the config has another rank for it.
        """
        config = self.source.config
        alpha = config.alpha(name, rank)
        scaling = "rslora" if config.use_rslora else "standard"
        strength = float((alpha > 0) - (alpha < 0))
        settings = Settings(
            rank, abs(alpha) or 1.0, scaling, config.lora_dropout, init=init, variant=variant
        )
        return settings, strength

    def factor_shapes(self, layer: LayerKeys) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of a layer.

        Raises:
            BrokenFileError: they are no factors of one rank.
        """
        names = ("embedding_A", "embedding_B") if layer.is_embedding else ("A", "B")
        A, B = (self.source.shapes[layer.parts[n]] for n in names)
        if len(A) < 2 or len(B) != len(A) or 0 in (*A, *B):
            raise BrokenFileError(
                self.source.path, f"the factors of {layer.module} are {A} and {B}, which are none"
            )
        return A, B

    def check(self) -> None:
        """Refuse an adapter that the base does not fit, or leaves open.

        Raises:
            MismatchError: names or shapes differ.
            BrokenFileError: the config leaves modules out that have factors.
            UnsettledError: the layout of a square weight is told by nothing.
        """
        if self.host is None:
            return
        wanted = len(self.keys.layers) + len(self.keys.tokens) + len(self.keys.copies)
        if self.missing or self.shapes:
            lacks = list(dict.fromkeys(self.missing))
            raise MismatchError(
                str(self.source.path),
                self.host.name,
                unexpected=lacks,
                shapes=self.shapes,
                matched=max(wanted - len(lacks) - len(self.shapes), 0),
                wanted=wanted,
            )
        if self.left_out:
            raise BrokenFileError(
                self.source.path,
                f"it has factors of {listed(self.left_out)}, which target_modules of its config "
                f"does not choose: PEFT would leave them out",
            )
        if self.open:
            raise UnsettledError(
                str(self.source.path),
                self.open,
                f"whether square weights of {self.host.name} are stored as (out, in) or (in, out)",
                f"say so with {by_layout()}, or give the live model "
                f"({worded('base=model', 'python:...')}), whose classes tell",
            )
