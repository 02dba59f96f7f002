"""llama.cpp's adapters: a GGUF file of `general.type` adapter, with one alpha for all.

`NAME.lora_a` is (rank, in) and `NAME.lora_b` (out, rank), NAME being the base's tensor in
llama.cpp's names; of `token_embd.weight` lora_a is (V, rank). ΔW = alpha/rank·(B @ A), each tensor
of its own rank, and B @ A where alpha is 0. On a model of transformers the names are found through
`names/llama.cpp.txt`, and the rows of q and k are put in its order.

It is one file, however long, as every format is.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, Host, Layer
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import (
    BrokenFileError,
    NoFormError,
    NonFiniteError,
    OptionError,
    OutputError,
    UnsettledError,
    worded,
)
from lora_param.files.gguf import (
    Gguf,
    decode_keys,
    encode_gguf,
    encode_keys,
    read_gguf,
    read_type,
)
from lora_param.files.safetensors import tensor_bytes
from lora_param.files.writer import replace_file
from lora_param.formats.base import Format
from lora_param.formats.heads import by_neighbours, heads_for, is_named_so, to_halves
from lora_param.formats.peft.encode import encode_pair
from lora_param.formats.peft.patterns import exact_alpha
from lora_param.formats.peft.reading import Placed
from lora_param.formats.record import found_in, pairs_of, record, scaled_to, settings_of
from lora_param.names.table import names_of
from lora_param.targets.regions import WHOLE, Region

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

LAYERS: tuple[Layer, ...] = ("linear", "embedding", "parameter")
"""The kinds of layer that llama.cpp has factors for."""

_A, _B = ".lora_a", ".lora_b"
_EMBEDDING = "token_embd.weight"
_OWN = re.compile(r"(blk\.\d+\.[a-z0-9_]+|token_embd|output)\.weight")
_ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "mixtral": ("llama", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen2_moe": ("qwen2moe", False),
    "qwen3": ("qwen3", False),
    "qwen3_moe": ("qwen3moe", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3": ("gemma3", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
}
"""model_type of transformers → llama.cpp's architecture, and whether its converter puts the rows of
q and k in another order (`undo_permute` of its LlamaModel and what is derived from it)."""
_TURNED = dict(_ARCHITECTURES.values())


@dataclass(frozen=True)
class _File:
    """What a file holds.

    Attributes:
        path: where it is.
        header: its header.
        keys: its keys.
        tensors: by name, quantized ones as numbers.
        shapes: of those, rows first.
    """

    path: Path
    header: Gguf
    keys: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))


def _recognise(path: Path) -> bool:
    return path.is_file() and read_type(path) == "adapter"


def _read(path: Path, *, layout: str | None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose names tell how W is")
    header = read_gguf(path)
    keys = decode_keys(header)
    if keys.get("adapter.type") != "lora":
        raise BrokenFileError(path, f"its adapter.type is {keys.get('adapter.type')!r}, not lora")
    if "adapter.lora.alpha" not in keys:
        raise BrokenFileError(path, "it has no adapter.lora.alpha")
    if b"adapter.alora.invocation_tokens" in header.keys:
        raise NoFormError(
            str(path),
            "adapter.alora.invocation_tokens",
            "an update that begins at certain tokens, which no weight can hold",
            "use it with llama.cpp",
        )
    with open_checkpoint(path) as checkpoint:
        shapes = {n: w.shape for n, w in checkpoint.weights.items()}
        file = _File(path, header, keys, checkpoint, shapes)
    return _settle(file, _names(file), None)


def _names(file: _File) -> list[str]:
    """The tensors of the base that it has factors for.

    Raises:
        BrokenFileError: a half alone, a name of another convention, or sizes that do not fit.
        NoFormError: a vector that llama.cpp passes over.
    """
    found: dict[str, None] = {}
    for key, shape in file.shapes.items():
        end = next((e for e in (_A, _B) if key.endswith(e)), None)
        if end is None and len(shape) == 1:
            raise NoFormError(
                str(file.path),
                f"the vector {key}",
                "which llama.cpp passes over",
                "take it out, or use the adapter that it was converted from",
            )
        if end is None:
            raise BrokenFileError(file.path, f"the tensor {key} ends in neither {_A} nor {_B}")
        found[key.removesuffix(end)] = None
    for name in found:
        for end in (_A, _B):
            if f"{name}{end}" not in file.shapes:
                raise BrokenFileError(
                    file.path, f"a lora_a and a lora_b belong together, and there is no {name}{end}"
                )
        A, B = (file.shapes[f"{name}{e}"] for e in (_A, _B))
        rank = A[-1] if name == _EMBEDDING else A[-2] if len(A) > 1 else 0
        stacked = len(A) == len(B) == 3 and A[0] == B[0]
        if ((len(A), len(B)) != (2, 2) and not stacked) or rank != B[-1] or 0 in (*A, *B):
            raise BrokenFileError(file.path, f"the factors of {name} do not fit: {A} and {B}")
    return list(found)


def _settle(file: _File, wanted: list[str], host: Host | None) -> Adapter:
    names = names_of("llama.cpp")
    there = {} if host is None else found_in(host, wanted)
    placed = [_placed(file, n, () if n not in there else there[n].tied) for n in wanted]
    rotated = [n for n in wanted if names.canonical(n).endswith(_ROTATED)]
    if host is not None and not is_named_so(wanted, names, host) and _is_turned(file, rotated):
        placed = [to_halves(p, names, host, str(file.path)) for p in placed]
    adapter = record(
        placed,
        file.path,
        "gguf",
        tool="llama.cpp",
        extra={"architecture": file.architecture, "keys": file.header.keys, **_counted(file)},
        settle=partial(_settle, file, wanted) if host is None else None,
    )
    adapter.names = names
    return adapter


def _counted(file: _File) -> dict[str, Any]:
    header = file.header
    return {
        "count": header.count,
        "alignment": header.alignment,
        "version": header.version,
        "alpha": file.keys["adapter.lora.alpha"],
    }


def _is_turned(file: _File, rotated: list[str]) -> bool:
    if not rotated:
        return False
    if file.architecture not in _TURNED:
        raise UnsettledError(
            str(file.path),
            rotated,
            f"in which order llama.cpp has the rows of q and k for {file.architecture!r}",
            f"give a base of {', '.join(_TURNED)}, or the GGUF file itself",
        )
    return _TURNED[file.architecture]


def _placed(file: _File, name: str, apart: tuple[str, ...]) -> Placed:
    a, b = (f"{name}{e}" for e in (_A, _B))
    A, B = file.shapes[a], file.shapes[b]
    read_a, read_b = (partial(file.tensors.__getitem__, k) for k in (a, b))
    rank, alpha = B[-1], float(file.keys["adapter.lora.alpha"])
    if not math.isfinite(alpha):
        raise BrokenFileError(file.path, f"its adapter.lora.alpha is {alpha}")
    settings, strength = settings_of(rank, alpha or float(rank))
    layer: Layer = "linear"
    makers: dict[str, Callable[[], Tensor]] = {"lora_A": read_a, "lora_B": read_b}
    region = WHOLE
    shape: tuple[int, ...] = (B[0], A[-1])
    if name == _EMBEDDING:  # (V, rank) and (D, rank)
        shape, layer = (A[0], B[0]), "embedding"
        makers = {"lora_A": lambda: read_b().T.contiguous(), "lora_B": read_a}
    elif len(A) == 3:
        shape, layer, region = (A[0], B[1], A[2]), "parameter", Region(stacked=True)
    return Placed(name, settings, shape, makers, layer, region, strength=strength, apart=apart)


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    if path.suffix.lower() != ".gguf":
        raise OutputError(path, "the name of llama.cpp's adapter file ends in .gguf")
    pairs = pairs_of(adapter, "llama.cpp", LAYERS)
    architecture, alpha = _architecture(adapter), _alpha(adapter)
    tensors: dict[str, Tensor] = {}
    for name, (pair, kind) in pairs.items():
        theirs, heads = _theirs(adapter, name, architecture)
        A, B = pair.A, scaled_to(pair, alpha / pair.rank if alpha else 1.0)
        if theirs == _EMBEDDING:
            A, B = B, A.T  # (V, rank), (D, rank)
        elif kind == "embedding":
            pair.A, pair.B = A, B
            A, B = encode_pair(pair, kind, adapter.base[name].shape)
        if heads is not None:
            B = by_neighbours(B, heads)
        if f"{theirs}{_A}" in tensors:
            raise NoFormError(
                adapter.source, name, f"which llama.cpp calls {theirs} like another", "leave it out"
            )
        tensors |= {f"{theirs}{_A}": A.contiguous(), f"{theirs}{_B}": B.contiguous()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{key} of {adapter.source}")
    _write_file(adapter, path, architecture, alpha, tensors, force=force, sync=sync)


def _write_file(
    adapter: Adapter,
    path: Path,
    architecture: str,
    alpha: float,
    tensors: Mapping[str, Tensor],
    *,
    force: bool,
    sync: bool,
) -> None:
    import torch

    codes = {torch.float16: 1, torch.bfloat16: 30}
    stored = {
        n: (codes.get(t.dtype, 0), t if t.dtype in codes else t.float())
        for n, t in sorted(tensors.items())
    }
    known = adapter.extra.get("gguf", {})
    if known.get("alpha") == alpha and known.get("architecture") == architecture:
        keys, count, alignment = known["keys"], known["count"], known["alignment"]
        version = known["version"]
    else:
        values: dict[str, str | float] = {
            "general.architecture": architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": float(alpha),
        }
        keys, count, alignment, version = encode_keys(values), len(values), 32, 3
    header = Gguf({}, keys, count, version, alignment, 0, None)
    text, placed, size = encode_gguf(
        header, {n: (code, tuple(t.shape)) for n, (code, t) in stored.items()}, None
    )
    with replace_file(path, force=force, sync=sync) as file:
        file.write(text)
        for name, entry in placed.items():
            file.write(bytes(entry.start - file.tell()))
            file.write(tensor_bytes(stored[name][1]))
        file.write(bytes(size - file.tell()))


def _architecture(adapter: Adapter) -> str:
    """llama.cpp's name of the kind of model.

    Raises:
        UnsettledError: nothing tells it.
        NoFormError: it is none that is known here.
    """
    known = adapter.extra.get("gguf", {}).get("architecture")
    config = adapter.config_at_hand
    own = known or config.get("general.architecture")
    if own:
        return str(own)
    kind = config.get("model_type")
    if kind is None:
        raise UnsettledError(
            adapter.source,
            adapter.targets,
            "what kind of model it is for, which llama.cpp's files say",
            f"give the base with its config.json ({worded('base=', '--base MODEL')})",
        )
    if kind not in _ARCHITECTURES:
        raise NoFormError(
            adapter.source,
            f"weights of a model_type {kind}",
            f"whose names in llama.cpp are not known here ({', '.join(_ARCHITECTURES)} are)",
            "write PEFT's, and convert that with llama.cpp's convert_lora_to_gguf.py",
        )
    return _ARCHITECTURES[str(kind)][0]


def _theirs(adapter: Adapter, name: str, architecture: str) -> tuple[str, int | None]:
    """llama.cpp's name of a weight, and the heads by which its rows are put in order.

    Raises:
        NoFormError: it has no name there.
        UnsettledError: the base's config is needed for the order.
    """
    if _OWN.fullmatch(name):
        return name, None
    names = names_of("llama.cpp")
    found = next((n for n in names.aliases(name) if _OWN.fullmatch(n)), None)
    if found is None:
        raise NoFormError(
            adapter.source,
            name,
            "which has no name in llama.cpp that is known here",
            "bake it (lora-param bake), or leave it out",
        )
    canonical = names.canonical(name)
    turned = canonical.endswith(_ROTATED) and _TURNED.get(architecture, False)
    if not turned:
        return found, None
    return found, heads_for(canonical, adapter.config_at_hand, adapter.source, "the base")


def _alpha(adapter: Adapter) -> float:
    """One alpha that gives every pair its scale; 0, and scales in B, where none of 32 bits does."""
    pairs = pairs_of(adapter, "llama.cpp", LAYERS)
    alphas = {exact_alpha(p.scale, p.rank) for p, _ in pairs.values()}
    alpha = alphas.pop()
    (short,) = struct.unpack("<f", struct.pack("<f", alpha))
    if not alphas and short == alpha:
        return alpha
    return 0.0


FORMAT = Format("gguf", _recognise, _read, _write, LAYERS)
