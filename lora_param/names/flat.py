"""Names with each `.` as `_`, as sd-scripts writes them: of what a base has, and what it means."""

from __future__ import annotations

from collections.abc import Iterable

from lora_param.names.table import Names

__all__ = ["aliased", "flattened"]

Found = dict[str, list[str]]
_FUSED = "in_proj_weight"


def flattened(base: Iterable[str]) -> Found:
    """Flat name of a module → the base's weights that have it.

    >>> flattened(["up_blocks.0.conv1.weight", "up_blocks.0.conv1.bias"])
    {'up_blocks_0_conv1': ['up_blocks.0.conv1.weight']}
    """
    found: Found = {}
    for name in base:
        if flat := _flat(name):
            found.setdefault(flat, []).append(name)
    return found


def aliased(base: Iterable[str], names: Names) -> Found:
    """Flat name of a module, as other tools write it → the base's weights that it may be.

    Args:
        base: the base's weights.
        names: the rules.

    Returns:
        Also of weights that the base has in parts, or as a part of another: these are named as the
        rules name them.

    >>> found = aliased(["up_blocks.0.resnets.1.conv1.weight"], default_names())
    >>> found["output_blocks_1_0_in_layers_2"]
    ['up_blocks.0.resnets.1.conv1.weight']
    """
    base = [name for name in base if _flat(name)]
    found: Found = {}
    for name in [*base, *_meant(base, names)]:
        for alias in names.aliases(name):
            flat = _flat(alias)
            if flat and name not in found.setdefault(flat, []):
                found[flat].append(name)
    return found


def _flat(name: str) -> str:
    """The module's name, flat; "" for what is no module's weight."""
    module, _, leaf = name.rpartition(".")
    if leaf == _FUSED:
        return f"{module}.in_proj".replace(".", "_")
    return module.replace(".", "_") if leaf == "weight" else ""


def _meant(base: Iterable[str], names: Names) -> Iterable[str]:
    """Weights that the base has not as such: parts of what it has fused, the whole of its parts."""
    index = names.index(base)
    found: dict[str, None] = {}
    for rule in names.rules:
        if rule.of_experts:
            continue
        for name in index:
            if match := rule.whole.match(name):
                found |= dict.fromkeys(part.name(match[0]) for part in rule.parts)
            elif match := rule.parts[0].match(name):
                found[rule.whole.name(match[0])] = None
    return [name for name in found if name not in index]
