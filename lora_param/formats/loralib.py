"""loralib's state dicts: `X.lora_A` and `X.lora_B` beside X's weight, and the biases it trained.

Linear: A (rank, in), B (out, rank), of W or of its transpose. Embedding: A (rank, V), B (D, rank)
and ΔW = (B @ A)ᵀ. MergedLinear: A has the rows of each enabled block one after the other, B their
rows, each of its own rank; which blocks are enabled is not stored. ConvNd: A (rank·k, in·k), B
(out·k, rank·k) and ΔW is B @ A seen in W's shape, which is a product of a higher rank.
Alpha is not stored either.

It is one file, however long, as every format is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, Host, Layer
from lora_param.errors import BrokenFileError, NoFormError, OptionError, UnsettledError, worded
from lora_param.formats.base import Format
from lora_param.formats.peft.encode import encode_pair, pair_of
from lora_param.formats.peft.kinds import kinds_of
from lora_param.formats.peft.reading import IN_FIRST, OUT_FIRST, Placed, by_layout
from lora_param.formats.record import (
    common_alpha,
    found_in,
    needs_alpha,
    pairs_of,
    record,
    scaled_to,
    settings_of,
)
from lora_param.formats.state import StateFile, names_in, open_state, write_state
from lora_param.targets.regions import WHOLE, Region
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight, is_embedding_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

LAYERS: tuple[Layer, ...] = ("linear", "conv1d", "embedding")
"""The kinds of layer that are written. Convolutions are read alone."""

_A, _B, _BIAS = ".lora_A", ".lora_B", ".bias"
_COPY = Settings(rank=1, alpha=1.0, scaling="constant", variant="copy")
_Options = tuple[float, str | None, tuple[bool, ...] | None]


def _recognise(path: Path) -> bool:
    names = set(names_in(path))
    halves = [n for n in names if n.endswith((_A, _B)) and ".parametrizations." not in n]
    whole = any(f"{n.removesuffix(_A)}.weight" in names for n in halves)  # a model, not an adapter
    ours = any(".weight" in n for n in halves)  # which lost what it says of itself
    return bool(halves) and not whole and not ours


def _read(
    path: Path,
    *,
    layout: str | None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> Adapter:
    if layout not in (None, OUT_FIRST, IN_FIRST):
        raise OptionError("layout", layout, f"{OUT_FIRST}, {IN_FIRST}")
    file = open_state(path)
    modules = _modules(file)
    if alpha is None:
        raise needs_alpha(path, modules, "loralib")
    enabled = None if enable_lora is None else tuple(map(bool, enable_lora))
    if enabled is not None and not any(enabled):
        raise OptionError("enable_lora", enable_lora, "one block or more that is enabled")
    return _settle(file, modules, (alpha, layout, enabled), None)


def _modules(file: StateFile) -> list[str]:
    """The modules with factors.

    Raises:
        BrokenFileError: a key that is none of loralib's, or a half alone.
    """
    ends = (_A, _B, _BIAS)
    for key in file.shapes:
        if not key.endswith(ends) and f".{key}" not in ends:
            raise BrokenFileError(
                file.path, f"the key {key} is none of loralib's (X.lora_A, X.lora_B, X.bias)"
            )
    found = dict.fromkeys(k.removesuffix(e) for k in file.shapes for e in (_A, _B) if k.endswith(e))
    for module in found:
        for end in (_A, _B):
            if f"{module}{end}" not in file.shapes:
                raise BrokenFileError(
                    file.path,
                    f"a lora_A and a lora_B belong together, and there is no {module}{end}",
                )
        A, B = (file.shapes[f"{module}{e}"] for e in (_A, _B))
        if len(A) != 2 or len(B) != 2 or 0 in (*A, *B) or A[0] % B[1]:
            raise BrokenFileError(file.path, f"the factors of {module} do not fit: {A} and {B}")
    return list(found)


def _settle(file: StateFile, modules: list[str], told: _Options, host: Host | None) -> Adapter:
    names = {m: f"{m}.weight" for m in modules}
    there: dict[str, Weight] = {}
    if host is not None:
        # loralib's convolution keeps the layer that it stands for inside of itself
        both = found_in(host, [n for m in modules for n in (names[m], f"{m}.conv.weight")])
        names = {m: n if (n := f"{m}.conv.weight") in both else names[m] for m in modules}
        there = {n: both[n] for n in names.values() if n in both}
    placed: list[Placed] = []
    unclear: list[str] = []
    for module in modules:
        W = there.get(names[module])
        found = _placed(file, module, names[module], told, W, unclear)
        placed += found
    if unclear and host is not None:
        raise UnsettledError(
            str(file.path),
            unclear,
            f"whether square weights of {host.name} are stored as (out, in) or (in, out)",
            f"say so with {by_layout()}, or give the live model "
            f"({worded('base=model', 'python:...')}), whose classes tell",
        )
    placed += _biases(file)
    settle = partial(_settle, file, modules, told) if host is None else None
    extra = {"alpha": told[0]}
    return record(
        placed, file.path, "loralib", tool="loralib", host=host, extra=extra, settle=settle
    )


def _placed(
    file: StateFile,
    module: str,
    name: str,
    told: _Options,
    W: Weight | None,
    unclear: list[str],
) -> Iterator[Placed]:
    alpha, layout, enabled = told
    A, B = (file.shapes[f"{module}{e}"] for e in (_A, _B))
    down, up = (partial(file.tensors.__getitem__, f"{module}{e}") for e in (_A, _B))
    rank, apart = B[1], () if W is None else W.tied
    settings, strength = settings_of(rank, alpha)
    if W is not None and len(W.shape) > 2:
        yield _conv(file, module, name, alpha, W, (down, up))
        return
    out, into = B[0], A[1]
    blocks = A[0] // rank
    if blocks > 1 or _is_block(W, out, into):
        places = _blocks(file, module, (blocks, out, into), enabled, W)
        size = out // blocks
        turned = _is_turned(W, (size * len(places), into), layout, name, unclear)
        for j, i in enumerate(i for i, on in enumerate(places) if on):
            rows = slice(j * size, (j + 1) * size)
            part = slice(j * rank, (j + 1) * rank)
            makers = _makers(partial(_part, down, part), partial(_part, up, rows), turned)
            span = (i * size, (i + 1) * size)
            if turned:
                region = Region(columns=None if len(places) == 1 else span)
            else:
                region = Region(rows=None if len(places) == 1 else span)
            total = size * len(places)
            shape = (into, total) if turned else (total, into)
            layer: Layer = "conv1d" if turned else "linear"
            yield Placed(
                name, settings, shape, makers, layer, region, strength=strength, apart=apart
            )
        return
    turned = _is_turned(W, (out, into), layout, name, unclear)
    shape = (into, out) if turned else (out, into)
    layer = "linear"
    if turned:
        of_embedding = W is not None and _is_embedding(W)
        layer = "embedding" if of_embedding else "conv1d"
    makers = _makers(down, up, turned)
    yield Placed(name, settings, shape, makers, layer, strength=strength, apart=apart)


def _is_block(W: Weight | None, rows: int, columns: int) -> bool:
    """A single pair of factors is for one block of W's rows, and not for W."""
    if W is None or sorted(W.shape) == sorted((rows, columns)):
        return False
    return any(m == columns and n % rows == 0 for n, m in (W.shape, W.shape[::-1]))


def _part(read: Callable[[], Tensor], rows: slice) -> Tensor:
    return read()[rows].contiguous()


def _makers(
    down: Callable[[], Tensor], up: Callable[[], Tensor], turned: bool
) -> dict[str, Callable[[], Tensor]]:
    """A and B in W's layout: (B A)ᵀ = Aᵀ Bᵀ."""
    if not turned:
        return {"lora_A": down, "lora_B": up}
    return {"lora_A": lambda: up().T.contiguous(), "lora_B": lambda: down().T.contiguous()}


def _is_embedding(W: Weight) -> bool:
    return "Embedding" in W.classes if W.classes else is_embedding_name(W.name)


def _is_turned(
    W: Weight | None,
    matrix: tuple[int, int],
    layout: str | None,
    name: str,
    unclear: list[str],
) -> bool:
    """W is (in, out): by its shape, else its class, else what the caller says."""
    if W is None:
        return False
    if matrix[0] != matrix[1]:
        return W.shape != matrix
    if W.classes:
        return _is_embedding(W) or W.in_first is True
    if layout is None:
        unclear.append(name)
    return layout == IN_FIRST


def _blocks(
    file: StateFile,
    module: str,
    sizes: tuple[int, int, int],
    enabled: tuple[bool, ...] | None,
    W: Weight | None,
) -> tuple[bool, ...]:
    """For each of a MergedLinear's blocks, whether it is enabled.

    Args:
        sizes: how many are enabled, their rows in all, columns.
        enabled: what the caller says.
        W: the base's weight.

    Raises:
        UnsettledError: nobody says which.
        BrokenFileError: they do not go with the tensors, or with the base.
    """
    blocks, out, into = sizes
    size = out // blocks
    total = None
    if W is not None:
        total = next((n for n, m in (W.shape, W.shape[::-1]) if m == into and n % size == 0), None)
        if total is None:
            raise BrokenFileError(
                file.path,
                f"{module} has {blocks} blocks of {size} × {into}, and {W.name} is {W.shape}",
            )
    if enabled is None:
        if total is not None and total == out:
            return (True,) * blocks
        if total is None:  # without a base: as if these were all
            return (True,) * blocks
        raise UnsettledError(
            str(file.path),
            [module],
            f"which {blocks} of {total // size} blocks of its rows are adapted",
            f"give {worded('enable_lora=', '--enable-lora 1,0,1')}, as loralib has it",
        )
    fits = sum(enabled) == blocks and (total is None or len(enabled) * size == total)
    if not fits:
        raise BrokenFileError(
            file.path,
            f"{module} has {blocks} enabled blocks of {size} rows"
            + ("" if total is None else f" out of {total}")
            + f", which enable_lora={list(enabled)} does not give",
        )
    return enabled


def _conv(
    file: StateFile,
    module: str,
    name: str,
    alpha: float,
    W: Weight,
    read: tuple[Callable[[], Tensor], Callable[[], Tensor]],
) -> Placed:
    """Row o of W is k rows of B @ A one after the other, k·(o), k·(o)+1, ...: A k times as a block
    diagonal, and of B those rows side by side."""
    A, B = (file.shapes[f"{module}{e}"] for e in (_A, _B))
    out, into, *kernel = W.shape
    k = kernel[0]
    fits = len(kernel) == 2 and set(kernel) == {k} and A[0] == B[1] and A[0] % k == 0
    if not fits or B[0] != out * k or A[1] != into * k:
        raise NoFormError(
            str(file.path),
            f"factors {A} and {B} of {module}, whose weight is {W.shape}",
            "which are not those of a square kernel of an ungrouped Conv2d",
            "bake it with loralib (model.eval()) instead",
        )
    rank = A[0] // k
    down, up = read
    # alpha/rank of loralib's rank, at the rank that the product has
    settings = Settings(rank=A[0] * k, alpha=abs(alpha) / rank or 1.0, scaling="constant")
    strength = float((alpha > 0) - (alpha < 0))
    makers: dict[str, Callable[[], Tensor]] = {
        "lora_A": lambda: _repeated(down(), k),  # (k·rank·k, in·k·k)
        "lora_B": lambda: up().view(out, k, A[0]).flatten(1).contiguous(),  # (out, k·rank·k)
    }
    return Placed(name, settings, W.shape, makers, "conv", strength=strength)


def _repeated(A: Tensor, count: int) -> Tensor:
    """The same matrix several times down a diagonal."""
    rows, columns = A.shape
    found = A.new_zeros(count * rows, count * columns)
    for i in range(count):
        found[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = A
    return found


def _biases(file: StateFile) -> list[Placed]:
    """The biases that loralib trained beside the factors, as full copies."""
    return [
        Placed(key, _COPY, file.shapes[key], {"value": partial(_column, file, key)})
        for key in file.shapes
        if not key.endswith((_A, _B))
    ]


def _column(file: StateFile, key: str) -> Tensor:
    return file.tensors[key][:, None]


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    import torch

    factors, biases = _sorted(adapter)
    tensors: dict[str, Tensor] = {
        key: adapter.factors(key)["value"].detach().cpu().flatten() for key in biases
    }
    alpha = _alpha(factors)
    for name, (pair, kind) in pairs_of(factors, "loralib", LAYERS).items():
        blocks = _merged(factors, name, kind)
        if blocks:
            pairs = [pair_of(_whole(factors, k), [k], kind, "loralib") for k in blocks]
        else:
            pairs = [pair]
        encoded = []
        for p in pairs:
            p.B, p.scale = scaled_to(p, alpha / p.rank), alpha / p.rank
            encoded.append(encode_pair(p, kind, adapter.base[name].shape))
        As, Bs = zip(*encoded, strict=True)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}{_A}": torch.cat(As), f"{module}{_B}": torch.cat(Bs)}
    write_state(tensors, path, adapter.source, force=force, sync=sync)


def _sorted(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The adapter without the full copies of biases, and these."""
    copies = [
        key
        for key, t in adapter.targets.items()
        if t.settings.variant == "copy" and t.target.name.rpartition(".")[2] == "bias"
    ]
    rest = {key: t for key, t in adapter.targets.items() if key not in copies}
    return replace(adapter, targets=rest), copies


def _merged(adapter: Adapter, name: str, kind: Layer) -> list[str]:
    """The targets of a weight that are equal blocks of its outputs of one rank, in their order."""
    keys = [k for k, t in adapter.targets.items() if t.target.name == name]
    axis = 0 if kind == "linear" else 1
    spans = [adapter.targets[k].target.region for k in keys]
    ranges = [(s.rows, s.columns)[axis] for s in spans]
    if kind == "embedding" or any((s.columns, s.rows)[axis] is not None for s in spans):
        return []
    known = {k: r for k, r in zip(keys, ranges, strict=True) if r is not None}
    sizes = {stop - start for start, stop in known.values()}
    ranks = {adapter.targets[k].settings.rank for k in keys}
    if len(known) != len(keys) or len(sizes) != 1 or len(ranks) != 1:
        return []
    (size,) = sizes
    even = adapter.base[name].shape[axis] % size == 0
    aligned = all(start % size == 0 for start, _ in known.values())
    return sorted(keys, key=known.__getitem__) if even and aligned else []


def _whole(adapter: Adapter, key: str) -> Adapter:
    """The adapter in which a block is a weight of its own."""
    t = adapter.targets[key]
    whole = replace(t, target=replace(t.target, region=WHOLE))
    return replace(adapter, targets={**adapter.targets, key: whole})


def _alpha(adapter: Adapter) -> float:
    known = adapter.extra.get("loralib", {}).get("alpha")
    if known is not None:
        return float(known)
    return common_alpha(p for p, _ in pairs_of(adapter, "loralib", LAYERS).values())


def _unsaid(adapter: Adapter) -> str:
    factors = _sorted(adapter)[0]
    told = f"loralib's files do not say alpha: read this one with alpha {_alpha(factors):g}."
    kinds = kinds_of(factors)
    merged = {name: keys for name, kind in kinds.items() if (keys := _merged(factors, name, kind))}
    for name, keys in merged.items():
        axis = 0 if kinds[name] == "linear" else 1
        spans = [factors.targets[k].target.region for k in keys]
        ranges = [r for s in spans if (r := (s.rows, s.columns)[axis]) is not None]
        size = ranges[0][1] - ranges[0][0]
        starts = {start for start, _ in ranges}
        every = range(0, factors.base[name].shape[axis], size)
        enabled = ",".join(str(int(start in starts)) for start in every)
        return f"{told} Nor do they say which blocks are enabled: enable_lora is {enabled}."
    return told


FORMAT = Format(
    "loralib",
    _recognise,
    _read,
    _write,
    LAYERS,
    takes=("alpha", "enable_lora"),
    unsaid=_unsaid,
)
