"""The native adapter file: one `.safetensors` with the factors, and all settings in its metadata.

Tensors are `TARGET.lora_A` and `TARGET.lora_B` (for pissa and olora also `TARGET.initial_A` and
`TARGET.initial_B`), where TARGET is a parameter's full name with its slice. `__metadata__` holds
`format: "pt"`, `lora_param: "1"` and `config`, a JSON text:

    {"name": "default",
     "targets": {TARGET: {"rank", "alpha", "scaling", "scale", "strength", "dropout", "init",
                          "variant", "enabled", "also", "apart"}},
     "base": {NAME: {"shape", "dtype", "hash"}}}

`scale` is what multiplies B @ A: that of rank, alpha and scaling, times `strength`.

A field that is missing stands at its default. Settings that came after this list are written where
they are not at their default, and those of them without which the adapter would mean something else
are named in `"essential": [FIELD, ...]`, beside `targets`. A field that a version does not know is
refused if it is named there, and otherwise kept and written again; so are other entries of
`__metadata__`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.errors import (
    BrokenFileError,
    OptionError,
    OutputError,
    UnknownFileError,
    UnsettledError,
    UserError,
)
from lora_param.files.header import Header, encode_header, read_header
from lora_param.files.locks import locked
from lora_param.files.safetensors import (
    NAMES,
    SafetensorsFile,
    StreamEntry,
    write_safetensors,
)
from lora_param.files.writer import copy_range, replace_file
from lora_param.fingerprint import BaseWeight
from lora_param.formats.base import Format
from lora_param.targets.matching import match_targets
from lora_param.targets.regions import Target, parse_target, weight_name
from lora_param.targets.settings import INITIAL, SETTINGS, Settings

__all__ = ["FORMAT", "VERSION", "check_adapter_name", "toggle"]

VERSION = "1"
_NAME, _MARK = "native", "lora_param"
_METADATA = {"format", _MARK, "config"}
_SETTINGS = {name: s for name, s in SETTINGS.items() if s.in_file}
_FIRST = {"rank", "alpha", "scaling", "dropout", "init", "variant"}  # every reader knows them
_STATE = {"strength": 1.0, "enabled": True, "also": [], "apart": []}  # with their defaults
_FLOATS = {"F16", "BF16", "F32", "F64"}


class _BadConfigError(Exception):
    """What is wrong with the config; the path is added where it is caught."""


class _EssentialError(Exception):
    """The config has a field that is not known and cannot be passed over."""


def _recognise(path: Path) -> bool:
    return (
        path.is_file()
        and path.suffix.lower() == ".safetensors"
        and _MARK in read_header(path).metadata
    )


def _read(path: Path, *, layout: str | None = None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, which tells how W is stored")
    checkpoint = SafetensorsFile(path)
    version = checkpoint.metadata[_MARK]
    if version != VERSION:
        raise UnknownFileError(
            path, f"a lora_param adapter of version {version!r}", f"version {VERSION!r}"
        )
    try:
        config = json.loads(checkpoint.metadata["config"], object_pairs_hook=_unique)
        adapter = _decode(config, checkpoint, path)
        _check_tensors(adapter, checkpoint.header)
    except _EssentialError as error:
        raise UnknownFileError(
            path, f"an adapter that needs a later version: {error}", "what this version knows"
        ) from None
    except KeyError as error:
        raise BrokenFileError(path, f"its adapter config lacks {error.args[0]!r}") from None
    except (ValueError, RecursionError, _BadConfigError) as error:
        if isinstance(error, UserError):  # a setting that the package itself refuses
            raise BrokenFileError(path, f"its adapter config is wrong: {error}") from None
        raise BrokenFileError(path, f"its adapter config cannot be read: {error}") from None
    return adapter


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _BadConfigError("a name is there twice")
    return found


def _decode(config: Any, tensors: SafetensorsFile, path: Path) -> Adapter:
    needed = _typed(_typed(config, dict, "the config").get("essential", []), list, "essential")
    known = ("name", "targets", "base", "essential")
    extra: dict[str, Any] = {"config": _unknown(config, known, needed, "the config")}
    extra |= {"targets": {}, "base": {}}
    name = _typed(config.get("name", "default"), str, "name")
    base: dict[str, BaseWeight] = {}
    for weight, value in _typed(config["base"], dict, "base").items():
        where = f"base of {weight}"
        extra["base"][weight] = _unknown(value, ("shape", "dtype", "hash"), needed, where)
        shape = _typed(value["shape"], list, f"shape in {where}")
        if not all(type(size) is int and size > 0 for size in shape):
            raise _BadConfigError(f"shape in {where} is {shape}")
        digest = value.get("hash")
        if digest is not None:
            _typed(digest, str, f"hash in {where}")
        base[weight] = BaseWeight(
            tuple(shape), _typed(value["dtype"], str, f"dtype in {where}"), digest
        )
    targets = {}
    for key, value in _typed(config["targets"], dict, "targets").items():
        extra["targets"][key] = _unknown(value, (*_SETTINGS, *_STATE, "scale"), needed, key)
        targets[key] = _decode_target(key, value, base)
    if not targets:
        raise _BadConfigError("it has no targets")
    extra["metadata"] = {k: v for k, v in tensors.metadata.items() if k not in _METADATA}
    return Adapter(targets, tensors, base, name, str(path), {_NAME: extra})


def _decode_target(key: str, value: Any, base: Mapping[str, BaseWeight]) -> AdapterTarget:
    settings = Settings(
        **{n: _typed(value[n], s.kind, f"{n} of {key}") for n, s in _SETTINGS.items() if n in value}
    )
    state = {n: _typed(value.get(n, d), type(d), f"{n} of {key}") for n, d in _STATE.items()}
    for n in ("also", "apart"):
        for other in state[n]:
            _typed(other, str, f"{n} of {key}")
    weight = key if key in base else weight_name(key)
    if weight not in base:
        raise _BadConfigError(f"{key} has no base")
    target = Target(key) if key in base else parse_target(key, base[weight].shape)
    if target.name not in base or str(target) != key:
        raise _BadConfigError(f"{key} is not how its target is written ({target})")
    decoded = AdapterTarget(
        target,
        settings,
        state["strength"],
        state["enabled"],
        tuple(state["also"]),
        tuple(state["apart"]),
    )
    scale = settings.scale * decoded.strength
    found = _typed(value.get("scale", scale), float, f"scale of {key}")
    if not math.isclose(found, scale, rel_tol=1e-6):
        raise _BadConfigError(f"{key} has scale {found}, and its other settings give {scale}")
    return decoded


def _unknown(value: Any, known: Iterable[str], needed: Iterable[str], where: str) -> dict[str, Any]:
    """The fields that are not known, none of them essential."""
    unknown = {n: v for n, v in _typed(value, dict, where).items() if n not in set(known)}
    for name in unknown:
        if name in needed:
            raise _EssentialError(f"{name!r} in {where} changes what it means, and is not known")
    try:
        json.dumps(unknown, allow_nan=False)  # it will be passed on
    except ValueError:
        raise _BadConfigError(f"{where} has a number that JSON cannot hold") from None
    return unknown


def _typed(value: Any, kind: type, where: str) -> Any:
    """The value, if JSON gives it the type it should have; numbers finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    if kind is float or type(value) is not kind:
        raise _BadConfigError(f"{where} is {value!r:.80}, which is no {kind.__name__}")
    return value


def _check_tensors(adapter: Adapter, header: Header) -> None:
    """Every target has its factors, of the shapes and dtypes that fit, and nothing is left over."""
    left = dict(header.entries)
    for key, t in adapter.targets.items():
        matrix = t.target.region.matrix(adapter.base[t.target.name].shape)
        shapes = t.settings.shapes(matrix)
        if any(f"{key}.{initial}" in left for initial in INITIAL):
            shapes |= t.settings.initial_shapes(matrix)
        for name, shape in shapes.items():
            entry = left.pop(f"{key}.{name}", None)
            if entry is None:
                raise _BadConfigError(f"the tensor {key}.{name} is missing")
            if entry.shape != shape:
                raise _BadConfigError(
                    f"{key}.{name} is {entry.shape}, and rank {t.settings.rank} on its base takes "
                    f"{shape}"
                )
            if entry.dtype not in _FLOATS:
                raise _BadConfigError(f"{key}.{name} is of dtype {entry.dtype}")
    if left:
        raise _BadConfigError(f"the tensor {next(iter(left))} belongs to no target")


def _encode(adapter: Adapter) -> dict[str, str]:
    """The metadata of an adapter."""
    extra = {
        "config": {},
        "targets": {},
        "base": {},
        "metadata": {},
        **adapter.extra.get(_NAME, {}),
    }
    later = {
        key: {
            n: value
            for n, s in _SETTINGS.items()
            if n not in _FIRST and (value := getattr(t.settings, n)) != s.default
        }
        for key, t in adapter.targets.items()
    }
    essential = {n for fields in later.values() for n in fields if _SETTINGS[n].essential}
    config = {
        **extra["config"],
        **({"essential": sorted(essential)} if essential else {}),
        "name": adapter.name,
        "targets": {
            key: {
                **extra["targets"].get(key, {}),
                **{n: getattr(t.settings, n) for n in _FIRST},
                **later[key],
                "scale": t.scale * t.strength,
                "strength": t.strength,
                "enabled": t.enabled,
                "also": list(t.also),
                "apart": list(t.apart),
            }
            for key, t in adapter.targets.items()
        },
        "base": {
            name: {
                **extra["base"].get(name, {}),
                "shape": list(b.shape),
                "dtype": b.dtype,
                "hash": b.hash,
            }
            for name, b in adapter.base.items()
        },
    }
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**extra["metadata"], "format": "pt", _MARK: VERSION, "config": text}


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    check_adapter_name(path)
    if adapter.settle is not None:
        raise UnsettledError(
            adapter.source,
            adapter.targets,
            "how the base stores its weights",
        )
    entries: dict[str, StreamEntry] = {}
    for key in adapter.targets:
        for name, tensor in adapter.factors(key).items():
            dtype = NAMES.get(str(tensor.dtype).removeprefix("torch."))
            if dtype not in _FLOATS:
                raise OutputError(path, f"{key}.{name} is {tensor.dtype}, not a floating factor")
            full = f"{key}.{name}"
            entries[full] = (dtype, tuple(tensor.shape), partial(adapter.tensors.__getitem__, full))
    with replace_file(path, force=force, sync=sync) as file:
        write_safetensors(file, entries, _encode(adapter))


def check_adapter_name(path: Path) -> None:
    """Refuse a name under which the file would not be found to be an adapter again.

    Raises:
        OutputError: it does not end in `.safetensors`.
    """
    if path.suffix.lower() != ".safetensors":
        raise OutputError(path, "the name of an adapter file ends in .safetensors")


def toggle(
    path: Path, enabled: bool, patterns: str | Iterable[str] | None, *, sync: bool = True
) -> list[str]:
    """See `lora_param.formats.toggle_file`."""
    with locked(path) as state:  # from reading it to replacing it: no other toggle is undone
        adapter = _read(path)
        chosen = match_targets(adapter.weights(), patterns)
        if all(adapter.targets[key].enabled == enabled for key in chosen):
            return chosen
        changed = {k: replace(adapter.targets[k], enabled=enabled) for k in chosen}
        header = read_header(path)
        encoded = _encode(replace(adapter, targets=adapter.targets | changed))
        with (
            path.open("rb") as source,
            replace_file(path, force=True, sync=sync, replaces=state) as file,
        ):
            file.write(encode_header(header.entries.items(), encoded, path))
            copy_range(source, file, header.start, header.size)
    return chosen


FORMAT = Format(_NAME, _recognise, _read, _write)
