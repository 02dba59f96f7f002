"""What to say of a file that is given as an adapter and is none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lora_param.checkpoint.header import read_header
from lora_param.errors import UnknownFileError, listed

__all__ = ["unknown_adapter"]

_FAMILIES = (
    ((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A"), "a PEFT adapter"),
    ((".lora_down.weight", ".lora_up.weight"), "a kohya adapter"),
    ((".hada_w1_a", ".lokr_w1", ".lokr_w1_a"), "a LyCORIS adapter"),
)


def unknown_adapter(path: Path, formats: Iterable[str]) -> UnknownFileError:
    """The error that says what the path seems to hold instead."""
    accepted = f"an adapter file of the format {listed(formats)}"
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return UnknownFileError(path, "a PEFT adapter, which is not supported yet", accepted)
        return UnknownFileError(path, "a directory", accepted)
    if path.suffix != ".safetensors":
        return UnknownFileError(path, "no .safetensors file", accepted)
    names = list(read_header(path).entries)
    what = next(
        (
            f"{what}, which is not supported yet"
            for ends, what in _FAMILIES
            if any(name.endswith(ends) for name in names)
        ),
        "a model",
    )
    found = f"a file without a lora_param adapter; it looks like {what}"
    return UnknownFileError(path, found if names else "a file without any tensor", accepted)
