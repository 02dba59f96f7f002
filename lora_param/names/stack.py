"""Experts that are a tensor each for the adapter, and one stack in the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.names.rewritten import STACK, Parts, Rewritten, share_A
from lora_param.names.table import Rule
from lora_param.targets.regions import WHOLE, Target
from lora_param.targets.settings import INITIAL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["stack"]


def stack(result: Rewritten, whole: str, rule: Rule, parts: Parts) -> None:
    """One tensor an expert becomes a matrix of a stack; an expert without factors has zeros.

    Raises:
        LayoutError: they differ in more than rank and scale, or do not fit the stack.
    """
    adapter, shape = result.source, result.shapes[whole].shape
    first = min(parts.values(), key=list(adapter.targets).index)
    targets = {key: adapter.targets[key] for key in parts.values()}
    for key, t in targets.items():
        if t.settings.variant != "lora" or any(n in INITIAL for n in adapter.tensor_names(key)):
            raise result.refuse(key, "only plain LoRA can be stacked")
        if t.target.region != WHOLE:
            raise result.refuse(key, "a part of it alone is adapted, and it becomes one of a stack")
        if (t.enabled, t.strength) != (targets[first].enabled, targets[first].strength):
            raise result.refuse(key, f"enabled otherwise than {first}, with which it is stacked")
    experts = shape[0]
    numbers = {e for _, e in parts if e is not None}
    if max(numbers) >= experts:
        raise result.refuse(first, f"expert {max(numbers)}, and {whole} has {experts}")
    plan = _Stacked(adapter, rule, parts, shape, len(rule.parts))
    if plan.problem:
        raise result.refuse(plan.problem[0], plan.problem[1])
    settings = targets[first].settings.at(plan.rank, plan.scale)
    target = AdapterTarget(
        Target(whole, STACK), settings, targets[first].strength, targets[first].enabled
    )
    result.add(target, {"lora_A": lambda: plan.factors()[0], "lora_B": lambda: plan.factors()[1]})


class _Stacked:
    """How the factors of many matrices become those of one stack."""

    def __init__(
        self,
        adapter: Adapter,
        rule: Rule,
        parts: Parts,
        shape: tuple[int, ...],
        count: int,
    ) -> None:
        self.adapter, self.rule, self.parts = adapter, rule, parts
        self.experts, self.shape = shape[0], shape
        self.problem: tuple[str, str] | None = None
        sizes: dict[int, int] = {}
        ranks: dict[int, int] = {}
        columns: set[int] = set()
        for (i, _), key in parts.items():
            A, B = (adapter.tensors[f"{key}.{n}"] for n in ("lora_A", "lora_B"))
            columns.add(A.shape[1])
            if sizes.setdefault(i, B.shape[0]) != B.shape[0] or len(columns) > 1:
                self.problem = key, "of another shape than the other experts"
                return
            ranks[i] = max(ranks.get(i, 0), B.shape[1])
        known = next(iter(sizes.values()))
        if all(p.equal for p in rule.parts[1:]):
            sizes = dict.fromkeys(range(count), known) | sizes
        self.sizes = [sizes.get(i, 0) for i in range(count)]
        rows, into = sum(self.sizes), columns.pop()
        self.turned = rule.transposed if rows == into else (rows, into) != shape[1:]
        if shape[1:] != ((into, rows) if self.turned else (rows, into)):
            key = next(iter(parts.values()))
            self.problem = key, f"{rows} × {into} with its like, in a stack of {shape[1:]}"
            return
        self.columns = into
        self.shared = self._shares_A(count)
        self.ranks = (
            [max(ranks.values())] if self.shared else [ranks.get(i, 0) for i in range(count)]
        )
        self.rank = sum(self.ranks)
        scales = {adapter.targets[k].scale for k in parts.values()}
        self.scale = scales.pop() if len(scales) == 1 else 1.0
        self.folds = bool(scales)

    def _shares_A(self, count: int) -> bool:
        experts = {e for _, e in self.parts}
        for e in experts:
            keys = [self.parts.get((i, e)) for i in range(count)]
            there = [k for k in keys if k is not None]
            if len(there) < count or not share_A(self.adapter, there):
                return False
        return True

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (E, r, in) and B (E, out, r), or of a turned stack A (E, r, out) and B (E, in, r)."""
        import torch

        like = self.adapter.tensors[f"{next(iter(self.parts.values()))}.lora_A"]
        A = like.new_zeros(self.experts, self.rank, self.columns)
        B = like.new_zeros(self.experts, sum(self.sizes), self.rank)
        for (i, e), key in self.parts.items():
            assert e is not None
            own_A, own_B = (self.adapter.tensors[f"{key}.{n}"] for n in ("lora_A", "lora_B"))
            if self.folds:
                own_B = own_B * self.adapter.targets[key].scale
            at = 0 if self.shared else sum(self.ranks[:i])
            rank = own_B.shape[1]
            rows = (
                slice(i, None, len(self.sizes))
                if self.rule.interleaved
                else slice(sum(self.sizes[:i]), sum(self.sizes[: i + 1]))
            )
            A[e, at : at + rank] = own_A
            B[e, rows, at : at + rank] = own_B
        if self.turned:
            return B.mT.contiguous(), A.mT.contiguous()
        return A, torch.Tensor.contiguous(B)
