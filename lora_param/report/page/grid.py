"""Targets, or weights, laid out as layer × projection, whatever the model calls them.

A name is split where its first index is: `encoder.layer.3.attention.self.query.weight` is row
`encoder.layer.*.attention.self.query.weight`, column 3. Indices that follow one another are one
column (`blocks.3.2.conv` is in column 3.2); an index further on stays in the row, so that each
expert has a row of its own. A name without an index stands in a column without a number. A row's
name is a pattern of the target language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lora_param.report.collapse import is_index

__all__ = ["Grid", "Place", "in_reading_order", "lay_out", "place"]

_LONGEST = 34  # characters of a label
Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """Where a target stands.

    Attributes:
        row: its name with `*` for the index.
        column: the index; empty where the name has none.
    """

    row: str
    column: tuple[int, ...]


@dataclass(frozen=True)
class Grid(Generic[Item]):
    """Items, such as the targets of one adapter, by row and column.

    Attributes:
        rows: names with `*` for the index, in order of appearance.
        labels: what tells the rows apart, one for each.
        columns: indices in order, a name without one last.
        cells: row and column number → the item there.
        axis: what the indices count, such as `encoder.layer`; empty where that differs.
    """

    rows: tuple[str, ...]
    labels: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...]
    cells: dict[tuple[int, int], Item]
    axis: str

    @property
    def headings(self) -> tuple[str, ...]:
        """The columns as text."""
        return tuple(".".join(map(str, column)) or "–" for column in self.columns)


def place(name: str) -> Place:
    """Where a target of this name stands.

    >>> place("h.3.attn.q.weight[0:64]"), place("head.weight").column
    (Place(row='h.*.attn.q.weight[0:64]', column=(3,)), ())
    """
    segments = name.split(".")
    first = next((i for i, s in enumerate(segments) if is_index(s)), len(segments))
    last = first
    while last < len(segments) and is_index(segments[last]):
        last += 1
    column = tuple(int(s) for s in segments[first:last])
    return Place(".".join([*segments[:first], *("*" for _ in column), *segments[last:]]), column)


def lay_out(items: Sequence[Item], name: Callable[[Item], str]) -> Grid[Item]:
    """Items as a grid; their names differ."""
    places = [place(name(item)) for item in items]
    rows = tuple(dict.fromkeys(p.row for p in places))
    columns = sorted({p.column for p in places}, key=lambda c: (not c, c))
    row_number = {row: i for i, row in enumerate(rows)}
    column_number = {column: i for i, column in enumerate(columns)}
    axes = {p.row.partition("*")[0].rstrip(".") for p in places if p.column}
    return Grid(
        rows,
        _labels(rows),
        tuple(columns),
        {
            (row_number[p.row], column_number[p.column]): item
            for p, item in zip(places, items, strict=True)
        },
        _printable(axes.pop()) if len(axes) == 1 else "",
    )


def in_reading_order(
    items: Sequence[Item], name: Callable[[Item], str], group: Callable[[Item], str] = lambda _: ""
) -> list[Item]:
    """Group by group and layer by layer: files have layer 10 before layer 2.

    Args:
        items: to be put in order.
        name: of an item.
        group: what it belongs to, such as an adapter.
    """
    first: dict[tuple[str, str], int] = {}
    keys = []
    for position, item in enumerate(items):
        found = place(name(item))
        lead = first.setdefault((group(item), found.row.partition("*")[0]), position)
        keys.append((lead, found.column, position))
    return [items[position] for *_, position in sorted(keys)]


def _labels(rows: Sequence[str]) -> tuple[str, ...]:
    """The rows without what they all begin and end with."""
    segments = [row.split(".") for row in rows]
    if len(rows) == 1:
        lead = max(len(segments[0]) - 3, 0)
        tail = int(segments[0][-1] == "weight" and bool(set(segments[0][lead:-1]) - {"*"}))
    else:
        lead = _shared(segments)
        tail = _shared([s[lead:][::-1] for s in segments])
    kept = [s[lead : len(s) - tail] or s for s in segments]
    return tuple(_short(".".join(s for s in part if s != "*") or part[-1]) for part in kept)


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many items all lists begin with, one of each always left over; 0 of no lists."""
    number = 0
    while lists and all(len(items) > number + 1 for items in lists):
        if len({items[number] for items in lists}) > 1:
            break
        number += 1
    return number


def _short(label: str) -> str:
    label = _printable(label)
    if len(label) <= _LONGEST:
        return label
    end = _LONGEST * 2 // 3
    return f"{label[: _LONGEST - end - 1]}…{label[-end:]}"


def _printable(text: str) -> str:
    """A name in a file may hold what no drawing can."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
