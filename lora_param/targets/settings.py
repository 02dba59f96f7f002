"""How a target is adapted: rank, alpha, scaling, dropout, initialisation and variant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from lora_param.errors import OptionError

__all__ = ["FROM_WEIGHT", "INITIAL", "INITS", "SCALINGS", "VARIANTS", "Settings", "parse_init"]
__all__ += ["scale_of"]

INITS = ("kaiming", "he", "normal", "orthogonal", "pissa", "olora")
SCALINGS = ("standard", "rslora", "constant")
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "lora": {"lora_A": "rank in", "lora_B": "out rank"},
    "dora": {"lora_A": "rank in", "lora_B": "out rank", "magnitude": "out"},
    "miss": {"lora_M": "rank out"},
}
"""Variant → the tensors that it trains, each with its axes; a stack has one more in front. What a
variant does with them is in the file of its name under `weight/variants/`."""

FROM_WEIGHT = ("pissa", "olora")
"""Initialisations that start from W's own directions. What they start at is kept as `initial_A` and
`initial_B` and subtracted, so that W stays as it is: ΔW = scale·(B @ A - initial_B @ initial_A)."""

INITIAL = {"initial_A": "lora_A", "initial_B": "lora_B"}
"""The tensors of that pair, and the factor that each is the beginning of."""


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
        if self.init != "kaiming" and "lora_A" not in VARIANTS[self.variant]:
            expected = f"kaiming, the default: {self.variant} has no A to initialise"
            raise OptionError("init", self.init, expected)

    def __repr__(self) -> str:
        """Rank and alpha, and what is not the default."""
        shown = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        told = [f"{n}={v!r}" for n, v, default in shown if v != default or n in ("rank", "alpha")]
        return f"Settings({', '.join(told)})"

    @property
    def scale(self) -> float:
        """What multiplies B @ A."""
        return scale_of(self.alpha, self.rank, self.scaling)

    def capped(self, matrix: tuple[int, ...]) -> Settings:
        """What fits a target of shape (out, in), or (E, out, in): a rank of at most min(out, in).

        More would add parameters and nothing else. The scale stays the one that was asked for; it
        is written down as itself, since alpha/rank of another rank may round to another number.

        >>> Settings(rank=8).capped((2, 16))
        Settings(rank=2, alpha=2.0, scaling='constant')
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
        sizes = {"rank": self.rank, "out": rows, "in": columns}
        return {
            name: (*stack, *(sizes[axis] for axis in axes.split()))
            for name, axes in VARIANTS[self.variant].items()
        }

    def fixed_shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept beside it and never trains: the initial pair, or nothing."""
        shapes = self.shapes(matrix) if self.init in FROM_WEIGHT else {}
        return {name: shapes[factor] for name, factor in INITIAL.items() if factor in shapes}
