r"""The target language: text → `Pattern`.

| pattern | matches |
|---|---|
| `q_proj`, `attn.q_proj`, `q_proj.weight` | whole dotted segments at the end of the name |
| `encoder.layer.*.attention.**.weight` | `*` within a segment, `**` across; on the whole name |
| `layers.{0..11}.{q,v}_proj` | ranges and alternatives |
| `re:EXPRESSION` | full match on the name |
| `type:LSTM`, `all-linear` | by module class |
| `!PATTERN` | takes away |
| `NAME[a:b]`, `NAME[:,a:b]`, `NAME[i/n]`, `NAME[*]` | a part of what NAME matches |
| `PATTERN:rank=16,alpha=32` | settings for what PATTERN matches |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from lora_param.errors import OptionError, PatternError
from lora_param.targets.regions import SliceText, parse_slice, split_slice
from lora_param.targets.settings import SETTINGS
from lora_param.targets.weights import Weight

__all__ = ["Pattern", "parse_pattern", "parse_patterns"]

Kind = Literal["name", "glob", "regex", "type", "all-linear"]

_OPTIONS = re.compile(r":((?:[a-z_]+=[^,=]*)(?:,[a-z_]+=[^,=]*)*)$")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MAX_ALTERNATIVES = 100_000

_SETTINGS = {name: s.kind for name, s in SETTINGS.items() if s.in_pattern}


@dataclass(frozen=True)
class Pattern:
    """One pattern, read.

    Attributes:
        text: as written.
        kind: how it matches.
        negated: it takes away (`!`).
        part: the slice it takes of each weight, or None for whole weights.
        settings: what it sets for the weights it matches.
        names: of which a name has to end in one, in whole segments.
        expressions: compiled, one of which a name has to match in full.
        type_name: the class that a `type:` pattern names.
    """

    text: str
    kind: Kind
    negated: bool
    part: SliceText | None
    settings: Mapping[str, object]
    names: frozenset[str] = field(default=frozenset(), repr=False)
    expressions: tuple[re.Pattern[str], ...] = field(default=(), repr=False)
    type_name: str = ""

    @property
    def is_explicit(self) -> bool:
        """It names weights one by one, so that one it names wrongly is a mistake."""
        return self.kind == "name"

    def matches(self, weight: Weight) -> bool:
        """The pattern names this weight."""
        if self.kind == "all-linear":
            return weight.not_all_linear is None
        if self.kind == "type":
            return self.type_name in weight.classes and len(weight.shape) > 1
        name = weight.name
        short = name.removesuffix(".weight") if self.kind != "regex" else name
        if self.kind == "name":
            return any(end in self.names for n in {name, short} for end in _ends(n))
        return any(
            e.fullmatch(name) or (short != name and e.fullmatch(short)) for e in self.expressions
        )

    def covers(self, weight: Weight) -> str:
        """Why a weight within the pattern's reach cannot be adapted by it, or ""."""
        if self.kind == "all-linear":
            return weight.not_linear
        if self.kind == "type":
            return weight.unsuitable if self.type_name in weight.classes else ""
        return weight.unsuitable if self.matches(weight) else ""


def parse_patterns(patterns: str | Iterable[str], option: str = "targets") -> list[Pattern]:
    """Read one pattern or several.

    Raises:
        OptionError: these are no texts; `option` is what they were given as.
        PatternError: one cannot be read.
    """
    texts = (
        [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else patterns
    )
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(option, text, "a pattern over names of weights, or several")
    return [parse_pattern(text) for text in texts]


@lru_cache(maxsize=1024)
def parse_pattern(text: str) -> Pattern:
    """Read one pattern.

    Raises:
        PatternError: it cannot be read; the message says where.

    >>> parse_pattern("layers.{0..3}.{q,v}_proj:rank=16").settings
    {'rank': 16}
    """
    body = text.strip()
    negated = body.startswith("!")
    body = body[1:] if negated else body
    settings: dict[str, object] = {}
    if options := _OPTIONS.search(body):
        settings = _parse_settings(options[1], text)
        body = body[: options.start()]
    if negated and settings:
        raise PatternError(text, "a pattern that takes away has no settings")
    body, slice_text = split_slice(body)
    part = parse_slice(slice_text, text) if slice_text is not None else None
    if not body:
        raise PatternError(text, "it is empty")

    kind: Kind
    names: frozenset[str] = frozenset()
    expressions: tuple[re.Pattern[str], ...] = ()
    type_name = ""
    if body == "all-linear":
        kind = "all-linear"
    elif body.startswith("type:"):
        kind, type_name = "type", body.removeprefix("type:")
        if not type_name.isidentifier():
            raise PatternError(text, f"{type_name!r} is not the name of a class")
    elif body.startswith("re:"):
        kind = "regex"
        try:
            expressions = (re.compile(body.removeprefix("re:")),)
        except re.error as error:
            raise PatternError(text, f"the regular expression is wrong: {error}") from None
    else:
        if ":" in body:
            head = body.partition(":")[0]
            raise PatternError(
                text,
                f"{head!r} is neither 're', 'type' nor a pattern with settings "
                f"({', '.join(_SETTINGS)})",
            )
        if bad := re.search(r"[\[\]\s]", body):
            raise PatternError(
                text,
                f"{bad[0]!r} is not part of a name; slices are [a:b], [:,a:b], [i/n] and [*]",
            )
        alternatives = _expand_braces(body, text)
        kind = "glob" if any("*" in a or "?" in a for a in alternatives) else "name"
        if not all(all(a.split(".")) for a in alternatives):
            raise PatternError(text, "a segment between two dots is empty")
        if kind == "name":
            names = frozenset(alternatives)
        else:
            expressions = tuple(_compile_glob(a) for a in alternatives)
    return Pattern(text, kind, negated, part, settings, names, expressions, type_name)


def _ends(name: str) -> Iterator[str]:
    """The name, and what is left of it without its first segment, its first two, and so on.

    >>> list(_ends("a.b.c"))
    ['a.b.c', 'b.c', 'c']
    """
    yield name
    while (dot := name.find(".")) >= 0:
        name = name[dot + 1 :]
        yield name


def _parse_settings(text: str, pattern: str) -> dict[str, object]:
    settings: dict[str, object] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in _SETTINGS:
            raise PatternError(pattern, f"{key!r} is not a setting ({', '.join(_SETTINGS)})")
        try:
            settings[key] = _SETTINGS[key](value.strip())
        except ValueError:
            raise OptionError(f"{key} in {pattern!r}", value, _SETTINGS[key].__name__) from None
    return settings


def _expand_braces(body: str, pattern: str) -> list[str]:
    """`a{1..3}` → a1 a2 a3, `{q,v}x` → qx vx; innermost braces first."""
    done, todo = [], [body]
    while todo:
        text = todo.pop()
        match = _BRACES.search(text)
        if match is None:
            if "{" in text or "}" in text:
                raise PatternError(pattern, "the braces do not pair")
            done.append(text)
            continue
        options: list[str] = []
        for item in match[1].split(","):
            if bounds := _RANGE.fullmatch(item):
                first, last = int(bounds[1]), int(bounds[2])
                if abs(last - first) > _MAX_ALTERNATIVES:
                    raise PatternError(pattern, f"the range {item} is too long")
                step = 1 if last >= first else -1
                width = len(bounds[1]) if bounds[1].startswith("0") else 0
                options += [str(i).zfill(width) for i in range(first, last + step, step)]
            else:
                options.append(item)
        todo += [text[: match.start()] + o + text[match.end() :] for o in reversed(options)]
        if len(todo) + len(done) > _MAX_ALTERNATIVES:
            raise PatternError(pattern, f"its braces make over {_MAX_ALTERNATIVES} alternatives")
    return done


def _compile_glob(body: str) -> re.Pattern[str]:
    segments = body.split(".")
    if segments == ["**"]:
        return re.compile(".+", re.DOTALL)
    expression, glue = "", ""
    for i, segment in enumerate(segments):
        if segment != "**":
            expression += glue + _compile_segment(segment)
            glue = r"\."
        elif i == 0:  # `**` stands for any number of whole segments, none included
            expression += r"(?:[^.]+\.)*"
        else:
            expression += r"(?:\.[^.]+)*"
    return re.compile(expression)


def _compile_segment(segment: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", segment)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)
