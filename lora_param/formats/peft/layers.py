"""PEFT's layers as targets: Linear, Conv1D, Embedding, ConvNd, MultiheadAttention.

PEFT keeps A as (rank, in) and B as (out, rank) however W is stored. Ours are in W's own layout, so
that on a weight stored as (in, out) the two change places: (B A)ᵀ = Aᵀ Bᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from lora_param.adapter import Layer
from lora_param.errors import BrokenFileError, NoFormError
from lora_param.formats.peft.config import DOUBLED
from lora_param.formats.peft.keys import OTHERS, LayerKeys
from lora_param.formats.peft.others import place_other
from lora_param.formats.peft.reading import IN_FIRST, Placed, Reading
from lora_param.targets.settings import INITIAL, Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["place_layer"]

Make = Callable[[], "Tensor"]


def place_layer(reading: Reading, layer: LayerKeys) -> list[Placed]:
    """The target of one layer, and that of its bias where B has one.

    Raises:
        BrokenFileError: its tensors do not go together, or not with the config.
        NoFormError: it has no form here.
    """
    method = reading.source.config.method
    others = bool(OTHERS & set(layer.parts))
    if others != (method != "LORA"):
        names = ", ".join(sorted(layer.parts))
        told = f"{layer.module} has {names}, and its config says {method}"
        raise BrokenFileError(reading.source.path, told)
    if others:
        return [place_other(reading, layer)]
    A, B = reading.factor_shapes(layer)
    if layer.depth:
        raise BrokenFileError(
            reading.source.path,
            f"{layer.module} has a layer within a layer, and the config's target_parameters names "
            "no parameter of it",
        )
    if A[0] != B[1] and not (len(A) > 2 and A[0] % B[1] == 0):
        raise BrokenFileError(
            reading.source.path,
            f"lora_A of {layer.module} is of rank {A[0]} and lora_B of rank {B[1]}",
        )
    place = _embedding if layer.is_embedding else _conv if len(A) > 2 else _linear
    placed = place(reading, layer, A, B)
    found = [placed, *_bias(reading, layer, placed)]
    W = reading.weight(placed.name)
    placed.apart = () if W is None else W.tied
    if placed.layer == "embedding" and W is not None and reading.stands_for_head(W):
        reading.notes.append(
            f"{placed.name} is the output head as well (tie_word_embeddings in config.json), which "
            f"changes with it in a file, as PEFT's merge_and_unload changes it; a live model keeps "
            f"its head apart, as PEFT's forward does."
        )
    return found


def _linear(reading: Reading, layer: LayerKeys, A: tuple[int, ...], B: tuple[int, ...]) -> Placed:
    module, of = layer.module, layer.module
    parent, _, leaf = module.rpartition(".")
    name, kind = f"{module}.weight", "linear"
    if module in reading.keys.attention or reading.has(f"{module}.in_proj_weight"):
        name, kind = f"{module}.in_proj_weight", "attention"
    elif leaf == "out_proj" and parent in reading.keys.attention:
        of, kind = parent, "attention"
    elif leaf == "out_proj" and reading.has(f"{parent}.in_proj_weight"):
        raise NoFormError(
            str(reading.source.path),
            f"factors of {module}",
            "the output of a MultiheadAttention, which PEFT's forward does not use when it is "
            "targeted alone",
            f"train again with {parent} as the target",
        )
    in_first = kind == "linear" and _in_first(reading, name, (B[0], A[1]))
    W = reading.weight(name)
    if W is not None and kind == "attention" and W.shape != (B[0], A[1]):
        reading.differ(name, W, f"{(B[0], A[1])}")
    layer_kind: Layer = "conv1d" if in_first else "attention" if kind == "attention" else "linear"
    shape = (A[1], B[0]) if in_first else (B[0], A[1])
    settings, strength = _settings(reading, layer, of, A[0], in_first)
    makers = _pair(reading, layer, ("A", "B"), swap=in_first)
    if settings.init != "kaiming":
        makers |= _initial(reading, name, settings, in_first, kind)
    makers |= _magnitude(reading, layer)
    if of != module:
        settings = _doubled(reading, settings, name)
    return Placed(name, settings, shape, makers, layer_kind, strength=strength)


def _doubled(reading: Reading, settings: Settings, name: str) -> Settings:
    """The settings of an attention's output as PEFT computes it, in training as well."""
    version = reading.source.config.version
    if version is not None and version > DOUBLED:
        reading.notes.append(
            f"Older PEFTs add the update of {name} twice (peft#3774); it is taken once."
        )
        return settings
    reading.notes.append(
        f"The PEFT that wrote this adds the update of {name} twice (peft#3774): its alpha is "
        "doubled here, so that outputs are the same."
    )
    return replace(settings, alpha=2 * settings.alpha)


def _in_first(reading: Reading, name: str, shape: tuple[int, int]) -> bool:
    """W is stored as (in, out), as far as anything tells; without a base it is taken as it comes.

    Args:
        reading: the adapter.
        name: the weight.
        shape: (out, in) of the factors.
    """
    W = reading.weight(name)
    if W is None:
        return False
    told = _told_by_shape(W.shape, shape)
    if told is None and W.shape != shape:
        reading.differ(name, W, f"{shape} (out, in)")
        return False
    if told is not None:
        if W.in_first not in (None, told):
            reading.differ(name, W, f"{shape} (out, in)")
        return told
    if W.in_first is not None:
        return W.in_first
    flag = reading.source.config.fan_in_fan_out
    if _others(reading) <= {flag}:
        return flag
    if reading.layout is None:  # the flag is that of the layer that PEFT made last
        reading.open.append(name)
    return reading.layout == IN_FIRST


def _told_by_shape(weight: tuple[int, ...], factors: tuple[int, int]) -> bool | None:
    """Where the two sides differ, the shape tells; None where it does not, or does not fit."""
    if factors[0] == factors[1] or weight not in (factors, factors[::-1]):
        return None
    return weight != factors


def _others(reading: Reading) -> set[bool]:
    """How the weights of this adapter whose shape tells are stored."""
    assert reading.host is not None
    found = set()
    for layer in reading.keys.layers:
        W = reading.host.weights.get(f"{layer.module}.weight")
        if W is None or layer.is_embedding:
            continue
        A, B = reading.factor_shapes(layer)
        if len(A) == 2 and (told := _told_by_shape(W.shape, (B[0], A[1]))) is not None:
            found.add(told)
    return found


def _embedding(
    reading: Reading, layer: LayerKeys, A: tuple[int, ...], B: tuple[int, ...]
) -> Placed:
    name, shape = f"{layer.module}.weight", (A[1], B[0])  # (V, D)
    W = reading.weight(name)
    if W is not None and W.shape != shape:
        reading.differ(name, W, f"{shape}")
    settings, strength = _settings(reading, layer, layer.module, A[0], True, init="kaiming")
    makers = _pair(reading, layer, ("embedding_A", "embedding_B"), swap=True)
    makers |= _magnitude(reading, layer)
    return Placed(name, settings, shape, makers, "embedding", strength=strength)


def _conv(reading: Reading, layer: LayerKeys, A: tuple[int, ...], B: tuple[int, ...]) -> Placed:
    name, shape = f"{layer.module}.weight", (B[0], *A[1:])
    W = reading.weight(name)
    grouped = A[0] != B[1] or (
        W is not None and W.shape[:1] == B[:1] and W.shape[2:] == A[2:] and W.shape[1] < A[1]
    )
    if grouped:
        raise NoFormError(
            str(reading.source.path),
            f"factors of the grouped convolution {layer.module}",
            "whose update reads every input in every group, which the weight cannot hold",
            "use it with PEFT, or train that layer with another target",
        )
    if W is not None and W.shape != shape:
        reading.differ(name, W, f"{shape}")
    settings, strength = _settings(reading, layer, layer.module, A[0], False)
    if settings.init != "kaiming":
        _refuse_initial(reading, layer.module, settings)
    makers = _pair(reading, layer, ("A", "B"), swap=False) | _magnitude(reading, layer)
    return Placed(name, settings, shape, makers, "conv", strength=strength)


def _settings(
    reading: Reading,
    layer: LayerKeys,
    of: str,
    rank: int,
    in_first: bool,
    init: str | None = None,
) -> tuple[Settings, float]:
    config = reading.source.config
    if config.use_dora != ("magnitude" in layer.parts):
        have, says = ("a", "no DoRA") if not config.use_dora else ("no", "DoRA")
        raise BrokenFileError(
            reading.source.path,
            f"{layer.module} has {have} lora_magnitude_vector, and its config says {says}",
        )
    variant = "lora" if not config.use_dora else "dora_columns" if in_first else "dora"
    return reading.settings(of, rank, variant, init or config.init)


def _pair(
    reading: Reading, layer: LayerKeys, parts: tuple[str, str], *, swap: bool
) -> dict[str, Make]:
    """Makers of A (rank, n) and B (m, rank) as matrices in W's layout."""
    down, up = (reading.tensor(layer.parts[p]) for p in parts)
    if swap:
        return {
            "lora_A": lambda: up().T.contiguous(),
            "lora_B": lambda: down().T.contiguous(),
        }
    return {"lora_A": lambda: down().flatten(1), "lora_B": lambda: up().flatten(1)}


def _magnitude(reading: Reading, layer: LayerKeys) -> dict[str, Make]:
    if "magnitude" not in layer.parts:
        return {}
    read = reading.tensor(layer.parts["magnitude"])
    return {"magnitude": lambda: read().flatten()}  # (1, out, 1, ...) of a convolution


def _initial(
    reading: Reading, name: str, settings: Settings, in_first: bool, kind: str
) -> dict[str, Make]:
    """The pair that PEFT takes away from W when it loads: made of W itself, so that it is known."""
    if kind != "linear" or (settings.init == "olora" and in_first):
        _refuse_initial(reading, name, settings)
    host = reading.host
    if host is None:
        note = (
            f"Of {settings.init}: updates are relative to directions of the base, which is not at "
            "hand; norms are of scale·(B @ A) alone."
        )
        if note not in reading.notes:
            reading.notes.append(note)
        return {}

    @cache
    def pair() -> tuple[Tensor, Tensor]:
        import torch

        W = host.value(name).float()
        W = W.T if in_first else W
        r = settings.rank
        if settings.init == "pissa":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            root = (S[:r] / settings.scale).sqrt()
            return root[:, None] * Vh[:r], U[:, :r] * root
        Q, R = torch.linalg.qr(W)  # not divided by the scale: PEFT takes scale·(Q @ R) away
        return R[:r].contiguous(), Q[:, :r].contiguous()

    first, second = INITIAL
    if in_first:
        return {
            first: lambda: pair()[1].T.contiguous(),
            second: lambda: pair()[0].T.contiguous(),
        }
    return {first: lambda: pair()[0], second: lambda: pair()[1]}


def _refuse_initial(reading: Reading, name: str, settings: Settings) -> None:
    raise NoFormError(
        str(reading.source.path),
        f"{settings.init} on {name}",
        "for which PEFT has no such start",
        "save it with PEFT's path_initial_model_for_weight_conversion, and use that",
    )


def _bias(reading: Reading, layer: LayerKeys, placed: Placed) -> list[Placed]:
    """`lora_bias`: scale·b is added to the layer's bias, a rank-1 update of a weight (out, 1)."""
    key = layer.parts.get("bias")
    if key is None:
        return []
    if placed.settings.variant != "lora" or placed.name.endswith(".in_proj_weight"):
        raise NoFormError(
            str(reading.source.path),
            f"a bias on B of {layer.module}",
            "which is not added to the layer's bias there",
            "use it with PEFT",
        )
    name = f"{layer.module}.bias"
    size = reading.source.shapes[key]
    W = reading.weight(name)
    if W is not None and W.shape != size:
        reading.differ(name, W, f"{size}")
    scale, read = placed.settings.scale, reading.tensor(key)

    def ones() -> Tensor:
        return read().new_ones(1, 1)

    settings = Settings(rank=1, alpha=scale, scaling="constant")
    makers: dict[str, Make] = {"lora_A": ones, "lora_B": lambda: read()[:, None]}
    return [Placed(name, settings, size, makers, placed.layer, strength=placed.strength)]
