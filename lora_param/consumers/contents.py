"""The contents of an adapter, whatever wrote it: its tensors by module and role, and its config.

Read without torch, but for a file of torch.save (`adapter_model.bin`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import BrokenFileError, MissingFileError, UnknownFileError
from lora_param.files.gguf import read_type
from lora_param.files.safetensors import SafetensorsFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PARTS", "Contents", "Module", "read_contents"]

Array = Callable[[], "NDArray[np.float32]"]

_ACCEPTED = "an adapter: a file of tensors, or a directory with adapter_config.json"
_PICKLES = (".pt", ".pth", ".ckpt")
_MLX = "adapters.safetensors"
PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
"""How keys of diffusers begin."""
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ENDS = (
    (r"\.lora_A(\.\w+)?\.weight", "peft", "A"),
    (r"\.lora_B(\.\w+)?\.weight", "peft", "B"),
    (r"\.lora_embedding_A(\.\w+)?", "peft", "A"),
    (r"\.lora_embedding_B(\.\w+)?", "peft", "B"),
    (r"\.lora_magnitude_vector(\.weight|\.\w+\.weight|)", "peft", "magnitude"),
    (r"\.lora_B(\.\w+)?\.bias", "peft", "bias"),
    (r"\.token_adapter\.trainable_tokens_delta", "peft", "rows"),
    (r"\.lora_down\.weight", "kohya", "A"),
    (r"\.lora_up\.weight", "kohya", "B"),
    (r"\.lora_mid\.weight", "lycoris", "mid"),
    (r"\.alpha", "kohya", "alpha"),
    (r"\.dora_scale", "kohya", "magnitude"),
    (r"\.(hada_\w+)", "lycoris", "loha"),
    (r"\.(lokr_\w+)", "lycoris", "lokr"),
    (r"\.(oft_\w+)(\.weight)?", "lycoris", "oft"),
    (r"(\.processor)?\.\w*lora\.down\.weight", "diffusers", "A"),
    (r"(\.processor)?\.\w*lora\.up\.weight", "diffusers", "B"),
    (r"\.parametrizations\.\w+\.\d+\.lora_A", "minlora", "A"),
    (r"\.parametrizations\.\w+\.\d+\.lora_B", "minlora", "B"),
    (r"\.lora_A", "native", "A"),
    (r"\.lora_B", "native", "B"),
    (r"\.lora_M", "native", "M"),
    (r"\.magnitude", "native", "magnitude"),
    (r"\.lora_a\.weight", "torchtune", "A"),
    (r"\.lora_b\.weight", "torchtune", "B"),
    (r"(?<=\.weight)\.lora_a", "gguf", "A"),
    (r"(?<=\.weight)\.lora_b", "gguf", "B"),
    (r"\.lora_a", "mlx", "A"),
    (r"\.lora_b", "mlx", "B"),
    (r"\.m", "mlx", "magnitude"),
)
_EXPRESSIONS = tuple((re.compile(f"(?P<module>.*){e}"), c, r) for e, c, r in _ENDS)


@dataclass
class Module:
    """What a file holds for one module: names of tensors by role, and their shapes."""

    tensors: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Contents:
    """The parts of an adapter, read.

    Attributes:
        path: what was asked about.
        config: PEFT's, {} where there is none.
        shapes: shape of each tensor.
        arrays: the values of each.
        metadata: of a safetensors file.
        kind: native, peft, kohya, lycoris, diffusers, gguf, minlora, loralib, torchtune or mlx.
        modules: what there is of each module, by its name in the keys.
        conventions: convention → the keys that are written in it.
        other: keys that are no part of an update.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    arrays: dict[str, Array]
    metadata: dict[str, str]
    kind: str = ""
    modules: dict[str, Module] = field(default_factory=dict)
    conventions: dict[str, list[str]] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)


def read_contents(path: Path) -> Contents:
    """Read what is needed to judge an adapter.

    Raises:
        MissingFileError: nothing is there.
        UnknownFileError: it is no adapter.
        BrokenFileError: a file is damaged.
    """
    found = _read(path)
    for key in found.shapes:
        place = _place(key)
        if place is None:
            found.other.append(key)
            continue
        module, convention, role = place
        found.conventions.setdefault(convention, []).append(key)
        own = found.modules.setdefault(module, Module())
        own.tensors[role], own.shapes[role] = key, found.shapes[key]
    found.kind = _kind(found)
    for m in found.modules.values():
        _turn(found.kind, m)
    return found


def _turn(kind: str, m: Module) -> None:
    """Shapes of A as (rank, in) and of B as (out, rank), of tools that store them otherwise."""
    A, B = m.shapes.get("A", ()), m.shapes.get("B", ())
    if len(A) != 2 or len(B) != 2:
        return
    swapped = kind == "minlora" and A[0] != B[1] and A[1] == B[0]  # an embedding's
    if kind == "mlx" or swapped:
        m.shapes["A"], m.shapes["B"] = A[::-1], B[::-1]


def _read(path: Path) -> Contents:
    if not path.exists():
        raise MissingFileError(path, _ACCEPTED)
    if path.is_file():
        kind = path.suffix.lower()
        if kind in _PICKLES or read_type(path) == "adapter":
            return _of_file(path, path, {})
        if kind != ".safetensors":
            raise UnknownFileError(path, "not a .safetensors file", _ACCEPTED)
        beside = path.parent / "adapter_config.json"
        config = _config(beside) if path.name in _WEIGHTS and beside.is_file() else {}
        return _of_file(path, path, config)
    if (path / _MLX).is_file():
        return _of_file(path, path / _MLX, {})
    config_path = path / "adapter_config.json"
    weights = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if not config_path.is_file():
        what = (
            "weights without adapter_config.json" if weights else "a directory without an adapter"
        )
        raise UnknownFileError(path, what, _ACCEPTED)
    if not weights:
        raise UnknownFileError(path, "adapter_config.json without weights", _ACCEPTED)
    return _of_file(path, weights[0], _config(config_path))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(path, str(error)) from None
    if not isinstance(config, dict):
        raise BrokenFileError(path, f"it holds a {type(config).__name__}, not an object")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise BrokenFileError(path, f"its {name} is {value!r:.80}, which is no number")
    return {k: v for k, v in config.items() if v is not None}


def _of_file(path: Path, weights: Path, config: dict[str, Any]) -> Contents:
    if weights.suffix.lower() == ".safetensors":
        file = SafetensorsFile(weights)
        shapes = {name: entry.shape for name, entry in file.header.entries.items()}
        arrays: dict[str, Array] = {name: partial(file.array, name) for name in shapes}
        if not shapes:
            raise BrokenFileError(weights, "it holds no tensor")
        return Contents(path, config, shapes, arrays, file.header.metadata)
    with open_checkpoint(weights) as checkpoint:
        shapes = {name: w.shape for name, w in checkpoint.weights.items()}
        held = {name: checkpoint.array(name) for name in shapes}
    return Contents(path, config, shapes, {n: partial(held.__getitem__, n) for n in held}, {})


def _place(key: str) -> tuple[str, str, str] | None:
    """The module, the convention and the role of a key; None for what is no part of an update."""
    for expression, convention, role in _EXPRESSIONS:
        match = expression.fullmatch(key)
        if match is not None:
            return match["module"], convention, role
    return None


def _kind(source: Contents) -> str:
    if "lora_param" in source.metadata:
        return "native"
    ours = source.conventions.get("peft", [])
    if ours and not source.config and all(k.startswith(PARTS) for k in ours):
        return "diffusers"
    if source.config or ours:
        return "peft"
    for kind in ("minlora", "torchtune", "mlx", "lycoris", "kohya", "diffusers", "gguf"):
        if kind in source.conventions:
            return kind
    if "native" in source.conventions:
        return "loralib"
    raise UnknownFileError(source.path, "a file without factors of any known convention", _ACCEPTED)
