"""What came of a target: sums over the elements that were written, and the row made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_param.targets.regions import Region
from lora_param.weight.blocks import BLOCK

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["BakedTarget", "Measures", "add_to", "count_changed", "is_finite", "measure"]
__all__ += ["overflows"]


@dataclass(frozen=True, slots=True)
class BakedTarget:
    """What baking did to one target.

    Attributes:
        target: its key.
        adapter: the name of the adapter it is from.
        changed: number of the target's elements whose stored value changed.
        total: number of the target's elements.
        rounding_loss: ‖ΔW_kept - ΔW‖ / ‖ΔW‖: the part of the update that the stored dtype cannot
            hold; of all adapters on the target together. 0 where ΔW is 0.
        relative_norm: ‖ΔW‖ / ‖W‖ of this adapter over the target; infinite over a zero W.
        dead: ΔW is zero because the factors are (B was never trained).
        measured: number of the target's elements that the two norms are of: all of them, or those
            of every eighth block of rows where the target has several.
        quantization_error: ‖W - W_original‖ / ‖ΔW‖ of a quantized W, where the original is at hand.
    """

    target: str
    adapter: str
    changed: int
    total: int
    rounding_loss: float
    relative_norm: float
    dead: bool
    measured: int = 0
    quantization_error: float | None = None

    @property
    def kept(self) -> float:
        """The share of the update that is stored: 1 less the rounding loss, at least 0."""
        return max(0.0, 1.0 - self.rounding_loss)

    @property
    def lost(self) -> bool:
        """The update is not zero, and yet the stored dtype kept nothing of it."""
        return self.changed == 0 and self.relative_norm > 0

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {**asdict(self), "lost": self.lost, "kept": self.kept}


class Measures(NamedTuple):
    """Sums over a target's elements, from which its row is made; added up block by block."""

    changed: int
    total: int
    measured: int = 0  # elements that the following are of
    base: float = 0.0  # Σ W²
    own: float = 0.0  # Σ ΔW² of the target
    wanted: float = 0.0  # Σ ΔW² of all that is added
    lost: float = 0.0  # Σ (kept - ΔW)²

    @classmethod
    def sum(cls, parts: Sequence[Measures]) -> Measures:
        """Of several blocks; exact, so that their order does not matter."""
        changed, total, measured, *squares = zip(cls(0, 0), *parts, strict=True)
        return cls(sum(changed), sum(total), sum(measured), *map(math.fsum, squares))


def add_to(W: Tensor, region: Region, delta: Tensor) -> None:
    """Add to a region of W, in place."""
    if region.picked is None:
        W[region.index].add_(delta)
    else:
        W[region.index] += delta


def measure(
    W: Tensor,
    kept: Tensor,
    regions: Sequence[Region],
    deltas: Sequence[Tensor],
    counted: Sequence[Measures],
) -> list[Measures]:
    """What was stored against what was meant, for each update of some rows of W."""
    import torch

    wide = deltas[0].dtype
    shared = len(set(regions)) == 1
    if shared:
        wanted = deltas[0] if len(deltas) == 1 else torch.stack(list(deltas)).sum(0)
    else:
        wanted = torch.zeros_like(W, dtype=wide)
        for region, delta in zip(regions, deltas, strict=True):
            add_to(wanted, region, delta)
    found: list[Measures] = []
    for region, delta, count in zip(regions, deltas, counted, strict=True):
        own = _square(delta)
        if shared and found:
            found.append(found[0]._replace(own=own))
            continue
        want = wanted if shared else wanted[region.index]
        full = W[region.index].to(wide)
        lost = kept[region.index].to(wide, copy=True).sub_(full).sub_(want)
        found.append(
            count._replace(
                measured=count.total,
                base=_square(full),
                own=own,
                wanted=own if len(deltas) == 1 else _square(want),
                lost=_square(lost),
            )
        )
    return found


def _square(tensor: Tensor) -> float:
    """Σ x²; over many elements not in fp32 alone, where it would lose small ones."""
    import torch

    parts = torch.split(tensor.reshape(-1), BLOCK)
    return math.fsum(float(torch.dot(part, part)) for part in parts)


def _bits(tensor: Tensor) -> NDArray[Any]:
    """The elements as whole numbers, for NumPy, which is the quicker at comparing them."""
    import torch

    kinds = (torch.int8, torch.int16, torch.int32, torch.int64)
    return tensor.view(kinds[tensor.itemsize.bit_length() - 1]).numpy()


def count_changed(before: Tensor, after: Tensor) -> int:
    """Elements of other bits, where -0 is 0."""
    import numpy as np

    a = _bits(before)
    differs, sign = a ^ _bits(after), -1 << (8 * a.itemsize - 1)
    count = int(np.count_nonzero(differs))
    if count and (_least(a) == sign or not _least(_unsigned(a))):  # there are zeros, of some sign
        count -= int(np.count_nonzero((differs == sign) & ((a == 0) | (a == sign))))
    return count


def _unsigned(bits: NDArray[Any]) -> NDArray[Any]:
    """The same bits without a sign, so that the negative numbers are the largest."""
    return bits.view(f"u{bits.itemsize}")


def _least(bits: NDArray[Any]) -> int:
    import numpy as np

    return int(np.minimum.reduce(bits, axis=None))


def _most(bits: NDArray[Any]) -> int:
    import numpy as np

    return int(np.maximum.reduce(bits, axis=None))


@cache
def _infinity(dtype: torch.dtype) -> int | None:
    """The bits of infinity as a whole number; None where the dtype has none to tell it by."""
    import torch

    infinite = torch.tensor(math.inf).to(dtype)
    return int(_bits(infinite)) if math.isinf(infinite.item()) else None


def _may_overflow(tensor: Tensor) -> bool:
    """Some element is infinite or NaN, or none can be told: by the largest bits of either sign."""
    bits, infinity = _bits(tensor), _infinity(tensor.dtype)
    if infinity is None or not bits.size:
        return True
    negative = infinity + (1 << (8 * bits.itemsize - 1))
    return _most(bits) >= infinity or _most(_unsigned(bits)) >= negative


def is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; in one pass, and without a mask of the tensor's size."""
    import torch

    return tensor.numel() == 0 or all(math.isfinite(v) for v in torch.aminmax(tensor))


def overflows(before: Tensor, after: Tensor) -> bool:
    """Some element was finite and no longer is."""
    from lora_param.weight.precision import compute_dtype

    if not _may_overflow(after):
        return False
    wide = compute_dtype(before.dtype)
    before, after = before.to(wide), after.to(wide)
    return not is_finite(after) and bool((before.isfinite() & ~after.isfinite()).any())
