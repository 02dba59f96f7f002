"""A `peft.LoraConfig`, or its dict, as targets and settings: what it says, or why it cannot be.

PEFT chooses modules by the ends of their names, and counts ranks and alphas by patterns over them.
Here the names are settled against a model, so that each target is named once, with its settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from lora_param.errors import LoraConfigError, OptionError
from lora_param.targets.options import read_options
from lora_param.targets.settings import Settings, SettingsOptions
from lora_param.targets.weights import Weight

__all__ = ["LoraConfig", "chosen_by", "config_of", "names_module", "read_lora_config"]

LoraConfig = Mapping[str, Any]
"""A `peft.LoraConfig`, which is not imported, or its dict."""

# Fields that change what is trained, and what stands for them here, if anything does.
_REFUSED: Mapping[str, str] = {
    "modules_to_save": "let them train beside the adapter (requires_grad_(True) after apply)",
    "trainable_token_indices": "adapt the embedding instead, or train it whole",
    "lora_bias": "leave it out: LoRA here is on the weight alone",
    "layer_replication": "build the model with the layers it is to have",
    "megatron_config": "adapt the modules of the exported model",
    "use_qalora": "adapt the quantized weight directly",
    "alora_invocation_tokens": "use PEFT for it",
    "arrow_config": "use PEFT for it",
    "use_bdlora": "use PEFT for it",
    "kasa_config": "use PEFT for it",
    "monteclora_config": "use PEFT for it",
    "corda_config": "use init='pissa' or 'olora'",
    "eva_config": "use init='pissa' or 'olora'",
    "lora_ga_config": "use init='pissa' or 'olora'",
    "velora_config": "use PEFT for it",
    "loftq_config": "use init='pissa' or 'olora'",
    "ensure_weight_tying": "use tied='together'",
}
_SAYS_NOTHING = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("runtime_config",),
}
_READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern"),
}


def config_of(targets: object) -> dict[str, Any] | None:
    """The fields of a LoraConfig or of a dict of one; None for anything else.

    >>> config_of({"peft_type": "LORA", "r": 4, "target_modules": ["q"]})["r"], config_of(["q"])
    (4, None)
    """
    to_dict = getattr(targets, "to_dict", None)
    if callable(to_dict) and hasattr(targets, "peft_type"):
        found: dict[str, Any] = to_dict()
        return found
    return dict(targets) if isinstance(targets, Mapping) else None


def chosen_by(
    function: Callable[..., Any],
    targets: str | Iterable[str] | object,
    exclude: str | Iterable[str],
    options: SettingsOptions,
    weights: Mapping[str, Weight],
) -> tuple[str | Iterable[str], Settings]:
    """Patterns and settings, of a call that takes them or a LoraConfig.

    Raises:
        OptionError: a LoraConfig, and beside it what it already says.
        UnknownOptionError: an option that is no setting.
    """
    config = config_of(targets)
    if config is None:
        return cast("str | Iterable[str]", targets), read_options(function, options)
    beside = [*options, *(["exclude"] if exclude else [])]
    if beside:
        raise OptionError(beside[0], "given", "what the LoraConfig says; change it there")
    return read_lora_config(config, weights)


def read_lora_config(
    config: Mapping[str, Any], weights: Mapping[str, Weight]
) -> tuple[list[str], Settings]:
    """Patterns that name each weight the config means, with its rank and alpha, and the settings.

    Args:
        config: the fields; those that are absent stand at PEFT's defaults.
        weights: of a live model, with the classes of their modules.

    Raises:
        LoraConfigError: a field that has no form here, or that names nothing.
    """
    method = getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA")
    if method != "LORA":
        raise LoraConfigError("peft_type", method, "a LoRA is what can be applied")
    for name, value in config.items():
        if name in _REFUSED and value:
            raise LoraConfigError(name, value, _REFUSED[name])
        if name not in _REFUSED and name not in _READ and name not in _SAYS_NOTHING and value:
            raise LoraConfigError(name, value, "it is not known here: leave it out")
    if config.get("bias", "none") != "none":
        says = "biases train where requires_grad_(True) says so after apply"
        raise LoraConfigError("bias", config["bias"], says)
    settings = Settings(
        rank=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        scaling="rslora" if config.get("use_rslora") else "standard",
        dropout=float(config.get("lora_dropout") or 0.0),
        init=_init(config.get("init_lora_weights", True), config.get("r", 8)),
        variant="dora" if config.get("use_dora") else "lora",
    )
    found = [*_modules(config, weights), *_parameters(config, weights)]
    if not found:
        raise LoraConfigError(
            "target_modules", config.get("target_modules"), "name modules that the model has"
        )
    return [f"{target}{_own(config, module)}" for target, module in found], settings


def _init(value: object, rank: int) -> str:
    if value is True or value is None:
        return "kaiming"
    if value == "gaussian":
        return f"normal:{1 / rank!r}"
    if value in ("pissa", "olora"):
        return str(value)
    raise LoraConfigError("init_lora_weights", value, "True, 'gaussian', 'pissa' or 'olora'")


def _own(config: Mapping[str, Any], module: str) -> str:
    """`:rank=R,alpha=A`, where patterns give a module its own."""
    rank = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return f":rank={rank},alpha={float(alpha)!r}"


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that matches an end of the name, as PEFT takes it."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _modules(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> list[tuple[str, str]]:
    """The weight of each chosen module, and the module."""
    wanted = config.get("target_modules")
    if not wanted:
        return []
    modules: dict[str, list[Weight]] = {}
    for weight in weights.values():
        if weight.name.rpartition(".")[2] in ("weight", "in_proj_weight"):
            modules.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        chosen = [m for m, ws in modules.items() if any(not w.not_linear for w in ws)]
    else:
        chosen = [m for m in modules if _matcher(wanted)(m)]
        _check_all_used(wanted, chosen)
    chosen = [m for m in chosen if names_module(config, m) and _in_layers(config, m)]
    found = []
    for module in chosen:
        found += [(w.name, module) for w in modules[module]]
        inner = f"{module}.out_proj" if module else "out_proj"
        if modules[module][0].name.endswith("in_proj_weight") and inner in modules:
            found.append((f"{inner}.weight", module))
    return list(dict.fromkeys(found))


def names_module(config: Mapping[str, Any], module: str) -> bool:
    """`target_modules` and `exclude_modules` of a config leave this module in.

    Where they say "all-linear", or nothing, its class decides: True. The output of a
    MultiheadAttention comes with it.

    Raises:
        re.error: one of them is an expression that cannot be read.

    >>> names_module({"target_modules": ["q"]}, "a.q"), names_module({"target_modules": "a"}, "a.q")
    (True, False)
    """
    wanted = config.get("target_modules")
    names = {module, module.removesuffix(".out_proj")}
    if wanted and str(wanted).lower() != "all-linear" and not any(map(_matcher(wanted), names)):
        return False
    return not _matcher(config.get("exclude_modules") or ())(module)


def _matcher(wanted: str | Iterable[str]) -> Callable[[str], bool]:
    """PEFT's rule: an expression for the whole name, or ends of it."""
    if isinstance(wanted, str):
        expression = re.compile(wanted)
        return lambda name: expression.fullmatch(name) is not None
    ends = tuple(wanted)
    return lambda name: any(name == end or name.endswith(f".{end}") for end in ends)


def _check_all_used(wanted: str | Iterable[str], chosen: list[str]) -> None:
    """A name that matches nothing is passed over by PEFT, without a word."""
    if isinstance(wanted, str):
        return
    unused = [end for end in wanted if not any(_matcher([end])(name) for name in chosen)]
    if unused:
        raise LoraConfigError("target_modules", unused, "name modules that the model has")


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None:
        return True
    wanted = [layers] if isinstance(layers, int) else list(layers)
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf".*\.{p}\.(\d+)\." for p in patterns] or [r".*\.[^.]*\.(\d+)\."]
    for expression in expressions:
        if found := re.match(expression, f".{module}"):
            return int(found[1]) in wanted
    return False


def _parameters(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> list[tuple[str, str]]:
    """Each parameter that `target_parameters` names; a stack matrix by matrix."""
    named = config.get("target_parameters") or ()
    found = []
    for end in named:
        hits = [w for w in weights.values() if _matcher([end])(w.name)]
        if not hits:
            raise LoraConfigError("target_parameters", [end], "name parameters that the model has")
        found += [(f"{w.name}{'[*]' if len(w.shape) == 3 else ''}", w.name) for w in hits]
    return found
