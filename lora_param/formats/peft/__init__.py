"""PEFT's LoRA: a directory of `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

What PEFT 0.21.2 does is the reference; where an older one differs, `peft_version` tells which.
"""

from __future__ import annotations

from lora_param.formats.base import Format
from lora_param.formats.peft.read import read_peft
from lora_param.formats.peft.source import recognise
from lora_param.formats.peft.write import write_peft

__all__ = ["FORMAT"]

FORMAT = Format("peft", recognise, read_peft, write_peft)
