"""How a target is adapted: rank, alpha, scaling, dropout, initialisation and variant."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_param.errors import OptionError

__all__ = ["INITS", "SCALINGS", "VARIANTS", "Settings", "parse_init", "scale_of"]

INITS = ("kaiming", "he", "normal", "orthogonal", "pissa", "olora")
SCALINGS = ("standard", "rslora", "constant")
VARIANTS = ("lora", "dora")


def scale_of(alpha: float, rank: int, scaling: str) -> float:
    """What multiplies B @ A.

    `standard` is alpha/rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685, §4.1), `rslora` is
    alpha/√rank (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732, eq. 4), `constant` is alpha.

    >>> scale_of(16, 4, "standard"), scale_of(16, 4, "rslora"), scale_of(16, 4, "constant")
    (4.0, 8.0, 16.0)
    """
    if scaling == "standard":
        return alpha / rank
    if scaling == "rslora":
        return alpha / math.sqrt(rank)
    if scaling == "constant":
        return float(alpha)
    raise OptionError("scaling", scaling, ", ".join(SCALINGS))


def parse_init(init: str) -> tuple[str, float | None]:
    """Name and argument of an initialisation.

    Raises:
        OptionError: there is none of this name, or its argument is wrong.

    >>> parse_init("normal:0.02")
    ('normal', 0.02)
    """
    name, colon, text = init.partition(":")
    accepted = ", ".join(f"{n}:STD" if n == "normal" else n for n in INITS)
    if name not in INITS or (colon and name != "normal"):
        raise OptionError("init", init, accepted)
    try:
        argument = float(text) if colon else None
    except ValueError:
        raise OptionError("init", init, accepted) from None
    if argument is not None and not (argument > 0 and math.isfinite(argument)):
        raise OptionError("init", init, "normal:STD with a finite STD above 0")
    return name, argument


@dataclass(frozen=True, slots=True)
class Settings:
    """How one target is adapted; the defaults are the design's.

    Raises:
        OptionError: a value outside what is accepted.
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: str = "standard"
    dropout: float = 0.0
    init: str = "kaiming"
    variant: str = "lora"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise OptionError("rank", self.rank, "a whole number of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise OptionError("alpha", self.alpha, "a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise OptionError("dropout", self.dropout, "a number from 0 up to, not including, 1")
        scale_of(self.alpha, self.rank, self.scaling)
        parse_init(self.init)
        if self.variant not in VARIANTS:
            raise OptionError("variant", self.variant, ", ".join(VARIANTS))

    @property
    def scale(self) -> float:
        """What multiplies B @ A."""
        return scale_of(self.alpha, self.rank, self.scaling)

    def capped(self, matrix: tuple[int, ...]) -> Settings:
        """What fits a target of shape (out, in), or (E, out, in): a rank of at most min(out, in).

        More would add parameters and nothing else. The scale stays the one that was asked for; it
        is written down as itself, since alpha/rank of another rank may round to another number.

        >>> Settings(rank=8).capped((2, 16))
        Settings(rank=2, alpha=2.0, scaling='constant', dropout=0.0, init='kaiming', variant='lora')
        """
        limit = min(matrix[-2:])
        if self.rank <= limit:
            return self
        return replace(self, rank=limit, alpha=self.scale, scaling="constant")

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of what trains on a target of shape (out, in), or (E, out, in) for a stack.

        >>> Settings(rank=2, variant="dora").shapes((4, 6))
        {'lora_A': (2, 6), 'lora_B': (4, 2), 'magnitude': (4,)}
        """
        *stack, rows, columns = matrix
        shapes = {"lora_A": (*stack, self.rank, columns), "lora_B": (*stack, rows, self.rank)}
        return shapes | ({"magnitude": (*stack, rows)} if self.variant == "dora" else {})
