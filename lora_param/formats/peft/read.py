"""A PEFT adapter as a record, first by its files alone, then settled for a base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget, Host, LazyTensors
from lora_param.errors import BrokenFileError, NoFormError
from lora_param.fingerprint import BaseWeight
from lora_param.formats.peft.aliases import renamed, under_their_names
from lora_param.formats.peft.keys import Keys, LayerKeys, parse_keys
from lora_param.formats.peft.layers import place_layer
from lora_param.formats.peft.parameters import parameters_of, place_parameters
from lora_param.formats.peft.reading import Placed, Reading
from lora_param.formats.peft.source import Source, open_source
from lora_param.targets.regions import Region, Target
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_peft"]

_COPY = Settings(rank=1, alpha=1.0, scaling="constant", variant="copy")
_COUNTER = "num_batches_tracked"
_SAYS_NOTHING = (
    "PEFT's files do not say what base they were made on: names and shapes alone were compared."
)
_NO_BASE = (
    "PEFT's files do not say what base they were made on: names and the layout of weights are "
    "checked when a base is given."
)


def read_peft(path: Path, *, layout: str | None = None) -> Adapter:
    """Read a PEFT directory or one of its files.

    Args:
        path: the directory, its config, or its weights.
        layout: "out-in" or "in-out": how square weights are stored, where nothing else tells.

    Raises:
        BrokenFileError: files are missing, or do not agree with each other.
        UnknownFileError: it is of a method that is not read.
        NoFormError: it has something that has no form here.
    """
    source = open_source(path)
    keys = parse_keys(source.tensors, str(path))
    return _settle(source, keys, layout, None)


def _settle(source: Source, keys: Keys, layout: str | None, host: Host | None) -> Adapter:
    if host is None:
        return _read(source, keys, layout, None)
    factors = {}
    for layer in keys.layers:
        A, B = (source.shapes[layer.parts[p]] if p in layer.parts else () for p in "AB")
        if len(A) == len(B) == 2:
            factors[f"{layer.module}.weight"] = (B[0], A[1])
    same, own = under_their_names(host, keys, source.config, factors)
    return renamed(_read(source, keys, layout, same), own)


def _read(source: Source, keys: Keys, layout: str | None, host: Host | None) -> Adapter:
    reading = Reading(source, keys, layout, host)
    placed = [*_layers(reading), *_tokens(reading)]
    placed = _with_copies(reading, placed)
    reading.check()
    base = {p.name: BaseWeight(p.shape) for p in placed}
    if host is not None:  # what the base has, without claiming that the adapter was made on it
        base = {name: BaseWeight(host.weights[name].shape) for name in base}
    targets: dict[str, AdapterTarget] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for p in placed:
        if p.key in targets:
            raise BrokenFileError(source.path, f"it adapts {p.key} twice")
        targets[p.key] = AdapterTarget(
            Target(p.name, p.region),
            p.settings,
            p.strength,
            also=p.also,
            apart=p.apart,
            layer=p.layer,
        )
        makers |= {f"{p.key}.{name}": make for name, make in p.makers.items()}
    return Adapter(
        targets,
        LazyTensors(makers),
        base,
        source.name,
        str(source.path),
        format="peft",
        notes=(_NO_BASE if host is None else _SAYS_NOTHING, *reading.notes),
        settle=partial(_settle, source, keys, layout) if host is None else None,
    )


def _layers(reading: Reading) -> list[Placed]:
    of_module: dict[str, list[LayerKeys]] = {}
    for layer in reading.keys.layers:
        of_module.setdefault(layer.module, []).append(layer)
    placed: list[Placed] = []
    for module, layers in of_module.items():
        if parameters_of(reading, module, layers):
            placed += place_parameters(reading, module, layers)
        else:
            reading.check_chosen(module)
            placed += [p for layer in layers for p in place_layer(reading, layer)]
    return placed


def _tokens(reading: Reading) -> list[Placed]:
    """Rows that replace a weight's. PEFT calls them a delta, and they are none."""
    placed = []
    for module, key in reading.keys.tokens.items():
        name, shape = f"{module}.weight", reading.source.shapes[key]
        rows = reading.source.config.tokens(module)
        if len(shape) != 2 or shape[0] != len(rows):
            raise BrokenFileError(
                reading.source.path,
                f"{key} is {shape}, and its config names {len(rows)} rows for {module}",
            )
        W = reading.weight(name)
        if W is not None and (len(W.shape) != 2 or W.shape[1] != shape[1]):
            reading.differ(name, W, f"rows of {shape[1]}")
        elif W is not None and max(rows) >= W.shape[0]:
            reading.differ(name, W, f"its row {max(rows)}")
        order = sorted(range(len(rows)), key=rows.__getitem__)
        read = reading.tensor(key)
        placed.append(
            Placed(
                name,
                _COPY,
                (max(rows) + 1, shape[1]),
                {"value": partial(_taken, read, order)},
                "embedding",
                Region(picked=tuple(sorted(rows))),
                also=() if W is None else W.tied,
            )
        )
    return placed


def _taken(read: Callable[[], Tensor], order: list[int]) -> Tensor:
    return read()[order]


def _with_copies(reading: Reading, placed: list[Placed]) -> list[Placed]:
    """The targets with those of full copies. A copy of an adapted weight is the base's own."""
    adapted = {p.key: p for p in placed}
    for name, key in reading.keys.copies.items():
        if name.rpartition(".")[2] == _COUNTER:
            reading.notes.append(f"{name} counts batches, and is left out.")
            continue
        shape, read = reading.source.shapes[key], reading.tensor(key)
        if not shape:
            raise NoFormError(
                str(reading.source.path), f"the number {name}", "no tensor of rows", "take it out"
            )
        W = reading.weight(name)
        if W is not None and W.shape != shape:
            reading.differ(name, W, f"a copy of {shape}")
        if name in adapted:
            if W is not None and W.shape == shape and not reading.shapes:
                adapted[name] = _on_copy(reading, adapted[name], read)
            continue
        size = (shape[0], -1) if len(shape) > 1 else (shape[0], 1)
        tied = () if W is None else W.tied
        value: dict[str, Callable[[], Tensor]] = {"value": partial(_reshaped, read, size)}
        adapted[name] = Placed(name, _COPY, shape, value, apart=tied)
    return list(adapted.values())


def _reshaped(read: Callable[[], Tensor], size: tuple[int, int]) -> Tensor:
    return read().reshape(size)


def _on_copy(reading: Reading, target: Placed, read: Callable[[], Tensor]) -> Placed:
    """A target whose file also holds its W, as PEFT writes embeddings: what both come to.

    Where that W is the base's, the target is as any other. Otherwise it is the copy with its
    update, as one copy.
    """
    import torch

    assert reading.host is not None
    W = reading.host.value(target.name)
    saved = read()
    if torch.equal(saved.to(W.dtype), W):
        return target
    reading.notes.append(
        f"{target.name} in the file is not the base's: it is taken with its update, as one copy."
    )
    if target.settings.variant != "lora":
        raise NoFormError(
            str(reading.source.path),
            f"DoRA on its own copy of {target.name}",
            "a base other than this one",
            "give the base with the resized embedding",
        )
    scale = target.settings.scale * target.strength

    def value() -> Tensor:
        A, B = (target.makers[n]() for n in ("lora_A", "lora_B"))
        return read() + (B @ A * scale).to(saved.dtype)

    return Placed(target.name, _COPY, target.shape, {"value": value}, apart=target.apart)
