"""What differs between two adapters, between two checkpoints, or between a checkpoint and what a
base and an adapter should have made of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter
from lora_param.arithmetic.difference import Diff, Difference
from lora_param.arithmetic.pairs import Pair, pair_of
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.plan import plan_merging
from lora_param.errors import OptionError
from lora_param.formats import is_adapter, read_adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["diff"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int, str], None]

_DIRECTIONS = 64  # how many directions a difference is searched for
_NOTHING = 1e-4  # of the greatest singular value: what fp32 leaves of a zero one


def diff(
    a: PathLike,
    b: PathLike,
    adapter: PathLike | None = None,
    *,
    key: str | None = None,
    check_fingerprint: bool = True,
    progress: Progress | None = None,
) -> Diff:
    """Compare two adapters, two checkpoints, or a checkpoint with a base and an adapter.

    Weights are the same where their bits are. One is in memory at a time. A merged checkpoint may
    be stored in another dtype than its base (`bake --dtype`): W + ΔW is then rounded to the dtype
    that `a` has, and the notes say so.

    Args:
        a: an adapter or a checkpoint.
        b: the same kind of thing.
        adapter: with two checkpoints: is `a` what baking this adapter into `b` gives?
        key: dotted name of the nested state dict in pickles.
        check_fingerprint: refuse a `b` with other values than the adapter was made on.
        progress: called with what is done, what there is, and a name.

    Raises:
        OptionError: an adapter and a checkpoint, which have nothing to compare.
        MismatchError, FingerprintError: the adapter does not fit `b`.
        FileError: something cannot be read.

    >>> diff("merged", "base", "adapter.safetensors").same  # doctest: +SKIP
    True
    """
    sides = [is_adapter(p) for p in (a, b)]
    if sides == [True, True] and adapter is None:
        return _of_adapters(read_adapter(a), read_adapter(b), progress)
    if any(sides):
        found = f"{a} and {b}" + ("" if adapter is None else f" with {adapter}")
        accepted = "two adapters, two checkpoints, or MERGED BASE ADAPTER"
        raise OptionError("what to compare", found, accepted)
    with open_checkpoint(a, key) as one, open_checkpoint(b, key) as other:
        return _of_checkpoints(one, other, adapter, check_fingerprint, progress)


# --- checkpoints ----------------------------------------------------------------------------------


def _of_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    adapter: PathLike | None,
    check_fingerprint: bool,
    progress: Progress | None,
) -> Diff:
    merging = None
    if adapter is not None:
        pairs = [(read_adapter(adapter), 1.0)]
        merging = plan_merging(b, pairs, dtype=None, check_fingerprint=check_fingerprint)
    cast: dict[tuple[torch.dtype, torch.dtype], int] = {}
    names = [*a, *(n for n in b if n not in a)]
    both = [n for n in names if n in a and n in b]
    rows: list[Difference] = []
    for i, name in enumerate(names):
        if progress:
            progress(i + 1, len(names), name)
        if name not in a or name not in b:
            rows.append(Difference(name, f"in {a.path if name in a else b.path} alone"))
            continue
        mine, theirs = a[name], b[name]
        if merging is not None:
            own = merging.stored_as(theirs)
            if mine.dtype != own and mine.is_floating_point() and own.is_floating_point:
                cast[own, mine.dtype] = cast.get((own, mine.dtype), 0) + 1
                theirs = replace(merging, dtype=mine.dtype).stored(name, theirs)
            else:
                theirs = merging.stored(name, theirs)
        if row := _values(name, mine, theirs):
            rows.append(row)
    side = str(b.path) if adapter is None else f"{b.path} with {adapter}"
    kind = "checkpoints" if adapter is None else "baked"
    notes = [_cast_note(n, *dtypes) for dtypes, n in cast.items()]
    return Diff(str(a.path), side, kind, tuple(rows), len(both), tuple(notes))


def _cast_note(count: int, base: torch.dtype, merged: torch.dtype) -> str:
    there, here = (str(d).removeprefix("torch.") for d in (base, merged))
    return (
        f"{count} weight{'s' * (count != 1)}, {there} in the base, {'is' if count == 1 else 'are'} "
        f"{here} in what was merged, and compared as {here}."
    )


def _values(name: str, a: Tensor, b: Tensor) -> Difference | None:
    import torch

    if a.shape != b.shape:
        return Difference(name, f"{tuple(a.shape)} and {tuple(b.shape)}")
    if a.layout != torch.strided or b.layout != torch.strided or a.is_complex() or b.is_complex():
        same = a.layout == b.layout and a.dtype == b.dtype and bool((a == b).all())
        return None if same else Difference(name, f"{a.dtype}, {a.layout}", total=a.numel())
    same_dtype = a.dtype == b.dtype
    if same_dtype and torch.equal(a, b):
        return None
    words = "values"
    if not same_dtype:
        words = " and ".join(str(t.dtype).removeprefix("torch.") for t in (a, b))
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    x, y = a.to(wide), b.to(wide)
    delta = x - y
    changed = int(torch.count_nonzero(delta))
    if same_dtype and changed == 0 and not bool(x.isnan().any() or y.isnan().any()):
        return None  # a zero of another sign: the same number
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    base = float(torch.linalg.vector_norm(y, dtype=torch.float64))
    ratio = norm / base if base else math.inf
    return Difference(name, words, changed, a.numel(), norm, ratio, _rank(delta))


def _rank(delta: Tensor) -> int | None:
    """The rank of a matrix, up to 64; 0 for none at all."""
    import torch

    from lora_param.weight.lowrank import Kept, factorize

    if delta.dim() < 2 or not bool(delta.isfinite().all()):
        return None
    matrix = delta.reshape(delta.shape[0], -1)
    low = factorize(matrix, Kept(rank=_DIRECTIONS))
    values = low.B.square().sum(0)  # singular values: both factors have their roots
    count = int(torch.count_nonzero(values > _NOTHING * values.max())) if values.any() else 0
    if count == _DIRECTIONS < min(matrix.shape) or low.energy < 1 - 1e-5:
        return None
    return count


# --- adapters -------------------------------------------------------------------------------------


def _of_adapters(a: Adapter, b: Adapter, progress: Progress | None) -> Diff:
    keys = [*a.targets, *(k for k in b.targets if k not in a.targets)]
    both = [k for k in keys if k in a.targets and k in b.targets]
    rows: list[Difference] = []
    for i, key in enumerate(keys):
        if progress:
            progress(i + 1, len(keys), key)
        if key not in b.targets or key not in a.targets:
            side = a if key in a.targets else b
            rows.append(Difference(key, f"in {side.source} alone"))
            continue
        rows += _targets(a, b, key)
    return Diff(a.source, b.source, "adapters", tuple(rows), len(both))


def _targets(a: Adapter, b: Adapter, key: str) -> Iterator[Difference]:
    import torch

    mine, theirs = a.targets[key], b.targets[key]
    words = []
    if mine.enabled != theirs.enabled:
        words.append("disabled" if theirs.enabled else "enabled")
    for name in ("rank", "variant"):
        x, y = getattr(mine.settings, name), getattr(theirs.settings, name)
        if x != y:
            words.append(f"{name} {x} and {y}")
    if mine.settings.variant != theirs.settings.variant:
        yield Difference(key, ", ".join(words))
        return
    f, g = a.factors(key), b.factors(key)
    same = f.keys() == g.keys() and all(torch.equal(f[n], g[n]) for n in f)
    scales = mine.scale * mine.strength, theirs.scale * theirs.strength
    if same and scales[0] == scales[1] and not words:
        return
    if scales[0] != scales[1]:
        words.append(f"scale {scales[0]:g} and {scales[1]:g}")
    if mine.settings.variant != "lora":
        yield Difference(key, ", ".join(words) or "values")
        return
    x, y = (pair_of(s, key, "diff") for s in (a, b))
    if x.A.shape[-1] != y.A.shape[-1] or x.B.shape[-2] != y.B.shape[-2]:
        yield Difference(key, "of weights of other shapes")
        return
    norm, base = _norm(x, y), _norm(y)
    yield Difference(
        key,
        ", ".join(words) or "values",
        norm=norm,
        ratio=norm / base if base else math.inf,
        overlap=_overlap(x, y),
    )


def _norm(x: Pair, y: Pair | None = None) -> float:
    """‖ΔW‖ of x, or of the difference of both, from the Gram matrices of the factors, in fp64."""
    import torch

    A = x.A.double() if y is None else torch.cat([x.A, y.A], -2).double()
    B = x.B.double() * x.scale
    if y is not None:
        B = torch.cat([B, -y.B.double() * y.scale], -1)
    R_B, R_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    return float(torch.linalg.vector_norm(R_B @ R_A.mT))


def _overlap(x: Pair, y: Pair) -> float | None:
    """The mean of the squared cosines between two updates' directions; None where one is 0."""
    import torch

    from lora_param.weight.lowrank import Kept, reduce_product

    shares = []
    lows = [reduce_product(p.A.double(), p.B.double(), Kept(energy=1.0)) for p in (x, y)]
    if any(not bool(low.A.any()) for low in lows):
        return None
    for left, right in ((lows[0].B, lows[1].B), (lows[0].A.mT, lows[1].A.mT)):
        u, v = (torch.nn.functional.normalize(t, dim=-2) for t in (left, right))
        cosines = torch.linalg.svdvals(u.mT @ v)  # (*, min(r))
        shares.append(float(cosines.square().mean()))
    return sum(shares) / 2
