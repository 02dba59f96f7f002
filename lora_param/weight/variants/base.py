"""What a variant is: tensors that train, and how they make an update of W.

Every variant has one normal form, α ∘ W + s·(B @ A), with α a factor for each row of W (None is 1).
`delta` defines the update and serves every built weight, live and in files; `lower` gives the
normal form, which products use without building the weight. Both must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_param.targets.forms import Form
from lora_param.weight.blocks import BLOCK, Index, blocks_of, one_thread
from lora_param.weight.precision import exact

__all__ = ["Fresh", "Lowered", "Tensors", "Variant", "product"]

Tensors = Mapping[str, Tensor]


class Lowered(NamedTuple):
    """α ∘ W + scale·(B @ A), for a matrix W (m, n) or a stack of them (E, m, n).

    Attributes:
        alpha: what multiplies each row of W, (*, m); None is 1.
        A: shape (*, r, n).
        B: shape (*, m, r).
        scale: what multiplies B @ A; a 0-d tensor while compiling.
    """

    alpha: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Fresh:
    """What a variant's fresh tensors can be made of.

    Attributes:
        shapes: of the tensors that train, by name.
        dtype: their dtype.
        device: where they live.
        factors: gives `lora_A` and `lora_B` as the settings initialise them, and for pissa and
            olora the initial pair that is subtracted.
        W: gives the target as a matrix (*, m, n), in fp32 at least.
        generator: source of randomness; torch's own where None.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    factors: Callable[[], dict[str, Tensor]]
    W: Callable[[], Tensor]
    generator: torch.Generator | None = None

    def uniform(self, name: str) -> Tensor:
        """The tensor of this name from U(-1/√n, 1/√n), n the length of its rows."""
        bound = 1 / math.sqrt(self.shapes[name][-1])
        return self.zeros(name).uniform_(-bound, bound, generator=self.generator)

    def zeros(self, name: str) -> Tensor:
        """The tensor of this name, zero."""
        return torch.zeros(self.shapes[name], dtype=self.dtype, device=self.device)


class Variant:  # its methods are defaults, and do not use all of their arguments
    """A way of making an update out of tensors; derive from it, override what differs.

    Attributes:
        uses_W: the update is made where W is at hand, by `lower` and `delta`, as it depends on W or
            has a quicker way to be built than a product; otherwise `pair` makes it.
        needs_W: it depends on W's values, and not on its shape alone.
        by_rows: names of the tensors whose first dimension is the rows of W, where each row of the
            update depends on that row of W and of these tensors alone; empty where it does not.
            A gather from a table lowers the gathered rows only.
        value: name of the tensor that takes W's place, or "" where something is added to W.
        has_blocks: the update of some rows of W needs no more of W than these rows, so that a file
            is baked a block at a time (see `blocks_of`); otherwise with all of W in memory.
    """

    uses_W = True
    needs_W = True
    value = ""
    by_rows: tuple[str, ...] = ()
    has_blocks = False

    def of_form(self, form: Form) -> Variant:
        """The variant in one of its forms, where it has any."""
        return self

    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        """Tensors of a new adapter, whose update is zero."""
        return make.factors()

    def pair(
        self, tensors: Tensors, scale: float, strength: float
    ) -> tuple[Tensor, Tensor, float] | None:
        """A, B and what multiplies B @ A; None where the tensors alone make no such product."""
        return None

    def lower(
        self,
        W: Tensor,
        tensors: Tensors,
        scale: float,
        strength: float,
        known: Tensor | None = None,
    ) -> Lowered | None:
        """The normal form, or None where there is none: the weight is built.

        Args:
            W: the target as a matrix (*, m, n), in its own dtype.
            tensors: what trains, by name, and nothing else.
            scale: alpha/rank, or what the scaling makes of both. Like the strength a 0-d tensor
                while compiling.
            strength: multiplies the whole update.
            known: what `known` gives for W, where W is frozen.
        """
        found = self.pair(tensors, scale, strength)
        return found and Lowered(None, *found)

    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        """ΔW of shape (*, m, n), computed in W's dtype.

        Args: as for `lower`; W has been cast to the dtype of the merge.
        """
        lowered = self.lower(W, tensors, scale, strength)
        assert lowered is not None
        return product(lowered.A, lowered.B, lowered.scale, W.dtype)

    def of_block(self, tensors: Tensors, index: Index) -> Tensors:
        """The tensors that make the update of a block of W by `delta`; see `has_blocks`."""
        return {n: t[index if n in self.by_rows else index[:-1]] for n, t in tensors.items()}

    def known(self, W: Tensor) -> Tensor | None:
        """What `lower` needs of W alone, to be kept while W does not change. W (*, m, n)."""
        return None

    def linear(
        self,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        tensors: Tensors,
        scale: float,
        dropout: float,
        known: Tensor | None,
    ) -> Tensor | None:
        """x W'ᵀ + b by a kernel of its own, or None where it has none.

        Asked for an update of a whole matrix at full strength, the only one on it, in eager mode.

        Args:
            x: shape (*, n).
            W: shape (m, n), in x's dtype.
            bias: shape (m,), or None.
            tensors, scale, known: as for `lower`.
            dropout: on the input of A.
        """
        return None


def product(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale·(B @ A), computed in `dtype` whatever autocast says. (*, out, in)

    Both factors are made contiguous first, and the product is made by `blocks_of`, each in one
    thread, so that the bits depend neither on how they are stored, nor on whether all of it is made
    at once, nor on the number of threads.
    """
    with exact(A):
        A, B = A.to(dtype).contiguous(), B.to(dtype).contiguous()
        if isinstance(scale, float) and abs(math.frexp(scale)[0]) == 0.5:  # a power of two
            return _by_blocks(B * scale, A)  # the same bits, and one pass over the product less
        return _by_blocks(B, A) * scale


def _by_blocks(B: Tensor, A: Tensor) -> Tensor:
    """B @ A. (*, m, r), (*, r, n) → (*, m, n)"""
    shape = (*B.shape[:-1], A.shape[-1])
    if B.device.type != "cpu" or torch.compiler.is_compiling():
        return B @ A
    with one_thread():
        if math.prod(shape) <= BLOCK:
            return B @ A
        # joined by cat, for that is differentiable and known to all of torch's transforms
        blocks = [(B[index] @ A[index[:-1]]).reshape(-1) for index in blocks_of(shape)]
    return torch.cat(blocks).reshape(shape)
