"""The grammar of PEFT's keys: which layer each is of, and which part of it.

`base_model.model.` + path of the module + a tail. `base_layer` stands in the path where PEFT has
put a layer of its own around the module: once for what belongs to the wrapped module itself, and
once more for each parameter of the module that has been wrapped after this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_param.errors import BrokenFileError, listed

__all__ = ["OTHERS", "PREFIX", "Keys", "LayerKeys", "looks_peft", "parse_keys"]

PREFIX = "base_model.model."
_INNER = "base_layer"

_TAILS = {
    "A": re.compile(r"\.lora_A\.weight"),
    "B": re.compile(r"\.lora_B\.weight"),
    "bias": re.compile(r"\.lora_B\.bias"),
    "embedding_A": re.compile(r"\.lora_embedding_A"),
    "embedding_B": re.compile(r"\.lora_embedding_B"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.weight)?"),
}
_COMPOSED = (*(f"hada_w{i}_{x}" for i in "12" for x in "ab"), "hada_t1", "hada_t2")
_COMPOSED += (*(f"lokr_w{i}{x}" for i in "12" for x in ("", "_a", "_b")), "lokr_t2")
_TAILS |= {n: re.compile(rf"\.{n}") for n in _COMPOSED}
_TAILS |= {n: re.compile(rf"\.{n}\.weight") for n in ("oft_R", "oft_embedding_R")}
OTHERS = frozenset((*_COMPOSED, "oft_R", "oft_embedding_R"))
"""The parts of layers of other methods than LoRA."""

_TOKENS = ".token_adapter.trainable_tokens_delta"
_OURS = re.compile(r"\.(lora_|token_adapter\.|hada_|lokr_|oft_)")
_CONVENTIONS = {
    "kohya": re.compile(r"\.lora_(down|up|mid)\.weight$|\.alpha$"),
    "diffusers": re.compile(r"\.lora\.(down|up)\.weight$"),
    "LyCORIS": re.compile(r"\.(hada_w|lokr_w|oft_blocks|dora_scale)"),
    "mlx or torchtune": re.compile(r"\.lora_[ab](\.weight)?$"),
    "lora_param": re.compile(r"\.lora_[AB]$"),
}


@dataclass
class LayerKeys:
    """The keys of one layer of PEFT's.

    Attributes:
        module: path of the module that it stands around, as in the base.
        depth: how many layers stand around this one: 0 for the outermost.
        parts: "A", "B" and what else there is → key.
    """

    module: str
    depth: int
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def is_embedding(self) -> bool:
        """Its factors are those of an embedding."""
        return "embedding_A" in self.parts or "embedding_B" in self.parts


@dataclass
class Keys:
    """All keys of a file, each in one place.

    Attributes:
        layers: those with factors.
        tokens: module → key of the rows that replace its weight's.
        copies: name of a tensor in the base → key of what replaces it.
        attention: modules that PEFT knows to be a MultiheadAttention.
    """

    layers: list[LayerKeys]
    tokens: dict[str, str]
    copies: dict[str, str]
    attention: set[str]


def looks_peft(names: Iterable[str]) -> bool:
    """Some key is PEFT's."""
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", _TOKENS)
    return any(name.startswith("base_model.") or name.endswith(ends) for name in names)


def parse_keys(names: Iterable[str], source: str) -> Keys:
    """Sort the keys of a file.

    Raises:
        BrokenFileError: a key is none of PEFT's, a half is missing, or keys follow two conventions.
    """
    names = list(names)
    _check_conventions(names, source)
    layers: dict[tuple[str, int], LayerKeys] = {}
    tokens: dict[str, str] = {}
    copies: dict[str, str] = {}
    attention: set[str] = set()
    for key in sorted(names):
        path = key.removeprefix(PREFIX)
        part, stem = _part(path)
        if part is not None:
            module, depth, of_attention = _module(stem)
            if of_attention:
                attention.add(of_attention)
            layer = layers.setdefault((module, depth), LayerKeys(module, depth))
            layer.parts[part] = key
        elif path.endswith(_TOKENS):
            tokens[_plain(path.removesuffix(_TOKENS))] = key
        elif _OURS.search(path):
            raise BrokenFileError(source, f"the key {key} is none that PEFT writes")
        else:
            copies[_plain(path)] = key
    _check_halves(layers.values(), source)
    return Keys(list(layers.values()), tokens, copies, attention)


def _part(path: str) -> tuple[str | None, str]:
    """Which part of a layer, and the path of the layer."""
    for part, tail in _TAILS.items():
        found = tail.search(path)
        if found and found.end() == len(path):
            return part, path[: found.start()]
    return None, path


def _module(stem: str) -> tuple[str, int, str]:
    """The module, how deep the layer lies on it, and the attention that it is the output of."""
    segments = stem.split(".")
    depth = 0
    while segments and segments[-1] == _INNER:
        segments.pop()
        depth += 1
    of_attention = ""
    if depth == 0 and len(segments) > 2 and segments[-2] == _INNER and segments[-1] == "out_proj":
        of_attention = ".".join(segments[:-2])
    return _plain(".".join(segments)), depth, of_attention


def _plain(path: str) -> str:
    return ".".join(s for s in path.split(".") if s != _INNER)


def _check_halves(layers: Iterable[LayerKeys], source: str) -> None:
    alone = []
    for layer in layers:
        if OTHERS & set(layer.parts):
            continue
        if layer.is_embedding and {"A", "B"} & set(layer.parts):
            raise BrokenFileError(
                source, f"{layer.module} has factors of a layer and of an embedding"
            )
        halves = ("embedding_A", "embedding_B") if layer.is_embedding else ("A", "B")
        have = [layer.parts[h] for h in halves if h in layer.parts]
        if len(have) != 2:
            alone.append(have[0] if have else next(iter(layer.parts.values())))
    if alone:
        raise BrokenFileError(
            source, f"a lora_A and a lora_B belong together, and one is missing to {listed(alone)}"
        )


def _check_conventions(names: list[str], source: str) -> None:
    if not names:
        raise BrokenFileError(source, "it holds no tensor")
    ours = [n for n in names if n.startswith(PREFIX)]
    for tool, form in _CONVENTIONS.items():
        other = next((n for n in names if not n.startswith(PREFIX) and form.search(n)), None)
        if other:
            with_peft = f", beside PEFT's {ours[0]}: keys of two conventions" if ours else ""
            raise BrokenFileError(source, f"the key {other} is one of {tool}{with_peft}")
    without = [n for n in names if not n.startswith(PREFIX)]
    if without:
        raise BrokenFileError(
            source,
            f"{len(without)} of its {len(names)} keys do not begin with {PREFIX}, without which "
            f"PEFT loads nothing of them: {listed(without, 2)}",
        )
