"""mlx-lm's adapters: a directory of `adapters.safetensors` and `adapter_config.json`.

`X.lora_a` is (in, rank) and `X.lora_b` (rank, out); of a linear layer, stored as (out, in),
ΔW = scale·(lora_a @ lora_b)ᵀ, of an embedding, stored as (in, out), scale·(lora_a @ lora_b). A
stack of experts (`switch_mlp`) has (E, rank, in) and (E, out, rank). `m` is DoRA's lengths of rows.
The scale is the config's, as it is: one scale and one rank for all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, Host, Layer
from lora_param.errors import BrokenFileError, NoFormError, OptionError, OutputError
from lora_param.files.header import read_header
from lora_param.files.safetensors import NAMES, StreamEntry, write_safetensors
from lora_param.files.writer import check_output, replace_directory
from lora_param.formats.base import DORA, Format
from lora_param.formats.peft.encode import encode_pair
from lora_param.formats.peft.reading import Placed
from lora_param.formats.record import (
    found_in,
    load_config,
    pairs_of,
    record,
    scaled_to,
    settings_of,
)
from lora_param.formats.state import StateFile, open_state
from lora_param.targets.regions import WHOLE, Region
from lora_param.targets.weights import Weight, is_embedding_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

LAYERS: tuple[Layer, ...] = ("linear", "conv1d", "embedding", "parameter")
"""The kinds of layer that mlx-lm adapts."""

_WEIGHTS, _CONFIG = "adapters.safetensors", "adapter_config.json"
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_A, _B, _M = ".lora_a", ".lora_b", ".m"
_LAYER = re.compile(r"(.+\.)?layers\.\d+\.(?P<key>.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def _recognise(path: Path) -> bool:
    if path.is_dir():
        return (path / _WEIGHTS).is_file()
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return False
    return any(n.endswith((_A, _B)) for n in read_header(path).entries)


def _read(path: Path, *, layout: str | None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose layers tell how W is")
    weights = path / _WEIGHTS if path.is_dir() else path
    other = next((n for n in _PEFT if path.is_dir() and (path / n).is_file()), None)
    if other:
        raise BrokenFileError(
            path, f"it holds both {_WEIGHTS} and {other}; give one of the two files"
        )
    file, config = open_state(weights), weights.parent / _CONFIG
    if not config.is_file():
        raise BrokenFileError(
            weights, f"there is no {_CONFIG} beside it, which tells the scale of its factors"
        )
    return _settle(file, _modules(file), _parameters(config), None)


def _modules(file: StateFile) -> list[str]:
    """The modules of a file.

    Raises:
        BrokenFileError: a key of another convention, a half alone, or sizes that do not fit.
    """
    found: dict[str, None] = {}
    for key in file.shapes:
        end = next((e for e in (_A, _B, _M) if key.endswith(e)), None)
        if end is None:
            raise BrokenFileError(
                file.path, f"the key {key} is none of mlx's (X.lora_a, X.lora_b, X.m)"
            )
        found[key.removesuffix(end)] = None
    for module in found:
        for end in (_A, _B):
            if f"{module}{end}" not in file.shapes:
                raise BrokenFileError(
                    file.path,
                    f"a lora_a and a lora_b belong together, and there is no {module}{end}",
                )
        A, B = (file.shapes[f"{module}{e}"] for e in (_A, _B))
        plain = len(A) == len(B) == 2 and A[1] == B[0]
        stack = len(A) == len(B) == 3 and A[0] == B[0] and A[1] == B[2]
        if not (plain or stack) or 0 in (*A, *B):
            raise BrokenFileError(file.path, f"the factors of {module} do not fit: {A} and {B}")
    return list(found)


def _parameters(path: Path) -> dict[str, Any]:
    """`lora_parameters` of the config, with `fine_tune_type`.

    Raises:
        BrokenFileError: it says no scale, or is of another kind of training.
    """
    config = load_config(path)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise BrokenFileError(path, f"its fine_tune_type is {kind!r}, and not lora or dora")
    found = config.get("lora_parameters")
    found = found if isinstance(found, dict) else {}
    scale = found.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise BrokenFileError(path, f"its lora_parameters hold no scale, but {found!r:.80}")
    return {**found, "fine_tune_type": kind, "config": config}


def _settle(
    file: StateFile, modules: list[str], parameters: dict[str, Any], host: Host | None
) -> Adapter:
    there = {} if host is None else found_in(host, [f"{m}.weight" for m in modules])
    placed = [_placed(file, m, parameters, there.get(f"{m}.weight")) for m in modules]
    return record(
        placed,
        file.path,
        "mlx",
        tool="mlx",
        host=host,
        extra={"config": parameters["config"]},
        settle=partial(_settle, file, modules, parameters) if host is None else None,
    )


def _placed(file: StateFile, module: str, parameters: dict[str, Any], W: Weight | None) -> Placed:
    a, b, m = (f"{module}{end}" for end in (_A, _B, _M))
    A, B = file.shapes[a], file.shapes[b]
    stack = len(A) == 3
    rank = A[1]
    if parameters.get("rank", rank) != rank:
        raise BrokenFileError(
            file.path,
            f"{module} is of rank {rank}, and its {_CONFIG} says {parameters['rank']}",
        )
    if (parameters["fine_tune_type"] == "dora") != (m in file.shapes):
        has = "lengths" if m in file.shapes else "no lengths"
        raise BrokenFileError(
            file.path,
            f"{module} has {has} (m), and its {_CONFIG} says {parameters['fine_tune_type']}",
        )
    read_a, read_b = (partial(file.tensors.__getitem__, k) for k in (a, b))
    makers: dict[str, Callable[[], Tensor]]
    layer: Layer
    if stack:
        shape: tuple[int, ...] = (A[0], B[1], A[2])
        makers, layer, turned = {"lora_A": read_a, "lora_B": read_b}, "parameter", False
    else:
        turned = _is_turned(W, (B[1], A[0]), f"{module}.weight")
        shape = (A[0], B[1]) if turned else (B[1], A[0])
        if turned:
            makers = {"lora_A": read_b, "lora_B": read_a}
            is_linear = W is not None and W.in_first is True
            layer = "conv1d" if is_linear else "embedding"
        else:
            makers = {
                "lora_A": lambda: read_a().T.contiguous(),
                "lora_B": lambda: read_b().T.contiguous(),
            }
            layer = "linear"
    variant = "lora"
    if m in file.shapes:
        variant = "dora_columns" if layer == "conv1d" else "dora"
        if stack or math.prod(file.shapes[m]) != shape[1 if layer == "conv1d" else 0]:
            raise BrokenFileError(file.path, f"{m} is {file.shapes[m]}, for a weight of {shape}")
        makers["magnitude"] = lambda: file.tensors[m].flatten()
    settings, strength = settings_of(
        rank, float(parameters["scale"]), variant=variant, scaling="constant"
    )
    region = Region(stacked=True) if stack else WHOLE
    apart = () if W is None else W.tied
    return Placed(
        f"{module}.weight", settings, shape, makers, layer, region, strength=strength, apart=apart
    )


def _is_turned(W: Weight | None, matrix: tuple[int, int], name: str) -> bool:
    """W is (in, out): by its shape, else its class, else its name."""
    if W is None:
        return is_embedding_name(name)
    if matrix[0] != matrix[1]:
        return W.shape == matrix[::-1]
    if W.classes:
        return "Embedding" in W.classes or W.in_first is True
    return is_embedding_name(name)


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    real = check_output(path, force=force, directory=True)
    if real.is_dir() and (
        other := [p.name for p in real.iterdir() if p.name not in (_WEIGHTS, _CONFIG)]
    ):
        raise OutputError(path, f"it holds other things than an mlx adapter, such as {other[0]}")
    pairs = pairs_of(adapter, "mlx", LAYERS, dora=True, any_side=True)
    with_lengths = {p.magnitude is not None for p, _ in pairs.values()}
    if len(with_lengths) > 1:
        raise NoFormError(
            adapter.source,
            "DoRA on some targets and not on others",
            "and mlx's fine_tune_type is for all of them",
            "bake one part of it, and write the other",
        )
    rank = max(p.rank for p, _ in pairs.values())
    scales = [p.scale for p, _ in pairs.values()]
    scale = max(sorted(set(scales)), key=scales.count)
    tensors: dict[str, Tensor] = {}
    keys: set[str] = set()
    for name, (pair, kind) in pairs.items():
        module = name.removesuffix(".weight")
        if (
            not name.endswith(".weight")
            or _EXPERT.search(name)
            or (kind == "parameter" and pair.A.dim() != 3)
        ):
            raise NoFormError(
                adapter.source,
                name,
                "which is no layer of mlx's: it has experts stacked, as switch_mlp",
                "bake it (lora-param bake), or leave it out",
            )
        pair.B, pair.scale = scaled_to(pair, scale), scale
        a, b = _filled(pair.A, rank, -2), _filled(pair.B, rank, -1)
        if a.dim() == 2:
            pair.A, pair.B = a, b
            A, B = encode_pair(pair, kind, adapter.base[name].shape)
            a, b = A.T, B.T
        tensors |= {f"{module}{_A}": a.contiguous(), f"{module}{_B}": b.contiguous()}
        if pair.magnitude is not None:
            of_rows = a.shape[0] if kind == "embedding" else b.shape[1]
            if pair.magnitude.numel() != of_rows or pair.magnitude.numel() != len(pair.magnitude):
                raise NoFormError(
                    adapter.source,
                    name,
                    "DoRA over the other side of the weight than mlx's",
                    "bake it (lora-param bake), or give --lossy",
                )
            tensors[f"{module}{_M}"] = pair.magnitude.flatten().contiguous()
        match = _LAYER.fullmatch(module)
        keys.add(match["key"] if match else module)
    config = _config(adapter, rank, scale, keys, dora=with_lengths == {True})
    entries: dict[str, StreamEntry] = {
        n: (NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), partial(_itself, t))
        for n, t in tensors.items()
    }
    with replace_directory(path, force=force, sync=sync) as directory:
        (directory / _CONFIG).write_text(json.dumps(config, indent=4, sort_keys=True), "utf-8")
        write_safetensors(directory / _WEIGHTS, entries, {"format": "mlx"}, sync=False)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _filled(factor: Tensor, rank: int, axis: int) -> Tensor:
    """A factor with zeros up to a rank, which mlx has one of."""
    import torch

    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _config(
    adapter: Adapter, rank: int, scale: float, keys: set[str], *, dora: bool
) -> dict[str, Any]:
    known = adapter.extra.get("mlx", {}).get("config", {})
    dropouts = {t.settings.dropout for t in adapter.targets.values()}
    parameters = {
        "dropout": max(dropouts),
        "keys": sorted(keys),
        "rank": rank,
        "scale": scale,
    }
    return {
        **known,
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {**known.get("lora_parameters", {}), **parameters},
        "num_layers": -1,  # all of them: which have factors, the file says
    }


FORMAT = Format("mlx", _recognise, _read, _write, LAYERS, DORA)
