"""State dicts under a model's original names, loaded where weights are parametrized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_param.errors import MismatchError, ResumeError
from lora_param.fingerprint import tensor_base_weight
from lora_param.model.lora import LoRA
from lora_param.targets.weights import canonical_name
from lora_param.weight.base import dense

__all__ = ["FINGERPRINT", "fingerprint_tensor", "hook_loading", "is_plain", "rename_base_keys"]
__all__ += ["unhook_loading"]

FINGERPRINT = "fingerprint"  # among a weight's entries of a state dict, instead of a frozen W


def is_plain(chain: nn.Module) -> bool:
    """Nothing but LoRA is in a list of parametrizations."""
    return bool(chain.is_tensor) and all(isinstance(p, LoRA) for p in chain.children())


def rename_base_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Make a state dict that holds `weight` fit a module on which it is parametrized.

    The base goes to `parametrizations.weight.original`. The adapter is no part of such a state
    dict: its own values stand in for it, so that a strict load passes and leaves it as it is.

    Where the factors are there as well (see `model/pretrained.py`), `weight` is W + ΔW and left
    out: W is in the state dict under its own name, or the model's, if it has the fingerprint.

    Raises:
        ResumeError: W is another one.
        MismatchError: a fingerprint of W without all factors.
    """
    lists = cast(nn.ModuleDict, module._modules["parametrizations"])
    for tensor, chain in lists.named_children():
        inner, plain = f"{prefix}parametrizations.{tensor}.", f"{prefix}{tensor}"
        told = state_dict.pop(f"{inner}{FINGERPRINT}", None)
        own = chain.state_dict(keep_vars=True)
        if told is not None:
            _check_resumed(f"{prefix}{tensor}", own, told, state_dict, inner)
        if not is_plain(chain) or (plain not in state_dict and told is None):
            continue
        value = state_dict.pop(plain, None)
        if told is None:
            state_dict.setdefault(f"{inner}original", value)
        for name, kept_value in own.items():
            state_dict.setdefault(f"{inner}{name}", kept_value)


def fingerprint_tensor(W: Tensor) -> Tensor:
    """The fingerprint of a base weight, as a tensor of text for a state dict."""
    known = tensor_base_weight(dense(W))
    return torch.tensor(list(f"{known.dtype} {known.hash}".encode()), dtype=torch.uint8)


def _check_resumed(
    name: str, own: dict[str, Tensor], told: Tensor, state_dict: dict[str, Any], inner: str
) -> None:
    here, there = (bytes(t.tolist()).decode() for t in (fingerprint_tensor(own["original"]), told))
    if here != there:
        raise ResumeError(canonical_name(name), here, there)
    missing = [n for n in own if n != "original" and f"{inner}{n}" not in state_dict]
    if missing:
        raise MismatchError("the state dict", f"the adapters on {name}", missing=missing)


def _load_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if "parametrizations" in module._modules:
        rename_base_keys(module, state_dict, prefix)


def hook_loading(owner: nn.Module) -> None:
    """Have a module load such state dicts that keeps the class which torch gave it."""
    hooks = owner._load_state_dict_pre_hooks.values()
    if not any(_is_our_hook(hook) for hook in hooks):
        owner.register_load_state_dict_pre_hook(_load_hook)  # type: ignore[no-untyped-call]


def unhook_loading(owner: nn.Module) -> None:
    """Undo `hook_loading`."""
    for key, hook in list(owner._load_state_dict_pre_hooks.items()):
        if _is_our_hook(hook):
            del owner._load_state_dict_pre_hooks[key]


def _is_our_hook(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "hook", hook) is _load_hook
