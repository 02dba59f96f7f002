"""The adapters of diffusers: one file of keys that begin with the name of a pipeline's part.

`unet.`, `transformer.`, `text_encoder.` ..., the module's path, and one of four endings, of which
two eras differ: PEFT's `lora_A.weight`, `lora_B.weight` and `lora_magnitude_vector`, and before
them `lora.down.weight`, `lora_linear_layer.down.weight`, and a processor's own
`processor.to_q_lora.down.weight` of the projection `to_q` beside it.

The scale is that of `lora_adapter_metadata` (a JSON text in the file's metadata, with the fields of
a LoraConfig under the part's name); else alpha/rank of `X.alpha`; else 1.

It is one file, however long, as every format is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, Layer
from lora_param.errors import BrokenFileError, NoFormError, OptionError, OutputError
from lora_param.formats.base import DORA, Format
from lora_param.formats.peft.encode import encode_pair
from lora_param.formats.peft.patterns import exact_alpha, patterns
from lora_param.formats.peft.reading import Placed
from lora_param.formats.record import pairs_of, record, settings_of
from lora_param.formats.state import StateFile, names_in, open_state, write_state

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "LAYERS"]

LAYERS: tuple[Layer, ...] = ("linear", "conv")
"""The kinds of layer that diffusers' loaders have factors for."""

_PARTS = (
    *("unet", "transformer", "transformer_2", "prior", "controlnet", "connectors"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_METADATA = "lora_adapter_metadata"
_TAILS = (
    (re.compile(r"\.lora_A\.weight"), "A", "PEFT's"),
    (re.compile(r"\.lora_B\.weight"), "B", "PEFT's"),
    (re.compile(r"\.lora(_linear_layer)?\.down\.weight"), "A", "diffusers' first"),
    (re.compile(r"\.lora(_linear_layer)?\.up\.weight"), "B", "diffusers' first"),
    (re.compile(r"_lora\.down\.weight"), "A", "diffusers' first"),
    (re.compile(r"_lora\.up\.weight"), "B", "diffusers' first"),
    (re.compile(r"\.lora_magnitude_vector(\.weight)?"), "magnitude", ""),
    (re.compile(r"\.alpha"), "alpha", ""),
)


@dataclass
class _Module:
    """A module of a part of the pipeline: what it is called there, and role → key."""

    part: str
    path: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.part}.{self.path}"


_LANGUAGE = "transformer.h."  # GPT-2 and its like, of which PEFT's prefix was taken off


def _recognise(path: Path) -> bool:
    names = [n for n in names_in(_file(path)) if not n.startswith(_LANGUAGE)]
    return any(place is not None and place[2] in "AB" for place in map(_place, names))


def _file(path: Path) -> Path:
    """The file; of a directory, the one that diffusers saves into it."""
    if not path.is_dir():
        return path
    return next((p for n in _NAMES if (p := path / n).is_file()), path)


def _place(key: str) -> tuple[str, str, str, str] | None:
    """Part, module, role and era of a key; None for what is none of diffusers'."""
    part = next((p for p in _PARTS if key.startswith(f"{p}.")), None)
    if part is None:
        return None
    rest = key.removeprefix(f"{part}.")
    for tail, role, era in _TAILS:
        found = tail.search(rest)
        if found and found.end() == len(rest):
            return part, _module(rest[: found.start()]), role, era
    return None


def _module(path: str) -> str:
    """`X.processor.to_q` is `X.to_q`, and a `to_out` is the first module of its list."""
    path = path.replace(".processor.", ".")
    return f"{path}.0" if path.endswith(".to_out") else path


def _read(path: Path, *, layout: str | None) -> Adapter:
    if layout is not None:
        raise OptionError("layout", layout, f"nothing for {path}, whose layers tell how W is")
    file = open_state(_file(path))
    modules = _modules(file)
    configs = _configs(file, {m.part for m in modules})
    placed = [_placed(file, m, configs.get(m.part), _has_alpha(modules)) for m in modules]
    extra = {"metadata": dict(file.metadata)}
    return record(placed, path, "diffusers", tool="diffusers", extra=extra)


def _has_alpha(modules: Iterable[_Module]) -> bool:
    return any("alpha" in m.keys for m in modules)


def _modules(file: StateFile) -> list[_Module]:
    """The modules of a file.

    Raises:
        BrokenFileError: a key of another convention, or of both eras, or a half alone.
    """
    found: dict[tuple[str, str], _Module] = {}
    eras: dict[str, str] = {}
    for key in file.shapes:
        place = _place(key)
        if place is None:
            raise BrokenFileError(
                file.path,
                f"the key {key} is none of diffusers' (PART.MODULE.lora_A.weight and the like, "
                f"with a PART of {', '.join(_PARTS)})",
            )
        part, path, role, era = place
        if era:
            eras.setdefault(era, key)
        module = found.setdefault((part, path), _Module(part, path))
        if role in module.keys:
            raise BrokenFileError(file.path, f"{module.keys[role]} and {key} are the same thing")
        module.keys[role] = key
    if len(eras) > 1:
        both = " and ".join(eras.values())
        raise BrokenFileError(file.path, f"it has keys of two conventions: {both}")
    for module in found.values():
        lacking = [role for role in "AB" if role not in module.keys]
        if lacking:
            raise BrokenFileError(
                file.path,
                f"a down (lora_A) and an up (lora_B) belong together, and {module.name} has "
                f"{', '.join(module.keys.values())} alone",
            )
    return list(found.values())


def _configs(file: StateFile, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each part that the metadata has one for."""
    text = file.metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(file.path, f"its {_METADATA} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BrokenFileError(file.path, f"its {_METADATA} is a {type(fields).__name__}")
    found = {}
    for part in parts:
        start = f"{part}."
        own = {k.removeprefix(start): v for k, v in fields.items() if k.startswith(start)}
        if own:
            found[part] = own
    return found


def _placed(
    file: StateFile, module: _Module, config: Mapping[str, Any] | None, some_alpha: bool
) -> Placed:
    A, B = (file.shapes[module.keys[role]] for role in "AB")
    fits = len(A) >= 2 and len(B) in (2, len(A)) and A[0] == B[1] and 0 not in (*A, *B)
    if not fits or any(n != 1 for n in B[2:]):
        raise BrokenFileError(file.path, f"the factors of {module.name} do not fit: {A} and {B}")
    shape = (B[0], *A[1:])
    has_magnitude = "magnitude" in module.keys
    scaling, alpha = _scale(file, module, config, A[0], some_alpha)
    variant = "dora" if has_magnitude else "lora"
    settings, strength = settings_of(A[0], alpha, variant=variant, scaling=scaling)
    keys = module.keys
    makers: dict[str, Callable[[], Tensor]] = {
        "lora_A": lambda: file.tensors[keys["A"]].flatten(1),
        "lora_B": lambda: file.tensors[keys["B"]].flatten(1),
    }
    if has_magnitude:
        if math.prod(file.shapes[keys["magnitude"]]) != B[0]:
            raise BrokenFileError(file.path, f"{keys['magnitude']} has not {B[0]} elements")
        makers["magnitude"] = lambda: file.tensors[keys["magnitude"]].flatten()
    layer: Layer = "conv" if len(shape) > 2 else "linear"
    return Placed(f"{module.name}.weight", settings, shape, makers, layer, strength=strength)


def _scale(
    file: StateFile,
    module: _Module,
    config: Mapping[str, Any] | None,
    rank: int,
    some_alpha: bool,
) -> tuple[str, float]:
    """Scaling and alpha of a module.

    Raises:
        BrokenFileError: what the file says twice, it says differently; or it is no number.
    """
    own = module.keys.get("alpha")
    if own is not None:
        number = file.tensors[own]
        if number.numel() != 1 or not math.isfinite(number.item()):
            raise BrokenFileError(file.path, f"{own} is no finite number")
    stored = None if own is None else float(number.item())
    if config is None:
        if own is None and some_alpha:
            raise BrokenFileError(file.path, f"{module.name} has no alpha, which others have")
        return "standard", float(rank) if stored is None else stored
    found = _matching(config.get("rank_pattern"), module.path, config.get("r", 8))
    if found != rank:
        raise BrokenFileError(
            file.path, f"{module.name} is of rank {rank}, and {found} in its {_METADATA}"
        )
    for name in ("use_dora", "lora_bias"):
        has = name == "use_dora" and "magnitude" in module.keys
        if bool(config.get(name)) != has:
            raise BrokenFileError(
                file.path, f"{name} of its {_METADATA} does not go with the keys of {module.name}"
            )
    alpha = _matching(config.get("alpha_pattern"), module.path, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BrokenFileError(file.path, f"the alpha of {module.name} is {alpha!r}")
    if stored is not None and stored != float(alpha):
        raise BrokenFileError(
            file.path, f"the alpha of {module.name} is {stored:g}, and {alpha:g} in its {_METADATA}"
        )
    return "rslora" if config.get("use_rslora") else "standard", float(alpha)


def _matching(pattern: Any, path: str, default: Any) -> Any:
    """The value of the first pattern that an end of the path matches, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _write(adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
    if path.suffix.lower() != ".safetensors":
        raise OutputError(path, "the name of diffusers' adapter file ends in .safetensors")
    pairs = pairs_of(adapter, "diffusers", LAYERS, dora=True)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, (pair, kind) in pairs.items():
        part, module = _part_of(adapter, name)
        shape = adapter.base[name].shape
        A, B = encode_pair(pair, kind, shape)
        stem = f"{part}.{module}"
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        if pair.magnitude is not None:
            size = (1, -1, *(1,) * (len(shape) - 2)) if kind == "conv" else (-1,)
            tensors[f"{stem}.lora_magnitude_vector"] = pair.magnitude.reshape(size)
        own = parts.setdefault(part, {"ranks": {}, "alphas": {}, "dora": set()})
        own["ranks"][module] = pair.rank
        own["alphas"][module] = exact_alpha(pair.scale, pair.rank)
        own["dora"].add(pair.magnitude is not None)
    fields: dict[str, Any] = {}
    for part, own in parts.items():
        if len(own["dora"]) > 1:
            raise NoFormError(
                adapter.source,
                f"DoRA on some targets of {part} and not on others",
                "and diffusers' use_dora is for all of them",
                "bake one part of it, and write the other",
            )
        fields |= {f"{part}.{k}": v for k, v in _config(own).items()}
    # diffusers' own metadata beside ours stays as it was read
    known = adapter.extra.get("diffusers", {}).get("metadata", {})
    text = json.dumps(fields, indent=2, sort_keys=True)
    metadata = {"format": "pt", **known, _METADATA: text}
    contiguous = {n: t.contiguous() for n, t in tensors.items()}
    write_state(contiguous, path, adapter.source, metadata=metadata, force=force, sync=sync)


def _part_of(adapter: Adapter, name: str) -> tuple[str, str]:
    """Part and module of a weight; of a model that is no pipeline, its one part.

    Raises:
        NoFormError: nothing tells the part.
    """
    module = name.removesuffix(".weight")
    part, _, rest = module.partition(".")
    if part in _PARTS and rest:
        return part, rest
    # a model on its own, by what its names have in common with those of its kind
    names = adapter.weights_at_hand or adapter.base
    for known, mark in _MARKS.items():
        if any(mark.match(n) for n in names):
            return known, module
    raise NoFormError(
        adapter.source,
        name,
        f"which is in no part of a pipeline ({', '.join(_PARTS)})",
        "write it from the pipeline that it is for, whose names begin with the part",
    )


_MARKS = {
    "unet": re.compile(r"(down|up)_blocks\.\d+\."),
    "transformer": re.compile(r"(single_)?transformer_blocks\.\d+\."),
    "text_encoder": re.compile(r"text_model\."),
}


def _config(own: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a LoraConfig that say ranks and scales of one part."""
    rank, rank_pattern = patterns(own["ranks"])
    alpha, alpha_pattern = patterns(own["alphas"])
    return {
        "alpha_pattern": alpha_pattern,
        "lora_alpha": alpha,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": sorted(own["ranks"]),
        "use_dora": own["dora"] == {True},
    }


FORMAT = Format("diffusers", _recognise, _read, _write, LAYERS, DORA)
