"""PEFT's LoHa, LoKr and OFT: their tensors as targets, and targets as their tensors.

LoHa's and LoKr's tensors are LyCORIS' (see `formats.lycoris_kinds`), the scale is alpha/rank from
the config, of two whole matrices too, and Tucker's core of a 1-d convolution is (rank, rank, k, 1).
PEFT makes the shapes of LoKr's tensors of its config, so that they have to follow from one.
`oft_R` rotates the inputs of a layer (see `variants.oft_columns`); on an embedding it rotates what
comes out of it, the other way round.

It is one file, however long: one entry for each of PEFT's other methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, Layer
from lora_param.errors import BrokenFileError, NoFormError
from lora_param.formats.lycoris_kinds import KINDS, Module, encode, parts_of
from lora_param.formats.peft.config import PEFT_VERSION
from lora_param.formats.peft.encode import check_whole
from lora_param.formats.peft.keys import LayerKeys
from lora_param.formats.peft.kinds import split_name
from lora_param.formats.peft.patterns import exact_alpha, patterns, target_names
from lora_param.formats.peft.reading import Placed, Reading
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Others", "encode_others", "place_other"]

METHODS: Mapping[str, str] = {"LOHA": "loha", "LOKR": "lokr", "OFT": "oft_columns"}
"""PEFT's method → the variant that it is."""

_LAYERS: Mapping[str, tuple[Layer, ...]] = {
    "loha": ("linear", "conv"),
    "lokr": ("linear", "conv"),
    "oft_columns": ("linear", "conv", "embedding"),
}
_BAKE = "bake it (lora-param bake), or leave it out"


def place_other(reading: Reading, layer: LayerKeys) -> Placed:
    """The target of one layer.

    Raises:
        BrokenFileError: its tensors do not go together, or not with the config.
        NoFormError: it has no form here.
    """
    method, names = reading.source.config.method, set(layer.parts)
    own = {"oft_R"} if method == "OFT" else set(KINDS[METHODS[method]])
    if layer.depth or (names - own and names != {"oft_embedding_R"}):
        raise BrokenFileError(
            reading.source.path,
            f"the tensors of {layer.module} ({', '.join(sorted(names))}) are not those of {method}",
        )
    placed = _rotation(reading, layer) if method == "OFT" else _composed(reading, layer)
    W = reading.weight(placed.name)
    placed.apart = () if W is None else W.tied
    return placed


def _composed(reading: Reading, layer: LayerKeys) -> Placed:
    name, source = f"{layer.module}.weight", reading.source
    W = reading.weight(name)

    def scaled(rank: int) -> tuple[int, float, float]:
        rank = rank or source.config.ranks(layer.module)[0]
        settings, strength = reading.settings(layer.module, rank)
        return rank, settings.alpha, strength

    sizes = {n: source.shapes[k] for n, k in layer.parts.items()}
    if "lokr_w2" in layer.parts and len(source.shapes[layer.parts["lokr_w2"]]) == 3:
        raise NoFormError(
            str(source.path),
            f"a whole lokr_w2 of the 1-d convolution {layer.module}",
            "which PEFT lays out in another order than LyCORIS",
            "use it with PEFT, or train it in another form",
        )
    shape = None if W is None else W.shape
    read = source.tensors.__getitem__
    (part,) = parts_of(
        Module(str(source.path), layer.module, layer.parts, sizes, read, shape, scaled)
    )
    if W is not None and not part.fits(W.shape):
        reading.differ(name, W, f"{part.shape}")
    found = part.shape if W is None else W.shape
    kind: Layer = "" if W is None else "conv" if len(found) > 2 else "linear"
    return Placed(name, part.settings, found, dict(part.makers), kind, strength=part.strength)


def _rotation(reading: Reading, layer: LayerKeys) -> Placed:
    name, source = f"{layer.module}.weight", reading.source
    ((part, key),) = layer.parts.items()
    size = source.shapes[key]
    block = math.isqrt(2 * size[-1]) + 1
    shared = "shared" in source.config.form
    if len(size) != 2 or block < 2 or block * (block - 1) // 2 != size[1]:
        raise BrokenFileError(source.path, f"{key} is {size}, which is no block of a rotation")
    W, of_embedding = reading.weight(name), part == "oft_embedding_R"
    columns = size[0] * block
    turned = W is not None and W.in_first and not of_embedding
    if W is not None and (turned or (len(W.shape) > 2 and math.prod(W.shape[2:]) > 1)):
        raise NoFormError(
            str(source.path),
            f"a rotation of {layer.module}, of shape {W.shape}",
            "where PEFT's forward and its merge are two different things",
            "use it with PEFT",
        )
    if W is not None:
        width = math.prod(W.shape[1:])
        if width % block if shared else width != columns:
            reading.differ(name, W, f"{columns} inputs")
    settings = Settings(block, 1.0, "constant", variant="oft_columns", form=source.config.form)
    kind: Layer = "embedding" if of_embedding else "conv" if W and len(W.shape) > 2 else "linear"
    read = reading.tensor(key)
    made = (lambda: -read()) if of_embedding else read  # R turned round is that of -Q
    return Placed(name, settings, (1, columns) if W is None else W.shape, {"oft_R": made}, kind)


@dataclass
class Others:
    """What goes into the files of an adapter of one of these methods.

    Attributes:
        tensors: by their keys, without the prefix.
        modules: what is targeted.
        config: what its config says.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Layer] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def encode_others(
    adapter: Adapter, of_weight: Mapping[str, list[str]], kinds: Mapping[str, Layer]
) -> Others | None:
    """The adapter as PEFT has it, where its targets are of one of these methods; otherwise None.

    Args:
        adapter: any, settled.
        of_weight: weight → its targets.
        kinds: weight → kind of layer.

    Raises:
        NoFormError: PEFT has no form for some target, or none beside the others.
    """
    variants = {adapter.targets[k].settings.variant for keys in of_weight.values() for k in keys}
    method = next((m for m, variant in METHODS.items() if variant in variants), None)
    if method is None:
        return None
    out = Others()
    for name, keys in of_weight.items():
        t, kind = check_whole(adapter, keys, "PEFT"), kinds[name]
        words = t.settings.parsed_form.words
        why = ""
        if t.settings.variant != METHODS[method]:
            why = f"of variant {t.settings.variant}, and PEFT's {method} is for all of an adapter"
        elif words & {"rows", "columns"}:
            why = f"with DoRA's lengths, which PEFT's {method} does not have"
        elif kind not in _LAYERS[t.settings.variant] or split_name(name)[1] != "weight":
            why = f"of a layer that PEFT's {method} does not have"
        elif t.settings.dropout:
            why = f"with dropout, which PEFT's {method} does not have on inputs"
        if why:
            raise NoFormError(adapter.source, keys[0], why, _BAKE)
        out.modules[split_name(name)[0]] = kind
    write = {"LOHA": _loha, "LOKR": _lokr, "OFT": _oft}[method]
    config = write(adapter, out, [keys[0] for keys in of_weight.values()])
    out.config = {
        **config,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_weights": True,
        "module_dropout": 0.0,
        "peft_type": method,
        "peft_version": PEFT_VERSION,
        "target_modules": target_names(adapter.weights_at_hand, list(out.modules)),
        "task_type": None,
    }
    return out


def _ranks(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """`r`, `alpha` and their patterns."""
    alphas = {name: exact_alpha(scales[name], r) for name, r in ranks.items()}
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns(alphas)
    numbers = {k: _number(v) for k, v in alpha_pattern.items()}
    return {
        "r": rank,
        "rank_pattern": rank_pattern,
        "alpha": _number(alpha),
        "alpha_pattern": numbers,
        "rank_dropout": 0.0,
    }


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _factors(adapter: Adapter, key: str) -> dict[str, Tensor]:
    return {n: x.detach().cpu() for n, x in adapter.factors(key).items()}


def _add(adapter: Adapter, out: Others, key: str, tensors: Mapping[str, Tensor]) -> None:
    """The tensors of a target; a core of one dimension gets PEFT's second one."""
    t = adapter.targets[key]
    shape = adapter.base[t.target.name].shape
    found = encode(t, tensors, shape, of_norm=False)
    module = split_name(t.target.name)[0]
    for name, x in found.items():
        out.tensors[f"{module}.{name}"] = x[..., None] if "_t" in name and x.dim() == 3 else x


def _one(adapter: Adapter, keys: Iterable[str], what: str, values: Iterable[Any]) -> Any:
    """What all targets have in common.

    Raises:
        NoFormError: nothing; the message says what.
    """
    first, *rest = zip(keys, values, strict=True)
    for key, value in rest:
        if value != first[1]:
            why = f"{what} {value}, and {first[0]} {first[1]}; PEFT has one for all"
            raise NoFormError(adapter.source, f"{key} of", why, _BAKE)
    return first[1]


def _is_spatial(shape: tuple[int, ...]) -> bool:
    return math.prod(shape[2:]) > 1


def _loha(adapter: Adapter, out: Others, keys: list[str]) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    spatial: dict[str, bool] = {}
    for key in keys:
        t = adapter.targets[key]
        module = split_name(t.target.name)[0]
        ranks[module], scales[module] = t.settings.rank, t.scale * t.strength
        if _is_spatial(adapter.base[t.target.name].shape):
            spatial[key] = "tucker" in t.settings.parsed_form.words
        _add(adapter, out, key, _factors(adapter, key))
    tucker = bool(spatial) and _one(adapter, spatial, "Tucker's form", spatial.values())
    return {**_ranks(ranks, scales), "use_effective_conv2d": tucker}


@dataclass
class _Kron:
    """LoKr's matrices of one target as PEFT's config has to make them.

    Attributes:
        key: the target.
        rank: for PEFT, which makes factors of w2 below half of its larger side.
        left, right: shapes of w1 and w2, without the kernel.
        tensors: by their names.
        is_spatial: the kernel has several elements.
    """

    key: str
    rank: int
    left: tuple[int, int]
    right: tuple[int, int]
    tensors: dict[str, Tensor]
    is_spatial: bool

    @property
    def both(self) -> bool:
        """w1 is of two factors."""
        return "lokr_w1_a" in self.tensors

    @property
    def tucker(self) -> bool:
        """w2 is in Tucker's form."""
        return "lokr_t2" in self.tensors


def _lokr(adapter: Adapter, out: Others, keys: list[str]) -> dict[str, Any]:
    found = [_kron(adapter, key) for key in keys]
    both = any(k.both for k in found)
    for k in found:
        if both and not k.both and k.rank < max(k.left) / 2:
            why = "whose first matrix is whole beside others of two factors, and PEFT has one rule"
            raise NoFormError(adapter.source, k.key, why, _BAKE)
        _add(adapter, out, k.key, k.tensors)
    spatial = [k for k in found if k.is_spatial and "lokr_w2" not in k.tensors]
    tucker = bool(spatial) and _one(
        adapter, (k.key for k in spatial), "Tucker's form", (k.tucker for k in spatial)
    )
    pairs = [(k.left[i], k.right[i]) for k in found for i in (0, 1)]
    factors = [-1, *sorted({n for pair in pairs for n in pair})]
    factor = next((f for f in factors if all(_divided(a * b, f) == (a, b) for a, b in pairs)), None)
    if factor is None:
        k = found[0]
        raise NoFormError(
            adapter.source,
            k.key,
            f"of {k.left} by {k.right} and others, which no decompose_factor of PEFT divides so",
            _BAKE,
        )
    modules = {split_name(adapter.targets[k.key].target.name)[0]: k for k in found}
    scales = {m: (t := adapter.targets[k.key]).scale * t.strength for m, k in modules.items()}
    return {
        **_ranks({m: k.rank for m, k in modules.items()}, scales),
        "decompose_both": both,
        "decompose_factor": factor,
        "rank_dropout_scale": False,
        "use_effective_conv2d": tucker,
    }


def _kron(adapter: Adapter, key: str) -> _Kron:
    """A target's matrices.

    Those that PEFT would have whole at this rank are multiplied out, in fp32 at least.
    """
    from lora_param.weight.precision import compute_dtype
    from lora_param.weight.variants.lokr import whole

    t, tensors = adapter.targets[key], _factors(adapter, key)
    shape, rank = adapter.base[t.target.name].shape, t.settings.rank
    wide = compute_dtype(next(iter(tensors.values())).dtype)
    w1 = whole(tensors, "1", wide)
    left = (int(w1.shape[0]), int(w1.shape[1]))
    if shape[1] % left[1]:
        why = f"whose first matrix, {left}, does not divide its {shape[1]} inputs"
        raise NoFormError(adapter.source, key, why, _BAKE)
    right = (shape[0] // left[0], shape[1] // left[1])
    if "lokr_w2" in tensors:
        rank = max(rank, -(-max(right) // 2))
    elif rank >= max(right) / 2:
        w2 = whole(tensors, "2", wide)
        tensors = {n: x for n, x in tensors.items() if not n.startswith(("lokr_w2", "lokr_t"))}
        tensors["lokr_w2"] = w2
    if "lokr_w1_a" in tensors and rank >= max(left) / 2:
        tensors = {n: x for n, x in tensors.items() if not n.startswith("lokr_w1")}
        tensors["lokr_w1"] = w1
    if len(shape) == 3 and "lokr_w2" in tensors:
        why = "whose second matrix PEFT lays out in another order on a 1-d convolution"
        raise NoFormError(adapter.source, key, why, _BAKE)
    return _Kron(key, rank, left, right, tensors, _is_spatial(shape))


def _divided(number: int, factor: int) -> tuple[int, int]:
    """A number as PEFT's `decompose_factor` divides it."""
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    limit = math.isqrt(number) if factor < 0 else min(math.isqrt(number), factor)
    small = next(d for d in range(limit, 0, -1) if number % d == 0)
    return small, number // small


def _oft(adapter: Adapter, out: Others, keys: list[str]) -> dict[str, Any]:
    settings = [adapter.targets[k].settings for k in keys]
    form = _one(adapter, keys, "a form", (s.form for s in settings))
    counts: list[int] = []
    for key in keys:
        t = adapter.targets[key]
        shape, module = adapter.base[t.target.name].shape, split_name(t.target.name)[0]
        if _is_spatial(shape):
            why = "of a convolution, where PEFT's forward and its merge are two different things"
            raise NoFormError(adapter.source, key, why, _BAKE)
        counts.append(shape[1] // t.settings.rank)
        R = _factors(adapter, key)["oft_R"]
        if out.modules[module] == "embedding":
            out.tensors[f"{module}.oft_embedding_R.weight"] = -R
        else:
            out.tensors[f"{module}.oft_R.weight"] = R.contiguous()
    blocks = {s.rank for s in settings}
    if len(blocks) > 1:
        _one(adapter, keys, "a number of blocks", counts)
    terms = settings[0].parsed_form.size("terms", 0)
    return {
        "r": counts[0] if len(blocks) > 1 else 0,
        "oft_block_size": 0 if len(blocks) > 1 else settings[0].rank,
        "block_share": "shared" in form,
        "coft": False,
        "eps": 6e-05,
        "fan_in_fan_out": False,
        "use_cayley_neumann": terms > 0,
        "num_cayley_neumann_terms": terms or 5,
    }
