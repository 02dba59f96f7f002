"""The adapters of LyCORIS: sd-scripts' form, with further kinds of update (see `lycoris_kinds`).

Both are read as one, for a file may hold LoRA beside others, and each is written: `kohya` is what
sd-scripts reads by itself, LoRA alone.
"""

from __future__ import annotations

from pathlib import Path

from lora_param.adapter import Adapter
from lora_param.formats.base import Format
from lora_param.formats.kohya import read_modules, write_modules

__all__ = ["FORMAT"]


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    write_modules(adapter, path, lycoris=True, force=force, sync=sync)


FORMAT = Format("lycoris", lambda _: False, read_modules, _write)
"""No path is recognised as this format: `kohya` reads it."""
