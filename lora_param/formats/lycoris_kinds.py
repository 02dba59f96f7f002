"""What LyCORIS has in a file of `<lora name>.<suffix>`: kind by kind, read and written.

LoRA is as `formats.kohya` says. LoHa is `hada_w1_a` (out, rank), `hada_w1_b` (rank, in·k·k),
`hada_w2_a` and `hada_w2_b`; in Tucker's form the first ones are (rank, out) and (rank, in) beside
`hada_t1`, `hada_t2` (rank, rank, k, k). LoKr is `lokr_w1`, or `lokr_w1_a` and `lokr_w1_b`, with
`lokr_w2` (.., .., k, k), or `lokr_w2_a` and `lokr_w2_b`, which `lokr_t2` makes those of Tucker's
form; the scale of two whole matrices is 1, whatever alpha says. `diff` and `diff_b` are added to a
weight and its bias as they are, `w_norm` and `b_norm` to those of a norm; `diff_b` comes beside any
kind. `oft_blocks` of three dimensions is OFT, of four BOFT, with `rescale`, and `alpha` its
constraint (0: none). `dora_scale` has DoRA's lengths, (out, 1, ...) or (1, in, ...).

It is one file, however long: one function for each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.adapter import AdapterTarget
from lora_param.errors import BrokenFileError, NoFormError
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DOWN", "KINDS", "MAGNITUDE", "NUMBER", "SUFFIXES", "UNKNOWN", "UP", "Module"]
__all__ += ["Part", "encode", "lengths_of", "parts_of"]

Make = Callable[[], "Tensor"]

NUMBER, MAGNITUDE = "alpha", "dora_scale"
DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
_LOHA = tuple(f"hada_w{i}_{x}" for i in "12" for x in "ab")
_LOKR = tuple(f"lokr_w{i}" for i in "12") + tuple(f"lokr_w{i}_{x}" for i in "12" for x in "ab")
_DIFFS = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
_DORA = ("lora", "loha", "lokr")  # the kinds that come with lengths
KINDS: Mapping[str, tuple[str, ...]] = {
    "lora": (DOWN, UP, MID),
    "loha": (*_LOHA, "hada_t1", "hada_t2"),
    "lokr": (*_LOKR, "lokr_t2"),
    "diff": ("diff", "w_norm", "b_norm"),
    "bias": ("diff_b",),  # beside any of the others
    "oft": ("oft_blocks", "rescale"),
}
"""Kind → the suffixes that are its own."""

SUFFIXES = tuple(s for suffixes in KINDS.values() for s in suffixes)

UNKNOWN: Mapping[str, str] = {
    "a1.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "on_input": "IA3",
    "weight": "IA3",
    "lambda_layer": "T-LoRA",
    "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "bias_indices": "a sparse bias",
}
"""Suffix → what it is of, of LyCORIS' other methods, which are not read."""


@dataclass(frozen=True)
class Part:
    """One target of a module.

    Attributes:
        leaf: "weight" or "bias".
        shape: of the weight, as far as the tensors tell: (out, in·k·k) of a convolution whose
            kernel they do not show, (out,) where they show no more.
        settings, strength: of the target.
        makers: tensor → what makes it in our layout.
        is_flat: the columns may be those of a kernel, too.
    """

    leaf: str
    shape: tuple[int, ...]
    settings: Settings
    strength: float
    makers: Mapping[str, Make]
    is_flat: bool = False

    def fits(self, weight: tuple[int, ...]) -> bool:
        """The weight may be of this shape; a 1x1 convolution has the factors of a linear layer."""
        if self.settings.variant in ("oft", "boft"):
            return weight[:1] == self.shape
        if self.is_flat and (weight[0], math.prod(weight[1:])) == self.shape:
            return True
        return _core(weight) == _core(self.shape)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


@dataclass(frozen=True)
class Module:
    """One module of a file.

    Attributes:
        source: what to call the file in messages.
        name: of the module there.
        keys: suffix → key.
        sizes: suffix → shape of the tensor.
        read: gives the tensor of a key.
        W: the shape of the weight, where the base is at hand.
        scaled: rank of the tensors, 0 where they show none → rank, alpha and strength.
        constraint: of rotations; 0 is none.
    """

    source: str
    name: str
    keys: Mapping[str, str]
    sizes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    W: tuple[int, ...] | None
    scaled: Callable[[int], tuple[int, float, float]]
    constraint: float = 0.0

    def broken(self) -> BrokenFileError:
        """What to raise where its tensors do not fit."""
        told = ", ".join(f"{s} {size}" for s, size in self.sizes.items())
        return BrokenFileError(self.source, f"the tensors of {self.name} do not fit: {told}")

    def shaped(self, suffix: str, *dims: int) -> Make:
        """A tensor in our layout."""
        key = self.keys[suffix]
        return lambda: self.read(key).reshape(dims)

    def part(
        self, shape: tuple[int, ...], settings: Settings, strength: float, names: tuple[str, ...]
    ) -> Part:
        """A target of the weight, its lengths with it; the form's sizes are checked."""
        wanted = settings.shapes((shape[0], math.prod(shape[1:])))
        suffixes = {n: n for n in names}
        if MAGNITUDE in self.keys:
            suffixes["magnitude"] = MAGNITUDE
        for name, suffix in suffixes.items():
            size, dims = self.sizes[suffix], wanted.get(name, ())
            lead = 2 if "_t" in name else 1
            flat = (*size[:lead], math.prod(size[lead:]))
            if (math.prod(size),) != dims if name == "magnitude" else flat != dims:
                raise self.broken()
        makers = {n: self.shaped(s, *wanted[n]) for n, s in suffixes.items()}
        return Part("weight", shape, settings, strength, makers, is_flat=len(shape) == 2)


def parts_of(m: Module) -> list[Part]:
    """The targets of one module.

    Raises:
        BrokenFileError: its tensors do not go together.
        NoFormError: they have no form here.
    """
    kinds = [kind for kind, suffixes in KINDS.items() if any(s in m.keys for s in suffixes)]
    own = {NUMBER, *(s for kind in kinds for s in KINDS[kind])}
    if any(kind in _DORA for kind in kinds):
        own.add(MAGNITUDE)
    of_weight = [kind for kind in kinds if kind != "bias"]
    if not kinds or len(of_weight) > 1 or not m.keys.keys() <= own:
        raise m.broken()
    read = {"lora": _lora, "loha": _loha, "lokr": _lokr, "diff": _diff, "bias": _bias, "oft": _oft}
    parts = [part for kind in kinds for part in read[kind](m)]
    if len({part.leaf for part in parts}) < len(parts):
        raise m.broken()
    return parts


def lengths_of(
    source: str, key: str, size: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[str, int]:
    """Whether `dora_scale` has lengths of "rows" or of "columns", and columns to each length.

    Args:
        source, key: for messages.
        size: of `dora_scale`.
        shape: of the weight.

    Raises:
        NoFormError: neither.
    """
    columns = math.prod(shape[1:])
    if size[:1] == shape[:1] and math.prod(size) == shape[0]:
        return "rows", 1
    if len(size) > 1 and size[0] == 1 and math.prod(size) == size[1] and columns % size[1] == 0:
        return "columns", columns // size[1]
    raise NoFormError(
        source,
        f"{key} of {size} for a weight of {shape}",
        "DoRA over neither its rows nor its columns",
        "bake it with the tool that made it",
    )


def _form(m: Module, words: list[str], shape: tuple[int, ...], kernel: int) -> str:
    """The form, with the lengths that the module has and the kernel where a tensor shows it."""
    if MAGNITUDE in m.keys:
        over, own = lengths_of(m.source, m.keys[MAGNITUDE], m.sizes[MAGNITUDE], shape)
        words = [*words, over]
        kernel = max(kernel, own)
    return "+".join(words + ([f"kernel{kernel}"] if kernel > 1 else []))


def _kernel(m: Module, suffix: str) -> tuple[int, ...]:
    """The kernel of Tucker's core. PEFT keeps that of a 1-d convolution as (k, 1)."""
    return m.sizes[suffix][2:] if m.W is None or len(m.W) != 3 else m.W[2:]


def _lora(m: Module) -> list[Part]:
    """LoRA, in Tucker's form where it has a core, with DoRA's lengths.

    Raises:
        BrokenFileError: the factors do not go together, or one is not there.
    """
    if lacking := [s for s in (DOWN, UP) if s not in m.keys]:
        raise BrokenFileError(m.source, f"{m.name} has no {lacking[0]}")
    down, up, mid = m.sizes[DOWN], m.sizes[UP], m.sizes.get(MID)
    fits = len(down) >= 2 and len(up) in (2, len(down)) and 0 not in (*down, *up)
    fits = fits and all(n == 1 for n in up[2:])
    if mid is None:
        fits = fits and up[1] == down[0]
    else:  # (p, q, k, k) between up (out, p) and down (q, in)
        fits = fits and len(mid) > 2 and mid[:2] == (up[1], down[0]) and up[1] == down[0]
        fits = fits and all(n == 1 for n in down[2:])
    if not fits:
        told = f", {MID} {mid}" if mid else ""
        raise BrokenFileError(
            m.source, f"the factors of {m.name} do not fit: {DOWN} {down}, {UP} {up}{told}"
        )
    shape = (up[0], down[1], *(mid or down)[2:])
    over, columns = "", 1
    makers = {
        "lora_A": m.shaped(DOWN, down[0], math.prod(down[1:])),
        "lora_B": m.shaped(UP, *up[:2]),
    }
    if MAGNITUDE in m.keys:
        size = m.sizes[MAGNITUDE]
        over, columns = lengths_of(m.source, m.keys[MAGNITUDE], size, m.W or shape)
        makers["magnitude"] = m.shaped(MAGNITUDE, math.prod(size))
    variant = {"": "lora", "rows": "dora", "columns": "dora_columns"}[over]
    form = f"kernel{columns}" if columns > 1 else ""
    if mid is not None:
        makers["lora_down"], makers["lora_up"] = makers.pop("lora_A"), makers.pop("lora_B")
        makers["lora_mid"] = m.shaped(MID, *mid[:2], math.prod(mid[2:]))
        variant = "tucker"
        form = "+".join(filter(None, [over, f"kernel{math.prod(mid[2:])}"]))
    rank, alpha, strength = m.scaled(down[0])
    settings = Settings(rank, alpha, variant=variant, form=form)
    return [Part("weight", shape, settings, strength, makers)]


def _loha(m: Module) -> list[Part]:
    if not all(s in m.keys for s in _LOHA) or ("hada_t1" in m.keys) != ("hada_t2" in m.keys):
        raise m.broken()
    tucker = "hada_t1" in m.keys
    if any(len(m.sizes[s]) < 2 for s in _LOHA):
        raise m.broken()
    rank, rows = m.sizes["hada_w1_b"][0], m.sizes["hada_w1_a"][1 if tucker else 0]
    shape = (rows, *m.sizes["hada_w1_b"][1:])
    kernel = 1
    if tucker:
        shape = (*shape, *_kernel(m, "hada_t1"))
        kernel = math.prod(m.sizes["hada_t1"][2:])
    elif m.W is not None and math.prod(shape) == math.prod(m.W):
        shape = m.W  # whose kernel the columns are of
    rank, alpha, strength = m.scaled(rank)
    form = _form(m, ["tucker"] if tucker else [], shape, kernel)
    settings = Settings(rank, alpha, variant="loha", form=form)
    names = (*_LOHA, *(("hada_t1", "hada_t2") if tucker else ()))
    return [m.part(shape, settings, strength, names)]


def _lokr(m: Module) -> list[Part]:
    both, full, tucker = "lokr_w1" not in m.keys, "lokr_w2" in m.keys, "lokr_t2" in m.keys
    names: tuple[str, ...] = ("lokr_w1_a", "lokr_w1_b") if both else ("lokr_w1",)
    names += ("lokr_w2",) if full else ("lokr_w2_a", "lokr_w2_b")
    names += ("lokr_t2",) if tucker else ()
    if {*names} != {s for s in m.keys if s in KINDS["lokr"]} or (full and tucker):
        raise m.broken()
    if any(len(m.sizes[s]) < 2 for s in names):
        raise m.broken()
    left = m.sizes[names[0]][0], m.sizes[names[1 if both else 0]][1]
    right = m.sizes["lokr_w2" if full else "lokr_w2_a"][1 if tucker else 0]
    inner = m.sizes["lokr_w2" if full else "lokr_w2_b"][1:]
    shape = (left[0] * right, left[1] * inner[0], *inner[1:])
    kernel = 1
    if tucker:
        shape = (*shape, *_kernel(m, "lokr_t2"))
        kernel = math.prod(m.sizes["lokr_t2"][2:])
    elif m.W is not None and math.prod(shape) == math.prod(m.W) and shape[0] == m.W[0]:
        shape = m.W
    of_rank = "lokr_w2_b" if not full else "lokr_w1_b" if both else ""
    rank, alpha, strength = m.scaled(m.sizes[of_rank][0] if of_rank else 0)
    words = [w for w, on in (("both", both), ("full", full), ("tucker", tucker)) if on]
    form = "+".join(filter(None, [_form(m, words, shape, kernel), f"left{left[0]}x{left[1]}"]))
    settings = Settings(rank, alpha, variant="lokr", form=form)
    return [m.part(shape, settings, strength, names)]


def _diff(m: Module, suffixes: tuple[str, ...] = KINDS["diff"]) -> list[Part]:
    settings, found = Settings(1, 1.0, "constant", variant="diff"), list[Part]()
    for suffix in suffixes:
        if suffix not in m.keys:
            continue
        size, leaf = m.sizes[suffix], _DIFFS[suffix]
        if not size or (leaf == "bias" and len(size) != 1):
            raise m.broken()
        made = m.shaped(suffix, size[0], math.prod(size[1:]))
        found.append(Part(leaf, size, settings, 1.0, {"diff": made}))
    return found


def _bias(m: Module) -> list[Part]:
    return _diff(m, KINDS["bias"])


def _oft(m: Module) -> list[Part]:
    blocks = m.sizes.get("oft_blocks", ())
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        raise m.broken()
    rows = blocks[-3] * blocks[-1]
    constraint = m.constraint
    words = [
        *(["constrained"] if constraint > 0 else []),
        *(["rescale"] if "rescale" in m.keys else []),
        *([f"stages{blocks[0]}"] if len(blocks) == 4 else []),
    ]
    settings = Settings(
        blocks[-1],
        constraint if constraint > 0 else 1.0,
        "constant",
        variant="oft" if len(blocks) == 3 else "boft",
        form="+".join(words),
    )
    makers = {"oft_blocks": m.shaped("oft_blocks", *blocks)}
    if "rescale" in m.keys:
        if math.prod(m.sizes["rescale"]) != rows:
            raise m.broken()
        makers["rescale"] = m.shaped("rescale", rows)
    return [Part("weight", (rows,), settings, 1.0, makers)]


def encode(
    t: AdapterTarget, tensors: Mapping[str, Tensor], shape: tuple[int, ...], of_norm: bool
) -> dict[str, Tensor]:
    """A target's tensors by their suffixes.

    Args:
        t: of one of the kinds here, or of Tucker's form, of a whole weight or bias.
        tensors: its own.
        shape: of the weight or bias.
        of_norm: its module is a norm.
    """
    import torch

    kernel, ones = shape[2:], (1,) * (len(shape) - 2)
    if t.settings.variant == "diff":
        leaf = t.target.name.rpartition(".")[2]
        suffix = next(s for s, of in _DIFFS.items() if of == leaf and s.endswith("norm") == of_norm)
        factor, diff = t.scale * t.strength, tensors["diff"]
        if factor != 1:
            diff = diff.to(torch.promote_types(diff.dtype, torch.float32)) * factor
        return {suffix: diff.reshape(shape).contiguous()}
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if name == "magnitude":
            over_rows = "rows" in t.settings.parsed_form.words
            found[MAGNITUDE] = x.reshape((-1, 1, *ones) if over_rows else (1, -1, *ones))
        elif "_t" in name:
            found[name] = x.reshape(*x.shape[:2], *kernel)
        elif name == "lokr_w2":
            found[name] = x.reshape(x.shape[0], -1, *kernel)
        elif name == "rescale":
            found[name] = x.reshape(-1, *(1,) * (len(shape) - 1))
        elif name == "lora_mid":
            found["lora_mid.weight"] = x.reshape(*x.shape[:2], *kernel)
        elif name in ("lora_down", "lora_up"):
            found[f"{name}.weight"] = x.reshape(*x.shape, *ones)
        else:
            found[name] = x
    return {n: x.contiguous() for n, x in found.items()}
