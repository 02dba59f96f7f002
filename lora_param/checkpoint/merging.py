"""What a bake changes: which entries, by which updates, merged a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, is_dead
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.measures import (
    BakedTarget,
    Measures,
    add_to,
    count_changed,
    measure,
    overflows,
)
from lora_param.checkpoint.pieces import Block, Piece
from lora_param.errors import NonFiniteError
from lora_param.files.journal import Journal
from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.blocks import BLOCK, blocks_of, flat_range

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_param.weight.update import Deferred, Update

__all__ = ["Merging", "Noted"]

Noted = tuple[int, str, Measures]
"""The number of an adapter, the key of a target, and measures of some blocks: plain data."""

_EVERY = 8  # blocks, of which one is measured


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
        adapters_mark: a hash of the adapters' targets, weights and tensors.
        journal: where it is noted what is done, for another process to go on.
        resumed: bytes that another process had written already.
    """

    base: Checkpoint
    pieces: dict[str, list[Piece]]
    dtype: torch.dtype | None
    disabled: list[str]
    adapters: list[Adapter]
    exact: bool = False
    link: bool = False
    max_shard_size: int | None = None
    casts_vectors: bool = True
    adapters_mark: str = ""
    journal: Journal | None = None
    resumed: int = 0
    _measures: dict[tuple[int, str], dict[str, list[Measures]]] = field(default_factory=dict)

    @property
    def targets(self) -> list[Piece]:
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
        regions: dict[Region, list[Piece]] = {}
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
            if cast.dtype != W.dtype and overflows(part, cast):
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
            merged = start.to(wide, copy=True)
            for region, delta in added:
                add_to(merged, region, delta)
            kept = merged.to(dtype)
        else:
            kept = stored.reshape(-1)[block.start : block.stop].view(part.shape)
        if overflows(part, kept):
            raise NonFiniteError(f"{name} with its update, stored as {dtype},")
        old = part.to(dtype)
        pairs = [(old, kept) if r is WHOLE else (old[r.index], kept[r.index]) for r in regions]
        measures = [Measures(count_changed(*pair), pair[0].numel()) for pair in pairs]
        if self.exact or block.is_sampled:
            measures = measure(part, kept, regions, deltas, measures)
        return kept.reshape(-1), measures

    def updates(self, pieces: Sequence[Piece], dtype: torch.dtype) -> list[Update | Deferred]:
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

    def note(self, name: str, pieces: Sequence[Piece], measures: Sequence[Measures]) -> list[Noted]:
        """Add to what came of an entry's targets; in any order, by any thread.

        Returns:
            What `note_again` takes in another process, of the same plan.
        """
        numbers = {id(a): k for k, a in enumerate(self.adapters)}
        for piece, measured in zip(pieces, measures, strict=True):
            of_names = self._measures.setdefault((id(piece.adapter), piece.key), {})
            of_names.setdefault(name, []).append(measured)
        pairs = zip(pieces, measures, strict=True)
        return [(numbers[id(p.adapter)], p.key, m) for p, m in pairs]

    def note_again(self, name: str, noted: Sequence[Noted]) -> None:
        """Add what `note` gave, for the same entry."""
        for number, key, measured in noted:
            adapter = self.adapters[number]
            of_names = self._measures.setdefault((id(adapter), key), {})
            of_names.setdefault(name, []).append(Measures(*measured))

    def rows(
        self, errors: Mapping[str, float] = MappingProxyType({})
    ) -> dict[tuple[int, str], BakedTarget]:
        """What came of each target, by its adapter's identity and its key.

        Args:
            errors: ‖W - W_original‖ / ‖W‖ of targets, by key, where it is known.
        """
        return {(id(p.adapter), p.key): self._row(p, errors.get(p.key)) for p in self.targets}

    def _row(self, piece: Piece, error: float | None) -> BakedTarget:
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
