"""The native adapter file: one `.safetensors` with the factors, and all settings in its metadata.

Tensors are `TARGET.lora_A` and `TARGET.lora_B` (for pissa and olora also `TARGET.initial_A` and
`TARGET.initial_B`), where TARGET is a parameter's full name with its slice. `__metadata__` holds
`format: "pt"`, `lora_param: "1"` and `config`, a JSON text:

    {"name": "default",
     "targets": {TARGET: {"rank", "alpha", "scaling", "scale", "strength", "dropout", "init",
                          "variant", "enabled", "also", "apart"}},
     "base": {NAME: {"shape", "dtype", "hash"}}}

`scale` is what multiplies B @ A: that of rank, alpha and scaling, times `strength`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.errors import BrokenFileError, OutputError, UnknownFileError, UserError
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
from lora_param.targets.regions import Target, parse_target, split_slice
from lora_param.targets.settings import INITIAL, Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "VERSION", "check_adapter_name", "toggle"]

VERSION = "1"
_MARK = "lora_param"
_SETTINGS = {
    "rank": int,
    "alpha": float,
    "scaling": str,
    "dropout": float,
    "init": str,
    "variant": str,
}
_OTHERS = {"scale": float, "strength": float, "enabled": bool, "also": list, "apart": list}
_FIELDS: dict[str, type] = {**_SETTINGS, **_OTHERS}
_FLOATS = {"F16", "BF16", "F32", "F64"}


class _BadConfigError(Exception):
    """What is wrong with the config; the path is added where it is caught."""


def _recognise(path: Path) -> bool:
    return (
        path.is_file()
        and path.suffix.lower() == ".safetensors"
        and _MARK in read_header(path).metadata
    )


def _read(path: Path) -> Adapter:
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


def _decode(config: Any, tensors: Mapping[str, Tensor], path: Path) -> Adapter:
    _only(config, ("name", "targets", "base"), "the config")
    name = _typed(config["name"], str, "name")
    base: dict[str, BaseWeight] = {}
    for weight, value in _typed(config["base"], dict, "base").items():
        where = f"base of {weight}"
        _only(value, ("shape", "dtype", "hash"), where)
        shape = _typed(value["shape"], list, f"shape in {where}")
        if not all(type(size) is int and size > 0 for size in shape):
            raise _BadConfigError(f"shape in {where} is {shape}")
        digest = value.get("hash")
        if digest is not None:
            _typed(digest, str, f"hash in {where}")
        base[weight] = BaseWeight(
            tuple(shape), _typed(value["dtype"], str, f"dtype in {where}"), digest
        )
    targets = {
        key: _decode_target(key, value, base)
        for key, value in _typed(config["targets"], dict, "targets").items()
    }
    if not targets:
        raise _BadConfigError("it has no targets")
    return Adapter(targets, tensors, base, name, str(path))


def _decode_target(key: str, value: Any, base: Mapping[str, BaseWeight]) -> AdapterTarget:
    _only(value, tuple(_FIELDS), key)
    fields = {n: _typed(value[n], kind, f"{n} of {key}") for n, kind in _FIELDS.items()}
    settings = Settings(**{n: fields[n] for n in _SETTINGS})
    for n in ("also", "apart"):
        for other in fields[n]:
            _typed(other, str, f"{n} of {key}")
    weight = key if key in base else split_slice(key)[0]
    if weight not in base:
        raise _BadConfigError(f"{key} has no base")
    target = Target(key) if key in base else parse_target(key, base[weight].shape)
    if target.name not in base or str(target) != key:
        raise _BadConfigError(f"{key} is not how its target is written ({target})")
    decoded = AdapterTarget(
        target,
        settings,
        fields["strength"],
        fields["enabled"],
        tuple(fields["also"]),
        tuple(fields["apart"]),
    )
    scale = settings.scale * decoded.strength
    if not math.isclose(fields["scale"], scale, rel_tol=1e-6):
        raise _BadConfigError(
            f"{key} has scale {fields['scale']}, and its other settings give {scale}"
        )
    return decoded


def _only(value: Any, known: Iterable[str], where: str) -> None:
    _typed(value, dict, where)
    unknown = [k for k, v in value.items() if k not in set(known) and v is not None]
    if unknown:
        raise _BadConfigError(f"{unknown[0]!r} in {where} is not known to this version")


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
        shapes = t.settings.shapes(t.target.region.matrix(adapter.base[t.target.name].shape))
        if any(f"{key}.{initial}" in left for initial in INITIAL):
            shapes |= {initial: shapes[factor] for initial, factor in INITIAL.items()}
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
    config = {
        "name": adapter.name,
        "targets": {
            key: {
                **{n: getattr(t.settings, n) for n in _SETTINGS},
                "scale": t.scale * t.strength,
                "strength": t.strength,
                "enabled": t.enabled,
                "also": list(t.also),
                "apart": list(t.apart),
            }
            for key, t in adapter.targets.items()
        },
        "base": {
            name: {"shape": list(b.shape), "dtype": b.dtype, "hash": b.hash}
            for name, b in adapter.base.items()
        },
    }
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {"format": "pt", _MARK: VERSION, "config": text}


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    check_adapter_name(path)
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
    from lora_param.targets.matching import match_targets

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
            file.write(encode_header(header.entries.items(), header.metadata | encoded, path))
            copy_range(source, file, header.start, header.size)
    return chosen


FORMAT = Format("native", _recognise, _read, _write)
