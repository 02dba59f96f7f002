"""What readers and writers of other tools' formats share: a record of targets, and its pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, AdapterTarget, Host, Layer, LazyTensors
from lora_param.errors import BrokenFileError, MismatchError, NoFormError, UnsettledError, worded
from lora_param.fingerprint import BaseWeight
from lora_param.formats.peft.encode import Pair, pair_of, scaled_to
from lora_param.formats.peft.kinds import kinds_of
from lora_param.formats.peft.patterns import exact_alpha
from lora_param.formats.peft.reading import Placed
from lora_param.names.resolve import Here, resolve
from lora_param.targets.regions import Target
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "common_alpha",
    "found_in",
    "load_config",
    "needs_alpha",
    "pairs_of",
    "record",
    "scaled_to",
    "settings_of",
]

_BAKE = "bake it (lora-param bake), or leave it out"


def record(
    placed: Iterable[Placed],
    path: Path,
    format: str,
    *,
    tool: str,
    host: Host | None = None,
    extra: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    settle: Callable[[Host], Adapter] | None = None,
) -> Adapter:
    """The targets of a file as a record.

    Args:
        placed: the targets.
        path: the file.
        format: the format's name.
        tool: whose file it is, for the note that it says nothing of the base.
        host: the base, where it is at hand: shapes are compared with those of its weights.
        extra: what this format wants to know again when it writes the record.
        notes: further ones.
        settle: see `Adapter`.

    Raises:
        BrokenFileError: two of them are of the same part of a weight.
        MismatchError: shapes differ from those of the base.
    """
    placed = list(placed)
    targets: dict[str, AdapterTarget] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for p in placed:
        if p.key in targets:
            raise BrokenFileError(path, f"it adapts {p.key} twice")
        targets[p.key] = AdapterTarget(
            Target(p.name, p.region),
            p.settings,
            p.strength,
            also=p.also,
            apart=p.apart,
            layer=p.layer,
        )
        makers |= {f"{p.key}.{name}": make for name, make in p.makers.items()}
    if host is not None:
        there = found_in(host, [p.name for p in placed])
        differing = [
            f"{p.name} is {there[p.name].shape}, the adapter's tensors are for {p.shape}"
            for p in placed
            if p.name in there and there[p.name].shape != p.shape
        ]
        if differing:
            matched, wanted = len(placed) - len(differing), len(placed)
            raise MismatchError(
                str(path), host.name, shapes=differing, matched=matched, wanted=wanted
            )
    return Adapter(
        targets,
        LazyTensors(makers),
        {p.name: BaseWeight(p.shape) for p in placed},
        source=str(path),
        format=format,
        extra={format: dict(extra)} if extra else {},
        notes=(
            f"{tool}'s files do not say what base they were made on: names and shapes alone are "
            "compared.",
            *notes,
        ),
        settle=settle,
    )


def found_in(host: Host, names: Iterable[str]) -> dict[str, Weight]:
    """Of each name that is one tensor in the base, that, under whatever name it has there."""
    names = list(names)
    own = {n: host.weights[n] for n in names if n in host.weights}
    if len(own) == len(names):
        return own
    places = resolve(names, host.weights, host.names, host.model_type).places
    return {n: host.weights[p.name] for n, p in places.items() if isinstance(p, Here)}


def settings_of(
    rank: int, alpha: float, *, variant: str = "lora", scaling: str = "standard"
) -> tuple[Settings, float]:
    """Settings and strength of an alpha that may be negative, or zero."""
    strength = float((alpha > 0) - (alpha < 0))
    return Settings(rank, abs(alpha) or 1.0, scaling, variant=variant), strength


def needs_alpha(path: Path, names: Iterable[str], tool: str) -> UnsettledError:
    """The error of a file that does not say the alpha that its factors were trained with."""
    return UnsettledError(
        str(path),
        names,
        f"the alpha that they were trained with, which {tool} does not store",
        f"give it ({worded('alpha=', '--alpha X')}); the scale is alpha/rank",
    )


def load_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BrokenFileError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(path, str(error)) from None
    if not isinstance(found, dict):
        raise BrokenFileError(path, f"it holds a {type(found).__name__}, not an object")
    return found


def pairs_of(
    adapter: Adapter,
    tool: str,
    layers: Collection[Layer],
    *,
    dora: bool = False,
    any_side: bool = False,
) -> dict[str, tuple[Pair, Layer]]:
    """For each weight the pair that all its updates are together, and its kind of layer.

    Args:
        adapter: of which.
        tool: whose form it is for, for messages.
        layers: the kinds of layer that it has factors for.
        dora: it has DoRA.
        any_side: its lengths may be of the rows or of the columns of W.

    Raises:
        UnsettledError: the base is needed, and not at hand.
        NoFormError: the tool has no form for something in it; the message names it.
    """
    if adapter.settle is not None:
        raise UnsettledError(
            adapter.source,
            adapter.targets,
            "how its base stores its weights",
        )
    kinds = kinds_of(adapter)
    of_weight: dict[str, list[str]] = {}
    for key, t in adapter.targets.items():
        name = t.target.name
        own = kinds.get(name)
        is_layer = name.endswith(".weight") or own in ("parameter", "in_first")
        if own not in layers or not is_layer:
            what = "a full copy or a vector" if own is None else f"of a layer of kind {own}"
            raise NoFormError(
                adapter.source, key, f"{what}, for which {tool} has no factors", _BAKE
            )
        of_weight.setdefault(name, []).append(key)
    pairs = {
        n: (pair_of(adapter, keys, kinds[n], tool, any_side=any_side), kinds[n])
        for n, keys in of_weight.items()
    }
    for name, (pair, _) in pairs.items():
        if pair.magnitude is not None and not dora:
            why = f"DoRA, which {tool} does not have"
            raise NoFormError(adapter.source, name, why, f"{_BAKE}, or give --lossy")
    return pairs


def common_alpha(pairs: Iterable[Pair]) -> float:
    """The alpha of most pairs, for a file that has one for all."""
    return Counter(exact_alpha(p.scale, p.rank) for p in pairs).most_common(1)[0][0]
