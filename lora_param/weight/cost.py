"""When building W + ΔW is cheaper than products with the factors: one model for every operation.

A (outputs, inputs) matrix meets `rows` vectors; r is the ranks together. Counted in multiplications
are the things that only one of both ways does:

    factored    rows · (outputs · (r + MOVED) + inputs · r)     products with B and A; adding them
    built       outputs · inputs · (r + MOVED)                  B @ A; writing the sum
                + rows · outputs · inputs / 3                   the gradient of what was built

The product with A counts where `both` are spared. A kernel with a backward of its own needs it for
the gradient of B in any case, and an embedding gathers rows instead: for these the boundary is
rows = inputs, whatever r and MOVED are (for one kernel see RunLoRA, Cherniuk et al. 2023,
https://arxiv.org/abs/2312.03415). The gradient counts where autograd sees a built weight and W is
frozen; a third of it, since a training step pays for the rest three times.

`tests/bench/cost.py` measures both ways, and says which of them is chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_param.weight.base import storage_of
from lora_param.weight.update import Update

__all__ = ["prefers_built"]

_MOVED = 32
"""Multiplications in the time that it takes to read and write an element. Measured on an x86 server
with MKL, fp32, one thread, the values that choose rightly lie between 23, from which on a training
step of a convolution of 3 to 64 channels is built (0.66 to 0.82 of the factored time), and 69,
up to which products with a 256 × 256 stack are not (built takes 1.0 to 1.2 of it)."""


def prefers_built(
    W: Tensor,
    updates: Sequence[Update],
    rows: int,
    outputs: int,
    inputs: int,
    *,
    both: bool = False,
    gradient: bool = False,
) -> bool:
    """Building is the cheaper way.

    Low precisions are never built here, which would round W + ΔW, nor packed weights, nor a weight
    with dropout, whose input a built one does not see.

    Args:
        W: the base.
        updates: what is added to it.
        rows: vectors that each matrix of W is multiplied with.
        outputs, inputs: the size of each matrix.
        both: building spares the product with A as well as that with B.
        gradient: a built weight would need a gradient that the factors do not.
    """
    size = outputs * inputs
    if rows * (outputs + inputs * both) <= size:
        return False
    if W.dtype not in (torch.float32, torch.float64) or storage_of(W) is not None:
        return False
    if any(u.dropout for u in updates):
        return False
    if not (both or gradient):
        return True
    r = sum(u.A.shape[-2] for u in updates)
    factored = rows * (outputs * (r + _MOVED) + inputs * r * both)
    return 3 * factored > 3 * size * (r + _MOVED) + rows * size * gradient
