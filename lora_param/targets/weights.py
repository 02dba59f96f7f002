"""What planning needs to know of a weight: its name, shape, dtype, and where it belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["Weight", "canonical_name", "count_base", "is_buffer_name", "is_embedding_name"]
__all__ += ["weights_from"]

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
_EMBEDDING = re.compile(r"(^|[._])(embed(ding)?s?|emb|wte|wpe)([._\d]|$)|(^|\.)shared\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|classifier|score)(\.|$)")
_LINEAR_CLASSES = {"Linear", "Conv1D"}  # Conv1D: the transposed Linear of transformers


@dataclass(frozen=True, slots=True)
class Weight:
    """A named parameter, as planning sees it.

    Attributes:
        name: its full name.
        shape: its shape.
        dtype: torch's name of its dtype, e.g. "bfloat16".
        classes: names of the owning module's classes, most derived first; empty when unknown
            (a file holds none).
        tied: the other names under which the same tensor is known.
        head: the owning module is the model's output head.
        packed: quantized storage that cannot be read: why it is thought so, or "".
        quantized: the format of quantized storage that is read as numbers, or "".
        in_first: its matrices are stored as (in, out), not (out, in); None where that is unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    classes: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    head: bool = False
    packed: str = ""
    quantized: str = ""
    in_first: bool | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        """It holds floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def unmergeable(self) -> str:
        """Why nothing can be added to its numbers, or ""."""
        if self.packed:
            return self.packed
        if not self.is_float:
            return f"of dtype {self.dtype}"
        if self.dtype.startswith("float4"):
            return f"packed as {self.dtype}"
        return f"empty, of shape {self.shape}" if self.numel == 0 else ""

    @property
    def unsuitable(self) -> str:
        """Why LoRA cannot adapt it, or ""."""
        if not self.unmergeable and len(self.shape) < 2:
            return f"{len(self.shape)}-dimensional"
        return self.unmergeable

    @property
    def not_linear(self) -> str:
        """Why `all-linear` leaves it out, or ""."""
        if self.unsuitable:
            return self.unsuitable
        if is_buffer_name(self.name):
            return "a running statistic, by its name"
        if self.classes and not _LINEAR_CLASSES.intersection(self.classes):
            return f"of a {self.classes[0].removeprefix('Parametrized')}, not of a linear layer"
        if len(self.shape) != 2:
            return f"{len(self.shape)}-dimensional"
        if not self.classes and is_embedding_name(self.name):
            return "an embedding, by its name"
        if self.head:
            return "the output head"
        if not self.classes and _HEAD.search(self.name):
            return "an output head, by its name"
        return ""

    @property
    def not_all_linear(self) -> str | None:
        """Why `all-linear` leaves it out: a reason to show, "" for what it never meant, or None."""
        reason = self.not_linear
        if not reason or self.packed:
            return reason or None
        meant = not self.unsuitable and not is_buffer_name(self.name) and len(self.shape) == 2
        is_linear = not self.classes or _LINEAR_CLASSES.intersection(self.classes)
        return reason if meant and is_linear else ""


def is_embedding_name(name: str) -> bool:
    """The name is one that embeddings usually have."""
    return _EMBEDDING.search(name) is not None


def is_buffer_name(name: str) -> bool:
    """The name is that of a normalisation's running statistics, which a file lists as a weight."""
    return name.rpartition(".")[2] in _BUFFERS


def count_base(weights: Mapping[str, Weight]) -> int:
    """Number of elements of all base weights, tied ones once, buffers and integers not."""
    seen: set[str] = set()
    total = 0
    for weight in weights.values():
        if weight.name in seen or not weight.is_float or is_buffer_name(weight.name):
            continue
        seen.update(weight.tied)
        total += weight.numel
    return total


def weights_from(shapes: Mapping[str, Sequence[int] | Weight]) -> dict[str, Weight]:
    """Take names and shapes as a plan's input."""
    return {
        name: value if isinstance(value, Weight) else Weight(name, tuple(value))
        for name, value in shapes.items()
    }


def canonical_name(name: str) -> str:
    """A parameter's name without what compile, FSDP and checkpoint wrappers put into it."""
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
