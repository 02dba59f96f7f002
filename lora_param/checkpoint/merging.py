"""What a bake will change: which entries, by which updates, and what came of each target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget, is_dead
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.fit import check_checkpoint
from lora_param.errors import NonFiniteError, OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BakedTarget", "Merging", "plan_merging"]


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
    """

    target: str
    adapter: str
    changed: int
    total: int
    rounding_loss: float
    relative_norm: float
    dead: bool

    @property
    def lost(self) -> bool:
        """The update is not zero, and yet the stored dtype kept nothing of it."""
        return self.changed == 0 and self.relative_norm > 0

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {**asdict(self), "lost": self.lost}


@dataclass(frozen=True)
class _Piece:
    """One enabled target of one adapter, with the weight it is given."""

    adapter: Adapter
    key: str
    weight: float

    @property
    def target(self) -> AdapterTarget:
        return self.adapter.targets[self.key]

    def factors(self) -> dict[str, Tensor]:
        return {n: t.detach().cpu() for n, t in self.adapter.factors(self.key).items()}

    def delta(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW over the target, as `merge` computes it."""
        from lora_param.weight.update import fold_initial, make_update
        from lora_param.weight.variants import variant_named

        t, tensors = self.target, fold_initial(self.factors())
        strength = t.strength * self.weight
        variant = variant_named(t.settings.variant)
        u = make_update(variant, tensors, t.scale, strength, t.target.region)
        return u.delta(W, dtype)


@dataclass
class Merging:
    """A checked plan of a bake over one checkpoint.

    Attributes:
        base: what is baked into.
        pieces: entry name → the updates that its tensor takes; tied names are all listed.
        dtype: what floating tensors are stored as, or None for what they are.
        disabled: keys of targets that take no part.
        rows: what came of each target, filled as tensors are merged.
    """

    base: Checkpoint
    pieces: dict[str, list[_Piece]]
    dtype: torch.dtype | None
    disabled: list[str]
    rows: dict[tuple[int, str], BakedTarget] = field(default_factory=dict)

    @property
    def targets(self) -> list[_Piece]:
        """Every enabled target, once."""
        unique = {(id(p.adapter), p.key): p for ps in self.pieces.values() for p in ps}
        return list(unique.values())

    def same_updates(self, a: str, b: str) -> bool:
        """Two entries take the very same updates (or none)."""
        return self.pieces.get(a, []) == self.pieces.get(b, [])

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a dense tensor of this dtype is stored as."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def stored_as(self, W: Tensor) -> torch.dtype:
        """What a tensor is stored as; a sparse or nested one, which is no weight, as it is."""
        import torch

        dense = W.layout == torch.strided and not W.is_nested
        return self.stored_dtype(W.dtype) if dense else W.dtype

    def stored(self, name: str, W: Tensor) -> Tensor:
        """What is to be stored for an entry: W + ΔW in fp32, rounded once; or W, cast if asked.

        Args:
            name: the entry.
            W: its base value.

        Returns:
            A tensor of W's shape.

        Raises:
            NonFiniteError: a finite value becomes infinite or NaN in the stored dtype.
        """
        from lora_param.weight.precision import compute_dtype
        from lora_param.weight.update import add_deltas

        pieces = self.pieces.get(name, [])
        target_dtype = self.stored_as(W)
        if not pieces:
            cast = W.to(target_dtype)
            if cast.dtype != W.dtype and _overflows(W, cast):
                raise NonFiniteError(f"{name}, stored as {target_dtype},")
            return cast
        wide = compute_dtype(W.dtype)
        deltas = [p.delta(W, wide) for p in pieces]
        regions = [p.target.target.region for p in pieces]
        merged = add_deltas(W, zip(regions, deltas, strict=True)).to(target_dtype)
        full, kept = W.to(wide), merged.to(wide)
        if _overflows(full, kept):
            raise NonFiniteError(f"{name} with its update, stored as {target_dtype},")
        self._measure(pieces, deltas, full, kept, W.to(target_dtype).to(wide))
        return merged

    def _measure(
        self,
        pieces: Sequence[_Piece],
        deltas: Sequence[Tensor],
        full: Tensor,
        kept: Tensor,
        unmerged: Tensor,
    ) -> None:
        """One row for each target: what was stored against what was meant."""
        import torch

        if len(deltas) == 1 and deltas[0].shape == full.shape:
            wanted = deltas[0]
        else:
            wanted = torch.zeros_like(full)
            for piece, delta in zip(pieces, deltas, strict=True):
                wanted[piece.target.target.region.index] += delta
        for piece, delta in zip(pieces, deltas, strict=True):
            index = piece.target.target.region.index
            want, base, own = _norm(wanted[index]), _norm(full[index]), _norm(delta)
            lost = (kept[index] - full[index]).sub_(wanted[index])
            self.rows[id(piece.adapter), piece.key] = BakedTarget(
                target=piece.key,
                adapter=piece.adapter.name,
                changed=int(torch.count_nonzero(kept[index] != unmerged[index])),
                total=full[index].numel(),
                rounding_loss=_norm(lost) / want if want else 0.0,
                relative_norm=own / base if base else (math.inf if own else 0.0),
                dead=is_dead(piece.factors(), own, base),
            )


def _norm(tensor: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(tensor))


def _is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; in one pass, and without a mask of the tensor's size."""
    import torch

    return tensor.numel() == 0 or all(math.isfinite(v) for v in torch.aminmax(tensor))


def _overflows(before: Tensor, after: Tensor) -> bool:
    """Some element was finite and no longer is."""
    return not _is_finite(after) and bool((before.isfinite() & ~after.isfinite()).any())


def plan_merging(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: torch.dtype | None,
    check_fingerprint: bool,
) -> Merging:
    """Check that the adapters fit the base and list what is to be merged; writes nothing.

    Raises:
        MismatchError, FingerprintError: an adapter does not fit.
        NonFiniteError: an enabled factor holds NaN or infinity.
        OptionError: a weight that is not finite.
    """
    pieces: dict[str, list[_Piece]] = {}
    disabled: list[str] = []
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise OptionError(f"the weight of {adapter.source}", weight, "a finite number")
        check_checkpoint(adapter, base, check_fingerprint=check_fingerprint)
        for key, t in adapter.targets.items():
            if not t.enabled:
                disabled.append(key)
                continue
            piece = _Piece(adapter, key, weight)
            _check_finite(piece)
            for name in _entries_of(t, base):
                pieces.setdefault(name, []).append(piece)
    return Merging(base, pieces, dtype, disabled)


def _entries_of(t: AdapterTarget, base: Checkpoint) -> list[str]:
    """The entries that take a target's update: its names, and what the file ties to them."""
    own = [n for n in (t.target.name, *t.also) if n in base]
    tied = [other for n in own for other in base.weights[n].tied]
    return [n for n in dict.fromkeys([*own, *tied]) if n not in t.apart]


def _check_finite(piece: _Piece) -> None:
    import torch

    for name, tensor in piece.factors().items():
        if not _is_finite(tensor.to(torch.promote_types(tensor.dtype, torch.float32))):
            raise NonFiniteError(f"{name} of {piece.key} in {piece.adapter.source}")
    t = piece.target
    if not math.isfinite(t.scale * t.strength * piece.weight):
        raise NonFiniteError(f"the scale of {piece.key} in {piece.adapter.source}")
