"""torch.einsum of two operands, one of them an adapted matrix or a stack of them."""

from __future__ import annotations

import re
import string
from typing import Any

import torch
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.rules.common import built, factored, folded, lowered, stacked_updates, whole
from lora_param.weight.update import NormalForm

__all__: list[str] = []

_TWO = re.compile(r"(\.\.\.)?([a-zA-Z]+)(\.\.\.)?,(\.\.\.)?([a-zA-Z]+)(\.\.\.)?->.*")


@implements(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Any:
    """Contractions of x with one side of the weight: first with A or B, then with the other.

    The weight's letters are taken from the equation: "bi,oi->bo" contracts i, so that x meets A
    (r, i) first and what comes of it meets B (o, r).
    """
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    equation = equation.replace(" ", "")
    if not _TWO.fullmatch(equation):
        return NotImplemented
    (first, second), out = equation.split("->")[0].split(","), equation.split("->")[1]
    x, weight = operands
    after = isinstance(weight, AdaptedWeight)
    if not after:
        (weight, x), (second, first) = operands, (first, second)
    V = lowered(weight)
    if V is None or not whole(V.updates):
        return NotImplemented
    return _contract(built(x), V, first, second, out, equation, after)


def _contract(
    x: Tensor, V: NormalForm, ins: str, letters: str, out: str, equation: str, after: bool
) -> Any:
    if len(letters) != V.base.dim() or len(set(letters)) != len(letters):
        return NotImplemented
    if V.base.dim() != 2 and not stacked_updates(V):
        return NotImplemented
    stack, p, q = letters[:-2], letters[-2], letters[-1]
    into = [d for d in (p, q) if d in ins and d not in out]  # what x and the weight sum over
    if len(into) != 1 or any(d in ins for d in (p, q) if d not in into):
        return NotImplemented
    names = ins.replace("...", "")
    if len(set(names)) != len(names):
        return NotImplemented
    summed = into[0]
    sizes = V.base.shape[-1] if summed == q else V.base.shape[-2]
    shared = [e for e in stack if e in ins]
    rows = x.numel() // max(sizes * (V.base.shape[0] if shared else 1), 1)
    r = next(c for c in string.ascii_letters if c not in equation)
    middle = ins.replace(summed, r) + "".join(e for e in stack if e not in ins)
    other = p if summed == q else q

    def base(x: Tensor, W: Tensor) -> Tensor:
        return torch.einsum(equation, *((x, W) if after else (W, x)))

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        first, second = (A, B) if summed == q else (B.mT, A.mT)  # (*, r, summed), (*, other, r)
        h = torch.einsum(f"{ins},{stack}{r}{summed}->{middle}", x, first)  # x's, r for the summed
        return torch.einsum(f"{middle},{stack}{other}{r}->{out}", h, second)  # the output's

    return factored(folded(V), x, base, product, rows=rows)
