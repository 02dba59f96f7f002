"""Where the weights that an adapter names stand in a base: pure, over names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lora_param.names.table import Names, Rule, default_names

__all__ = ["Here", "PartOf", "Resolution", "WholeOf", "resolve"]


@dataclass(frozen=True, slots=True)
class Here:
    """The same tensor, under a name of the base's."""

    name: str


@dataclass(frozen=True, slots=True)
class PartOf:
    """Some rows of a tensor of the base's, of one matrix of it where it is a stack.

    Attributes:
        whole: the base's name.
        rule: what says so.
        index: which part of the rule it is.
        expert: which matrix of the stack, or None.
    """

    whole: str
    rule: Rule
    index: int
    expert: int | None


@dataclass(frozen=True, slots=True)
class WholeOf:
    """Several tensors of the base's together.

    Attributes:
        rule: what says so.
        parts: for each expert (one, where there are none) the base's names of the rule's parts.
    """

    rule: Rule
    parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Resolution:
    """What was found, of each name that was asked for.

    Attributes:
        places: name → where it stands.
        missing: names that stand nowhere.
        ambiguous: name → the names of the base among which nothing decides.
        partial: name → the rule that fits it best, and the first name that the base lacks for it.
    """

    places: dict[str, Here | PartOf | WholeOf] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ambiguous: dict[str, tuple[str, ...]] = field(default_factory=dict)
    partial: dict[str, tuple[Rule, str]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every name has a place."""
        return not self.missing and not self.ambiguous

    @property
    def is_identity(self) -> bool:
        """Every name is a name of the base's already."""
        same = all(isinstance(p, Here) and p.name == n for n, p in self.places.items())
        return self.complete and same


def resolve(
    wanted: Iterable[str],
    base: Iterable[str],
    names: Names | None = None,
    model_type: str | None = None,
) -> Resolution:
    """Find each wanted name in a base.

    A name of the base's is that; else the one that differs in its leading segments alone; else
    what a rule makes of it.

    Args:
        wanted: names of weights.
        base: names of the base's weights.
        names: the rules, the packaged ones by default.
        model_type: the base's, where its config says so.

    >>> found = resolve(["base_model.model.l.q_proj.weight"], ["l.qkv_proj.weight"])
    >>> found.places["base_model.model.l.q_proj.weight"].index
    0
    """
    names = default_names() if names is None else names
    known = dict.fromkeys(base)
    index = names.index(known)
    heads = {n.partition(".")[0] for n in index}
    rules = [r for r in names.rules if r.only in ("", model_type)]
    found = Resolution()
    for name in dict.fromkeys(wanted):
        if name in known:
            found.places[name] = Here(name)
            continue
        canonical = names.canonical(name)
        part, _, rest = canonical.partition(".")
        if part in names.parts and part not in heads:  # the base is that part on its own
            canonical = rest
        alike = index.get(canonical, [])
        if len(alike) > 1:
            found.ambiguous[name] = tuple(alike)
        elif alike:
            found.places[name] = Here(alike[0])
        elif place := _by_rules(name, canonical, rules, index, found):
            found.places[name] = place
        else:
            found.missing.append(name)
    return found


def _by_rules(
    name: str,
    canonical: str,
    rules: Iterable[Rule],
    index: Mapping[str, list[str]],
    found: Resolution,
) -> Here | PartOf | WholeOf | None:
    for rule in rules:
        match = rule.whole.match(canonical)
        if match is not None:
            parts, lacking = _parts(rule, match[0], index)
            if parts and lacking is None:
                return Here(parts[0][0]) if rule.is_renaming else WholeOf(rule, parts)
            if lacking is not None:
                found.partial.setdefault(name, (rule, lacking))
        for i, part in enumerate(rule.parts):
            match = part.match(canonical)
            if match is None:
                continue
            whole = rule.whole.name(match[0])
            if len(index.get(whole, ())) == 1:
                name = index[whole][0]
                return Here(name) if rule.is_renaming else PartOf(name, rule, i, match[1])
            found.partial.setdefault(name, (rule, whole))
    return None


def _parts(
    rule: Rule, stem: str, index: Mapping[str, list[str]]
) -> tuple[tuple[tuple[str, ...], ...], str | None]:
    """The base's names of a rule's parts, for each expert, and the first that it lacks."""
    experts: list[tuple[str, ...]] = []
    while True:
        expert = len(experts) if rule.of_experts else None
        wanted = [part.name(stem, expert) for part in rule.parts]
        there = [w for w in wanted if len(index.get(w, ())) == 1]
        if not there and (experts or rule.of_experts):
            return tuple(experts), None if experts else wanted[0]
        if len(there) < len(wanted):
            return (), next(w for w in wanted if w not in there)
        experts.append(tuple(index[w][0] for w in wanted))
        if not rule.of_experts:
            return tuple(experts), None
