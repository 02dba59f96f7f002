"""How far a quantized base is from the one it was made of, against what an adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.measures import BakedTarget
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.quantized.logical import QuantizedCheckpoint
from lora_param.errors import OptionError, listed, worded

__all__ = ["advice", "quantization_errors"]


def quantization_errors(
    merging: Merging, base: QuantizedCheckpoint, original: Checkpoint
) -> dict[str, float]:
    """‖W - W_original‖ / ‖W‖ of each target on a quantized weight, by the target's key.

    Raises:
        OptionError: the original lacks such a weight, or has it of another shape, or not readable.
    """
    import torch

    shapes = {n: w.shape for n, w in original.weights.items() if w.is_float and not w.packed}
    targets = {p.key: p for p in merging.targets if p.target.target.name in base.packed}
    names = dict.fromkeys(p.target.target.name for p in targets.values())
    if wrong := [n for n in names if shapes.get(n) != base.packed[n].shape]:
        meant = f"a checkpoint that holds {listed(wrong)} of the same shape"
        raise OptionError(worded("original", "--original"), str(original.path), meant)
    found: dict[str, float] = {}
    for key, piece in targets.items():
        name, index = piece.target.target.name, piece.region.index
        W = base[name].float()[index]
        norm = float(torch.linalg.vector_norm(W))
        error = float(torch.linalg.vector_norm(W - original[name].float()[index]))
        found[key] = error / norm if norm else 0.0
    return found


def advice(rows: Sequence[BakedTarget], base: object, original: object) -> str:
    """What the errors of quantization mean for where to bake, in a sentence or two."""
    ratios = [r.quantization_error for r in rows if r.quantization_error is not None and not r.dead]
    if not ratios:
        return ""
    middle = median(ratios)
    said = (
        f"The quantization of {base} moved its weights by {middle:.3g} times the update (median)."
    )
    if middle > 1:
        return (
            f"{said} An adapter that was trained on the quantized base belongs on it: in "
            f"{original} the update would be smaller than the difference between the two."
        )
    return (
        f"{said} Baking into {original} instead keeps its precision: it is usually the better base."
    )
