"""An adapter written down for a base that holds the same numbers under other names and shapes.

ΔW stays what it is, element for element. The rows of a fused weight get factors of their own as
slices; a split weight's parts share A; experts are stacked, or taken out of their stack. Where
parts become one matrix, A has the ranks of all and B is block-diagonal, unless they share A: then
they are joined to what they were before they were split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.errors import LayoutError
from lora_param.fingerprint import BaseWeight
from lora_param.names.resolve import Here, Resolution, WholeOf
from lora_param.names.table import Rule
from lora_param.targets.regions import WHOLE, Region, Target
from lora_param.targets.settings import INITIAL, Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["relayout"]

Tensors = dict[str, "Tensor"]
Shapes = Mapping[str, BaseWeight]
_STACK = Region(stacked=True)


class _Computed(Mapping[str, "Tensor"]):
    """Tensors by name, each computed when it is asked for."""

    def __init__(self) -> None:
        self.made: dict[str, Callable[[], Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


@dataclass
class _Result:
    """The adapter as it is put together.

    Attributes:
        source: the adapter that is written down anew.
        shapes: the base's weights.
    """

    source: Adapter
    shapes: Shapes
    targets: dict[str, AdapterTarget] = field(default_factory=dict)
    tensors: _Computed = field(default_factory=_Computed)
    base: dict[str, BaseWeight] = field(default_factory=dict)

    def add(self, target: AdapterTarget, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        key, name = str(target.target), target.target.name
        if key in self.targets:
            raise LayoutError(self.source.source, key, "two of its targets stand there")
        self.targets[key] = target
        self.tensors.made.update({f"{key}.{n}": make for n, make in tensors.items()})
        if name not in self.base:
            self.base[name] = replace(self.shapes[name], hash=None)

    def refuse(self, key: str, why: str) -> LayoutError:
        return LayoutError(self.source.source, key, why)


def relayout(adapter: Adapter, found: Resolution, shapes: Shapes) -> Adapter:
    """Write an adapter down for the base that its names were resolved against.

    Args:
        adapter: any.
        found: a complete resolution of the names of its weights.
        shapes: shape and dtype of the base's weights, by name.

    Returns:
        An adapter whose targets are the base's weights, its tensors computed when asked for; the
        same one, where its names are the base's already. What is the same tensor as in its own
        base keeps its fingerprint.

    Raises:
        LayoutError: a target that has no form in the base: it says which, and why.
    """
    if found.is_identity:
        return adapter
    result = _Result(adapter, shapes)
    wholes: dict[tuple[str, Rule], dict[tuple[int, int | None], str]] = {}
    for key, t in adapter.targets.items():
        place = found.places[t.target.name]
        if isinstance(place, Here):
            _rename(result, key, t, place, found)
        elif isinstance(place, WholeOf):
            _split(result, key, t, place)
        else:
            parts = wholes.setdefault((place.whole, place.rule), {})
            if (place.index, place.expert) in parts:
                raise result.refuse(key, f"{place.whole} has it from two of its targets")
            parts[place.index, place.expert] = key
    for (whole, rule), parts in wholes.items():
        if rule.of_experts:
            _stack(result, whole, rule, parts)
        else:
            _fuse(result, whole, rule, parts)
    return replace(adapter, targets=result.targets, tensors=result.tensors, base=result.base)


def _rename(result: _Result, key: str, t: AdapterTarget, place: Here, found: Resolution) -> None:
    def names(old: tuple[str, ...]) -> tuple[str, ...]:
        places = (found.places.get(n) for n in old)
        return tuple(p.name for p in places if isinstance(p, Here))

    source = result.source
    target = replace(
        t,
        target=Target(place.name, t.target.region),
        also=names(t.also),
        apart=names(t.apart),
    )
    known = source.base.get(t.target.name)
    if known is not None:
        result.base[place.name] = known
    result.add(target, {n: _reader(source, key, n) for n in source.tensor_names(key)})


def _reader(adapter: Adapter, key: str, name: str) -> Callable[[], Tensor]:
    return lambda: adapter.tensors[f"{key}.{name}"]


# --- a whole of the adapter's: several tensors in the base --------------------------------------


def _split(result: _Result, key: str, t: AdapterTarget, place: WholeOf) -> None:
    rule, adapter = place.rule, result.source
    if t.target.region != (_STACK if rule.of_experts else WHOLE):
        raise result.refuse(key, f"a part of what is {len(place.parts[0])} tensors in the base")
    shapes = [result.shapes[n].shape for n in place.parts[0]]
    rows = [s[0] for s in shapes]
    tensors = adapter.factors(key)
    count = next(iter(tensors.values())).shape[0] if rule.of_experts else 1
    if count != len(place.parts):
        raise result.refuse(key, f"{count} experts, of which the base holds {len(place.parts)}")
    turned = _is_turned(result, key, t, tensors, (sum(rows), shapes[0][1]), rule)
    axes = _axes(t.settings, tensors, turned)
    for expert, parts in enumerate(place.parts):
        start = 0
        for i, name in enumerate(parts):
            where = (
                slice(i, None, len(parts)) if rule.interleaved else slice(start, start + rows[i])
            )
            start += rows[i]
            made = {
                new: _taken(
                    adapter, f"{key}.{old}", expert if rule.of_experts else None, dims, where
                )
                for old, (new, dims) in axes.items()
            }
            target = replace(t, target=Target(name), also=(), apart=())
            result.add(target, made)


def _taken(
    adapter: Adapter, name: str, expert: int | None, dims: str, rows: slice
) -> Callable[[], Tensor]:
    """One matrix of a stack, cut along its rows; turned where `dims` says so."""

    def make() -> Tensor:
        tensor = adapter.tensors[name]
        tensor = tensor if expert is None else tensor[expert]
        tensor = tensor.mT if dims.startswith("turned ") else tensor
        order = dims.removeprefix("turned ").split()
        return tensor[tuple(rows if axis == "out" else slice(None) for axis in order)]

    return make


def _axes(settings: Settings, tensors: Tensors, turned: bool) -> dict[str, tuple[str, str]]:
    """Tensor → its name and its axes in the matrix (out, in); of a turned one A and B swap."""
    plain = settings.axes
    plain |= {initial: plain[f] for initial, f in INITIAL.items() if initial in tensors}
    if not turned:
        return {n: (n, plain[n]) for n in tensors}
    pairs = {"lora_A": "lora_B", "lora_B": "lora_A", "initial_A": "initial_B"}
    pairs["initial_B"] = "initial_A"
    return {n: (pairs[n], f"turned {plain[pairs[n]]}") for n in tensors}


def _is_turned(
    result: _Result,
    key: str,
    t: AdapterTarget,
    tensors: Tensors,
    matrix: tuple[int, int],
    rule: Rule,
) -> bool:
    """The adapter holds the whole as (in, out), where the base's parts are (out, in): its shape
    says so, of a square one the rule."""
    rows, columns = matrix
    held = {
        axis: size
        for name, axes in t.settings.axes.items()
        for axis, size in zip(axes.split(), tensors[name].shape[-len(axes.split()) :], strict=True)
    }
    if "out" not in held or _of_columns(t.settings):
        raise result.refuse(key, f"of variant {t.settings.variant}, which is not made row by row")
    out, into = held["out"], held.get("in", columns)
    turned = rule.transposed if rows == columns else (out, into) == (columns, rows)
    if (out, into) == ((columns, rows) if turned else (rows, columns)):
        if turned and t.settings.variant != "lora":
            raise result.refuse(key, f"{t.settings.variant}, of a matrix that the base transposes")
        return turned
    raise result.refuse(key, f"{out} × {into} in the adapter, {rows} × {columns} in the base")


def _of_columns(settings: Settings) -> bool:
    """DoRA's lengths are those of columns, over all rows."""
    return settings.variant == "dora_columns" or "columns" in settings.parsed_form.words


# --- parts of the adapter's: one tensor in the base ----------------------------------------------


def _fuse(
    result: _Result, whole: str, rule: Rule, parts: dict[tuple[int, int | None], str]
) -> None:
    """q, k and v become slices of qkv; those that share A become the one they were."""
    adapter, shape = result.source, result.shapes[whole].shape
    keys = {i: key for (i, _), key in parts.items()}
    targets = {i: adapter.targets[key] for i, key in keys.items()}
    sizes = {i: _rows_of(adapter, key) for i, key in keys.items()}
    starts = _starts(rule, sizes, shape[0])
    if starts is None:
        raise result.refuse(keys[min(keys)], f"which rows of {whole} it is cannot be told")
    joined = len(keys) == len(rule.parts) and _share_A(adapter, list(keys.values()))
    if joined and all(targets[i].target.region == WHOLE for i in targets) and _alike(targets):
        _join(result, whole, rule, [keys[i] for i in sorted(keys)])
        return
    if rule.interleaved:
        raise result.refuse(keys[min(keys)], f"its rows take turns with others in {whole}")
    for i, key in keys.items():
        region = targets[i].target.region
        if region.stacked or region.columns is not None:
            raise result.refuse(key, f"a part of it alone is adapted, and it is rows of {whole}")
        first, last = region.rows or (0, sizes[i])
        start = starts[i]
        moved = Target(whole, Region(rows=(start + first, start + last)))
        made = {n: _reader(adapter, key, n) for n in adapter.tensor_names(key)}
        result.add(replace(targets[i], target=moved, also=(), apart=()), made)


def _rows_of(adapter: Adapter, key: str) -> int:
    """Rows of the whole weight behind a target."""
    t = adapter.targets[key]
    known = adapter.base.get(t.target.name)
    if known is not None:
        return known.shape[0]
    for name, axes in t.settings.axes.items():
        if "out" in axes.split():
            return int(adapter.tensors[f"{key}.{name}"].shape[axes.split().index("out")])
    raise AssertionError(t.settings.variant)


def _starts(rule: Rule, sizes: Mapping[int, int], total: int) -> dict[int, int] | None:
    """The first row of each part, the sizes of some being known; None where they do not tell."""
    known = dict(sizes)
    count = len(rule.parts)
    for i in (*range(1, count), *range(count - 1, 0, -1)):
        if rule.parts[i].equal:
            size = known.get(i, known.get(i - 1))
            if size is not None:
                known[i] = known[i - 1] = size
    open_ = [i for i in range(count) if i not in known]
    if len(open_) == count and all(p.equal for p in rule.parts[1:]):
        known = dict.fromkeys(range(count), total // count)
    elif len(open_) == 1:
        known[open_[0]] = total - sum(known.values())
    starts: dict[int, int] = {}
    for i in sizes:
        before = [known.get(j) for j in range(i)]
        after = [known.get(j) for j in range(i, count)]
        if None not in before:
            starts[i] = sum(n for n in before if n is not None)
        elif None not in after:
            starts[i] = total - sum(n for n in after if n is not None)
        else:
            return None
    if len(known) == count and (sum(known.values()) != total or min(known.values()) < 1):
        return None
    return starts


def _alike(targets: Mapping[int, AdapterTarget]) -> bool:
    first, *rest = targets.values()
    return all(
        (t.settings, t.strength, t.enabled) == (first.settings, first.strength, first.enabled)
        for t in rest
    )


def _share_A(adapter: Adapter, keys: list[str]) -> bool:
    """All parts are LoRA of one and the same A: they were split from one matrix."""
    if any(adapter.targets[k].settings.variant != "lora" for k in keys):
        return False
    first, *rest = (adapter.tensors[f"{k}.lora_A"] for k in keys)
    return all(t.shape == first.shape and bool((t == first).all()) for t in rest)


def _join(result: _Result, whole: str, rule: Rule, keys: list[str]) -> None:
    import torch

    adapter, count = result.source, len(rule.parts)

    def rows(name: str) -> Tensor:
        parts = [adapter.tensors[f"{k}.{name}"] for k in keys]
        if rule.interleaved:
            return torch.stack(parts, 1).flatten(0, 1)
        return torch.cat(parts)

    first = adapter.targets[keys[0]]
    made: dict[str, Callable[[], Tensor]] = {}
    for name in adapter.tensor_names(keys[0]):
        of_rows = name in ("lora_B", "initial_B")
        made[name] = (
            (lambda n: lambda: rows(n))(name) if of_rows else _reader(adapter, keys[0], name)
        )
    assert count == len(keys)
    result.add(replace(first, target=Target(whole), also=(), apart=()), made)


# --- experts --------------------------------------------------------------------------------------


def _stack(
    result: _Result, whole: str, rule: Rule, parts: dict[tuple[int, int | None], str]
) -> None:
    """One tensor an expert becomes a matrix of a stack; an expert without factors has zeros."""
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
    plan = _StackPlan(adapter, rule, parts, shape, len(rule.parts))
    if plan.problem:
        raise result.refuse(plan.problem[0], plan.problem[1])
    settings = _settings(targets[first].settings, plan.rank, plan.scale)
    target = AdapterTarget(
        Target(whole, _STACK), settings, targets[first].strength, targets[first].enabled
    )
    result.add(target, {"lora_A": lambda: plan.factors()[0], "lora_B": lambda: plan.factors()[1]})


def _settings(first: Settings, rank: int, scale: float) -> Settings:
    alpha = scale * rank
    if alpha / rank == scale:
        return replace(first, rank=rank, alpha=alpha, scaling="standard")
    return replace(first, rank=rank, alpha=scale, scaling="constant")


class _StackPlan:
    """How the factors of many matrices become those of one stack."""

    def __init__(
        self,
        adapter: Adapter,
        rule: Rule,
        parts: dict[tuple[int, int | None], str],
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
            if len(there) < count or not _share_A(self.adapter, there):
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
