"""Writing a record as PEFT's two files.

What is written, PEFT loads with every key used and saves again byte for byte: one pair of factors
for each layer, ranks and alphas by pattern where they differ, copies as `modules_to_save`, biases
and rows of tokens. What PEFT cannot say is refused by name.

It is one file, however long: the keys and the config of an adapter are made together.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Adapter, Layer
from lora_param.errors import NoFormError, NonFiniteError, OutputError, UnsettledError, worded
from lora_param.files.safetensors import NAMES, StreamEntry, write_safetensors
from lora_param.files.writer import check_output, replace_directory
from lora_param.formats.peft.config import PEFT_VERSION
from lora_param.formats.peft.copies import Copies, sort_copies
from lora_param.formats.peft.encode import Pair, encode_pair, pair_of
from lora_param.formats.peft.keys import PREFIX
from lora_param.formats.peft.kinds import kinds_of, split_name
from lora_param.formats.peft.others import Others, encode_others
from lora_param.formats.peft.patterns import exact_alpha, patterns, target_names
from lora_param.formats.peft.source import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write_peft"]

_OWN = {CONFIG, WEIGHTS, "adapter_model.bin", "README.md"}


@dataclass
class _Written:
    """What goes into the files.

    Attributes:
        tensors: by their keys.
        ranks, alphas: by the name that patterns are matched against.
        modules, parameters: what is targeted.
        rslora, dora: flags of all of them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    modules: dict[str, Layer] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False


def write_peft(
    adapter: Adapter, path: Path, *, force: bool, sync: bool, leaves: bool = False
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a directory of their own.

    Args:
        adapter, path, force, sync: as for `Write`.
        leaves: `target_modules` lists last names, whatever else of the base has them.

    Raises:
        NoFormError: PEFT has no form for something in it.
        UnsettledError: the kind of some layer is not known.
        NonFiniteError: a tensor holds NaN or infinity.
        OutputError: the directory exists (without force) or holds other things, or cannot be
            written.
    """
    real = check_output(path, force=force, directory=True)
    if real.is_dir() and (other := [p.name for p in real.iterdir() if p.name not in _OWN]):
        raise OutputError(path, f"it holds other things than a PEFT adapter, such as {other[0]}")
    if adapter.settle is not None:
        raise UnsettledError(
            adapter.source,
            adapter.targets,
            "how its base stores its weights",
        )
    config, tensors = _encode(adapter)
    if leaves:
        names = config["target_modules"]
        config["target_modules"] = sorted({n.rpartition(".")[2] for n in names})
    entries: dict[str, StreamEntry] = {}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{key} of {adapter.source}")
        name = NAMES[str(tensor.dtype).removeprefix("torch.")]
        entries[key] = (name, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    with replace_directory(path, force=force, sync=sync) as directory:
        (directory / CONFIG).write_text(text, "utf-8")
        write_safetensors(directory / WEIGHTS, entries, {"format": "pt"}, sync=False)


def _encode(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the tensors by their keys."""
    kinds = kinds_of(adapter)
    copies = sort_copies(adapter)
    of_weight: dict[str, list[str]] = {}
    for key, t in adapter.targets.items():
        if t.target.name in kinds and t.settings.variant != "copy":
            of_weight.setdefault(t.target.name, []).append(key)
    if own := [name for name in of_weight if not split_name(name)[0]]:
        raise NoFormError(
            adapter.source,
            f"factors of {own[0]}",
            "a weight of the model itself, and PEFT wraps modules inside of it",
            "put the model into another, such as nn.Sequential(model), or bake it",
        )
    others = encode_others(adapter, of_weight, kinds)
    if others is not None:
        return _of_others(adapter, others, copies)
    out = _Written()
    pairs = {name: pair_of(adapter, keys, kinds[name]) for name, keys in of_weight.items()}
    out.rslora = bool(pairs) and all(p.rslora for p in pairs.values())
    dora = {p.magnitude is not None for p in pairs.values()}
    if len(dora) > 1:
        raise NoFormError(
            adapter.source,
            "DoRA on some targets and not on others",
            "and PEFT's use_dora is for all of them",
            "bake one part of it, and write the other",
        )
    out.dora = dora == {True}
    names = [n for n in pairs if kinds[n] not in ("attention", "parameter", "in_first")]
    for name in names:
        module = split_name(name)[0]
        _add(out, module, module, pairs[name], kinds[name], adapter.base[name].shape)
    _add_attentions(out, {n: p for n, p in pairs.items() if kinds[n] == "attention"})
    _add_parameters(adapter, out, pairs, kinds)
    _add_bias(adapter, out, copies, pairs)
    copies.check(adapter, out.modules)
    tensors = out.tensors | copies.tensors(adapter, out.modules)
    return _config(adapter, out, copies), {PREFIX + key: t for key, t in tensors.items()}


def _of_others(
    adapter: Adapter, others: Others, copies: Copies
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of another method than LoRA."""
    copies.check(adapter, others.modules)
    bias = copies.bias(adapter, others.modules)
    method = others.config["peft_type"]
    if copies.updated or copies.rows or (bias != "none" and method != "OFT"):
        raise NoFormError(
            adapter.source,
            f"biases or rows of tokens beside {method}",
            "for which PEFT has no such thing",
            "bake it (lora-param bake), or leave them out",
        )
    config = {**others.config, "modules_to_save": copies.modules or None}
    if method == "OFT":
        config["bias"] = bias.replace("lora", "oft")
    tensors = others.tensors | copies.tensors(adapter, others.modules)
    return config, {PREFIX + key: t for key, t in tensors.items()}


def _add(
    out: _Written, module: str, path: str, pair: Pair, kind: Layer, shape: tuple[int, ...]
) -> None:
    """One layer around a module."""
    A, B = encode_pair(pair, kind, shape)
    if kind == "embedding":
        out.tensors |= {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B}
    else:
        out.tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    if pair.magnitude is not None:
        m = pair.magnitude
        size = (1, -1, *(1,) * (len(shape) - 2)) if kind == "conv" else (-1,)
        out.tensors[f"{path}.lora_magnitude_vector"] = m.reshape(size)
    out.modules[module] = kind
    _rank(out, module, pair)


def _rank(out: _Written, name: str, pair: Pair) -> None:
    out.ranks[name] = pair.rank
    fitting = pair.alpha is not None and pair.rslora == out.rslora
    alpha = pair.alpha if fitting else exact_alpha(pair.scale, pair.rank)
    assert alpha is not None
    out.alphas[name] = alpha


def _add_attentions(out: _Written, pairs: dict[str, Pair]) -> None:
    """Both projections of each: PEFT adapts them together, at one rank and alpha.

    It adds the update of the output twice (peft#3774), so that half of it is written.
    """
    import torch

    modules: dict[str, dict[str, Pair]] = {}
    for name, pair in pairs.items():
        module, leaf = split_name(name)
        if leaf == "in_proj_weight":
            modules.setdefault(module, {})["in"] = pair
        else:
            modules.setdefault(split_name(module)[0], {})["out"] = pair
    for module, found in modules.items():
        first = found.get("in") or found["out"]
        width = first.A.shape[1]
        rank = max(p.rank for p in found.values())
        scale = found["in"].scale if "in" in found else found["out"].scale / 2
        for leaf, rows in (("in", 3 * width), ("out", width)):
            own = found.get(leaf)
            A, B = first.A.new_zeros(rank, width), first.B.new_zeros(rows, rank)
            if own is not None:
                share = own.scale / (scale if leaf == "in" else 2 * scale) if scale else 1.0
                A[: own.rank], B[:, : own.rank] = own.A, own.B * share
            path = module if leaf == "in" else f"{module}.base_layer.out_proj"
            out.tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        out.modules[module] = "attention"
        one = found.get("in")
        exact = one is not None and one.rank == rank
        _rank(out, module, one if exact and one else Pair(torch.empty(rank, 0), first.B, scale))


def _add_parameters(
    adapter: Adapter, out: _Written, pairs: dict[str, Pair], kinds: dict[str, Layer]
) -> None:
    """Layers around one module nest, the first of its parameters innermost."""
    modules: dict[str, list[str]] = {}
    for name in pairs:
        if kinds[name] in ("parameter", "in_first"):
            modules.setdefault(split_name(name)[0], []).append(name)
    for module, names in modules.items():
        ordered = _registered(adapter, names)
        for depth, name in enumerate(reversed(ordered)):
            A, B = encode_pair(pairs[name], kinds[name], adapter.base[name].shape)
            path = ".".join(filter(None, [module, *["base_layer"] * depth]))
            path = f"{path}." if path else ""
            out.tensors |= {f"{path}lora_A.weight": A, f"{path}lora_B.weight": B}
            out.parameters.append(name)
            _rank(out, name, pairs[name])
    if modules and any(t.settings.dropout for t in adapter.targets.values()):
        raise NoFormError(
            adapter.source,
            f"dropout, and factors of {next(iter(modules))}",
            "and PEFT has no dropout with target_parameters",
            "set dropout to 0",
        )


def _registered(adapter: Adapter, names: list[str]) -> list[str]:
    weights = adapter.weights_at_hand
    if len(names) == 1:
        return names
    if all(n in weights and weights[n].classes for n in names):
        place = {name: i for i, name in enumerate(weights)}
        return sorted(names, key=place.__getitem__)
    if adapter.format == "peft" and adapter.settle is None:
        return names  # as they were read
    raise UnsettledError(
        adapter.source,
        names,
        "in which order their module has them, which PEFT's keys depend on",
        f"give the live model ({worded('base=model', '--base python:module:callable')})",
    )


def _add_bias(adapter: Adapter, out: _Written, copies: Copies, pairs: dict[str, Pair]) -> None:
    """Updates of biases, as `lora_bias`: B's own, added with the layer's scale."""
    if not copies.updated:
        return
    for key in copies.updated:
        module = split_name(adapter.targets[key].target.name)[0]
        pair = pairs.get(f"{module}.weight")
        if pair is None or out.modules.get(module) not in ("linear", "conv1d", "conv"):
            raise NoFormError(
                adapter.source,
                f"an update of {key}",
                "which PEFT has for the bias of a targeted layer alone",
                "bake it (lora-param bake), or leave it out",
            )
        one = pair_of(adapter, [key], "linear")
        b = (one.B @ one.A)[:, 0]
        out.tensors[f"{module}.lora_B.bias"] = (
            b if one.scale == pair.scale else b * (one.scale / pair.scale)
        )
    for module, kind in out.modules.items():
        if kind not in ("linear", "conv1d", "conv") or out.parameters or out.dora:
            raise NoFormError(
                adapter.source,
                f"updates of biases, and a layer {module} of kind {kind}",
                "for which PEFT has no lora_bias",
                "bake it (lora-param bake), or leave the biases out",
            )
        B = out.tensors[f"{module}.lora_B.weight"]
        out.tensors.setdefault(f"{module}.lora_B.bias", B.new_zeros(B.shape[0]))
    out.lora_bias = True


def _config(adapter: Adapter, out: _Written, copies: Copies) -> dict[str, Any]:
    if not out.modules and not out.parameters:
        raise NoFormError(
            adapter.source,
            "no factors, full copies alone",
            "and PEFT has no LoRA without a target",
            "bake it (lora-param bake)",
        )
    ranks, rank_pattern = patterns(out.ranks)
    alphas, alpha_pattern = patterns(out.alphas)
    dropouts = Counter(
        t.settings.dropout for t in adapter.targets.values() if t.settings.variant != "copy"
    )
    if len(dropouts) > 1:
        raise NoFormError(
            adapter.source,
            f"targets of different dropout ({', '.join(f'{d:g}' for d in dropouts)})",
            "and PEFT's lora_dropout is one for all",
            "set them to one",
        )
    matrices = [k for k in out.modules.values() if k in ("linear", "conv1d")]
    return {
        "alpha_pattern": {k: _number(v) for k, v in alpha_pattern.items()},
        "base_model_name_or_path": None,
        "bias": copies.bias(adapter, out.modules),
        "fan_in_fan_out": bool(matrices) and set(matrices) == {"conv1d"} and not out.parameters,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alphas),
        "lora_bias": out.lora_bias,
        "lora_dropout": next(iter(dropouts)),
        "modules_to_save": copies.modules or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": ranks,
        "rank_pattern": rank_pattern,
        "target_modules": target_names(adapter.weights_at_hand, list(out.modules)),
        "target_parameters": sorted(out.parameters) or None,
        "task_type": None,
        "trainable_token_indices": copies.rows or None,
        "use_dora": out.dora,
        "use_rslora": out.rslora,
    }


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
