"""Variants of LoRA, one file each, found by the names in `targets.settings.VARIANTS`."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lora_param.targets.settings import Settings
from lora_param.weight.variants.base import Fresh, Lowered, Variant

__all__ = ["Fresh", "Lowered", "Variant", "variant_named", "variant_of"]


def variant_of(settings: Settings) -> Variant:
    """The variant that settings name, the `VARIANT` of the file so named, in its form."""
    variant = variant_named(settings.variant)
    return variant.of_form(settings.parsed_form) if settings.form else variant


@cache
def variant_named(name: str) -> Variant:
    """The variant of a name in `VARIANTS`, in its plain form."""
    found = import_module(f"{__name__}.{name}").VARIANT
    assert isinstance(found, Variant)
    return found
