"""Rules over facts: what each consumer does with an adapter, why, and how to mend it."""

from __future__ import annotations

import operator
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

from lora_param.errors import InternalError, OptionError

__all__ = ["CONSUMERS", "ITSELF", "Finding", "Ruling", "judge", "load_rulings"]

Answer = Literal["accepted", "differs", "refused"]
Facts = Mapping[str, Any]

ITSELF = "itself"
CONSUMERS = (
    "vllm",
    "sglang",
    "llama.cpp",
    "ollama",
    "peft",
    "transformers",
    "diffusers",
    "comfyui",
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {">": operator.gt, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class Ruling:
    """One table of `rules.toml`; its fields are explained there."""

    consumers: tuple[str, ...]
    versions: str
    when: str
    verdict: Answer
    says: str
    mend: str
    source: str

    def holds(self, facts: Facts) -> bool:
        """All that it asks for is so."""
        return all(_is_so(part, facts) for part in self.when.split(" and "))

    def concerns(self, consumer: str, version: tuple[int, ...] | None) -> bool:
        """It is about this consumer, in this version or, where none is given, in the newest."""
        if consumer not in self.consumers:
            return False
        first, _, last = self.versions.partition("-")
        from_, to = version_of(first), version_of(last)
        if version is None:
            return not to
        # 0.16 up to and with: 0.16.4 is meant as well
        return (not from_ or version >= from_) and (not to or version[: len(to)] <= to)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found.

    Attributes:
        consumer: who; "itself" for what is wrong whoever reads it.
        versions: of which versions, as in `rules.toml`; "" for all.
        verdict: "refused", or "differs": it loads and computes something else.
        says: why.
        mend: what to do.
        source: where it says so.
    """

    consumer: str
    versions: str
    verdict: Answer
    says: str
    mend: str
    source: str


def version_of(text: str) -> tuple[int, ...]:
    """`0.19.1` as numbers; of anything else nothing.

    >>> version_of("0.19.1.dev0")
    (0, 19, 1)
    """
    return tuple(int(n) for n in re.findall(r"\d+", re.sub(r"\.?(dev|rc|a|b|post).*", "", text)))


def _is_so(part: str, facts: Facts) -> bool:
    words = part.split()
    negated = words[0] == "not"
    name, *rest = words[1:] if negated else words
    if name not in facts:
        raise InternalError(f"a rule asks for the fact {name!r}, which nobody gathers")
    value = facts[name]
    if rest:
        sign, wanted = rest
        value = _COMPARE[sign](value, float(wanted) if sign == ">" else wanted)
    return bool(value) != negated


@cache
def load_rulings() -> tuple[Ruling, ...]:
    """The rules that come with the package, in order."""
    text = files("lora_param.consumers").joinpath("rules.toml").read_text(encoding="utf-8")
    return tuple(
        Ruling(
            tuple(table["for"]),
            table.get("versions", ""),
            table["when"],
            cast(Answer, table["verdict"]),
            table["says"],
            table["mend"],
            table["source"],
        )
        for table in tomllib.loads(text)["rule"]
    )


def parse_consumer(text: str) -> tuple[str, tuple[int, ...] | None]:
    """`vllm`, or `vllm==0.11`, as name and version.

    Raises:
        OptionError: nobody of that name is known, or the version is no number.
    """
    name, equals, version = text.partition("==")
    numbers = version_of(version)
    if name not in CONSUMERS or (equals and not numbers):
        raise OptionError("consumer", text, f"{', '.join(CONSUMERS)}; with a version, vllm==0.11")
    return name, numbers or None


def judge(
    facts: Facts, consumers: Iterable[str] = (), rulings: Iterable[Ruling] | None = None
) -> list[Finding]:
    """What is wrong with an adapter, and what these consumers make of it.

    Args:
        facts: see `facts.gather`.
        consumers: names of `CONSUMERS`, each alone or with a version, as `vllm==0.11`.
        rulings: the packaged ones by default.

    Raises:
        OptionError: an unknown consumer.

    >>> judge(gather("adapter"), ["vllm"])  # doctest: +SKIP
    []
    """
    asked = [(ITSELF, None), *(parse_consumer(c) for c in consumers)]
    rulings = load_rulings() if rulings is None else tuple(rulings)
    found = []
    for name, version in asked:
        for r in rulings:
            if r.concerns(name, version) and r.holds(facts):
                says = r.says.format_map(facts)
                mend = r.mend.format_map(facts)
                found.append(Finding(name, r.versions, r.verdict, says, mend, r.source))
    return found
