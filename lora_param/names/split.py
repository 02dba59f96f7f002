"""A whole weight of the adapter's that is several tensors in the base: each gets its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, AdapterTarget
from lora_param.names.resolve import WholeOf
from lora_param.names.rewritten import STACK, Rewritten
from lora_param.names.table import Rule
from lora_param.targets.regions import WHOLE, Target
from lora_param.targets.settings import INITIAL, Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["split"]


def split(result: Rewritten, key: str, t: AdapterTarget, place: WholeOf) -> None:
    """Give each of the tensors at `place` its rows of a whole, and each expert its matrix.

    Raises:
        LayoutError: part of the whole alone is adapted, or its shape is not that of its parts.
    """
    rule, adapter = place.rule, result.source
    if t.target.region != (STACK if rule.of_experts else WHOLE):
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


def _axes(
    settings: Settings, tensors: Mapping[str, Tensor], turned: bool
) -> dict[str, tuple[str, str]]:
    """Tensor → its name and its axes in the matrix (out, in); of a turned one A and B swap."""
    axes = settings.all_axes
    if not turned:
        return {n: (n, axes[n]) for n in tensors}
    pairs = (*INITIAL,), (*INITIAL.values(),)
    other = {n: m for pair in pairs for n, m in zip(pair, pair[::-1], strict=True)}
    return {n: (other[n], f"turned {axes[other[n]]}") for n in tensors}


def _is_turned(
    result: Rewritten,
    key: str,
    t: AdapterTarget,
    tensors: Mapping[str, Tensor],
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
