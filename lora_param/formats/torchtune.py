"""torchtune's adapters: `X.lora_a.weight` (rank, in), `X.lora_b.weight` (out, rank), `X.magnitude`.

ΔW = alpha/rank·(lora_b @ lora_a). Rank and alpha are in an `adapter_config.json` beside the file
where torchtune wrote one (`r`, `lora_alpha`), and nowhere else. Names are torchtune's: on a model
of transformers they are found through `names/torchtune.txt`, and the rows of q and k are put in its
order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, Host, Layer
from lora_param.errors import BrokenFileError, NoFormError, OptionError, UnsettledError, worded
from lora_param.formats.base import DORA, Format
from lora_param.formats.heads import by_neighbours, heads_for, is_named_so, to_halves
from lora_param.formats.peft.reading import Placed
from lora_param.formats.record import (
    common_alpha,
    load_config,
    needs_alpha,
    pairs_of,
    record,
    scaled_to,
    settings_of,
)
from lora_param.formats.state import StateFile, names_in, open_state, write_state
from lora_param.names.table import names_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

LAYERS: tuple[Layer, ...] = ("linear",)
"""The kinds of layer that torchtune adapts."""

_CONFIG = "adapter_config.json"
_A, _B, _MAGNITUDE = ".lora_a.weight", ".lora_b.weight", ".magnitude"
_OWN = re.compile(
    r"(.+\.)?(layers\.\d+\.(attn\.(q|k|v|output)_proj|mlp\.w[123])|output|tok_embeddings)\.weight"
)
_TURNED = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), True),
    **dict.fromkeys(("qwen2", "qwen3", "phi3"), False),
}
"""By model_type, whether torchtune's rows of q and k are in another order than transformers'."""


def _recognise(path: Path) -> bool:
    names = set(names_in(path))
    halves = [n for n in names if n.endswith((_A, _B))]
    return bool(halves) and not any(n.replace(_A, ".weight") in names - {n} for n in halves)


def _read(path: Path, *, layout: str | None, alpha: float | None = None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose layers tell how W is")
    file = open_state(path)
    modules = _modules(file)
    return _settle(file, modules, _stored_alpha(file, modules, alpha), None)


def _modules(file: StateFile) -> list[str]:
    """The modules of a file.

    Raises:
        BrokenFileError: a key of another convention, a half alone, or sizes that do not fit.
    """
    found: dict[str, None] = {}
    for key in file.shapes:
        end = next((e for e in (_A, _B, _MAGNITUDE) if key.endswith(e)), None)
        if end is None:
            raise BrokenFileError(
                file.path,
                f"the key {key} is none of torchtune's (X.lora_a.weight, X.lora_b.weight, "
                "X.magnitude)",
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
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in (*A, *B):
            raise BrokenFileError(file.path, f"the factors of {module} do not fit: {A} and {B}")
        if math.prod(file.shapes.get(f"{module}{_MAGNITUDE}", B[:1])) != B[0]:
            raise BrokenFileError(file.path, f"{module}{_MAGNITUDE} has not {B[0]} elements")
    return list(found)


def _stored_alpha(file: StateFile, modules: list[str], alpha: float | None) -> float:
    """Alpha: what the config beside says, or the caller.

    Raises:
        UnsettledError: neither does.
        BrokenFileError: the config is for another rank.
        OptionError: both do, and differ.
    """
    beside = file.path.parent / _CONFIG
    config = load_config(beside) if beside.is_file() else {}
    stored, rank = config.get("lora_alpha"), config.get("r")
    if stored is None:
        if alpha is None:
            raise needs_alpha(file.path, modules, "torchtune")
        return alpha
    if not isinstance(stored, int | float) or isinstance(stored, bool):
        raise BrokenFileError(beside, f"lora_alpha is {stored!r}")
    if alpha is not None and alpha != stored:
        raise OptionError("alpha", alpha, f"{stored:g}, as {beside} says")
    ranks = {m: file.shapes[f"{m}{_A}"][0] for m in modules}
    if rank is not None and (other := next((m for m, r in ranks.items() if r != rank), None)):
        raise BrokenFileError(beside, f"r is {rank}, and {other} is of rank {ranks[other]}")
    return float(stored)


def _settle(file: StateFile, modules: list[str], alpha: float, host: Host | None) -> Adapter:
    placed = [_placed(file, module, alpha) for module in modules]
    names = names_of("torchtune")
    theirs = host is not None and is_named_so([p.name for p in placed], names, host)
    if host is not None and not theirs and _is_turned(file, placed, host):
        placed = [to_halves(p, names, host, str(file.path)) for p in placed]
    adapter = record(
        placed,
        file.path,
        "torchtune",
        tool="torchtune",
        extra={"alpha": alpha},
        settle=partial(_settle, file, modules, alpha) if host is None else None,
    )
    adapter.names = names
    return adapter


def _placed(file: StateFile, module: str, alpha: float) -> Placed:
    A, B, magnitude = (f"{module}{end}" for end in (_A, _B, _MAGNITUDE))
    (rank, into), out = file.shapes[A], file.shapes[B][0]
    variant = "dora" if magnitude in file.shapes else "lora"
    settings, strength = settings_of(rank, alpha, variant=variant)
    makers: dict[str, Callable[[], Tensor]] = {
        "lora_A": partial(file.tensors.__getitem__, A),
        "lora_B": partial(file.tensors.__getitem__, B),
    }
    if variant == "dora":
        makers["magnitude"] = lambda: file.tensors[magnitude].flatten()
    name = f"{module}.weight"
    return Placed(name, settings, (out, into), makers, "linear", strength=strength)


def _is_turned(file: StateFile, placed: list[Placed], host: Host) -> bool:
    """The base has the rows of q and k in another order.

    Raises:
        UnsettledError: it is of a kind of which that is not known.
    """
    canonical = names_of("torchtune").canonical
    rotated = [p.name for p in placed if canonical(p.name).endswith(_ROTATED)]
    if not rotated:
        return False
    kind = host.model_type or ""
    if kind not in _TURNED:
        raise UnsettledError(
            str(file.path),
            rotated,
            f"in which order {host.name} has the rows of q and k"
            + (f", of a model_type {kind}" if kind else ", which has no config.json"),
            f"give a model of {', '.join(_TURNED)} with its config, or one in torchtune's names",
        )
    return _TURNED[kind]


_ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    alpha = _alpha(adapter)
    tensors: dict[str, Tensor] = {}
    for name, (pair, _) in pairs_of(adapter, "torchtune", LAYERS, dora=True).items():
        theirs, heads = _theirs(adapter, name)
        B, magnitude = scaled_to(pair, alpha / pair.rank), pair.magnitude
        if heads is not None:
            B = by_neighbours(B, heads)
            magnitude = None if magnitude is None else by_neighbours(magnitude, heads)
        if f"{theirs}{_A}" in tensors:
            raise NoFormError(
                adapter.source, name, f"which torchtune calls {theirs} like another", "leave it out"
            )
        tensors |= {f"{theirs}{_A}": pair.A.contiguous(), f"{theirs}{_B}": B.contiguous()}
        if magnitude is not None:
            tensors[f"{theirs}{_MAGNITUDE}"] = magnitude.contiguous()
    write_state(tensors, path, adapter.source, force=force, sync=sync)


def _theirs(adapter: Adapter, name: str) -> tuple[str, int | None]:
    """torchtune's name of a module, and the heads by which the rows of its weight are put in order.

    Raises:
        UnsettledError: the base, or its config, is needed for the order.
    """
    names = names_of("torchtune")
    if _OWN.fullmatch(name):
        return name.removesuffix(".weight"), None
    found = next((n for n in names.aliases(name) if _OWN.fullmatch(n)), None)
    if found is None:
        return name.removesuffix(".weight"), None
    config: Mapping[str, object] = adapter.config_at_hand
    heads = None
    if names.canonical(name).endswith(_ROTATED):
        kind = config.get("model_type")
        if kind not in _TURNED:
            raise UnsettledError(
                adapter.source,
                [name],
                "in which order torchtune has the rows of q and k of such a model",
                f"give the base with its config ({worded('base=', '--base MODEL')}), of "
                f"{', '.join(_TURNED)}",
            )
        if _TURNED[str(kind)]:
            heads = heads_for(names.canonical(name), config, adapter.source, "the base")
    return found.removesuffix(".weight"), heads


def _alpha(adapter: Adapter) -> float:
    known = adapter.extra.get("torchtune", {}).get("alpha")
    if known is not None:
        return float(known)
    pairs = pairs_of(adapter, "torchtune", LAYERS, dora=True)
    return common_alpha(p for p, _ in pairs.values())


def _unsaid(adapter: Adapter) -> str:
    return f"torchtune's files do not say alpha: read this one with alpha {_alpha(adapter):g}."


FORMAT = Format(
    "torchtune", _recognise, _read, _write, LAYERS, DORA, takes=("alpha",), unsaid=_unsaid
)
