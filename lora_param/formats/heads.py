"""The rows of q and k where a tool rotates neighbours and transformers the two halves of a head.

Both store one matrix of (heads · size) rows. transformers rotates row i of a head with row
i + size/2; torchtune, and llama.cpp for some architectures, rotate rows 2i and 2i + 1, and store
the rows so. B and DoRA's lengths follow the rows of W.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_param.adapter import Host
from lora_param.errors import UnsettledError
from lora_param.formats.peft.reading import Placed
from lora_param.names.resolve import resolve
from lora_param.names.table import Names, default_names

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["by_halves", "by_neighbours", "heads_for", "is_named_so", "to_halves"]

_ROTATED = re.compile(r"(.+\.)?self_attn\.(?P<which>[qk])_proj(\.weight)?")
_ROWS = ("lora_B", "magnitude")


def by_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads·size, ...) that are stored by halves, so that those rotated together adjoin.

    >>> by_neighbours(torch.arange(4)[:, None], 1).flatten()
    tensor([0, 2, 1, 3])
    """
    parts = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, 2, size/2, ...)
    return parts.transpose(1, 2).reshape(rows.shape)


def by_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads·size, ...) that are stored by neighbours, as transformers stores them.

    >>> by_halves(torch.tensor([[0], [2], [1], [3]]), 1).flatten()
    tensor([0, 1, 2, 3])
    """
    parts = rows.reshape(heads, -1, 2, *rows.shape[1:])  # (heads, size/2, 2, ...)
    return parts.transpose(1, 2).reshape(rows.shape)


def heads_for(name: str, config: Mapping[str, Any], source: str, base: str) -> int | None:
    """How many heads a weight's rows are, by transformers' name; None for others than q and k.

    Raises:
        UnsettledError: the config does not say it.
    """
    match = _ROTATED.fullmatch(name)
    if match is None:
        return None
    text = config.get("text_config")
    fields: Mapping[str, Any] = text if isinstance(text, Mapping) else config
    heads = fields.get("num_attention_heads")
    if match["which"] == "k":
        heads = fields.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or heads < 1:
        raise UnsettledError(
            source,
            [name],
            f"how many attention heads {base} has, by which its rows are ordered",
            "give the model with its config.json (a directory, or the live model)",
        )
    return heads


def is_named_so(wanted: Iterable[str], names: Names, host: Host) -> bool:
    """The base has the tool's names itself, and so its order of rows.

    Args:
        wanted: names of weights, as the tool writes them.
        names: the rules, the tool's among them.
        host: the base.
    """
    plain = default_names()
    own = [n for n in wanted if names.canonical(n) != plain.canonical(n)]
    return bool(resolve(own, host.weights, plain, host.model_type).places)


def to_halves(placed: Placed, names: Names, host: Host, source: str) -> Placed:
    """A target in the order of transformers' rows."""
    heads = heads_for(names.canonical(placed.name), host.config, source, host.name)
    if heads is None:
        return placed
    turned = {n: _turned(make, heads) if n in _ROWS else make for n, make in placed.makers.items()}
    return replace(placed, makers=turned)


def _turned(make: Callable[[], Tensor], heads: int) -> Callable[[], Tensor]:
    return lambda: by_halves(make(), heads)
