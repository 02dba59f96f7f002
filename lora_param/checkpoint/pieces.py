"""What a bake adds: the updates of an entry, and the blocks of elements that take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.targets.regions import Region
from lora_param.weight.blocks import Index

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_param.weight.update import Deferred, Update

__all__ = ["Block", "Piece"]


@dataclass(frozen=True)
class Piece:
    """One enabled target of one adapter, with the weight it is given."""

    adapter: Adapter
    key: str
    weight: float

    @property
    def target(self) -> AdapterTarget:
        """What the adapter says of it."""
        return self.adapter.targets[self.key]

    @property
    def region(self) -> Region:
        """The part of the weight that it adds to."""
        return self.target.target.region

    def factors(self) -> dict[str, Tensor]:
        """Its tensors, on the CPU."""
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
    pieces: tuple[Piece, ...] = ()
    region: Region | None = None
    index: Index = ()
    is_sampled: bool = True

    @property
    def is_changed(self) -> bool:
        """Something is added."""
        return bool(self.pieces)
