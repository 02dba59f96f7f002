"""`Checkpoint`: weights in a file, as one mapping name → tensor that is read as it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.files.safetensors import tensor_bytes
from lora_param.fingerprint import BaseWeight, tensor_base_weight
from lora_param.targets.weights import Weight
from lora_param.weight.blocks import BLOCK

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["Checkpoint", "packed_reason", "packed_reasons"]

# What quantized formats store beside a packed weight X.weight (or X itself).
_BESIDE_NAME = ("_scale", "_scale_inv", "_scales", "_absmax", ".absmax", "_blocks", "_packed")
_BESIDE_MODULE = (".scale_weight", ".scales", ".qzeros", ".absmax", ".weight_packed")
_OWNERS = ("", ".weight", ".qweight")
_STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))


class Checkpoint(Mapping[str, "torch.Tensor"], ABC):
    """A mapping from the names of weights to CPU tensors, each read when it is asked for.

    The tensors are views of the file: do not write into them.

    Attributes:
        path: the file, the directory, or the `python:` text it was opened from.
        key: the dotted name of the nested state dict it shows, "" for the whole file.

    >>> with open_checkpoint("model.safetensors") as checkpoint:  # doctest: +SKIP
    ...     checkpoint["fc.weight"].shape
    torch.Size([10, 20])
    """

    path: Path | str
    key: str = ""
    _weights: dict[str, Weight] | None = None

    @abstractmethod
    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor of this name, on the CPU. KeyError for a name that the file lacks."""

    @abstractmethod
    def _describe(self) -> dict[str, Weight]:
        """Every entry, buffers and integers included, in the order of the file."""

    @property
    def weights(self) -> dict[str, Weight]:
        """Name, shape, dtype and ties of every entry, read from headers alone where they exist."""
        if self._weights is None:
            self._weights = self._describe()
        return self._weights

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, tied ones counted under each name."""
        return sum(t.numel() * t.element_size() for t in self.values())

    @property
    def config(self) -> Mapping[str, Any]:
        """What a config.json beside it says; empty where there is none."""
        return {}

    @property
    def model_type(self) -> str | None:
        """What kind of model it is, where its config says so."""
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def raw(self, name: str) -> bytes:
        """The bytes of the tensor of this name; for small ones that are no numbers."""
        return bytes(tensor_bytes(self[name]))

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor of this name as a float32 array, for statistics."""
        import torch

        array: NDArray[np.float32] = self[name].to(torch.float32).numpy()
        return array

    def flat_blocks(self, name: str, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """The elements `start` to `stop` of a tensor, as `array` has them, a block at a time."""
        flat = self.array(name).reshape(-1)[start:stop]
        return (flat[i : i + BLOCK] for i in range(0, len(flat), BLOCK))

    def base_weight(self, name: str) -> BaseWeight:
        """Fingerprint of one entry; reads no more than the sampled elements."""
        return tensor_base_weight(self[name])

    def fingerprint(
        self, names: Iterable[str] | None = None, hashed: Container[str] | None = None
    ) -> dict[str, BaseWeight]:
        """Fingerprints by name, of the entries named (names it lacks are left out) or of all.

        Args:
            names: which.
            hashed: those whose values are sampled; None for all. Of the others nothing is read.
        """
        wanted = self if names is None else [n for n in dict.fromkeys(names) if n in self]
        return {
            name: self.base_weight(name)
            if hashed is None or name in hashed
            else BaseWeight(self.weights[name].shape, self.weights[name].dtype)
            for name in wanted
        }

    def close(self) -> None:
        """Let go of open files; tensors already given out stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other  # Mapping would compare tensors with ==, which has no truth value


def packed_reason(name: str, names: Mapping[str, object]) -> str:
    """Why the entry looks like quantized storage, or "".

    >>> packed_reason("q.weight", {"q.weight": 0, "q.weight_scale": 0})
    'quantized: q.weight_scale is stored beside it'
    >>> packed_reason("q.weight_scale", {"q.weight": 0, "q.weight_scale": 0})
    'part of the quantized q.weight'
    """
    beside = [f"{name}{end}" for end in _BESIDE_NAME]
    stem, _, last = name.rpartition(".")
    if last in ("weight", "qweight"):
        beside += [f"{stem}{end}" for end in _BESIDE_MODULE]
        beside += [f"{name}{end}" for end in _STATES]
    found = next((n for n in beside if n in names), None)
    if found:
        return f"quantized: {found} is stored beside it"
    owner = _scaled_by(name, names)
    return f"part of the quantized {owner}" if owner else ""


def packed_reasons(names: Mapping[str, object]) -> dict[str, str]:
    """`packed_reason` of every name that has one.

    Most names of most files are not looked at twice: without something beside a weight there is
    nothing packed.
    """
    ends = (*_BESIDE_NAME, *_BESIDE_MODULE, *_STATES)
    found: dict[str, str] = {}
    for beside in names:
        if not beside.endswith(ends):
            continue
        owners = [beside.removesuffix(end) for end in ends if beside.endswith(end)]
        for name in (beside, *(f"{o}{last}" for o in owners for last in _OWNERS)):
            if name in names and name not in found and (reason := packed_reason(name, names)):
                found[name] = reason
    return found


def _scaled_by(name: str, names: Mapping[str, object]) -> str:
    """The packed weight that the entry belongs to, as its scale or the like, or ""."""
    for end in _BESIDE_NAME:
        if name.endswith(end) and (owner := name.removesuffix(end)) in names:
            return owner
    for end in _BESIDE_MODULE:
        for kind in ("weight", "qweight"):
            if name.endswith(end) and (owner := f"{name.removesuffix(end)}.{kind}") in names:
                return owner
    return ""
