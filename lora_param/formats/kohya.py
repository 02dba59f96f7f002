"""The adapters of kohya's sd-scripts: one `.safetensors` of `<lora name>.<suffix>`.

A lora name is `lora_unet_`, `lora_te_`, `lora_te1_` ... and the module's path with each `.` as `_`,
which cannot be taken back by itself: the names of the base say what it was. `lora_down.weight` is A
(rank, in, k, k), `lora_up.weight` B (out, rank, 1, 1), `alpha` a number (absent or 0: the rank),
`lora_mid.weight` (rank, rank, k, k) the core of a convolution's Tucker factors, and `dora_scale`
DoRA's lengths, (out, 1, ...) or (1, in). LyCORIS writes its LoCon so, too, under `lycoris_`.
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
)
from lora_param.files.header import read_header
from lora_param.files.safetensors import NAMES, SafetensorsFile, StreamEntry, write_safetensors
from lora_param.files.writer import replace_file
from lora_param.fingerprint import BaseWeight
from lora_param.formats.base import Format
from lora_param.formats.peft.encode import Pair, pair_of
from lora_param.formats.peft.kinds import kinds_of, split_name
from lora_param.formats.peft.patterns import exact_alpha
from lora_param.names.flat import flattened
from lora_param.names.table import default_names
from lora_param.targets.regions import Target
from lora_param.targets.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

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

_NUMBER, _MAGNITUDE = "alpha", "dora_scale"
_DOWN, _UP, _MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
_SUFFIXES = (_DOWN, _UP, _MID, _NUMBER, _MAGNITUDE)
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class _Module:
    """What a file has of one module: its lora name, and suffix → key."""

    name: str
    keys: Mapping[str, str]


def _recognise(path: Path) -> bool:
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return False
    return any(_prefix(n) and n.endswith((_DOWN, _UP)) for n in read_header(path).entries)


def _prefix(name: str) -> str:
    return next((p for p in _COMPONENTS if name.startswith(p)), "")


def _read(path: Path, *, layout: str | None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose layers tell how W is")
    file = SafetensorsFile(path)
    return _settle(file, _modules(file), None)


def _modules(file: SafetensorsFile) -> list[_Module]:
    """The modules of a file, each with both factors.

    Raises:
        BrokenFileError: a key of another convention, or a factor without the other.
        NoFormError: a suffix that is not known here.
    """
    found: dict[str, dict[str, str]] = {}
    for key in file.header.entries:
        name, _, suffix = key.partition(".")
        if not _prefix(name):
            raise BrokenFileError(
                file.path, f"{key} is no name of sd-scripts, as the others are (lora_unet_...)"
            )
        if suffix not in _SUFFIXES:
            what = "a kind of update that is not known here"
            raise NoFormError(str(file.path), key, what, "bake it with the tool that made it")
        found.setdefault(name, {})[suffix] = key
    for name, keys in found.items():
        if lacking := [s for s in (_DOWN, _UP) if s not in keys]:
            raise BrokenFileError(file.path, f"{name} has no {lacking[0]}")
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
        name = names[module.name]
        shape, rank = _shapes(file, module)
        W = None if host is None else host.weights.get(name)
        if W is not None and _core(W.shape) != _core(shape):
            differing.append(f"{name} is {W.shape}, the adapter's tensors are for {shape}")
            continue
        shape = shape if W is None else W.shape
        settings, strength = _settings(file, module, rank, shape)
        layer: Layer = "conv" if len(shape) > 2 else "linear"
        apart = () if W is None else W.tied
        targets[name] = AdapterTarget(Target(name), settings, strength, apart=apart, layer=layer)
        base[name] = BaseWeight(shape)
        makers |= {f"{name}.{n}": make for n, make in _makers(file, module).items()}
    if differing:
        assert host is not None
        wanted = len(modules)
        raise MismatchError(
            str(file.path), host.name, shapes=differing, matched=len(targets), wanted=wanted
        )
    extra = {"metadata": file.metadata, "names": {names[m.name]: m.name for m in modules}}
    return Adapter(
        targets,
        LazyTensors(makers),
        base,
        source=str(file.path),
        format="kohya",
        extra={"kohya": extra},
        notes=(
            "sd-scripts' files do not say what base they were made on: names and shapes alone "
            "are compared.",
        ),
        settle=partial(_settle, file, modules) if host is None else None,
    )


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution has the factors of a linear layer."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def _resolved(file: SafetensorsFile, modules: list[_Module], host: Host) -> dict[str, str]:
    """Lora name → the base's weight whose name, flattened, it is; exactly one, or an error."""
    flat, others = flattened(host.weights, host.names or default_names())
    found: dict[str, str] = {}
    lost, unclear = [], []
    for module in modules:
        prefix = _prefix(module.name)
        rest = module.name.removeprefix(prefix)
        starts = [p.replace(".", "_") for p in _COMPONENTS[prefix]]
        wanted = [start + rest for start in ("", *starts)]
        hits = [w for n in wanted for w in flat.get(n, [])]
        if not hits:  # under the name that another tool has for it
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


def _shapes(file: SafetensorsFile, module: _Module) -> tuple[tuple[int, ...], int]:
    """The shape of W that the factors are for, and their rank.

    Raises:
        BrokenFileError: they do not go together.
    """
    sizes = {s: file.header.entries[k].torch_shape for s, k in module.keys.items()}
    down, up, mid = sizes[_DOWN], sizes[_UP], sizes.get(_MID)
    fits = len(down) >= 2 and len(up) in (2, len(down)) and 0 not in (*down, *up)
    fits = fits and all(n == 1 for n in up[2:])
    if mid is None:
        fits = fits and up[1] == down[0]
    else:  # (p, q, k, k) between up (out, p) and down (q, in)
        fits = fits and len(mid) > 2 and mid[:2] == (up[1], down[0]) and up[1] == down[0]
        fits = fits and all(n == 1 for n in down[2:])
    if not fits:
        told = f", {_MID} {mid}" if mid else ""
        raise BrokenFileError(
            file.path, f"the factors of {module.name} do not fit: {_DOWN} {down}, {_UP} {up}{told}"
        )
    return (up[0], down[1], *(mid or down)[2:]), down[0]


def _settings(
    file: SafetensorsFile, module: _Module, rank: int, shape: tuple[int, ...]
) -> tuple[Settings, float]:
    alpha = float(rank)
    if key := module.keys.get(_NUMBER):
        number = file[key]
        if number.numel() != 1 or not math.isfinite(number.item()):
            raise BrokenFileError(file.path, f"{key} is no finite number")
        alpha = float(number.item()) or float(rank)
    variant = "lora"
    if key := module.keys.get(_MAGNITUDE):
        size = file.header.entries[key].torch_shape
        if size[:1] == shape[:1] and math.prod(size) == shape[0]:
            variant = "dora"
        elif len(size) == len(shape) == 2 and size == (1, shape[1]):
            variant = "dora_columns"
        else:
            raise NoFormError(
                str(file.path),
                f"{key} of {size} for a weight of {shape}",
                "DoRA over another side than its rows",
                "bake it with the tool that made it",
            )
    return Settings(rank=rank, alpha=abs(alpha), variant=variant), math.copysign(1.0, alpha)


def _makers(file: SafetensorsFile, module: _Module) -> dict[str, Callable[[], Tensor]]:
    """Tensors in our layout: A (rank, in·k·k), B (out, rank)."""
    keys = module.keys

    def down() -> Tensor:
        A = file[keys[_DOWN]]
        if _MID not in keys:
            return A.flatten(1)
        import torch

        mid = file[keys[_MID]]  # (p, q, k, k)
        return torch.einsum("pq...,qi->pi...", mid, A.flatten(1)).flatten(1)  # (p, in·k·k)

    found: dict[str, Callable[[], Tensor]] = {
        "lora_A": down,
        "lora_B": lambda: file[keys[_UP]].flatten(1),
    }
    if _MAGNITUDE in keys:
        found["magnitude"] = lambda: file[keys[_MAGNITUDE]].flatten()
    return found


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    if path.suffix.lower() != ".safetensors":
        raise OutputError(path, "the name of sd-scripts' adapter file ends in .safetensors")
    if adapter.settle is not None:
        raise UnsettledError(
            adapter.source,
            adapter.targets,
            "what its base calls its weights",
            "give the base (--base MODEL, base=)",
        )
    kinds = kinds_of(adapter)
    of_weight: dict[str, list[str]] = {}
    for key, t in adapter.targets.items():
        name = t.target.name
        if kinds.get(name) not in LAYERS or split_name(name)[1] != "weight":
            raise NoFormError(
                adapter.source,
                key,
                "no factors of a linear layer or a convolution, and sd-scripts has no others",
                "bake it (lora-param bake), or give --lossy to leave it out",
            )
        of_weight.setdefault(name, []).append(key)
    names = _lora_names(adapter, list(of_weight))
    tensors: dict[str, Tensor] = {}
    for name, keys in of_weight.items():
        pair = pair_of(adapter, keys, kinds[name], "sd-scripts", any_side=kinds[name] == "linear")
        shape, variant = adapter.base[name].shape, adapter.targets[keys[0]].settings.variant
        tensors |= {
            f"{names[name]}.{suffix}": tensor
            for suffix, tensor in _encoded(pair, shape, variant).items()
        }
    entries: dict[str, StreamEntry] = {
        key: (NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), partial(_same, t))
        for key, t in tensors.items()
    }
    metadata = adapter.extra.get("kohya", {}).get("metadata") or _told(tensors)
    with replace_file(path, force=force, sync=sync) as file:
        write_safetensors(file, entries, metadata)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _encoded(pair: Pair, shape: tuple[int, ...], variant: str) -> dict[str, Tensor]:
    import torch

    ones = (1,) * (len(shape) - 2)
    alpha = exact_alpha(pair.scale, pair.rank)
    number = torch.tensor(alpha, dtype=torch.float64)
    if number.float().item() == alpha:
        number = number.float()
    if alpha == 0:  # would be read as the rank
        pair = Pair(pair.A, torch.zeros_like(pair.B), 1.0, magnitude=pair.magnitude)
        number = torch.tensor(float(pair.rank))
    found = {
        _DOWN: pair.A.reshape(pair.rank, *shape[1:]).contiguous(),
        _UP: pair.B.reshape(shape[0], pair.rank, *ones).contiguous(),
        _NUMBER: number,
    }
    if pair.magnitude is not None:
        size = (1, -1) if variant == "dora_columns" else (-1, 1, *ones)
        found[_MAGNITUDE] = pair.magnitude.reshape(size).contiguous()
    return found


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
    ranks = {t.shape[0] for k, t in tensors.items() if k.endswith(_DOWN)}
    alphas = {t.item() for k, t in tensors.items() if k.endswith(f".{_NUMBER}")}

    def one(values: set[Any]) -> str:
        return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"

    told = {"ss_network_module": "networks.lora"}
    return _METADATA | told | {"ss_network_dim": one(ranks), "ss_network_alpha": one(alphas)}


FORMAT = Format("kohya", _recognise, _read, _write)
