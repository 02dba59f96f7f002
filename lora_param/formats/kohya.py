"""The adapters of kohya's sd-scripts: one `.safetensors` of `<lora name>.<suffix>`.

A lora name is `lora_unet_`, `lora_te_`, `lora_te1_` ... and the module's path with each `.` as `_`,
which cannot be taken back by itself: the names of the base say what it was. `lora_down.weight` is A
(rank, in, k, k), `lora_up.weight` B (out, rank, 1, 1), `alpha` a number (absent or 0: the rank),
`lora_mid.weight` (rank, rank, k, k) the core of a convolution's Tucker factors, and `dora_scale`
DoRA's lengths, (out, 1, ...) or (1, in). LyCORIS writes its LoCon so, too, under `lycoris_`.

It is one file, however long, as every format is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, AdapterTarget, Host, Layer, LazyTensors
from lora_param.errors import (
    BrokenFileError,
    MismatchError,
    NoFormError,
    OptionError,
    OutputError,
    UnsettledError,
    worded,
)
from lora_param.files.header import read_header
from lora_param.files.safetensors import NAMES, SafetensorsFile, StreamEntry, write_safetensors
from lora_param.files.writer import replace_file
from lora_param.fingerprint import BaseWeight
from lora_param.formats.base import DORA, Format
from lora_param.formats.lycoris_kinds import (
    DOWN,
    MAGNITUDE,
    NUMBER,
    SUFFIXES,
    UNKNOWN,
    UP,
    Module,
    Part,
    encode,
    parts_of,
)
from lora_param.formats.peft.encode import Pair, check_whole, is_lora, pair_of
from lora_param.formats.peft.kinds import kinds_of, split_name
from lora_param.formats.peft.patterns import exact_alpha
from lora_param.names.flat import aliased, flattened
from lora_param.names.table import default_names
from lora_param.targets.regions import Target

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS", "flat_names", "read_modules", "write_modules"]

LAYERS: tuple[Layer, ...] = ("linear", "conv")
"""The kinds of layer that sd-scripts adapts."""

_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "lora_unet_": ("unet.", "transformer.", "model.diffusion_model.", "diffusion_model."),
    "lora_te_": ("text_encoder.", "cond_stage_model.transformer.", "cond_stage_model.model."),
    "lora_te1_": ("text_encoder.", "conditioner.embedders.0.transformer."),
    "lora_te2_": ("text_encoder_2.", "conditioner.embedders.1.model."),
    "lora_te3_": ("text_encoder_3.",),
    "lycoris_": (),
}
"""Prefix of a lora name → where a base of several models has that one; alone, it has no prefix."""

_METADATA = {"format": "pt"}
_NEITHER = ("oft_columns",)
_OF_RANK = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # their first dimension is the rank


@dataclass(frozen=True)
class _Module:
    """What a file has of one module: its lora name, and suffix → key."""

    name: str
    keys: Mapping[str, str]


def _recognise(path: Path) -> bool:
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return False
    suffixes = {n.partition(".")[2] for n in read_header(path).entries if _prefix(n)}
    return bool(suffixes & {*SUFFIXES, *UNKNOWN})


def _prefix(name: str) -> str:
    return next((p for p in _COMPONENTS if name.startswith(p)), "")


def read_modules(path: Path, *, layout: str | None) -> Adapter:
    """Read a file of `<lora name>.<suffix>`: sd-scripts' own, or LyCORIS'."""
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose layers tell how W is")
    file = SafetensorsFile(path)
    return _settle(file, _modules(file), None)


def _modules(file: SafetensorsFile) -> list[_Module]:
    """The modules of a file.

    Raises:
        BrokenFileError: a key of another convention.
        NoFormError: a suffix that is not known here.
    """
    found: dict[str, dict[str, str]] = {}
    for key in file.header.entries:
        name, _, suffix = key.partition(".")
        if not _prefix(name):
            raise BrokenFileError(
                file.path, f"{key} is no name of sd-scripts, as the others are (lora_unet_...)"
            )
        if suffix not in (*SUFFIXES, NUMBER, MAGNITUDE):
            what = f"of {UNKNOWN.get(suffix, 'a kind of update')} that is not known here"
            raise NoFormError(str(file.path), key, what, "bake it with the tool that made it")
        found.setdefault(name, {})[suffix] = key
    return [_Module(name, keys) for name, keys in found.items()]


def _settle(file: SafetensorsFile, modules: list[_Module], host: Host | None) -> Adapter:
    names = {m.name: f"{m.name}.weight" for m in modules}
    if host is not None:
        names = _resolved(file, modules, host)
    targets: dict[str, AdapterTarget] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    base: dict[str, BaseWeight] = {}
    differing = []
    for module in modules:
        weight = names[module.name]
        own = None if host is None else host.weights.get(weight)
        for part in _parts(file, module, None if own is None else own.shape):
            name = f"{weight.removesuffix('weight')}{part.leaf}"
            W = None if host is None else host.weights.get(name)
            if (W and not part.fits(W.shape)) or (own and not W):
                theirs = f"is {W.shape}" if W else "is not there"
                differing.append(f"{name} {theirs}, the adapter's tensors are for {part.shape}")
                continue
            shape = part.shape if W is None else W.shape
            layer: Layer = "" if len(shape) < 2 else "conv" if len(shape) > 2 else "linear"
            targets[name] = AdapterTarget(
                Target(name),
                part.settings,
                part.strength,
                apart=() if W is None else W.tied,
                layer=layer,
            )
            base[name] = BaseWeight(shape)
            makers |= {f"{name}.{n}": make for n, make in part.makers.items()}
    if differing:
        assert host is not None
        wanted = len(targets) + len(differing)
        raise MismatchError(
            str(file.path), host.name, shapes=differing, matched=len(targets), wanted=wanted
        )
    others = not all(is_lora(t.settings) for t in targets.values())
    extra = {
        "metadata": file.metadata,
        "names": {names[m.name]: m.name for m in modules},
        "numbers": {names[m.name]: _number(file, m) for m in modules},
    }
    return Adapter(
        targets,
        LazyTensors(makers),
        base,
        source=str(file.path),
        format="lycoris" if others else "kohya",
        extra={"kohya": extra},
        notes=(
            "sd-scripts' files do not say what base they were made on: names and shapes alone "
            "are compared.",
        ),
        settle=partial(_settle, file, modules) if host is None else None,
    )


def _number(file: SafetensorsFile, module: _Module) -> Tensor | None:
    """`alpha` as it is in the file.

    Raises:
        BrokenFileError: it is no finite number.
    """
    key = module.keys.get(NUMBER)
    if key is None:
        return None
    number = file[key]
    if number.numel() != 1 or not math.isfinite(number.item()):
        raise BrokenFileError(file.path, f"{key} is no finite number")
    return number


def _parts(file: SafetensorsFile, module: _Module, W: tuple[int, ...] | None) -> list[Part]:
    """The targets of a module, for a weight of this shape."""
    number = _number(file, module)
    told = 0.0 if number is None else float(number.item())

    def scaled(rank: int) -> tuple[int, float, float]:
        alpha = (told or float(rank)) if rank else 1.0  # two whole matrices have no scale
        return rank or 1, abs(alpha), math.copysign(1.0, alpha)

    sizes = {s: file.header.entries[k].torch_shape for s, k in module.keys.items()}
    source = str(file.path)
    m = Module(source, module.name, module.keys, sizes, file.__getitem__, W, scaled, told)
    return parts_of(m)


def flat_names(lora: str) -> list[str]:
    """What a base's module may be called, flat, that has a lora name."""
    prefix = _prefix(lora)
    rest = lora.removeprefix(prefix)
    starts = [p.replace(".", "_") for p in _COMPONENTS.get(prefix, ())]
    return [start + rest for start in ("", *starts)]


def _resolved(file: SafetensorsFile, modules: list[_Module], host: Host) -> dict[str, str]:
    """Lora name → the base's weight whose name, flattened, it is; exactly one, or an error."""
    flat = flattened(host.weights)
    others: dict[str, list[str]] | None = None  # made where it is needed: it takes a while
    found: dict[str, str] = {}
    lost, unclear = [], []
    for module in modules:
        wanted = flat_names(module.name)
        hits = [w for n in wanted for w in flat.get(n, [])]
        if not hits:  # under the name that another tool has for it
            if others is None:
                others = aliased(host.weights, host.names or default_names())
            hits = list(dict.fromkeys(w for n in wanted for w in others.get(n, [])))
        if len(hits) == 1:
            found[module.name] = hits[0]
        elif hits:
            unclear.append(f"{module.name} could be any of {', '.join(hits)}")
        else:
            lost.append(module.name)
    of_weight: dict[str, str] = {}
    for name, weight in found.items():
        if weight in of_weight:
            unclear.append(f"{of_weight[weight]} and {name} both are {weight}")
        of_weight[weight] = name
    if lost or unclear:
        raise MismatchError(
            str(file.path),
            host.name,
            unexpected=lost,
            shapes=unclear,
            matched=len(found),
            wanted=len(modules),
        )
    return found


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    write_modules(adapter, path, lycoris=False, force=force, sync=sync)


def write_modules(adapter: Adapter, path: Path, *, lycoris: bool, force: bool, sync: bool) -> None:
    """Write a file of `<lora name>.<suffix>`.

    Args:
        adapter, path, force, sync: as for `Write`.
        lycoris: what is no LoRA is written as LyCORIS has it; otherwise it is refused.

    Raises:
        NoFormError: the tool has no form for something in it.
        UnsettledError: something is left open that only the base tells.
        OutputError: the file cannot be written.
    """
    tool = "LyCORIS" if lycoris else "sd-scripts"
    if path.suffix.lower() != ".safetensors":
        raise OutputError(path, f"the name of {tool}' adapter file ends in .safetensors")
    if adapter.settle is not None:
        raise UnsettledError(
            adapter.source,
            adapter.targets,
            "what its base calls its weights",
        )
    kinds = kinds_of(adapter)
    of_weight: dict[str, list[str]] = {}
    for key, t in adapter.targets.items():
        name, variant = t.target.name, t.settings.variant
        linear = kinds.get(name) in LAYERS and split_name(name)[1] == "weight"
        if lycoris and variant == "diff":
            linear = split_name(name)[1] in ("weight", "bias")
        if not is_lora(t.settings) and variant != "copy" and (not lycoris or variant in _NEITHER):
            raise NoFormError(
                adapter.source,
                key,
                f"of variant {variant}, which {tool} does not have",
                f"give {worded('lossy=True', '--lossy')} to approximate it "
                f"({worded('rank=', '--rank N')})"
                + ("" if variant in _NEITHER else ", or write it as lycoris"),
            )
        if not linear:
            raise NoFormError(
                adapter.source,
                key,
                f"no factors of a linear layer or a convolution, and {tool} has no others",
                f"bake it (lora-param bake), or give {worded('lossy=True', '--lossy')} to leave it "
                f"out",
            )
        of_weight.setdefault(name, []).append(key)
    names = _lora_names(adapter, [_weight_of(n) for n in of_weight])
    told = adapter.extra.get("kohya", {})
    tensors: dict[str, Tensor] = {}
    alpha: float | None
    for name, keys in of_weight.items():
        shape, first = adapter.base[name].shape, adapter.targets[keys[0]]
        if is_lora(first.settings) and not (lycoris and first.settings.variant == "tucker"):
            pair = pair_of(adapter, keys, kinds[name], tool, any_side=True)
            found, alpha = _encoded(pair, shape, first.settings.variant)
        else:
            first = check_whole(adapter, keys, tool)
            _check_channels(adapter, keys[0], shape)
            own = {n: x.detach().cpu() for n, x in adapter.factors(keys[0]).items()}
            found, alpha = _with_scale(first, encode(first, own, shape, _is_norm(adapter, name)))
        if alpha is not None:
            number = _written(told.get("numbers", {}), _weight_of(name), alpha, found)
            found |= {} if number is None else {NUMBER: number}
        tensors |= {f"{names[_weight_of(name)]}.{s}": x for s, x in found.items()}
    entries: dict[str, StreamEntry] = {
        key: (NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), partial(_same, t))
        for key, t in tensors.items()
    }
    metadata = told.get("metadata") or _told(tensors)
    with replace_file(path, force=force, sync=sync) as file:
        write_safetensors(file, entries, metadata)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _check_channels(adapter: Adapter, key: str, shape: tuple[int, ...]) -> None:
    """Refuse a LoKr whose first matrix is not over whole inputs of a convolution.

    Raises:
        NoFormError: it is so.
    """
    for name in ("lokr_w1", "lokr_w1_b"):
        if name in adapter.tensor_names(key):
            columns = adapter.tensors[f"{key}.{name}"].shape[-1]
            if shape[1] % columns:
                why = f"whose first matrix, of {columns} columns, does not divide {shape[1]} inputs"
                raise NoFormError(
                    adapter.source,
                    key,
                    why,
                    f"train it with another left ({worded('form=', '--form')})",
                )


def _with_scale(
    t: AdapterTarget, found: dict[str, Tensor]
) -> tuple[dict[str, Tensor], float | None]:
    """LyCORIS' tensors, and the alpha that goes with them; two whole matrices have no scale."""
    import torch

    if t.settings.variant == "diff":
        return found, None
    if t.settings.variant in ("oft", "boft"):
        return found, t.settings.alpha if "constrained" in t.settings.parsed_form.words else 0.0
    factor = t.scale * t.strength
    if not {"lokr_w1", "lokr_w2"} <= set(found):
        return found, exact_alpha(factor, t.settings.rank)
    if factor != 1:
        wide = torch.promote_types(found["lokr_w1"].dtype, torch.float32)
        found["lokr_w1"] = found["lokr_w1"].to(wide) * factor
    return found, 1.0


def _weight_of(name: str) -> str:
    """The weight of the module that a bias is of."""
    return f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name


def _is_norm(adapter: Adapter, name: str) -> bool:
    """The module's weight has one dimension."""
    weight = _weight_of(name)
    known = adapter.base.get(weight) or adapter.weights_at_hand.get(weight)
    return known is not None and len(known.shape) == 1


def _written(
    numbers: Mapping[str, Tensor | None], name: str, alpha: float, found: Mapping[str, Tensor]
) -> Tensor | None:
    """`alpha` as the file that was read had it, where that still says the same; None: none."""
    import torch

    if name in numbers:
        known = numbers[name]
        told = 0.0 if known is None else float(known.item())
        ranks = [x.shape[0] for s, x in found.items() if s in (DOWN, *_OF_RANK)]
        is_rotation = "oft_blocks" in found
        if "lokr_w1" in found and "lokr_w2" in found:
            return known
        if (told if told or is_rotation else float(ranks[0])) == alpha:
            return known
    number = torch.tensor(alpha, dtype=torch.float64)
    return number.float() if number.float().item() == alpha else number


def _encoded(pair: Pair, shape: tuple[int, ...], variant: str) -> tuple[dict[str, Tensor], float]:
    """A pair by its suffixes, and its alpha."""
    import torch

    ones = (1,) * (len(shape) - 2)
    alpha = exact_alpha(pair.scale, pair.rank)
    if alpha == 0:  # would be read as the rank
        alpha = float(pair.rank)
        pair = Pair(pair.A, torch.zeros_like(pair.B), 1.0, magnitude=pair.magnitude)
    found = {
        DOWN: pair.A.reshape(pair.rank, *shape[1:]).contiguous(),
        UP: pair.B.reshape(shape[0], pair.rank, *ones).contiguous(),
    }
    if pair.magnitude is not None:
        size = (1, -1, *ones) if variant == "dora_columns" else (-1, 1, *ones)
        found[MAGNITUDE] = pair.magnitude.reshape(size).contiguous()
    return found, alpha


def _lora_names(adapter: Adapter, names: list[str]) -> dict[str, str]:
    """The lora name of each weight: the one that it was read under, or made of its own.

    Raises:
        NoFormError: two weights, adapted or not, would have one name.
    """
    known: Mapping[str, str] = adapter.extra.get("kohya", {}).get("names", {})
    several = any(n.startswith("text_encoder_2.") for n in (*names, *adapter.weights_at_hand))
    found = {n: known.get(n) or _made(n, several) for n in names}
    owner: dict[str, str] = {}
    for name in (*names, *adapter.weights_at_hand):
        if split_name(name)[1] != "weight":
            continue
        made = found.get(name) or known.get(name) or _made(name, several)
        other = owner.setdefault(made, name)
        if other != name and (name in found or other in found):
            raise NoFormError(
                adapter.source,
                f"{name} and {other}",
                f"which sd-scripts both calls {made}",
                "leave one of them out, or bake it (lora-param bake)",
            )
    return found


def _made(name: str, several: bool) -> str:
    """`unet.a.b.weight` → `lora_unet_a_b`."""
    module = split_name(name)[0]
    for prefix, starts in _COMPONENTS.items():
        if several and prefix == "lora_te_":
            continue
        for start in starts:
            if module.startswith(start):
                return prefix + module.removeprefix(start).replace(".", "_")
    prefix = "lora_te_" if module.startswith("text_model.") else "lora_unet_"
    return prefix + module.replace(".", "_")


def _told(tensors: Mapping[str, Any]) -> dict[str, str]:
    """What sd-scripts' own files say of themselves, as far as it is known."""
    ranks = {t.shape[0] for k, t in tensors.items() if k.endswith(DOWN)}
    alphas = {t.item() for k, t in tensors.items() if k.endswith(f".{NUMBER}")}

    def one(values: set[Any]) -> str:
        return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"

    told = {"ss_network_module": "networks.lora"}
    return _METADATA | told | {"ss_network_dim": one(ranks), "ss_network_alpha": one(alphas)}


FORMAT = Format("kohya", _recognise, read_modules, _write, LAYERS, DORA)
