"""`QuantizedCheckpoint`: a checkpoint of quantized weights, read as the numbers they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.quantized.packed import Found, View
from lora_param.checkpoint.quantized.registry import find_packed
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, load_json
from lora_param.fingerprint import BaseWeight, tensor_base_weight
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["SIDE_CONFIGS", "QuantizedCheckpoint", "logical"]

SIDE_CONFIGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json in which a method keeps its settings."""

_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_METHODS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class QuantizedCheckpoint(Checkpoint):
    """Quantized weights under the names, shapes and dtypes of the model that they are of.

    Attributes:
        path, key: of the checkpoint as it is stored.
        stored: that checkpoint.
        packed: the weights that a format stores, by name.
        homes: the same weights, by the entry in whose place they lie.
        refused: entries of a format that cannot be read → why.
        told: names of the header's texts that say how the weights are stored.
    """

    def __init__(self, stored: Checkpoint, found: Found) -> None:
        self.path, self.key, self.stored = stored.path, stored.key, stored
        self.packed = {w.name: w for w in found.packed}
        self.homes = {w.home: w for w in found.packed}
        self.told = frozenset(found.told)
        self.refused = found.refused

    def _describe(self) -> dict[str, Weight]:
        members = {n for w in self.packed.values() for n in w.members}
        weights: dict[str, Weight] = {}
        for entry, stored in self.stored.weights.items():
            if (w := self.homes.get(entry)) is not None:
                weights[w.name] = Weight(w.name, w.shape, w.dtype, quantized=w.kind)
            elif entry not in members:
                reason = self.refused.get(entry)
                weights[entry] = stored if reason is None else replace(stored, packed=reason)
        return weights

    @property
    def config(self) -> Mapping[str, Any]:
        """The stored checkpoint's."""
        return self.stored.config

    @property
    def nbytes(self) -> int:
        """Size of all numbers in bytes, as they are read."""
        plain = (w for n, w in self.weights.items() if n not in self.packed)
        size = sum(w.numel * _SIZES.get(w.dtype, 1) for w in plain)
        return size + sum(prod(w.shape) * _SIZES[w.dtype] for w in self.packed.values())

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that a quantized weight is stored as, by role."""
        return {role: self.stored[entry] for role, entry in self.packed[name].entries.items()}

    def numbers(self, name: str) -> torch.Tensor:
        """A quantized weight as float32, before it is rounded to its dtype."""
        return self.packed[name].decode(self.parts(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.packed:
            if name not in self.weights:
                raise KeyError(name)
            return self.stored[name]
        import torch

        dtype: torch.dtype = getattr(torch, self.packed[name].dtype)
        return self.numbers(name).to(dtype)

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor of this name as a float32 array, for statistics."""
        return super().array(name) if name in self.packed else self.stored.array(name)

    def base_weight(self, name: str) -> BaseWeight:
        """Fingerprint of one entry; that of a quantized weight is of its numbers."""
        if name not in self.packed:
            return self.stored.base_weight(name)
        return tensor_base_weight(self[name])

    def close(self) -> None:
        """Close what is stored."""
        self.stored.close()


def logical(stored: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or where it holds quantized weights that can be read, as numbers."""
    if isinstance(stored, DistributedCheckpoint):  # of training: its packed weights are refused
        return stored
    if isinstance(stored, GgufCheckpoint):
        return QuantizedCheckpoint(stored, stored.found())
    config, dtype = _config_of(stored)
    if not config and not any(w.packed or not w.is_float for w in stored.weights.values()):
        return stored
    found = find_packed(View(stored.weights, config, dtype, _metadata(stored), stored.raw))
    return QuantizedCheckpoint(stored, found) if found.packed or found.refused else stored


def _config_of(stored: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """The `quantization_config` that goes with the weights, and the model's dtype."""
    if not isinstance(stored.path, Path):
        return {}, ""
    folder = stored.path if isinstance(stored, DirectoryCheckpoint) else stored.path.parent
    config = load_json(path) if (path := folder / "config.json").is_file() else {}
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, dict) else [config]
    names = [p.get(k) for p in places for k in ("dtype", "torch_dtype")]
    dtype = next((n for n in names if isinstance(n, str) and n in _SIZES), "")
    stated = (p.get(k) for p in places for k in ("quantization_config", "compression_config"))
    found = next((s for s in stated if isinstance(s, dict) and s), None)
    if found is None:
        side = next((n for n in SIDE_CONFIGS if (folder / n).is_file()), None)
        if side is None:
            return {}, dtype
        method = _METHODS.get(side)
        found = {"quant_method": method} if method else {}
        found |= load_json(folder / side)
    return found, dtype


def _metadata(stored: Checkpoint) -> Mapping[str, str]:
    files = stored.parts.values() if isinstance(stored, DirectoryCheckpoint) else [stored]
    texts: dict[str, str] = {}
    for file in files:
        if isinstance(file, SafetensorsCheckpoint):
            texts |= file.metadata
        elif not isinstance(file, PickleCheckpoint):
            break
    return texts
