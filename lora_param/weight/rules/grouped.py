"""Grouped products of a stack: rows of x, sorted by the matrix they go to.

torch.compile asks for a rule only where `torch.overrides` lists the operation, and would take the
weight for W elsewhere. This one is missing there, so that it is added to the list.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import get_overridable_functions

from lora_param.weight.adapted import implements
from lora_param.weight.private import GROUPED_PRODUCTS
from lora_param.weight.rules.common import factored, folded, lowered, stacked_updates

__all__: list[str] = []

_ALIGNMENT = 16  # bytes; what the kernel asks of every stride


get_overridable_functions().setdefault(torch, []).extend(GROUPED_PRODUCTS)


@implements(*GROUPED_PRODUCTS)
def grouped_mm(
    mat_a: Any, mat_b: Any = None, *, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """x V with each row of x by its own matrix, and the same with B and then A.

    x (S, k), V (E, k, n), B (E, k, r), A (E, r, n), offs (E,) → (S, n). The rank is filled up with
    zeros to what the kernel can take.
    """
    V = lowered(mat_b)
    if V is None or not stacked_updates(V) or not isinstance(offs, Tensor):
        return NotImplemented
    if bias is not None or mat_a.dim() != 2:
        return NotImplemented

    def base(x: Tensor, W: Tensor) -> Tensor:
        return GROUPED_PRODUCTS[0](x, W, offs=offs, out_dtype=out_dtype)  # (S, n)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        fill = -A.shape[-2] % (_ALIGNMENT // x.element_size())
        if fill:
            A, B = F.pad(A, (0, 0, 0, fill)), F.pad(B, (0, fill))
        h = GROUPED_PRODUCTS[0](x, B, offs=offs)  # (S, r)
        return GROUPED_PRODUCTS[0](h, A, offs=offs)  # (S, n)

    rows = mat_a.shape[0] // max(V.base.shape[0], 1)
    return factored(folded(V), mat_a, base, product, rows=rows, by_rows=True)
