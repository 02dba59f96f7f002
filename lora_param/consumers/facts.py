"""What there is to know of an adapter, as flat facts for the rules.

Headers and configs say nearly all; the values are looked at for zeros and for what is no number.

It is one file, however long: the facts that rules may ask for.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_param.consumers.contents import PARTS, Contents, Module, read_contents
from lora_param.errors import BrokenFileError, listed
from lora_param.files.places import place
from lora_param.formats.kohya import flat_names
from lora_param.formats.peft.patterns import chosen_modules
from lora_param.formats.portable import SERVED_RANKS
from lora_param.names.flat import aliased, flattened
from lora_param.names.resolve import resolve
from lora_param.names.table import Names, default_names, names_of
from lora_param.targets.lora_config import names_module
from lora_param.targets.weights import Weight

__all__ = ["gather"]

_IMAGE = (*PARTS, "diffusion_model.")
_OWN = {
    "lycoris": {"lycoris", "kohya"},
    "native": {"native", "lycoris"},  # whose tensors keep their names
    "diffusers": {"diffusers", "peft", "kohya"},  # kohya's is alpha
    "loralib": {"native"},
    "torchtune": {"torchtune", "native"},
}
"""Kind → the conventions in which its keys are written; of the others, their own."""
_OTHER_TOOLS = {
    "loralib": "loralib",
    "minlora": "minLoRA",
    "torchtune": "torchtune",
    "mlx": "mlx-lm",
    "diffusers": "diffusers",
}
_METHODS = ("LOHA", "LOKR", "OFT")  # PEFT's beside LoRA that are read here


def gather(
    path: str | os.PathLike[str],
    base: Mapping[str, Weight] | None = None,
    names: Names | None = None,
) -> dict[str, Any]:
    """The facts of an adapter.

    Args:
        path: a file, or a directory as PEFT writes it.
        base: the weights of the base, where it is at hand.
        names: rules between names, the packaged ones by default.

    Returns:
        Facts by name: numbers, texts, truths; beside each count that can name something stands
        NAME_names, a text for messages.

    Raises:
        MissingFileError: nothing is there.
        UnknownFileError: it is no adapter.
        BrokenFileError: a file is damaged.
    """
    source = read_contents(place(path))
    kind, modules = source.kind, source.modules
    facts: dict[str, Any] = {"kind": kind, "peft": kind == "peft", "keys": len(source.shapes)}
    facts["refusal"] = ""  # see `check`
    facts |= _of_names(source)
    facts |= _of_values(source)
    facts |= _of_config(source)
    facts |= _of_base(kind, modules, base, names or default_names())
    return facts


def _counted(name: str, found: Iterable[str]) -> dict[str, Any]:
    items = list(found)
    return {name: len(items), f"{name}_names": listed(items, 3)}


def _of_names(source: Contents) -> dict[str, Any]:
    kind, modules, other = source.kind, source.modules, source.other
    method = _method(source)
    own = {kind, "lycoris"} if method else _OWN.get(kind, {kind})
    foreign = [k for c, keys in source.conventions.items() if c not in own for k in keys]
    pairs = {n: m for n, m in modules.items() if "A" in m.tensors or "B" in m.tensors}
    half = [n for n, m in pairs.items() if ("A" in m.tensors) != ("B" in m.tensors)]
    saved = [k for k in other if not k.endswith(".base_layer.bias")]
    biases = [k for k in other if k.endswith(".bias")]
    biases += [m.tensors["bias"] for m in modules.values() if "bias" in m.tensors]
    saved = [k for k in saved if k not in biases and not k.endswith(".base_layer.weight")]
    if source.config.get("modules_to_save"):
        saved = [k for k in other if not k.endswith((".base_layer.bias", ".base_layer.weight"))]
        biases = [k for k in biases if k not in saved]
    rows = [m.tensors["rows"] for m in modules.values() if "rows" in m.tensors]
    magnitudes = any("magnitude" in m.tensors for m in modules.values())
    types = {role for m in modules.values() for role in m.tensors if role in _LYCORIS}
    bare = [k for k in source.shapes if not k.startswith("base_model.model.")]
    return {
        "modules": len(modules),
        "method": method,
        "other_tool": _OTHER_TOOLS.get(kind, ""),
        **_counted("half_pairs", half),
        **_counted("foreign_keys", foreign),
        **_counted("bare_keys", bare),
        **_counted("biases", biases),
        **_counted("modules_to_save", saved if kind == "peft" else []),
        **_counted("token_rows", rows),
        **_counted("not_lora", saved if kind == "peft" else []),
        **_counted("expert_tensors", [n for n in modules if re.search(r"\.experts(\.|$)", n)]),
        "dora": magnitudes or bool(source.config.get("use_dora")),
        "lycoris": ", ".join(sorted(types)),
        "image_names": any(n.removeprefix("base_model.model.").startswith(_IMAGE) for n in modules),
    }


def _method(source: Contents) -> str:
    """PEFT's method, where it is another one than LoRA."""
    method = source.config.get("peft_type")
    return method if source.kind == "peft" and method in _METHODS else ""


_LYCORIS = ("loha", "lokr", "oft", "mid")


def _of_values(source: Contents) -> dict[str, Any]:
    import numpy as np

    dead: list[str] = []
    broken: list[str] = []
    for key in source.shapes:
        if not np.isfinite(source.arrays[key]()).all():
            broken.append(key)
    for name, m in source.modules.items():
        factors = [m.tensors[role] for role in ("A", "B") if role in m.tensors]
        if len(factors) == 2 and not all(source.arrays[key]().any() for key in factors):
            dead.append(name)
    return {**_counted("not_finite", broken), **_counted("dead", dead)}


def _of_config(source: Contents) -> dict[str, Any]:
    config, kind, modules = source.config, source.kind, source.modules
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    rslora = bool(config.get("use_rslora"))
    rank_pattern, alpha_pattern = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    parameters = config.get("target_parameters") or []
    mismatches: list[str] = []
    differing: list[str] = []
    own_alpha: list[str] = []
    stacks: list[str] = []
    square = False
    ranks: list[int] = []
    scales: list[float] = []
    unequal: list[str] = []
    settings = _settings(source)
    chosen = chosen_modules(config, source.path) if kind == "peft" else {}
    not_chosen: list[str] = []
    for name, m in modules.items():
        if not {"A", "B"} <= m.tensors.keys():
            continue
        A, B = m.shapes["A"], m.shapes["B"]
        module = name.removeprefix("base_model.model.")
        is_stack = any(_is_stack(module, p) for p in parameters)
        held = A[0] if kind != "native" or len(A) == 2 else A[-2]
        is_pefts = module != name and not is_stack
        if is_pefts and not names_module(chosen, module.partition(".base_layer")[0]):
            not_chosen.append(name)
        if is_stack:
            stacks.append(name)
            square = square or A[-1] == B[0]
        elif len(A) == len(B) == 3 and kind in ("mlx", "gguf"):  # a stack of experts
            held = A[1]
        elif kind == "loralib":  # several blocks of rows have their A one after the other
            held = B[1]
        elif (
            kind not in ("native", "loralib")
            and len(B) > 1
            and A[0] != B[1]
            and not _is_grouped(A, B)
        ):
            unequal.append(name)
        own_rank = _pattern(rank_pattern, module, rank)
        scale_alpha = _pattern(alpha_pattern, module, alpha)
        if kind == "peft":
            if not is_stack and config and held != own_rank:
                mismatches.append(name)
            if (own_rank, scale_alpha) != (rank, alpha):
                differing.append(name)
            if scale_alpha != alpha:
                own_alpha.append(name)
            divisor = math.sqrt(own_rank) if rslora else own_rank
            scales.append(scale_alpha / divisor if divisor else math.inf)
        elif name in settings:
            scales.append(settings[name])
        elif "alpha" in m.tensors:
            value = float(source.arrays[m.tensors["alpha"]]().reshape(-1)[0])
            scales.append(value / held if held else math.inf)
        ranks.append(own_rank if is_stack else held)
    version = str(config.get("peft_version", ""))
    max_rank = max(ranks, default=0)
    patterns = [*rank_pattern, *alpha_pattern]
    return {
        "has_rank": "r" in config,
        "has_alpha": "lora_alpha" in config or kind != "peft" or bool(_method(source)),
        "has_target_modules": bool(config.get("target_modules")) or "target_modules" in config,
        "config_rank": rank,
        "config_scale": f"{alpha / (math.sqrt(rank) if rslora else rank):g}" if rank else "",
        "rslora": rslora,
        "rslora_loss": f"{math.sqrt(rank):.3g}" if rank and rank > 0 else "",
        "max_rank": max_rank,
        "served_rank": next((r for r in SERVED_RANKS if r >= max_rank), max_rank),
        "max_scale": float(f"{max(scales, default=0.0):.4g}"),
        "target_parameters": len(parameters),
        "overlapping_patterns": _overlap(patterns, modules),
        "old_layout": bool(version) and _numbers(version) < (0, 19, 1),
        "open_layout": not version and square,
        **_counted("rank_mismatches", unequal),
        **_counted("config_rank_mismatches", mismatches),
        **_counted("not_chosen", not_chosen),
        **_counted("scale_patterns", differing),
        **_counted("alpha_patterns", own_alpha),
        **_counted("stacks", stacks),
    }


def _settings(source: Contents) -> dict[str, float]:
    """Of a native adapter, what multiplies B @ A of each target."""
    try:
        targets = json.loads(source.metadata.get("config", "{}")).get("targets", {})
        return {k: float(t["scale"]) for k, t in targets.items() if "scale" in t}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise BrokenFileError(source.path, f"its config cannot be read: {error}") from None


def _is_stack(module: str, parameter: str) -> bool:
    """The module holds the factors of a parameter that PEFT's target_parameters name."""
    owner = parameter.rpartition(".")[0]
    bare = re.sub(r"(\.base_layer)+$", "", module)
    return bare == owner or bare.endswith(f".{owner}")


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's: the first key that the module's name ends with, as an expression."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _overlap(patterns: list[str], modules: Mapping[str, Module]) -> bool:
    distinct = sorted(set(patterns))
    for name in modules:
        module = name.removeprefix("base_model.model.")
        if sum(bool(re.match(rf"(.*\.)?({key})$", module)) for key in distinct) > 1:
            return True
    return False


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def _of_base(
    kind: str,
    modules: Mapping[str, Module],
    base: Mapping[str, Weight] | None,
    names: Names,
) -> dict[str, Any]:
    """Which modules the base lacks, and which have another shape there."""
    missing: list[str] = []
    shapes: list[str] = []
    if base is not None:
        names = names.joined(names_of({"gguf": "llama.cpp"}.get(kind, kind)))
        index = names.index(base)
        flat: tuple[dict[str, list[str]], ...] = ({},)
        if kind in ("kohya", "lycoris"):
            flat = flattened(base), aliased(base, names)
        for name, m in modules.items():
            weight = _weight(kind, name, base, index, flat, names)
            if weight is None:
                missing.append(name)
            elif weight.shape and not _fits(m, weight.shape):
                shapes.append(f"{name} ({weight.shape} in the base)")
    return {**_counted("missing_in_base", missing), **_counted("shapes_of_base", shapes)}


def _weight(
    kind: str,
    module: str,
    base: Mapping[str, Weight],
    index: Mapping[str, list[str]],
    flat: Sequence[Mapping[str, list[str]]],
    names: Names,
) -> Weight | None:
    """The base's weight behind a module; without a shape where only its place is known."""
    if kind == "native":
        module = re.sub(r"\[[^\]]*\]$", "", module)
    bare = re.sub(r"(\.base_layer)+$", "", module)
    if kind in ("kohya", "lycoris"):
        found = [n for f in flat_names(bare) for known in flat for n in known.get(f, ())]
        if found:
            return Weight(found[0], ())
        short = re.sub(r"^lora_(unet|te\d?|transformer)_|^lycoris_", "", bare)
        hit = next((n for f, (n, *_) in flat[0].items() if f.endswith(short)), None)
        return None if hit is None else Weight(hit, ())
    for wanted in (bare, f"{bare}.weight", f"{bare}.in_proj_weight"):
        hits = index.get(names.canonical(wanted), [])
        if hits:
            return base[hits[0]]
        if resolve([wanted], base, names).complete:
            return Weight(wanted, ())
    inside = f"{names.canonical(bare)}."
    if any(n.startswith(inside) for n in index):  # a module of bare parameters: stacks of experts
        return Weight(bare, ())
    return None


def _is_grouped(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """The factors of a grouped convolution: B has the rank of one group."""
    return len(A) > 2 and len(A) == len(B) and B[1] > 0 and A[0] % B[1] == 0


def _fits(m: Module, W: tuple[int, ...]) -> bool:
    """The factors give a matrix of W's shape, or of its transpose."""
    if not {"A", "B"} <= m.tensors.keys():
        return True
    A, B = m.shapes["A"], m.shapes["B"]
    if len(A) < 2 or len(B) < 2 or (_is_grouped(A, B) and A[0] != B[1]):
        return True
    if len(A) == len(B) == 3 and len(W) == 3 and A[0] == W[0]:  # a stack, matrix by matrix
        return {B[1], A[2]} == set(W[1:])
    out, columns, rest = B[0], math.prod(A[1:]), math.prod(W[1:])
    if len(W) == 3 and {out, columns} == set(W[1:]):  # a stack, its matrices side by side
        return True
    return (out, columns) in ((W[0], rest), (rest, W[0]))
