"""What a bake will change: which entries, by which updates, and what came of each target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_param.adapter import Adapter, AdapterTarget, is_dead
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.fit import check_checkpoint
from lora_param.errors import NonFiniteError, OptionError
from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.blocks import BLOCK, Index, blocks_of, flat_range

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from lora_param.weight.update import Deferred, Update

__all__ = ["BakedTarget", "Block", "Measures", "Merging", "plan_merging"]


_EVERY = 8  # blocks, of which one is measured


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


@dataclass(frozen=True)
class _Piece:
    """One enabled target of one adapter, with the weight it is given."""

    adapter: Adapter
    key: str
    weight: float

    @property
    def target(self) -> AdapterTarget:
        return self.adapter.targets[self.key]

    @property
    def region(self) -> Region:
        return self.target.target.region

    def factors(self) -> dict[str, Tensor]:
        return {n: t.detach().cpu() for n, t in self.adapter.factors(self.key).items()}

    def update(self, dtype: torch.dtype) -> Update | Deferred:
        """The update as a live model makes it, its tensors read, and cast to the merge's dtype."""
        from lora_param.weight.update import fold_initial, make_update
        from lora_param.weight.variants import variant_of

        t, tensors = self.target, fold_initial(self.factors())
        wide = {n: x.to(dtype).contiguous() for n, x in tensors.items()}
        variant = variant_of(t.settings)
        return make_update(variant, wide, t.scale, t.strength * self.weight, self.region)


@dataclass(frozen=True, slots=True)
class Block:
    """Some elements of an entry that follow each other, and what is added to them.

    Attributes:
        start, stop: the elements, in C order.
        pieces: whose updates they take; none for what is cast or copied.
        region: the one region of all the pieces; None where they take the whole of the entry,
            each by a region of its own.
        index: the block in the region, seen as a matrix or a stack.
        is_sampled: norms are measured over it also where they are estimated.
    """

    start: int
    stop: int
    pieces: tuple[_Piece, ...] = ()
    region: Region | None = None
    index: Index = ()
    is_sampled: bool = True

    @property
    def is_changed(self) -> bool:
        """Something is added."""
        return bool(self.pieces)


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


@dataclass
class Merging:
    """A checked plan of a bake over one checkpoint.

    Attributes:
        base: what is baked into.
        pieces: entry name → the updates that its tensor takes; tied names are all listed.
        dtype: what floating tensors are stored as, or None for what they are.
        disabled: keys of targets that take no part.
        adapters: what is baked, settled for the base.
        exact: measure norms over every block instead of one in some.
        link: files that nothing changes may be hard links to the base's.
        max_shard_size: divide a directory's weights anew, into files of so many bytes.
        casts_vectors: `dtype` is of tensors of one dimension, too.
    """

    base: Checkpoint
    pieces: dict[str, list[_Piece]]
    dtype: torch.dtype | None
    disabled: list[str]
    adapters: list[Adapter]
    exact: bool = False
    link: bool = False
    max_shard_size: int | None = None
    casts_vectors: bool = True
    _measures: dict[tuple[int, str], dict[str, list[Measures]]] = field(default_factory=dict)

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
        is_cast = dense and (self.casts_vectors or W.dim() > 1)
        return self.stored_dtype(W.dtype) if is_cast else W.dtype

    def blocks(self, name: str, shape: tuple[int, ...]) -> list[Block]:
        """What of an entry its updates touch, as blocks in the order of its elements.

        One block, of all of it, where updates overlap in part, share rows, or need more of W than
        some rows.
        """
        from lora_param.weight.variants import variant_of

        pieces = self.pieces.get(name, [])
        regions: dict[Region, list[_Piece]] = {}
        for piece in pieces:
            regions.setdefault(piece.region, []).append(piece)
        variants = {variant_of(p.target.settings) for p in pieces}
        # a block of a range of columns is whole rows, in which other columns may be changed, too
        beside = len(regions) > 1 and any(r.columns is not None for r in regions)
        if (
            beside
            or not all(v.has_blocks for v in variants)
            or any(a.overlaps(b) for a, b in combinations(regions, 2))
        ):
            return [Block(0, prod(shape), tuple(pieces))]
        found, width = [], prod(shape[1:])
        for region, own in regions.items():
            matrix = region.matrix(shape)
            first = 0 if region.rows is None else region.rows[0] * width
            for number, index in enumerate(blocks_of(matrix)):
                start, stop = flat_range(index, matrix)
                if region.columns is not None:  # whole rows, for these follow each other
                    start, stop = index[0].start * width, index[0].stop * width
                sampled = number % _EVERY == 0
                found.append(Block(first + start, first + stop, tuple(own), region, index, sampled))
        return sorted(found, key=lambda block: block.start)

    def merge(
        self,
        name: str,
        W: Tensor,
        block: Block,
        updates: Sequence[Update | Deferred],
        stored: Tensor | None = None,
    ) -> tuple[Tensor, list[Measures]]:
        """What is to be stored for a block, and what came of each of its pieces.

        Args:
            name: the entry, for messages.
            W: the base value of the entry, of its shape.
            block: one of `blocks`, or one without pieces, which is cast.
            updates: of the block's pieces.
            stored: what the file holds in the end, in the stored dtype, where its format rounds
                W + ΔW further.

        Returns:
            The block's elements, flat, in the stored dtype.

        Raises:
            NonFiniteError: a finite value becomes infinite or NaN in the stored dtype.
        """
        from lora_param.weight.precision import compute_dtype
        from lora_param.weight.update import add_deltas, replacing

        dtype, wide = self.stored_as(W), compute_dtype(W.dtype)
        part = W.reshape(-1)[block.start : block.stop]
        if not block.pieces:
            cast = part.to(dtype)
            if cast.dtype != W.dtype and _overflows(part, cast):
                raise NonFiniteError(f"{name}, stored as {dtype},")
            return cast, []
        if block.region is None:
            part, regions = part.view(W.shape), [p.region for p in block.pieces]
            deltas = [u.delta(part, wide) for u in updates]
        elif block.region.columns is None:
            columns = block.region.matrix(tuple(W.shape))[-1]
            part = part.view(*(r.stop - r.start for r in block.index), columns)
            regions = [WHOLE] * len(updates)
            deltas = [u.of_block(block.index).delta(part, wide) for u in updates]
        else:
            part = part.view(-1, *W.shape[1:])
            region = Region(columns=block.region.columns)
            regions, shape = [region] * len(updates), region.shape(tuple(part.shape))
            own = part[region.index].reshape(region.matrix(tuple(part.shape)))
            deltas = [u.of_block(block.index).delta(own, wide).view(shape) for u in updates]
        if stored is None:
            copies = replacing(updates) if block.region is None else []
            start = add_deltas(part, (), copies) if copies else part
            added = [
                (r, d) for u, r, d in zip(updates, regions, deltas, strict=True) if u not in copies
            ]
            kept = _add(start, added, wide).to(dtype)
        else:
            kept = stored.reshape(-1)[block.start : block.stop].view(part.shape)
        changed = [_count_changed(part[r.index].to(dtype), kept[r.index]) for r in regions]
        if _may_overflow(kept) and _overflows(part.to(wide), kept.to(wide)):
            raise NonFiniteError(f"{name} with its update, stored as {dtype},")
        totals = [part[r.index].numel() for r in regions]
        measures = list(map(Measures, changed, totals))
        if self.exact or block.is_sampled:
            measures = _measure(part, kept, regions, deltas, measures)
        return kept.reshape(-1), measures

    def updates(self, pieces: Sequence[_Piece], dtype: torch.dtype) -> list[Update | Deferred]:
        """The updates of pieces on a weight of this dtype, read and ready."""
        from lora_param.weight.precision import compute_dtype

        return [p.update(compute_dtype(dtype)) for p in pieces]

    def cover(self, name: str, shape: tuple[int, ...]) -> Iterator[Block]:
        """`blocks`, and blocks without pieces for the elements between them."""
        done, size = 0, prod(shape)
        for block in (*self.blocks(name, shape), Block(size, size)):
            for start in range(done, block.start, BLOCK):
                yield Block(start, min(start + BLOCK, block.start))
            if block.pieces:
                yield block
            done = block.stop

    def stored(self, name: str, W: Tensor, *, noted: bool = False) -> Tensor:
        """What is to be stored for an entry, all of it: W + ΔW rounded once, or W, cast if asked.

        Args:
            name: the entry.
            W: its base value.
            noted: this is what will be reported of its targets.

        Raises:
            NonFiniteError: a finite value becomes infinite or NaN in the stored dtype.
        """
        import torch

        pieces, dtype = self.pieces.get(name, []), self.stored_as(W)
        if not pieces and dtype == W.dtype:
            return W
        W = W.contiguous()
        ready = dict(zip(map(id, pieces), self.updates(pieces, W.dtype), strict=True))
        merged = torch.empty(W.shape, dtype=dtype)
        flat = merged.view(-1)
        for block in self.cover(name, tuple(W.shape)):
            updates = [ready[id(p)] for p in block.pieces]
            flat[block.start : block.stop], measures = self.merge(name, W, block, updates)
            if noted:
                self.note(name, block.pieces, measures)
        return merged

    def note_stored(self, name: str, W: Tensor, stored: Tensor) -> None:
        """Note what came of an entry of which the file holds something else than W + ΔW.

        Args:
            name: the entry.
            W: its base value.
            stored: what is read of it again, of the same dtype.
        """
        pieces = self.pieces[name]
        ready = dict(zip(map(id, pieces), self.updates(pieces, W.dtype), strict=True))
        for block in self.blocks(name, tuple(W.shape)):
            updates = [ready[id(p)] for p in block.pieces]
            self.note(name, block.pieces, self.merge(name, W, block, updates, stored)[1])

    def note(self, name: str, pieces: Sequence[_Piece], measures: Sequence[Measures]) -> None:
        """Add to what came of an entry's targets; in any order, by any thread."""
        for piece, measured in zip(pieces, measures, strict=True):
            of_names = self._measures.setdefault((id(piece.adapter), piece.key), {})
            of_names.setdefault(name, []).append(measured)

    def rows(
        self, errors: Mapping[str, float] = MappingProxyType({})
    ) -> dict[tuple[int, str], BakedTarget]:
        """What came of each target, by its adapter's identity and its key.

        Args:
            errors: ‖W - W_original‖ / ‖W‖ of targets, by key, where it is known.
        """
        return {(id(p.adapter), p.key): self._row(p, errors.get(p.key)) for p in self.targets}

    def _row(self, piece: _Piece, error: float | None) -> BakedTarget:
        of_names = self._measures.get((id(piece.adapter), piece.key), {})
        name = min(of_names, key=lambda n: (n != piece.target.target.name, n), default="")
        m = Measures.sum(of_names.get(name, ()))  # names that share a target hold the same
        own, base, wanted, lost = map(math.sqrt, (m.own, m.base, m.wanted, m.lost))
        norm = own / base if base else (math.inf if own else 0.0)
        if error is not None:
            error = error / norm if norm else math.inf
        return BakedTarget(
            target=piece.key,
            adapter=piece.adapter.name,
            changed=m.changed,
            total=m.total,
            rounding_loss=lost / wanted if wanted else 0.0,
            relative_norm=norm,
            dead=is_dead(piece.factors(), own, base),
            measured=m.measured,
            quantization_error=error,
        )


def _add(W: Tensor, deltas: Iterable[tuple[Region, Tensor]], dtype: torch.dtype) -> Tensor:
    """`add_deltas` without gradients: in place, which is quicker, of W's rows in this dtype."""
    merged = W.to(dtype, copy=True)
    for region, delta in deltas:
        _add_to(merged, region, delta)
    return merged


def _add_to(W: Tensor, region: Region, delta: Tensor) -> None:
    """In place, where the region is a view of W."""
    if region.picked is None:
        W[region.index].add_(delta)
    else:
        W[region.index] += delta


def _measure(
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
            _add_to(wanted, region, delta)
    found: list[Measures] = []
    for region, delta, count in zip(regions, deltas, counted, strict=True):
        own = _square(delta)
        if shared and found:
            found.append(found[0]._replace(own=own))
            continue
        want = wanted if shared else wanted[region.index]
        full = W[region.index].to(wide)
        lost = kept[region.index].to(wide).sub(full).sub_(want)
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


def _count_changed(before: Tensor, after: Tensor) -> int:
    """Elements of other bits, where -0 is 0."""
    import numpy as np

    a, b = _bits(before), _bits(after)
    differs = a != b
    count = int(np.count_nonzero(differs))
    if count and not (a & np.iinfo(a.dtype).max).min():  # of zeros, the sign may have changed
        sign = np.iinfo(a.dtype).min
        count -= int(np.count_nonzero(differs & ((a | b) == sign)))
    return count


def _may_overflow(tensor: Tensor) -> bool:
    """Some element is infinite or NaN, or the dtype has no infinity to tell it by; in one pass."""
    import numpy as np
    import torch

    bits = _bits(tensor)
    infinite = torch.tensor(math.inf).to(tensor.dtype)
    if not math.isinf(infinite.item()) or not bits.size:
        return True
    return bool((bits & np.iinfo(bits.dtype).max).max() >= _bits(infinite))


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
    settled: list[Adapter] = []
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise OptionError(f"the weight of {adapter.source}", weight, "a finite number")
        adapter = check_checkpoint(adapter, base, check_fingerprint=check_fingerprint)
        settled.append(adapter)
        for key, t in adapter.targets.items():
            if not t.enabled:
                disabled.append(key)
                continue
            piece = _Piece(adapter, key, weight)
            _check_finite(piece)
            for name in _entries_of(t, base):
                pieces.setdefault(name, []).append(piece)
    return Merging(base, pieces, dtype, disabled, settled)


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
