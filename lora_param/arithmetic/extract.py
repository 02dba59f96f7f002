"""The low-rank difference of two checkpoints: the adapter that leads from one to the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_param.adapter import Adapter, AdapterTarget, check_name
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import MismatchError, NoDifferenceError, NonFiniteError
from lora_param.names.table import default_names
from lora_param.printing import Printed
from lora_param.targets.matching import match_targets
from lora_param.targets.regions import Region, Target
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight, is_buffer_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExtractReport", "Extracted", "Moved", "extract"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Extracted:
    """One weight whose difference became factors.

    Attributes:
        target: its key.
        shape: of the weight.
        rank: of the factors.
        energy: share of ‖Δ‖² that they hold.
        relative_norm: ‖Δ‖ / ‖W‖ of the whole difference.
    """

    target: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    relative_norm: float


@dataclass(frozen=True, slots=True)
class Moved:
    """A weight that differs and is not in the adapter.

    Attributes:
        name: its name.
        reason: why: one-dimensional, not asked for, ...
        relative_norm: ‖Δ‖ / ‖W‖, where both can be compared.
    """

    name: str
    reason: str
    relative_norm: float | None = None


@dataclass(frozen=True, repr=False)
class ExtractReport(Printed):
    """What `extract` found. It prints itself.

    Attributes:
        base: where from.
        tuned: where to.
        rows: one for each weight in the adapter.
        moved: what differs and is not in it.
        unchanged: number of weights that are the same bit for bit.
        adapter: the adapter, in memory.
    """

    view: ClassVar[str] = "extract_view"

    base: str
    tuned: str
    rows: tuple[Extracted, ...]
    moved: tuple[Moved, ...]
    unchanged: int
    adapter: Adapter

    @property
    def energy(self) -> float:
        """The least share of ‖Δ‖² that a target's factors hold."""
        return min((row.energy for row in self.rows), default=1.0)

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "base": self.base,
            "tuned": self.tuned,
            "rows": [asdict(row) for row in self.rows],
            "moved": [asdict(m) for m in self.moved],
            "unchanged": self.unchanged,
            "energy": self.energy,
        }

    def __repr__(self) -> str:
        return f"<ExtractReport: {len(self.rows)} targets, {len(self.moved)} left out>"


def extract(
    base: PathLike,
    tuned: PathLike,
    targets: str | Iterable[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    exact: bool = False,
    seed: int = 0,
    adapter: str = "default",
    key: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ExtractReport:
    """Find the adapter that leads from a checkpoint to a fine-tuned one.

    Each difference is taken in fp32 and decomposed, one weight in memory at a time; the adapter is
    `ExtractReport.adapter`, with scale 1. Without one of `rank`, `energy` and `error` it keeps
    rank 32. Weights that are equal bit for bit are left out. What moved without being a matrix
    (norms, biases), what the patterns leave out, other shapes and what one side alone has are
    listed in the report.

    Args:
        base: a checkpoint of any kind that `open_checkpoint` takes.
        tuned: another one, whose names may have another prefix.
        targets: patterns that choose weights; all where None.
        rank: the most that a target gets.
        energy: the share of ‖Δ‖² to keep; each target gets the fewest that hold it.
        error: the same, as a share of ‖Δ‖ that may be lost.
        exact: decompose in full instead of by random projections.
        seed: of the projections.
        adapter: the name of the result.
        key: dotted name of the nested state dict in pickles.
        progress: called with weights done, weights in all, and the name.

    Raises:
        OptionError: several of rank, energy and error, or a value out of range.
        MismatchError: the two have no weight in common.
        NoDifferenceError: no matrix differs.
        NonFiniteError: a weight holds NaN or infinity.
        FileError: something cannot be read.

    >>> extract("base", "tuned", rank=16).adapter.targets  # doctest: +SKIP
    {'q_proj.weight': ...}
    """
    from lora_param.weight.lowrank import Kept, factorize

    given = (rank, energy, error)
    keep = Kept(rank=32) if given == (None, None, None) else Kept(rank, energy, error)
    check_name(adapter)
    rows: list[Extracted] = []
    moved: list[Moved] = []
    made: dict[str, AdapterTarget] = {}
    tensors: dict[str, Tensor] = {}
    unchanged = 0
    with open_checkpoint(base, key) as old, open_checkpoint(tuned, key) as new:
        theirs = _pairs(old, new)
        if not theirs:
            raise MismatchError(
                str(new.path),
                str(old.path),
                unexpected=list(new),
                missing=list(old),
                wanted=len(new),
            )
        chosen = None if targets is None else set(match_targets(old.weights, targets))
        moved += [Moved(n, f"in {old.path} alone") for n in old if n not in theirs]
        used = set(theirs.values())
        moved += [Moved(n, f"in {new.path} alone") for n in new if n not in used]
        seen: set[str] = set()
        for i, (name, other) in enumerate(theirs.items()):
            weight = old.weights[name]
            if progress:
                progress(i + 1, len(theirs), name)
            if name in seen or not weight.is_float or is_buffer_name(name):
                continue
            seen.update(weight.tied)
            if new.weights[other].shape != weight.shape:
                shapes = f"{weight.shape} became {new.weights[other].shape}"
                moved.append(Moved(name, shapes))
                continue
            W, delta = _difference(old, new, name, other)
            if delta is None:
                unchanged += 1
                continue
            reason = _left_out(weight, chosen)
            size = _ratio(delta, W)
            if reason:
                moved.append(Moved(name, reason, size))
                continue
            region = Region(stacked=_is_stack(weight))
            target = Target(name, region)
            low = factorize(
                delta.reshape(region.matrix(weight.shape)), keep, exact=exact, seed=seed
            )
            settings = Settings(rank=low.A.shape[-2], alpha=float(low.A.shape[-2]))
            made[str(target)] = AdapterTarget(target, settings, also=weight.tied)
            tensors |= {f"{target}.lora_A": low.A, f"{target}.lora_B": low.B}
            rows.append(Extracted(str(target), weight.shape, settings.rank, low.energy, size))
        if not made:
            raise NoDifferenceError(str(new.path), str(old.path), [m.name for m in moved])
        record = Adapter(
            made,
            tensors,
            old.fingerprint(t.target.name for t in made.values()),
            adapter,
            f"the difference of {new.path} and {old.path}",
        )
        return ExtractReport(
            str(old.path), str(new.path), tuple(rows), tuple(moved), unchanged, record
        )


def _pairs(old: Checkpoint, new: Checkpoint) -> dict[str, str]:
    """The base's name of each weight that both have → the other's."""
    names = default_names()
    index = names.index(new)
    found: dict[str, str] = {}
    for name in old:
        alike = [name] if name in new else index.get(names.canonical(name), [])
        if len(alike) == 1:
            found[name] = alike[0]
    return found


def _is_stack(weight: Weight) -> bool:
    """Experts: three dimensions, and no module of its own as a convolution has."""
    return len(weight.shape) == 3 and not weight.name.endswith("weight")


def _left_out(weight: Weight, chosen: set[str] | None) -> str:
    if weight.unsuitable:
        return weight.unsuitable
    return "" if chosen is None or weight.name in chosen else "not asked for"


def _difference(
    old: Checkpoint, new: Checkpoint, name: str, other: str
) -> tuple[Tensor, Tensor | None]:
    """W and Δ in fp32 (fp64 for fp64 weights), or None for Δ where both are the same bits."""
    import torch

    from lora_param.weight.precision import compute_dtype

    W, V = old[name], new[other]
    if W.dtype == V.dtype and torch.equal(W, V):
        return W, None
    wide = torch.promote_types(compute_dtype(W.dtype), compute_dtype(V.dtype))
    delta = V.to(wide) - W.to(wide)
    if not bool(delta.any()):  # other dtypes, the same numbers
        return W, None
    if not bool(torch.isfinite(delta).all()):
        raise NonFiniteError(f"the difference at {name}")
    return W, delta


def _ratio(delta: Tensor, W: Tensor) -> float:
    import torch

    norm, base = (
        float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (delta, W.to(delta.dtype))
    )
    return norm / base if base else float("inf")
