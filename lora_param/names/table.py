"""The rules of `rules.txt`, read and indexed; a user's own file adds to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path

from lora_param.errors import NameRuleError

__all__ = ["Names", "Part", "Rule", "default_names", "parse_names", "read_names"]

_STEM, _EXPERT = "*", "#"


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


@dataclass(frozen=True)
class Names:
    """All rules.

    Attributes:
        prefixes: leading segments without a meaning of their own.
        rules: in the order in which they are tried.
    """

    prefixes: frozenset[str]
    rules: tuple[Rule, ...]
    _known: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def canonical(self, name: str) -> str:
        """A name without leading segments that tools add or leave out.

        >>> default_names().canonical("base_model.model.model.layers.0.mlp.gate.weight")
        'layers.0.mlp.gate.weight'
        """
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
        return Names(self.prefixes | other.prefixes, other.rules + self.rules)


def parse_names(text: str, source: str) -> Names:
    """Read rules, see `rules.txt`.

    Raises:
        NameRuleError: a line that is no rule; it is shown with its number.

    >>> parse_names("*.qk.weight = *.q.weight | *.k.weight", "an example").rules[0].parts[1].text
    '*.k.weight'
    """
    prefixes: set[str] = set()
    rules: list[Rule] = []
    for number, line in enumerate(text.splitlines(), 1):
        written = "" if line.lstrip().startswith("#") else line.partition(" #")[0].strip()
        if not written:
            continue
        if written.startswith("prefix ") and len(written.split()) == 2:
            prefixes.add(written.split()[1])
            continue
        try:
            rules.append(_parse_rule(written))
        except ValueError as error:
            raise NameRuleError(source, number, line, str(error)) from None
    return Names(frozenset(prefixes), tuple(rules))


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
    text = files("lora_param.names").joinpath("rules.txt").read_text(encoding="utf-8")
    return parse_names(text, "rules.txt")


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
