"""What to say of a file that is given as an adapter and is none."""

from __future__ import annotations

from pathlib import Path

from lora_param.errors import UnknownFileError
from lora_param.files.header import read_header

__all__ = ["ACCEPTED", "unknown_adapter"]

_FAMILIES = (((".hada_w1_a", ".lokr_w1", ".lokr_w1_a"), "a LyCORIS adapter"),)


ACCEPTED = (
    "an adapter file (.safetensors), as lora-param apply or lora_param.save writes it, a "
    "directory of PEFT (adapter_config.json and adapter_model.safetensors), or an adapter of "
    "sd-scripts (lora_unet_...), diffusers, loralib, minLoRA, torchtune, mlx-lm or llama.cpp"
)


def unknown_adapter(path: Path) -> UnknownFileError:
    """The error that says what the path seems to hold instead."""
    accepted = ACCEPTED
    if path.is_dir():
        return UnknownFileError(path, "a directory", accepted)
    if path.suffix != ".safetensors":
        return UnknownFileError(path, "not a .safetensors file", accepted)
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
    return UnknownFileError(
        path, found if names else "a checkpoint without weights, not an adapter", accepted
    )
