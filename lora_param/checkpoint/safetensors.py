"""A `.safetensors` file as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from lora_param.checkpoint.base import Checkpoint, packed_reasons
from lora_param.files.header import DTYPES
from lora_param.files.safetensors import SafetensorsFile
from lora_param.targets.weights import Weight

__all__ = ["SafetensorsCheckpoint"]


class SafetensorsCheckpoint(SafetensorsFile, Checkpoint):
    """One `.safetensors` file, its header checked when it is opened.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is not a whole and consistent safetensors file.
    """

    path: Path

    def _describe(self) -> dict[str, Weight]:
        entries = self.header.entries
        packed = packed_reasons(entries)
        return {
            name: Weight(
                name,
                e.torch_shape,
                e.torch_dtype,
                packed=packed.get(name)
                or (
                    f"packed as {e.dtype}"
                    if DTYPES[e.dtype][0] < 8 or e.dtype.startswith("F6_")
                    else ""
                ),
            )
            for name, e in entries.items()
        }
