"""`adapter_config.json`: what of it decides the update, and what of it has no form here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_param.errors import BrokenFileError, NoFormError, UnknownFileError
from lora_param.formats.peft.patterns import chosen_modules
from lora_param.targets.settings import scale_of

__all__ = ["DOUBLED", "FLIPPED", "PEFT_VERSION", "PeftConfig", "ends_in", "read_config"]

PEFT_VERSION = "0.21.2"
"""The version whose rules are followed, and which is written."""

FLIPPED = (0, 19, 1)
"""Since this version a stack without `is_transposed` is read as (E, out, in), see peft#3165."""

DOUBLED = (0, 21, 2)
"""Up to this version the update of a MultiheadAttention's output is added twice, see peft#3774."""

SERIES = (0, 18)
"""Since this version the series of OFT is the one that is read."""

_MERGE = "merge it with PEFT (merge_and_unload) and use the merged model"
_CONVERT = "save it with PEFT's path_initial_model_for_weight_conversion, and use that"
_REFUSED: Mapping[str, tuple[str, str]] = {
    "use_qalora": ("whose A works on groups of inputs", _MERGE),
    "alora_invocation_tokens": ("which acts from a token of the input on", "use it with PEFT"),
    "arrow_config": ("a router over several adapters", "use it with PEFT"),
    "use_bdlora": ("with block-diagonal factors", _MERGE),
    "kasa_config": ("which cuts the base's smallest singular values off", _MERGE),
    "monteclora_config": ("with sampled factors", "use it with PEFT"),
    "megatron_config": ("of Megatron's parallel layers", "export it with Megatron first"),
    "layer_replication": ("whose base has layers twice", _MERGE),
}
_BASE_CHANGED = ("corda", "lora_ga", "loftq", "pissa_niter")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
_IGNORED = {
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("auto_mapping", "inference_mode", "target_modules", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "modules_to_save", "ensure_weight_tying", "megatron_core", "bias"),
    *("corda_config", "eva_config", "lora_ga_config", "velora_config", "loftq_config"),
    *("qalora_group_size", "runtime_config", "enable_lora", "merge_weights"),
}
_COMPOSED = {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout"}
_COMPOSED |= {"init_weights", "use_effective_conv2d"}
_METHODS: Mapping[str, set[str]] = {
    "LOHA": _COMPOSED,
    "LOKR": _COMPOSED | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
    "OFT": {
        *("r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share"),
        *("use_cayley_neumann", "num_cayley_neumann_terms", "fan_in_fan_out"),
    },
}
"""Other methods that are read → the fields that their configs have beside the common ones."""

_READ = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "lora_dropout"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "target_parameters"),
    *("trainable_token_indices",),
}


@dataclass(frozen=True)
class PeftConfig:
    """What the config says of scales and layouts; fields are PEFT's own.

    Attributes:
        source: what to call the adapter in messages.
        method: LORA, LOHA, LOKR or OFT.
        form: of OFT, that of its variant here.
        version: the PEFT that wrote it, as numbers; None where it does not say (before 0.18).
        chosen: `target_modules` and `exclude_modules`.
    """

    source: str
    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    lora_dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    init_lora_weights: object
    target_parameters: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None
    version: tuple[int, ...] | None
    method: str = "LORA"
    form: str = ""
    chosen: Mapping[str, str | list[str]] = field(default_factory=dict)

    @property
    def init(self) -> str:
        """Ours of the same base: pissa and olora start from W, all others leave it alone."""
        text = str(self.init_lora_weights).lower()
        return text if text in ("pissa", "olora") else "kaiming"

    def ranks(self, name: str) -> list[int]:
        """The ranks that the config has for a module or parameter, the one in force first."""
        return list(_matches(self.rank_pattern, name)) or [self.r]

    def alphas(self, name: str) -> list[float]:
        """The same of alpha."""
        return list(_matches(self.alpha_pattern, name)) or [self.lora_alpha]

    def alpha(self, name: str, rank: int) -> float:
        """The alpha in force for a tensor of this rank.

        Several patterns may match, and saving sorts them: then the rank tells if the first one
        still is the one that was trained with.

        Raises:
            BrokenFileError: the tensors are of a rank that the config does not have for them, or
                of one that leaves the alpha open.
        """
        ranks, alphas = self.ranks(name), self.alphas(name)
        if rank not in ranks:
            raise BrokenFileError(
                self.source, f"the tensors of {name} are of rank {rank}, its config says {ranks[0]}"
            )
        if rank != ranks[0] and len(set(alphas)) > 1:
            raise BrokenFileError(
                self.source,
                f"the tensors of {name} are of rank {rank}, which its rank_pattern has second, and "
                f"its alpha_pattern has {' and '.join(f'{a:g}' for a in alphas)} for them",
            )
        return alphas[0]

    def scale(self, alpha: float, rank: int) -> float:
        """What multiplies B @ A."""
        return scale_of(alpha, rank, "rslora" if self.use_rslora else "standard")

    def parameters(self, module: str) -> list[str]:
        """Names of the module's parameters that `target_parameters` names, in its order."""
        leaves = (t.rpartition(".")[2] for t in self.target_parameters)
        named = [
            n for n in leaves if any(ends_in(t, f"{module}.{n}") for t in self.target_parameters)
        ]
        return list(dict.fromkeys(named))

    def tokens(self, module: str) -> tuple[int, ...]:
        """The rows of a module's weight that `trainable_token_indices` names.

        Raises:
            BrokenFileError: it names none.
        """
        indices = self.trainable_token_indices
        if isinstance(indices, Mapping):
            found = [rows for name, rows in indices.items() if ends_in(name, module)]
            indices = found[0] if found else None
        if not indices:
            raise BrokenFileError(
                self.source,
                f"it has rows for {module}, and its config has no trainable_token_indices for them",
            )
        return indices


def ends_in(end: str, name: str) -> bool:
    """`name` is `end`, or ends in it at a dot."""
    return name == end or name.endswith(f".{end}")


def _matches(pattern: Mapping[str, Any], name: str) -> Iterator[Any]:
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                yield value
        except re.error:
            continue


def read_config(path: Path, source: str) -> PeftConfig:
    """Read and check an `adapter_config.json`.

    Raises:
        BrokenFileError: it is no such JSON text, or lacks what decides the scale.
        UnknownFileError: it is of a method that is not read.
        NoFormError: it has something set that has no form here.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(path, f"it is no JSON text ({error})") from None
    if not isinstance(raw, dict):
        raise BrokenFileError(path, "it is no JSON object")
    method = raw.get("peft_type") or "LORA"
    if method not in ("LORA", *_METHODS):
        accepted = f"PEFT adapters of LORA, {', '.join(_METHODS)}"
        raise UnknownFileError(source, f"a PEFT adapter of {method}", accepted)
    if method != "LORA":
        return _other(raw, path, source, method)
    for name, (what, instead) in _REFUSED.items():
        if raw.get(name):
            raise NoFormError(source, f"{name} in its config", f"a LoRA {what}", instead)
    _check_known(raw, _IGNORED | _READ | set(_REFUSED), source)
    _check_init(raw.get("init_lora_weights", True), source)
    return _typed(raw, path, source)


def _check_known(raw: Mapping[str, Any], known: set[str], source: str) -> None:
    unknown = [k for k, v in raw.items() if k not in known and v]
    if unknown:
        raise NoFormError(
            source,
            f"{unknown[0]} = {raw[unknown[0]]!r:.60} in its config",
            f"which PEFT {PEFT_VERSION} does not have",
            "take it out if it changes nothing of the update",
        )


def _other(raw: Mapping[str, Any], path: Path, source: str, method: str) -> PeftConfig:
    """The config of another method than LoRA, under LoRA's names."""
    _check_known(raw, _IGNORED | _METHODS[method], source)
    if method != "OFT":
        return replace(_typed(raw, path, source, "alpha"), method=method)
    if raw.get("coft") or raw.get("fan_in_fan_out"):
        name = "coft" if raw.get("coft") else "fan_in_fan_out"
        why = "an OFT that " + ("PEFT changes as it uses it" if name == "coft" else "is of Conv1D")
        raise NoFormError(source, f"{name} in its config", why, _MERGE)
    if "oft_block_size" not in raw:
        why = "of a PEFT before 0.14, whose OFT was another one"
        raise NoFormError(source, "no oft_block_size in its config", why, "use that PEFT")
    form = ["shared"] if raw.get("block_share") else []
    config = replace(_typed({**raw, "r": 1, "lora_alpha": 1}, path, source), method=method)
    if raw.get("use_cayley_neumann"):
        terms = raw.get("num_cayley_neumann_terms", 5)
        if type(terms) is not int or terms < 1:
            raise BrokenFileError(path, f"num_cayley_neumann_terms is {terms!r:.80}")
        if config.version is None or config.version < SERIES:
            why = "of a PEFT before 0.18, whose series was another one"
            raise NoFormError(source, "use_cayley_neumann in its config", why, "use that PEFT")
        form.append(f"terms{terms}")
    return replace(config, form="+".join(form))


def _check_init(init: object, source: str) -> None:
    text = str(init).lower()
    if any(text.startswith(name) for name in _BASE_CHANGED):
        what = f"init_lora_weights = {init!r}"
        raise NoFormError(
            source, what, "which changed its base in a way it does not tell", _CONVERT
        )
    if init is not None and init not in _PLAIN_INITS and text not in ("pissa", "olora"):
        known = "which this version does not know"
        raise NoFormError(source, f"init_lora_weights = {init!r}", known, _CONVERT)


def _typed(
    raw: Mapping[str, Any], path: Path, source: str, alpha_name: str = "lora_alpha"
) -> PeftConfig:
    def take(name: str, default: Any, check: type | tuple[type, ...]) -> Any:
        value = raw.get(name)
        if value is None:
            return default
        if not isinstance(value, check) or (isinstance(value, bool) and check is not bool):
            raise BrokenFileError(path, f"{name} is {value!r:.80}")
        return value

    number = (int, float)
    if raw.get(alpha_name) is None:
        raise BrokenFileError(
            path,
            f"it has no {alpha_name}, without which the scale of every update is unknown",
        )
    rank = take("r", 8, int)
    alpha = take(alpha_name, None, number)
    ranks, alphas = take("rank_pattern", {}, dict), take("alpha_pattern", {}, dict)
    for name, r in {"r": rank, **ranks}.items():
        if type(r) is not int or r < 1:
            raise BrokenFileError(path, f"the rank {name} is {r!r:.80}")
    for name, a in {alpha_name: alpha, **alphas}.items():
        if isinstance(a, bool) or not isinstance(a, number) or not math.isfinite(a):
            raise BrokenFileError(path, f"the alpha {name} is {a!r:.80}")
    return PeftConfig(
        source,
        rank,
        float(alpha),
        take("use_rslora", False, bool),
        take("use_dora", False, bool),
        take("lora_bias", False, bool),
        take("fan_in_fan_out", False, bool),
        float(take("lora_dropout", 0.0, number)),
        ranks,
        {name: float(a) for name, a in alphas.items()},
        raw.get("init_lora_weights", True),
        tuple(take("target_parameters", (), list)),
        _tokens(raw.get("trainable_token_indices"), path),
        _version(raw.get("peft_version")),
        chosen=chosen_modules(raw, path),
    )


def _tokens(value: Any, path: Path) -> Mapping[str, tuple[int, ...]] | tuple[int, ...] | None:
    if value is None:
        return None
    lists = value.values() if isinstance(value, dict) else [value]
    for rows in lists:
        if not isinstance(rows, list) or not all(type(r) is int and r >= 0 for r in rows):
            raise BrokenFileError(path, f"trainable_token_indices is {value!r:.80}")
        if len(set(rows)) != len(rows):
            raise BrokenFileError(path, "trainable_token_indices has a row twice")
    if isinstance(value, dict):
        return {name: tuple(rows) for name, rows in value.items()}
    return tuple(value)


def _version(value: Any) -> tuple[int, ...] | None:
    """`"0.19.1.dev0@abc"` → (0, 19, 1)."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", value) if isinstance(value, str) else None
    return tuple(int(n or 0) for n in found.groups()) if found else None
