"""The update of a target as one pair of factors, whatever it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_param.adapter import Adapter
from lora_param.errors import UnsettledError, VariantError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pair", "pair_of"]


class Pair(NamedTuple):
    """ΔW = scale·(B @ A).

    Attributes:
        A: shape (r, in), or (E, r, in) for a stack.
        B: shape (out, r), or (E, out, r) for a stack.
        scale: what multiplies B @ A, the strength in it.
    """

    A: Tensor
    B: Tensor
    scale: float


def pair_of(adapter: Adapter, key: str, what: str) -> Pair:
    """ΔW of a target as factors in fp32 (fp64 where they are); its initial pair joined to them.

    Args:
        what: the operation, for messages.

    Raises:
        VariantError: ΔW is not of that form, as it depends on W.
        UnsettledError: the adapter leaves open what only its base tells.
    """
    from lora_param.weight.precision import compute_dtype
    from lora_param.weight.update import fold_initial
    from lora_param.weight.variants import variant_of

    if adapter.settle is not None:
        give = "convert it first (lora-param convert ADAPTER --to native --base MODEL -o FILE)"
        raise UnsettledError(adapter.source, [key], f"how its base stores W, to {what}", give)
    t = adapter.targets[key]
    variant = variant_of(t.settings)
    tensors = fold_initial(
        {n: f.detach().cpu().to(compute_dtype(f.dtype)) for n, f in adapter.factors(key).items()}
    )
    pair = variant.pair(tensors, t.scale, t.strength)
    if pair is None:
        raise VariantError(what, adapter.source, key, t.settings.variant)
    return Pair(*pair)
