"""The part of a weight that a target adapts: all of it, rows, columns, or every matrix of a stack.

A weight of any shape is read as a matrix: its first dimension by the product of the others.
Slices are taken on the first two dimensions; a stack (`[*]`) takes each index of the first
dimension as a matrix of its own. Picked rows (`[3,7,9]`) are what a full copy of some rows, as of
trained tokens, replaces: files hold them, patterns do not name them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from lora_param.errors import PatternError, SliceError

__all__ = ["WHOLE", "Region", "SliceText", "Target", "parse_slice", "parse_target", "split_slice"]
__all__ += ["weight_name"]

Range = tuple[int, int]

_PICKED = re.compile(r"(?P<name>.+)\[(?P<rows>\d+(?:,\d+)*)\]", re.DOTALL)
_SLICE = re.compile(
    r"(?P<name>.+)\[(?P<slice>\*|-?\d+\s*/\s*-?\d+|[-\d\s]*:[-\d\s]*(?:,[-\d\s]*:[-\d\s]*)?)\]",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a weight, resolved against its shape.

    Attributes:
        rows: half-open range of the first dimension, or None for all of it.
        columns: half-open range of the second dimension, or None for all of it.
        stacked: each index of the first dimension is a matrix with factors of its own.
        picked: indices of single rows, ascending, or None.
    """

    rows: Range | None = None
    columns: Range | None = None
    stacked: bool = False
    picked: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.stacked:
            return "[*]"
        if self.picked is not None:
            return f"[{','.join(map(str, self.picked))}]"
        if self.rows is None and self.columns is None:
            return ""
        rows = ":" if self.rows is None else f"{self.rows[0]}:{self.rows[1]}"
        if self.columns is None:
            return f"[{rows}]"
        return f"[{rows},{self.columns[0]}:{self.columns[1]}]"

    @property
    def is_whole(self) -> bool:
        """The region is the whole weight, as one matrix."""
        return self == WHOLE

    @property
    def index(self) -> tuple[slice | list[int], ...]:
        """What to index the weight with to get the region."""
        if self.picked is not None:
            return (list(self.picked),)
        parts = [slice(None) if r is None else slice(*r) for r in (self.rows, self.columns)]
        return tuple(parts) if self.columns is not None else (parts[0],)

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the region of a weight of shape `weight`."""
        sizes = list(weight)
        if self.picked is not None:
            sizes[0] = len(self.picked)
        for dim, part in enumerate((self.rows, self.columns)):
            if part is not None:
                sizes[dim] = part[1] - part[0]
        return tuple(sizes)

    def matrix(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The region as a matrix (out, in), or as a stack of matrices (E, out, in).

        >>> Region().matrix((64, 3, 7, 7)), Region(stacked=True).matrix((8, 32, 16))
        ((64, 147), (8, 32, 16))
        """
        shape = self.shape(weight)
        lead = 2 if self.stacked else 1
        return (*shape[:lead], prod(shape[lead:]))

    def flat(self, weight: tuple[int, ...]) -> Range | None:
        """The range of the flattened weight that the region is; None where it is none.

        >>> Region(rows=(1, 3)).flat((4, 5)), Region(columns=(0, 2)).flat((4, 5))
        ((5, 15), None)
        """
        if self.picked is not None or self.columns is not None:
            return None
        start, stop = self.rows or (0, weight[0] if weight else 1)
        width = prod(weight[1:])
        return start * width, stop * width

    def overlaps(self, other: Region) -> bool:
        """Some element belongs to both regions."""

        def meet(a: Range | None, b: Range | None) -> bool:
            return a is None or b is None or (a[0] < b[1] and b[0] < a[1])

        if self.picked is not None:
            return other._has_any(self.picked)
        if other.picked is not None:
            return self._has_any(other.picked)
        return meet(self.rows, other.rows) and meet(self.columns, other.columns)

    def _has_any(self, rows: tuple[int, ...]) -> bool:
        if self.picked is not None:
            return not set(self.picked).isdisjoint(rows)
        return self.rows is None or any(self.rows[0] <= row < self.rows[1] for row in rows)


WHOLE = Region()


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """A weight, or a part of one, by name. `str(target)` is its key in an adapter file."""

    name: str
    region: Region = WHOLE

    def __str__(self) -> str:
        return f"{self.name}{self.region}"


@dataclass(frozen=True, slots=True)
class SliceText:
    """A slice as written, before a shape is known: `[a:b]`, `[:,a:b]`, `[i/n]` or `[*]`."""

    rows: tuple[int | None, int | None] | None = None
    columns: tuple[int | None, int | None] | None = None
    part: tuple[int, int] | None = None
    stacked: bool = False

    def resolve(self, name: str, shape: tuple[int, ...]) -> Region:
        """The region it means for a weight of this shape.

        Raises:
            SliceError: the shape has no such part.
        """
        if self.stacked:
            if len(shape) < 3:
                raise SliceError(f"{name}[*]", shape, "a stack has at least three dimensions")
            return Region(stacked=True)
        if self.part is not None:
            i, n = self.part
            text = f"{name}[{i}/{n}]"
            if n < 1 or not 0 <= i < n:
                raise SliceError(text, shape, f"the block is one of 0 to {max(n, 1) - 1}")
            if shape[0] % n:
                raise SliceError(text, shape, f"{shape[0]} rows do not divide into {n} blocks")
            size = shape[0] // n
            return Region(rows=(i * size, (i + 1) * size) if n > 1 else None)
        return Region(
            rows=_resolve_range(self.rows, name, shape, 0),
            columns=_resolve_range(self.columns, name, shape, 1),
        )


def _resolve_range(
    written: tuple[int | None, int | None] | None, name: str, shape: tuple[int, ...], dim: int
) -> Range | None:
    if written is None or written == (None, None):
        return None
    size = shape[dim]
    start, stop = (0 if written[0] is None else written[0]), written[1]
    stop = size if stop is None else stop
    start, stop = (v + size if v < 0 else v for v in (start, stop))
    if not 0 <= start < stop <= size:
        what = ("rows", "columns")[dim]
        found = ":".join("" if v is None else str(v) for v in written)
        raise SliceError(
            f"{name}[{':,' * dim}{found}]", shape, f"it takes {what} within 0:{size}, at least one"
        )
    return (start, stop) if (start, stop) != (0, size) else None


def split_slice(text: str) -> tuple[str, str | None]:
    """Take the slice, if there is one, off the end of `NAME[slice]`.

    >>> split_slice("attn.in_proj_weight[0/3]"), split_slice("fc1.weight")
    (('attn.in_proj_weight', '0/3'), ('fc1.weight', None))
    """
    match = _SLICE.fullmatch(text)
    return (match["name"], match["slice"]) if match else (text, None)


def parse_slice(text: str, pattern: str) -> SliceText:
    """Read what stands between the brackets.

    Raises:
        PatternError: it is none of `a:b`, `:,a:b`, `i/n`, `*`.
    """
    try:
        if text == "*":
            return SliceText(stacked=True)
        if "/" in text:
            i, n = text.split("/")
            return SliceText(part=(int(i), int(n)))
        ranges = [_parse_range(part) for part in text.split(",")]
    except ValueError as error:
        raise PatternError(pattern, f"[{text}] is not a slice: {error}") from None
    return SliceText(rows=ranges[0], columns=ranges[1] if len(ranges) == 2 else None)


def _parse_range(text: str) -> tuple[int | None, int | None]:
    start, stop = (part.strip() for part in text.split(":"))
    return (int(start) if start else None, int(stop) if stop else None)


def parse_target(key: str, shape: tuple[int, ...]) -> Target:
    """Read a target's key, as an adapter file writes it, for a weight of this shape.

    >>> parse_target("attn.in_proj_weight[0:64]", (192, 64)).region.rows
    (0, 64)
    """
    if picked := _PICKED.fullmatch(key):
        rows = tuple(int(row) for row in picked["rows"].split(","))
        if list(rows) != sorted(set(rows)) or rows[-1] >= shape[0]:
            raise SliceError(key, shape, f"it takes ascending rows within 0:{shape[0]}")
        return Target(picked["name"], Region(picked=rows))
    name, text = split_slice(key)
    return Target(name, parse_slice(text, key).resolve(name, shape) if text else WHOLE)


def weight_name(key: str) -> str:
    """The weight that a target's key is of.

    >>> weight_name("attn.in_proj_weight[0:64]"), weight_name("emb.weight[3,7]")
    ('attn.in_proj_weight', 'emb.weight')
    """
    picked = _PICKED.fullmatch(key)
    return picked["name"] if picked else split_slice(key)[0]
