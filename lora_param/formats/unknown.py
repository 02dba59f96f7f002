"""What to say of a file that is given as an adapter and is none."""

from __future__ import annotations

import re
from pathlib import Path

from lora_param.errors import UnknownFileError
from lora_param.files.header import read_header

__all__ = ["ACCEPTED", "unknown_adapter"]

_FAMILIES = (
    (re.compile(r"^oft_unet_"), "an OFT adapter of sd-scripts"),
    (re.compile(r"\.(hada_w1_a|lokr_w1(_a)?|oft_blocks)$"), "a LyCORIS adapter of another trainer"),
)


ACCEPTED = (
    "an adapter file (.safetensors), as lora-param apply or lora_param.save writes it, a "
    "directory of PEFT (adapter_config.json and adapter_model.safetensors), or an adapter of "
    "sd-scripts or LyCORIS (lora_unet_..., lycoris_...), diffusers, loralib, minLoRA, torchtune, "
    "mlx-lm or llama.cpp"
)


def unknown_adapter(path: Path) -> UnknownFileError:
    """The error that says what the path seems to hold instead."""
    accepted = ACCEPTED
    if path.is_dir():
        return UnknownFileError(path, "a directory", accepted)
    if path.suffix != ".safetensors":
        found = "not a .safetensors file, and without factors in keys that are known"
        return UnknownFileError(path, found, accepted)
    names = list(read_header(path).entries)
    what = next(
        (
            f"{what}, which is not supported yet"
            for form, what in _FAMILIES
            if any(form.search(name) for name in names)
        ),
        "a model",
    )
    found = f"a file without a lora_param adapter; it looks like {what}"
    return UnknownFileError(
        path, found if names else "a checkpoint without weights, not an adapter", accepted
    )
