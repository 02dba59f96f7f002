"""A tree of dotted names with columns of figures beside it, for terminals and pipes.

Where the terminal is narrow, columns that can be spared go first; the figures of a name that is
still too long stand below it, in their columns. Where no column of figures has room, each figure
stands below its name with its header before it. A name breaks between its segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_param.errors import escaped

__all__ = ["Column", "Facts", "Row", "TreeTable", "printable"]

_GAP = "  "
_LEAST_ROOM = 4
_STYLES = {"disabled": "yellow", "still zero": "yellow", "not finite": "bold red"}
_ASCII = str.maketrans(
    {"×": "x", "├": "|", "│": "|", "└": "`", "─": "-", "‖": "|", "Δ": "d", "–": "-", "·": "-"}
    | {"→": ">", "≤": "<", "∞": "i"}
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of figures, flush right.

    Attributes:
        header: what stands above it.
        optional: it may go where the terminal is too narrow for all.
        left: flush left, for words.
    """

    header: str
    optional: bool = False
    left: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        segments: dotted segments of its name.
        cells: its figures, one for each column.
        repeats: how many weights it stands for.
        words: what is out of the ordinary about it.
    """

    segments: tuple[str, ...]
    cells: tuple[str, ...]
    repeats: int = 1
    words: tuple[str, ...] = ()


@dataclass(slots=True)
class _Node:
    rows: list[Row] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Line:
    """A name in the tree: the guides before it, those before what hangs below it, and its row."""

    guide: str
    below: str
    label: str
    row: Row | None

    @property
    def name(self) -> str:
        row = self.row
        repeats = f" ×{row.repeats}" if row is not None and row.repeats > 1 else ""
        return f"{self.guide}{self.label}{repeats}"


@dataclass(frozen=True)
class TreeTable:
    """Rows under their names' tree. A Rich renderable.

    Attributes:
        columns: what is shown of each row.
        rows: in the order to show them.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = options.overflow == "ignore"  # into a pipe: no name is broken
        for line, below in self._lines(options.max_width):
            for part in [line] if whole else _fold(line, below, options.max_width):
                part.no_wrap = whole
                yield printable(part, options)

    def _lines(self, width: int) -> Iterator[tuple[Text, str]]:
        """Each line, and what stands before the rest of it where it has to be broken."""
        lines = list(_walk(_grow(self.rows), "", top=True))
        widths, room = self._fit(lines, width)
        deepest = max((len(n.below) for n in lines if n.row), default=0)
        if deepest + sum(map(_gapped, widths.values())) > width:
            yield from self._listed(lines, width)
            return
        figures = sum(map(_gapped, widths.values()))

        def is_beside(line: _Line, row: Row) -> bool:
            words = len(_words(row))
            return cell_len(line.name) <= room and not (words and room + figures + words > width)

        beside = {id(line) for line in lines if line.row and is_beside(line, line.row)}
        # no wider than what stands beside the figures, and the guides before figures of their own
        room = max(
            (cell_len(n.name) if id(n) in beside else len(n.below) for n in lines if n.row),
            default=0,
        )
        if any(self.columns[i].header for i in widths):
            yield Text(" " * room).append_text(self._headers(widths)), ""
        for line in lines:
            text = _named(line)
            if line.row is None:
                yield text, line.below
                continue
            words = _words(line.row)
            if id(line) not in beside:
                yield text.append_text(words), line.below
                text, words = Text().append(line.below, "dim"), Text()
            text.append(" " * (room - cell_len(text.plain)))
            yield text.append_text(self._cells(line.row, widths)).append_text(words), line.below

    def _listed(self, lines: Sequence[_Line], width: int) -> Iterator[tuple[Text, str]]:
        """Names with their figures below them, each after its header."""
        for line in lines:
            if line.row is None:
                yield _named(line), line.below
                continue
            yield _named(line).append_text(_words(line.row)), line.below
            cells = zip(self.columns, line.row.cells, strict=True)
            facts = [f"{c.header} {cell}".strip() for c, cell in cells if cell]
            for part in _in_lines(facts, width - len(line.below)) if facts else ():
                yield Text().append(line.below, "dim").append(part), line.below

    def _fit(self, lines: Sequence[_Line], width: int) -> tuple[dict[int, int], int]:
        """Widths of the columns to show, by their index, and the room for names beside them."""
        longest = max((cell_len(line.name) for line in lines if line.row), default=0)
        widths = {
            i: max(cell_len(t) for t in (column.header, *(row.cells[i] for row in self.rows)))
            for i, column in enumerate(self.columns)
            if any(row.cells[i] for row in self.rows)
        }

        def room() -> int:
            return width - sum(map(_gapped, widths.values()))

        for i in [i for i in widths if self.columns[i].optional]:
            if room() < longest:
                del widths[i]
        return widths, min(longest, max(room(), _LEAST_ROOM))

    def _headers(self, widths: dict[int, int]) -> Text:
        text = Text(style="dim")
        for i, width in widths.items():
            text.append(_GAP + _padded(self.columns[i].header, width, self.columns[i].left))
        return text

    def _cells(self, row: Row, widths: dict[int, int]) -> Text:
        text = Text()
        for i, width in widths.items():
            text.append(_GAP + _padded(row.cells[i], width, self.columns[i].left))
        return text


@dataclass(frozen=True)
class Facts:
    """Short facts in a line, ` · ` between them, broken only there. A Rich renderable."""

    facts: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in _in_lines(self.facts, options.max_width):
            yield printable(Text(line), options)


def printable(text: Text, options: ConsoleOptions) -> Text:
    """The text without trailing blanks, and in ASCII where the output takes nothing else.

    What would steer a terminal is written out: names come from files that anyone may have made.
    """
    text = text.copy()
    if not text.plain.isprintable():
        text.plain = escaped(text.plain)
    if options.ascii_only:
        text.plain = text.plain.translate(_ASCII)
    text.rstrip()
    text.overflow = options.overflow or "fold"
    return text


def _fold(text: Text, below: str, width: int) -> Iterator[Text]:
    """A line as lines of at most this width, broken after a dot or a blank of a name or remark."""
    while cell_len(text.plain) > width:
        start = len(text.plain) - len(text.plain.lstrip("│├└─ "))
        fits = set_cell_size(text.plain, width).rstrip("\n")
        ends = fits.rfind(_GAP) + len(_GAP), max(fits.rfind("."), fits.rfind(" ")) + 1
        end = next((end for end in ends if end > start), max(len(fits), 1))
        first, rest = text.divide([end])
        yield first
        indent = below if len(below) * 2 < width else ""
        blanks = len(rest.plain) - len(rest.plain.lstrip())
        text = Text().append(indent, "dim").append_text(rest[blanks:])
    yield text


def _in_lines(facts: Iterable[str], width: int) -> Iterator[str]:
    """Facts with ` · ` between them, broken only there."""
    line = ""
    for fact in facts:
        longer = f"{line} · {fact}" if line else fact
        if line and cell_len(longer) > width:
            yield line
            longer = fact
        line = longer
    yield line


def _gapped(width: int) -> int:
    return len(_GAP) + width


def _padded(text: str, width: int, left: bool) -> str:
    blanks = " " * (width - cell_len(text))
    return text + blanks if left else blanks + text


def _named(line: _Line) -> Text:
    text = Text().append(line.guide, "dim")
    if line.row is None:
        return text.append(line.label, "dim")
    text.append(line.label)
    return text.append(line.name[len(line.guide) + len(line.label) :], "cyan")


def _words(row: Row) -> Text:
    text = Text()
    for i, word in enumerate(row.words):
        text.append(", " if i else _GAP)
        text.append(word, _STYLES.get(word, "yellow"))
    return text


def _grow(rows: Sequence[Row]) -> _Node:
    root = _Node()
    for row in rows:
        node = root
        for segment in row.segments:
            node = node.children.setdefault(escaped(segment), _Node())
        node.rows.append(row)
    return root


def _walk(node: _Node, guide: str, *, top: bool = False) -> Iterator[_Line]:
    """The lines below a node; a chain of names without a fork is one line."""
    last = len(node.children) - 1
    for i, (label, child) in enumerate(node.children.items()):
        while not child.rows and len(child.children) == 1:
            (segment, child), *_ = child.children.items()
            label = f"{label}.{segment}"
        own = guide if top else guide + ("└─ " if i == last else "├─ ")
        deeper = guide if top else guide + ("   " if i == last else "│  ")
        below = f"{deeper}│  " if child.children else f"{deeper}   "
        if not child.rows:
            yield _Line(own, below, label, None)
        for row in child.rows:
            yield _Line(own, below, label, row)
        yield from _walk(child, deeper)
