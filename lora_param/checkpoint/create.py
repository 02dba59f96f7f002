"""A fresh adapter for a checkpoint, without the model's code."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Unpack

from lora_param.adapter import Adapter, AdapterTarget, check_name
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import OptionError
from lora_param.files.places import is_far
from lora_param.targets.options import read_options, takes_settings
from lora_param.targets.plan import Plan, PlannedTarget, Tied, make_plan
from lora_param.targets.settings import SettingsOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["create_adapter"]


@takes_settings
def create_adapter(
    base: str | os.PathLike[str],
    targets: str | Iterable[str] = "all-linear",
    *,
    exclude: str | Iterable[str] = (),
    tied: Tied = "error",
    seed: int | None = None,
    key: str | None = None,
    name: str = "default",
    **options: Unpack[SettingsOptions],
) -> tuple[Plan, Adapter]:
    """Choose weights of a checkpoint and make fresh factors for them, in memory.

    Args:
        base: a checkpoint of any kind that `open_checkpoint` takes.
        targets: patterns of the target language.
        exclude: patterns that take away.
        tied: what to do about a tensor with several names of which only some are targeted.
        seed: of the factors: the same seed gives the same bytes. None takes torch's generator.
        key: dotted name of the nested state dict in a pickle.
        name: the adapter's name.
        **options: the settings of what the patterns do not set.

    Returns:
        The plan, and an adapter with factors in fp32 (fp64 for fp64 weights) and the fingerprint
        of each targeted weight; of a base on another machine without the hash of its values, for
        a sample of these would take as long as all of them.

    Raises:
        TargetError: see `make_plan`.
        OptionError, UnknownOptionError: a setting outside its accepted values, or none.
        FileError: the base cannot be read.

    >>> plan, adapter = create_adapter("model.safetensors", ["q_proj"])  # doctest: +SKIP
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise OptionError("seed", seed, "a whole number from 0 to 2**64 - 1")
    check_name(name)
    settings = read_options(create_adapter, options)
    with open_checkpoint(base, key) as checkpoint:
        plan = make_plan(checkpoint.weights, targets, exclude=exclude, settings=settings, tied=tied)
        import torch

        names = [p.target.name for p in plan.targets]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        for planned in plan.targets:
            factors = _fresh(checkpoint, planned, generator)
            tensors |= {f"{planned.target}.{n}": t for n, t in factors.items()}
        return plan, Adapter(
            {str(p.target): AdapterTarget.from_plan(p) for p in plan.targets},
            tensors,
            checkpoint.fingerprint(names, () if is_far(checkpoint.path) else None),
            name,
            "the new adapter",
        )


def _fresh(
    checkpoint: Checkpoint, planned: PlannedTarget, generator: torch.Generator | None
) -> dict[str, Tensor]:
    import torch

    from lora_param.weight.init import fresh_tensors

    def matrix() -> Tensor:
        return checkpoint[planned.target.name][planned.target.region.index].reshape(planned.matrix)

    dtype = torch.float64 if planned.weight.dtype == "float64" else torch.float32
    return fresh_tensors(planned.settings, planned.matrix, matrix, dtype=dtype, generator=generator)
