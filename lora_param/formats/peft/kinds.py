"""Which of PEFT's layers a weight is of: by its record, its module's class, or its neighbours."""

from __future__ import annotations

from collections.abc import Mapping

from lora_param.adapter import Adapter, AdapterTarget, Layer
from lora_param.errors import NoFormError, UnsettledError, worded
from lora_param.targets.weights import Weight, is_embedding_name

__all__ = ["kinds_of", "split_name"]

_CONVS = {"Conv1d", "Conv2d", "Conv3d"}


def split_name(name: str) -> tuple[str, str]:
    """A weight's module and its name there."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def kinds_of(adapter: Adapter) -> dict[str, Layer]:
    """The kind of layer of every adapted weight of two dimensions or more.

    Raises:
        UnsettledError: neither the adapter nor the base at hand tells it of some.
        NoFormError: PEFT has no layer for it.
    """
    found: dict[str, Layer] = {}
    unknown: list[str] = []
    for t in adapter.targets.values():
        name = t.target.name
        if len(adapter.base[name].shape) < 2 or t.settings.variant == "copy":
            continue
        kind = t.layer or _kind(adapter, t)
        if kind is None:
            unknown.append(name)
        else:
            found[name] = kind
    if unknown:
        raise UnsettledError(
            adapter.source,
            dict.fromkeys(unknown),
            "what kind of layer has them, which PEFT's keys depend on",
            f"give the live model ({worded('base=model', '--base python:module:callable')}), whose "
            "classes tell",
        )
    return found


def _kind(adapter: Adapter, t: AdapterTarget) -> Layer | None:
    W = adapter.weights_at_hand.get(t.target.name)
    if W is None:
        return None
    return _by_class(adapter, W) if W.classes else _by_neighbours(W, adapter.weights_at_hand)


def _by_class(adapter: Adapter, W: Weight) -> Layer:
    classes, leaf = set(W.classes), split_name(W.name)[1]
    if any(c.startswith("ConvTranspose") for c in classes):
        raise NoFormError(
            adapter.source,
            f"factors of {W.name}",
            "a transposed convolution, for which PEFT has no layer",
            "bake it (lora-param bake), or leave it out",
        )
    if leaf == "weight":
        if "NonDynamicallyQuantizableLinear" in classes:
            return "attention"
        if "Conv1D" in classes:
            return "conv1d"
        if "Embedding" in classes:
            return "embedding"
        if "Linear" in classes:
            return "linear"
        if classes & _CONVS:
            return "conv"
    if leaf == "in_proj_weight" and "MultiheadAttention" in classes:
        return "attention"
    return "in_first" if W.in_first else "parameter"


def _by_neighbours(W: Weight, weights: Mapping[str, Weight]) -> Layer | None:
    """For files, which know no classes: the length of a bias tells what is the output."""
    module, leaf = split_name(W.name)
    if leaf == "in_proj_weight" and f"{module}.out_proj.weight" in weights:
        return "attention"
    parent, _, last = module.rpartition(".")
    if last == "out_proj" and f"{parent}.in_proj_weight" in weights:
        return "attention"
    if leaf != "weight":
        return "parameter" if len(W.shape) == 2 else None
    if len(W.shape) > 3:
        return "conv"
    if len(W.shape) == 3:
        return None
    bias = weights.get(f"{module}.bias")
    if bias is None:
        return "embedding" if is_embedding_name(W.name) else "linear"
    if W.shape[0] != W.shape[1]:
        return "linear" if bias.shape == W.shape[:1] else "conv1d"
    turned = any(
        len(other.shape) == 2
        and other.shape[0] != other.shape[1]
        and other.name.endswith(".weight")
        and (b := weights.get(f"{other.name.removesuffix('weight')}bias")) is not None
        and b.shape == other.shape[1:]
        for other in weights.values()
    )
    return None if turned else "linear"
