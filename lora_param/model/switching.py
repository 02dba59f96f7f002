"""What is changed on an adapter while it stays attached: on, off, and how strong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_param.errors import OptionError
from lora_param.model.sites import Patterns, chosen_loras

__all__ = ["disabled", "set_scale", "switch"]


def switch(
    model: nn.Module,
    enabled: bool,
    targets: Patterns | None = None,
    *,
    adapter: str | None = None,
) -> None:
    """What `lora_param.enable` and `disable` do on a live model."""
    for lora in chosen_loras(model, targets, adapter=adapter):
        lora.enabled = enabled


@contextmanager
def disabled(
    model: nn.Module, targets: Patterns | None = None, *, adapter: str | None = None
) -> Iterator[None]:
    """Leave updates out within a `with` block; what was enabled before is enabled after.

    Example:
        >>> import lora_param as lp
        >>> model = lp.apply(nn.Linear(4, 4), ["weight"], rank=2)
        >>> with disabled(model):
        ...     type(model.weight).__name__
        'Parameter'
    """
    before = [(lora, lora.enabled) for lora in chosen_loras(model, targets, adapter=adapter)]
    try:
        switch(model, False, targets, adapter=adapter)
        yield
    finally:
        for lora, was in before:
            lora.enabled = was


def set_scale(
    model: nn.Module,
    factor: float,
    targets: Patterns | None = None,
    *,
    adapter: str | None = None,
) -> None:
    """Set the strength of updates: 1.0 is as trained, 0.5 half of it, -1.0 its opposite.

    Setting it again replaces it; nothing accumulates.

    Raises:
        OptionError: the factor is not a finite number.
        NoAdapterError, TargetError: as for `enable`.
    """
    if not math.isfinite(factor):
        raise OptionError("factor", factor, "a finite number")
    for lora in chosen_loras(model, targets, adapter=adapter):
        lora.configure(lora.settings, float(factor))
