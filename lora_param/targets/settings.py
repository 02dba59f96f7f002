"""How a target is adapted: rank, alpha, scaling, dropout, initialisation and variant.

A field of `Settings` declares a setting: its name, type, default and accepted values, its help, and
where it may stand. What `apply` and its like take, the command line's options, the settings of
patterns, the fields of the adapter file and the tables of the docs follow from it. Type checkers
read `SettingsOptions` below it, which repeats name and type: they cannot see the one in the other.

It is one file, however long: a setting, what it may be and what follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from lora_param.errors import OptionError
from lora_param.targets.forms import FORMS, Form, parse_form, sizes_of
from lora_param.targets.regions import Region

__all__ = [
    "FROM_WEIGHT",
    "INITIAL",
    "INITS",
    "MADE",
    "READ",
    "SCALINGS",
    "SETTINGS",
    "VARIANTS",
    "Setting",
    "Settings",
    "SettingsOptions",
    "parse_init",
    "scale_of",
]

INITS = ("kaiming", "he", "normal", "orthogonal", "pissa", "olora")
SCALINGS: Mapping[str, tuple[str, Callable[[float, int], float]]] = {
    "standard": ("alpha/rank", lambda alpha, rank: alpha / rank),
    "rslora": ("alpha/√rank", lambda alpha, rank: alpha / math.sqrt(rank)),
    "constant": ("alpha", lambda alpha, _: float(alpha)),
}
"""Scaling → what multiplies B @ A, in words and of alpha and rank."""

VARIANTS: Mapping[str, Mapping[str, str]] = {
    "lora": {"lora_A": "rank in", "lora_B": "out rank"},
    "dora": {"lora_A": "rank in", "lora_B": "out rank", "magnitude": "out"},
    "dora_columns": {"lora_A": "rank in", "lora_B": "out rank", "magnitude": "channels"},
    "miss": {"lora_M": "rank out"},
    "loha": {
        "hada_w1_a": "out rank",
        "hada_w1_b": "rank in",
        "hada_w2_a": "out rank",
        "hada_w2_b": "rank in",
    },
    "lokr": {
        "lokr_w1": "left_out left_in",
        "lokr_w2_a": "right_out rank",
        "lokr_w2_b": "rank right_in",
    },
    "tucker": {
        "lora_down": "rank channels",
        "lora_mid": "rank rank kernel",
        "lora_up": "out rank",
    },
    "oft": {"oft_blocks": "row_blocks rank rank"},
    "boft": {"oft_blocks": "stages row_blocks rank rank"},
    "oft_columns": {"oft_R": "column_blocks pairs"},
    "diff": {"diff": "out in"},
    "copy": {"value": "out in"},
}
"""Variant → the tensors that it trains, each with its axes; a stack has one more in front. What a
variant does with them is in the file of its name under `weight/variants/`, and the forms that it
comes in are in `targets.forms`."""

READ = ("tucker", "oft", "boft", "oft_columns", "diff", "copy")
"""The variants that come in files of other tools alone."""

MADE = tuple(name for name in VARIANTS if name not in READ)
"""The variants that can be asked for."""

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
    if scaling not in SCALINGS:
        raise OptionError("scaling", scaling, ", ".join(SCALINGS))
    return SCALINGS[scaling][1](alpha, rank)


_INITS = [f"{name}:STD" if name == "normal" else name for name in INITS]  # as they are written


def parse_init(init: str) -> tuple[str, float | None]:
    """Name and argument of an initialisation.

    Raises:
        OptionError: there is none of this name, or its argument is wrong.

    >>> parse_init("normal:0.02")
    ('normal', 0.02)
    """
    name, colon, text = init.partition(":")
    accepted = ", ".join(_INITS)
    if name not in INITS or (colon and name != "normal"):
        raise OptionError("init", init, accepted)
    try:
        argument = float(text) if colon else None
    except ValueError:
        raise OptionError("init", init, accepted) from None
    if argument is not None and not (argument > 0 and math.isfinite(argument)):
        raise OptionError("init", init, "normal:STD with a finite STD above 0")
    return name, argument


@dataclass(frozen=True)
class Setting:
    """What is declared of a setting.

    Attributes:
        default: its value where none is given; its type is the setting's.
        help: one sentence or two, for the command line and the docs.
        accepted: what it may be, for errors.
        check: true for a value of its type that it may be; or raises an OptionError that says more.
        flag: a short option on the command line.
        in_pattern: it may be set in a pattern, as in `q_proj:rank=4`.
        in_file: the adapter file keeps it.
        essential: in a file, a value other than the default changes what the adapter means: a
            version that does not know the setting must refuse the file.
    """

    default: int | float | str
    help: str
    accepted: str
    check: Callable[[Any], object]
    flag: str = ""
    in_pattern: bool = True
    in_file: bool = True
    essential: bool = True

    @property
    def kind(self) -> type[int] | type[float] | type[str]:
        """Its type, which also reads it from text."""
        return type(self.default)

    def checked(self, name: str, value: object) -> int | float | str:
        """The value, a whole number as a float where the setting is one.

        Raises:
            OptionError: it is none of the accepted ones.
        """
        if self.kind is float and not isinstance(value, str | bool):
            try:
                value = float(value)  # type: ignore[arg-type]  # NumPy's and torch's numbers too
            except (TypeError, ValueError):
                raise OptionError(name, value, self.accepted) from None
        if isinstance(value, bool) or not isinstance(value, self.kind) or not self.check(value):
            raise OptionError(name, value, self.accepted)
        return value


def _setting(*args: Any, **more: Any) -> Any:
    """A field of `Settings`; takes what `Setting` takes."""
    declared = Setting(*args, **more)
    return field(default=declared.default, metadata={"setting": declared})


def _one_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


@dataclass(frozen=True, slots=True)
class Settings:
    """How one target is adapted; the defaults are the design's.

    Raises:
        OptionError: a value outside what is accepted.
    """

    rank: int = _setting(
        8,
        "Rows of A and columns of B; at most min(out, in).",
        "a whole number of at least 1",
        lambda rank: rank >= 1,
        flag="-r",
    )
    alpha: float = _setting(
        16.0,
        "Strength: multiplies B @ A by alpha/rank. Give it with the rank: 16 at rank 1 is 16-fold.",
        "a finite number above 0",
        lambda alpha: math.isfinite(alpha) and alpha > 0,
    )
    scaling: str = _setting(
        "standard",
        f"Scale: {_one_of(f'{name} ({words})' for name, (words, _) in SCALINGS.items())}.",
        ", ".join(SCALINGS),
        SCALINGS.__contains__,
    )
    dropout: float = _setting(
        0.0,
        "Dropout on the input of A in training.",
        "a number from 0 up to, not including, 1",
        lambda dropout: 0 <= dropout < 1,
        essential=False,
    )
    init: str = _setting(
        "kaiming",
        f"What the factors start as: {_one_of(_INITS)}.",
        ", ".join(_INITS),
        parse_init,
        essential=False,
    )
    variant: str = _setting(
        "lora",
        f"How the factors make the update: {_one_of(MADE)}.",
        ", ".join(MADE),
        VARIANTS.__contains__,
    )
    form: str = _setting(
        "",
        "Of variants that come in several forms: words and sizes joined by +. lokr takes both (its "
        "first matrix of two factors, too), full (its second one whole) and leftAxB (the shape of "
        "the first); loha and lokr take rows or columns (DoRA's lengths).",
        "words and sizes of the variant, joined by +",
        str.isascii,
    )

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            checked = setting.checked(name, value)
            if checked is not value:
                object.__setattr__(self, name, checked)
        if parse_form(self.variant, self.form) is None:
            known = ", ".join(FORMS.get(self.variant, ())) or "none"
            raise OptionError("form", self.form, f"of {self.variant}: {known}, joined by +")
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

    def on_part(self, region: Region, weight: tuple[int, ...]) -> Settings:
        """What fits a part of a weight of this shape, where a fresh adapter is made for it.

        The rank is `capped`, and LoKr's first matrix is over the inputs of a convolution alone,
        without its kernel, as other tools have it. A stack has no kernel.

        >>> Settings(rank=2, variant="lokr").on_part(Region(), (8, 6, 3, 3)).form
        'left2x2'
        """
        matrix = region.matrix(weight)
        fitting = self.capped(matrix)
        kernel = 1 if region.stacked else math.prod(weight[2:])
        if self.variant != "lokr" or kernel == 1 or "left" in self.parsed_form.sizes:
            return fitting
        sizes = sizes_of(Form(), 1, matrix[-2], matrix[-1] // kernel)
        assert sizes is not None
        left = f"left{sizes['left_out']}x{sizes['left_in']}"
        return replace(fitting, form=f"{self.form}+{left}" if self.form else left)

    @property
    def parsed_form(self) -> Form:
        """The form, read."""
        form = parse_form(self.variant, self.form)
        assert form is not None
        return form

    @property
    def axes(self) -> dict[str, str]:
        """The tensors that train, each with its axes.

        >>> Settings(variant="lokr", form="full").axes
        {'lokr_w1': 'left_out left_in', 'lokr_w2': 'right_out right_in'}
        """
        plain = VARIANTS[self.variant]
        return self.parsed_form.tensors(self.variant, plain) if self.form else dict(plain)

    @property
    def all_axes(self) -> dict[str, str]:
        """The same, and the initial pair that may be kept beside them.

        >>> Settings().all_axes["initial_B"]
        'out rank'
        """
        trained = self.axes
        return trained | {i: trained[f] for i, f in INITIAL.items() if f in trained}

    def capped(self, matrix: tuple[int, ...]) -> Settings:
        """What fits a target of shape (out, in), or (E, out, in): a rank of at most min(out, in).

        More would add parameters and nothing else. The scale stays the one that was asked for.

        >>> Settings(rank=8).capped((2, 16))
        Settings(rank=2, alpha=4.0)
        """
        limit = min(matrix[-2:])
        if self.rank <= limit:
            return self
        return self.at(limit, self.scale)

    def at(self, rank: int, scale: float) -> Settings:
        """The same with another rank and scale, written as alpha/rank where that does not round.

        >>> Settings().at(4, 0.5)
        Settings(rank=4, alpha=2.0)
        """
        alpha = scale * rank
        if alpha / rank == scale:
            return replace(self, rank=rank, alpha=alpha, scaling="standard")
        return replace(self, rank=rank, alpha=scale, scaling="constant")

    def shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of what trains on a target of shape (out, in), or (E, out, in) for a stack.

        >>> Settings(rank=2, variant="dora").shapes((4, 6))
        {'lora_A': (2, 6), 'lora_B': (4, 2), 'magnitude': (4,)}

        Raises:
            OptionError: its form's sizes do not divide the target's.
        """
        *stack, rows, columns = matrix
        sizes = sizes_of(self.parsed_form, self.rank, rows, columns)
        if sizes is None:
            raise OptionError(
                "form", self.form, f"sizes that divide a matrix of {rows} × {columns}"
            )
        return {
            name: (*stack, *(sizes[axis] for axis in axes.split()))
            for name, axes in self.axes.items()
        }

    def fixed_shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept beside it and never trains: the initial pair, or nothing."""
        return self.initial_shapes(matrix) if self.init in FROM_WEIGHT else {}

    def initial_shapes(self, matrix: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the initial pair of a variant that may have one."""
        shapes = self.shapes(matrix)
        return {name: shapes[factor] for name, factor in INITIAL.items() if factor in shapes}


SETTINGS: Mapping[str, Setting] = {f.name: f.metadata["setting"] for f in fields(Settings)}
"""Every setting, by its name."""


class SettingsOptions(TypedDict, total=False):
    """The settings as keywords, for type checkers: `**options: Unpack[SettingsOptions]`."""

    rank: int
    alpha: float
    scaling: str
    dropout: float
    init: str
    variant: str
    form: str
