"""The rules of `rules.txt`, read and indexed; a user's own file adds to them.

It is one file: what a line may say, and what is looked up in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from os import PathLike
from pathlib import Path

from lora_param.errors import NameRuleError

__all__ = ["Names", "Part", "PathRule", "Rule", "default_names", "names_of", "parse_names"]
__all__ += ["read_names"]

_STEM, _EXPERT = "*", "#"
_TOOLS = ("torchtune", "llama.cpp")


@dataclass(frozen=True, slots=True)
class Part:
    """One name of a rule.

    Attributes:
        text: as written, e.g. `*.experts.#.w1.weight`.
        equal: it has as many rows as the part before it.
    """

    text: str
    equal: bool = False

    @property
    def of_experts(self) -> bool:
        """It names one tensor for each expert."""
        return _EXPERT in self.text.split(".")

    def match(self, name: str) -> tuple[str, int | None] | None:
        """What `*` and `#` stand for in a name that it describes, else None.

        >>> Part("*.experts.#.w1.weight").match("layers.0.experts.3.w1.weight")
        ('layers.0', 3)
        """
        found = _expression(self.text).fullmatch(name)
        if found is None:
            return None
        expert = found["expert"] if self.of_experts else None
        return found["stem"] or "", None if expert is None else int(expert)

    def name(self, stem: str, expert: int | None = None) -> str:
        """The name for what `*` and `#` stand for."""
        text = self.text.replace(_EXPERT, str(expert)) if self.of_experts else self.text
        return text.replace(_STEM, stem) if stem else text.removeprefix(f"{_STEM}.")


@cache
def _expression(text: str) -> re.Pattern[str]:
    first, *rest = text.split(".")
    segments = [r"(?P<expert>\d+)" if s == _EXPERT else re.escape(s) for s in rest]
    assert first == _STEM
    return re.compile(rf"(?:(?P<stem>.+)\.)?{re.escape('.').join(segments)}")


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor here is several there.

    Attributes:
        whole: the one.
        parts: the several; one alone is another name.
        interleaved: their rows take turns.
        transposed: the stack holds (in, out), where its parts are (out, in).
        only: the config's model_type that it is for, or "".
        text: as written, for messages.
    """

    whole: Part
    parts: tuple[Part, ...]
    interleaved: bool = False
    transposed: bool = False
    only: str = ""
    text: str = ""

    @property
    def of_experts(self) -> bool:
        """The whole is a stack, the parts are matrices."""
        return self.parts[0].of_experts

    @property
    def is_renaming(self) -> bool:
        """Both sides are the same tensor."""
        return len(self.parts) == 1 and not self.of_experts


@dataclass(frozen=True, slots=True)
class PathRule:
    """Segments that mean the same as others, wherever they stand in a name.

    Attributes:
        other: how another tool writes them, e.g. `resblocks.#.attn`; `#` is any number.
        own: how they are written here, e.g. `encoder.layers.#.self_attn`.
    """

    other: str
    own: str

    def applied(self, name: str) -> str:
        """The name with its own segments.

        >>> PathRule("resblocks.#.attn", "layers.#.self_attn").applied("a.resblocks.3.attn.weight")
        'a.layers.3.self_attn.weight'
        """
        return _rewritten(name, self.other, self.own)

    def undone(self, name: str) -> str:
        """The name as the other tool writes it."""
        return _rewritten(name, self.own, self.other)


def _rewritten(name: str, old: str, new: str) -> str:
    if f".{old.partition('.#')[0]}." not in f".{name}.":  # nearly always: a search is dearer
        return name
    return _segments(old).sub(lambda m: _filled(new, m.groups()), name, count=1)


def _filled(text: str, numbers: Iterable[str]) -> str:
    for number in numbers:
        text = text.replace(_EXPERT, number, 1)
    return text


@cache
def _segments(text: str) -> re.Pattern[str]:
    parts = [r"(\d+)" if s == _EXPERT else re.escape(s) for s in text.split(".")]
    return re.compile(rf"(?<![^.]){re.escape('.').join(parts)}(?![^.])")


@dataclass(frozen=True)
class Names:
    """All rules.

    Attributes:
        prefixes: leading segments without a meaning of their own.
        rules: in the order in which they are tried.
        paths: segments that other tools write otherwise, in the order in which they are applied.
        parts: leading segments that a model has within a pipeline of several, and not on its own.
    """

    prefixes: frozenset[str]
    rules: tuple[Rule, ...]
    paths: tuple[PathRule, ...] = ()
    parts: frozenset[str] = frozenset()
    _known: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def canonical(self, name: str) -> str:
        """A name without leading segments that tools add or leave out, in segments of our own.

        >>> default_names().canonical("base_model.model.model.layers.0.mlp.gate.weight")
        'layers.0.mlp.gate.weight'
        """
        name = self._bare(name)
        if self._first.isdisjoint(name.split(".")):  # as in nearly every name
            return name
        for rule in self.paths:
            name = rule.applied(name)
        return name

    def aliases(self, name: str) -> list[str]:
        """Every way to write a name in other tools' segments, its canonical form first.

        >>> default_names().aliases("up_blocks.0.resnets.1.conv1")[-1]
        'output_blocks.1.0.in_layers.2'
        """
        found = {self.canonical(name): None}
        for rule in reversed(self.paths):
            found |= dict.fromkeys([rule.undone(n) for n in found])
        return list(found)

    @cached_property
    def _first(self) -> frozenset[str]:
        """Segments with which what another tool writes begins."""
        return frozenset(rule.other.partition(".")[0] for rule in self.paths)

    def _bare(self, name: str) -> str:
        segments = name.split(".")
        start = 0
        while start < len(segments) - 1 and segments[start] in self.prefixes:
            start += 1
        return ".".join(segments[start:])

    def index(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Canonical name → the names that have it."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.canonical(name), []).append(name)
        return found

    def joined(self, other: Names) -> Names:
        """These rules after those of `other`, which are tried first."""
        prefixes = self.prefixes | other.prefixes
        paths, parts = other.paths + self.paths, other.parts | self.parts
        return Names(prefixes, other.rules + self.rules, paths, parts)


def parse_names(text: str, source: str) -> Names:
    """Read rules, see `rules.txt`.

    Raises:
        NameRuleError: a line that is no rule; it is shown with its number.

    >>> parse_names("*.qk.weight = *.q.weight | *.k.weight", "an example").rules[0].parts[1].text
    '*.k.weight'
    """
    heads: dict[str, set[str]] = {"prefix": set(), "part": set()}
    rules: list[Rule] = []
    paths: list[PathRule] = []
    for number, line in enumerate(text.splitlines(), 1):
        written = "" if line.lstrip().startswith("#") else line.partition(" #")[0].strip()
        if not written:
            continue
        kind, *rest = written.split()
        if kind in heads and len(rest) == 1:
            heads[kind].add(rest[0])
            continue
        try:
            if written.startswith("path "):
                paths.append(_parse_path(written))
            else:
                rules.append(_parse_rule(written))
        except ValueError as error:
            raise NameRuleError(source, number, line, str(error)) from None
    prefixes, models = (frozenset(heads[kind]) for kind in ("prefix", "part"))
    return Names(prefixes, tuple(rules), tuple(paths), models)


def _parse_path(text: str) -> PathRule:
    sides = [side.strip() for side in text.removeprefix("path ").split("=")]
    if len(sides) != 2 or not all(sides):
        raise ValueError("it is not 'path OTHER = OWN'")
    for side in sides:
        segments = side.split(".")
        if not all(segments) or any(c.isspace() for c in side) or _STEM in segments:
            raise ValueError(f"{side!r} is no row of segments")
    if len({side.split(".").count(_EXPERT) for side in sides}) != 1:
        raise ValueError("both sides have as many '#'")
    return PathRule(*sides)


def _parse_rule(text: str) -> Rule:
    body, _, flags = text.partition(";")
    left, equals, right = body.partition("=")
    if not equals:
        raise ValueError("it has no '='")
    tokens = re.split(r"([|~])", right)
    parts = [Part(tokens[0].strip())]
    parts += [
        Part(name.strip(), sign == "~")
        for sign, name in zip(tokens[1::2], tokens[2::2], strict=True)
    ]
    whole = Part(left.strip())
    for part in (whole, *parts):
        segments = part.text.split(".")
        if segments[0] != _STEM or segments.count(_STEM) != 1 or segments.count(_EXPERT) > 1:
            raise ValueError(f"{part.text!r} is not '*.' and a name with at most one '#'")
        if not all(segments) or any(c.isspace() for c in part.text) or len(segments) < 2:
            raise ValueError(f"{part.text!r} is no name")
    if len({p.of_experts for p in parts}) != 1 or whole.of_experts:
        raise ValueError("'#' stands in all parts or in none, and never in the whole")
    words = flags.split()
    only = ""
    if "only" in words:
        at = words.index("only")
        if at + 1 == len(words):
            raise ValueError("'only' is followed by a model_type")
        only = words[at + 1]
        del words[at : at + 2]
    known = ("interleaved", "transposed")
    if unknown := [w for w in words if w not in known]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}, only TYPE")
    interleaved, transposed = (flag in words for flag in known)
    if interleaved and not all(p.equal for p in parts[1:]):
        raise ValueError("interleaved parts are of equal size: 'A ~ B'")
    return Rule(whole, tuple(parts), interleaved, transposed, only, text.strip())


@cache
def default_names() -> Names:
    """The rules that come with the package."""
    return _packaged("rules.txt")


@cache
def names_of(tool: str) -> Names:
    """The packaged rules, and before them those of one tool whose names are for its files alone.

    Args:
        tool: "torchtune" or "llama.cpp", which have a file of rules here; others have none.
    """
    if tool not in _TOOLS:
        return default_names()
    return default_names().joined(_packaged(f"{tool}.txt"))


def _packaged(file: str) -> Names:
    text = files("lora_param.names").joinpath(file).read_text(encoding="utf-8")
    return parse_names(text, file)


def read_names(path: str | PathLike[str] | None) -> Names:
    """The packaged rules, and before them those of a file.

    Raises:
        NameRuleError: the file cannot be read, or a line of it is no rule.
    """
    if path is None:
        return default_names()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NameRuleError(str(path), None, "", str(error)) from None
    return default_names().joined(parse_names(text, str(path)))
