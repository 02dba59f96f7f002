"""minLoRA's state dicts: `X.parametrizations.weight.0.lora_A` and `lora_B`.

Of a linear layer or a convolution A is (rank, in·k·k), B (out, rank) and ΔW = alpha/rank·(B @ A);
of an embedding, whose weight is stored as (in, out), they are swapped: A (V, rank), B (rank, D) and
ΔW = alpha/rank·(A @ B). Alpha is not stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, Host, Layer
from lora_param.errors import BrokenFileError, NoFormError, OptionError
from lora_param.formats.base import Format
from lora_param.formats.peft.reading import Placed
from lora_param.formats.record import (
    common_alpha,
    found_in,
    needs_alpha,
    pairs_of,
    record,
    scaled_to,
    settings_of,
)
from lora_param.formats.state import StateFile, names_in, open_state, write_state
from lora_param.targets.weights import is_embedding_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

LAYERS: tuple[Layer, ...] = ("linear", "conv", "embedding")
"""The kinds of layer that minLoRA adapts."""

_KEY = re.compile(
    r"(?P<module>(.+\.)?)parametrizations\.(?P<tensor>\w+)\.(?P<index>\d+)\.lora_(?P<half>[AB])"
)
_MASK = ".lora_dropout_mask"


def _recognise(path: Path) -> bool:
    names = names_in(path)
    halves = any(_KEY.fullmatch(n) for n in names)
    return halves and not any(n.endswith(".original") for n in names)  # that is a whole model


def _read(path: Path, *, layout: str | None, alpha: float | None = None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose factors tell how W is")
    file = open_state(path)
    pairs = _pairs(file)
    if alpha is None:
        raise needs_alpha(path, pairs, "minLoRA")
    return _settle(file, pairs, alpha, None)


def _pairs(file: StateFile) -> dict[str, dict[str, str]]:
    """Name of a weight → "A", "B" → key.

    Raises:
        BrokenFileError: a key that is none of minLoRA's, or a half alone.
        NoFormError: a weight with two parametrizations.
    """
    found: dict[str, dict[str, str]] = {}
    indices: dict[str, str] = {}
    for key in file.shapes:
        if key.endswith(_MASK):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise BrokenFileError(
                file.path,
                f"the key {key} is none of minLoRA's (X.parametrizations.weight.0.lora_A), as "
                "others in it are",
            )
        name = f"{match['module']}{match['tensor']}"
        if indices.setdefault(name, match["index"]) != match["index"]:
            raise NoFormError(
                str(file.path),
                f"several adapters on {name}",
                "which are one for each index",
                "save them one by one, and combine them (lora-param combine)",
            )
        found.setdefault(name, {})[match["half"]] = key
    for name, halves in found.items():
        if len(halves) < 2:
            (key,) = halves.values()
            raise BrokenFileError(
                file.path, f"a lora_A and a lora_B belong together, and {name} has {key} alone"
            )
    return found


def _settle(
    file: StateFile, pairs: dict[str, dict[str, str]], alpha: float, host: Host | None
) -> Adapter:
    there = {} if host is None else found_in(host, pairs)
    placed = []
    for name, keys in pairs.items():
        A, B = (file.shapes[keys[half]] for half in "AB")
        swapped = _is_embedding(file, name, A, B)
        rank = A[1] if swapped else A[0]
        matrix = (A[0], B[1]) if swapped else (B[0], A[1])
        settings, strength = settings_of(rank, alpha)
        down, up = (keys["B"], keys["A"]) if swapped else (keys["A"], keys["B"])
        makers: dict[str, Callable[[], Tensor]] = {
            "lora_A": partial(file.tensors.__getitem__, down),
            "lora_B": partial(file.tensors.__getitem__, up),
        }
        W = there.get(name)
        shape: tuple[int, ...] = matrix
        if W is not None and (W.shape[0], math.prod(W.shape[1:])) == matrix:
            shape = W.shape
        layer: Layer = "embedding" if swapped else "conv" if len(shape) > 2 else "linear"
        apart = () if W is None else W.tied
        placed.append(Placed(name, settings, shape, makers, layer, strength=strength, apart=apart))
    settle = partial(_settle, file, pairs, alpha) if host is None else None
    return record(
        placed,
        file.path,
        "minlora",
        tool="minLoRA",
        host=host,
        extra={"alpha": alpha},
        settle=settle,
    )


def _is_embedding(file: StateFile, name: str, A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """Whether A and B are swapped: of the two ways to multiply them, one has a rank in it.

    Raises:
        BrokenFileError: neither has.
    """
    if len(A) == len(B) == 2 and 0 not in (*A, *B):
        plain = A[0] == B[1] and A[0] <= min(B[0], A[1])
        swapped = A[1] == B[0] and A[1] <= min(A[0], B[1])
        if plain and swapped:  # all four sides are equal
            return is_embedding_name(name)
        if plain or swapped:
            return swapped
        if A[0] == B[1] or A[1] == B[0]:  # more rank than the weight has
            return A[0] != B[1]
    raise BrokenFileError(file.path, f"the factors of {name} do not fit: {A} and {B}")


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    pairs = pairs_of(adapter, "minLoRA", LAYERS)
    alpha = _alpha(adapter)
    tensors: dict[str, Tensor] = {}
    for name, (pair, kind) in pairs.items():
        module, _, leaf = name.rpartition(".")
        stem = ".".join(filter(None, [module, "parametrizations", leaf, "0"]))
        A, B = pair.A, scaled_to(pair, alpha / pair.rank)
        if kind == "embedding":
            A, B = B, A
        tensors |= {f"{stem}.lora_A": A.contiguous(), f"{stem}.lora_B": B.contiguous()}
    write_state(tensors, path, adapter.source, force=force, sync=sync)


def _alpha(adapter: Adapter) -> float:
    known = adapter.extra.get("minlora", {}).get("alpha")
    if known is not None:
        return float(known)
    return common_alpha(p for p, _ in pairs_of(adapter, "minLoRA", LAYERS).values())


def _unsaid(adapter: Adapter) -> str:
    return f"minLoRA's files do not say alpha: read this one with alpha {_alpha(adapter):g}."


FORMAT = Format("minlora", _recognise, _read, _write, LAYERS, takes=("alpha",), unsaid=_unsaid)
