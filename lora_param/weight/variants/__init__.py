"""Variants of LoRA, one file each, found by the names in `targets.settings.VARIANTS`."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lora_param.weight.variants.base import Fresh, Lowered, Variant

__all__ = ["Fresh", "Lowered", "Variant", "variant_named"]


@cache
def variant_named(name: str) -> Variant:
    """The variant of a name in `targets.settings.VARIANTS`: the `VARIANT` of the file so named."""
    found = import_module(f"{__name__}.{name}").VARIANT
    assert isinstance(found, Variant)
    return found
