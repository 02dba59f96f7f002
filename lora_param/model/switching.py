"""What is changed on an adapter while it stays attached: on, off, how strong, kept built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_param.errors import OptionError
from lora_param.model.cache import keeping
from lora_param.model.chains import chain_of
from lora_param.model.held import hold, switch_lora
from lora_param.model.sites import Patterns, chosen_loras, sites

__all__ = ["cached", "disabled", "set_scale", "switch"]


def switch(
    model: nn.Module,
    enabled: bool,
    targets: Patterns | None = None,
    *,
    adapter: str | None = None,
) -> None:
    """What `lora_param.enable` and `disable` do on a live model."""
    for lora in chosen_loras(model, targets, adapter=adapter):
        switch_lora(lora, enabled)


@contextmanager
def disabled(
    model: nn.Module, targets: Patterns | None = None, *, adapter: str | None = None
) -> Iterator[None]:
    """Leave updates out within a `with` block; what was enabled before is enabled after.

    The updates are out in every thread while any block over them is open. Blocks may nest, and
    those of several threads may overlap; what `enable` or `disable` says meanwhile holds when the
    last one ends. An adapter that is saved within a block is saved as it is outside of it.

    Example:
        >>> import lora_param as lp
        >>> model = lp.apply(nn.Linear(4, 4), ["weight"], rank=2)
        >>> with disabled(model):
        ...     type(model.weight).__name__
        'Parameter'
    """
    with hold(chosen_loras(model, targets, adapter=adapter)):
        yield


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
    try:
        is_finite = math.isfinite(factor)
    except TypeError:  # no number at all
        is_finite = False
    if not is_finite:
        raise OptionError("factor", factor, "a finite number")
    for lora in chosen_loras(model, targets, adapter=adapter):
        lora.configure(lora.settings, float(factor))


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Keep each adapted weight that is read without gradients, within a `with` block.

    Reads that need gradients are as they are outside. A weight is built again when W, a factor, a
    scale or a toggle has changed (writes through `.data` go unseen, as everywhere in torch), when
    another thread reads it, and within `torch.inference_mode` apart from outside of it.

    Memory: a full-size copy of each adapted weight that is read, until the block ends.

    Example:
        >>> import lora_param as lp
        >>> model = lp.apply(nn.Linear(8, 8), ["weight"], rank=2)
        >>> with torch.no_grad(), cached(model):
        ...     for _ in range(3):
        ...         y = model(torch.ones(1, 8))  # W + ΔW is built once
    """
    with keeping(chain_of(site.owner, site.tensor) for site in sites(model)):
        yield
