"""LoRA for any weight of any PyTorch model.

    import lora_param as lp

    lp.apply(model, ["q_proj", "v_proj"], rank=8, alpha=16)  # in place; the base is frozen
    print(lp.stats(model))                                   # trainable 0.24 % ...

    with lp.disabled(model): ...
    lp.save(model, "adapter.safetensors"); lp.load(model, "adapter.safetensors")
    lp.bake(model)                                           # merged weights, plain modules again
    lp.remove(model)                                         # the exact base back

Names load on first use: importing the package imports neither torch nor Rich nor Typer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_param.adapter import Adapter as Adapter
    from lora_param.api import convert as convert
    from lora_param.api import disable as disable
    from lora_param.api import enable as enable
    from lora_param.api import load as load
    from lora_param.api import plan as plan
    from lora_param.api import save as save
    from lora_param.api import save_pretrained as save_pretrained
    from lora_param.api import stats as stats
    from lora_param.api_files import apply_checkpoint as apply_checkpoint
    from lora_param.api_files import bake_checkpoint as bake_checkpoint
    from lora_param.arithmetic.combine import combine as combine
    from lora_param.arithmetic.diff import diff as diff
    from lora_param.arithmetic.difference import Diff as Diff
    from lora_param.arithmetic.extract import ExtractReport as ExtractReport
    from lora_param.arithmetic.extract import extract as extract
    from lora_param.arithmetic.resize import resize as resize
    from lora_param.checkpoint.baked import BakeReport as BakeReport
    from lora_param.consumers.check import check as check
    from lora_param.consumers.verdict import Verdict as Verdict
    from lora_param.errors import LoraParamError as LoraParamError
    from lora_param.errors import UserError as UserError
    from lora_param.formats import read_adapter as read_adapter
    from lora_param.formats import write_adapter as write_adapter
    from lora_param.model.adapters import apply as apply
    from lora_param.model.adapters import attach as attach
    from lora_param.model.adapters import param_groups as param_groups
    from lora_param.model.adapters import parameters as parameters
    from lora_param.model.adapters import remove as remove
    from lora_param.model.baking import bake as bake
    from lora_param.model.lora import LoRA as LoRA
    from lora_param.model.record import get_adapter as get_adapter
    from lora_param.model.state import base_state_dict as base_state_dict
    from lora_param.model.state import merged_state_dict as merged_state_dict
    from lora_param.model.switching import cached as cached
    from lora_param.model.switching import disabled as disabled
    from lora_param.model.switching import set_scale as set_scale
    from lora_param.report.stats import Stats as Stats
    from lora_param.targets.plan import Plan as Plan
    from lora_param.verification import Verification as Verification
    from lora_param.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "BakeReport": "checkpoint.baked",
    "Diff": "arithmetic.difference",
    "ExtractReport": "arithmetic.extract",
    "LoRA": "model.lora",
    "LoraParamError": "errors",
    "Plan": "targets.plan",
    "Stats": "report.stats",
    "UserError": "errors",
    "Verdict": "consumers.verdict",
    "Verification": "verification",
    "apply": "model.adapters",
    "apply_checkpoint": "api_files",
    "attach": "model.adapters",
    "bake": "model.baking",
    "bake_checkpoint": "api_files",
    "base_state_dict": "model.state",
    "cached": "model.switching",
    "check": "consumers.check",
    "combine": "arithmetic.combine",
    "convert": "api",
    "diff": "arithmetic.diff",
    "disable": "api",
    "disabled": "model.switching",
    "enable": "api",
    "extract": "arithmetic.extract",
    "get_adapter": "model.record",
    "load": "api",
    "merged_state_dict": "model.state",
    "param_groups": "model.adapters",
    "parameters": "model.adapters",
    "plan": "api",
    "read_adapter": "formats",
    "remove": "model.adapters",
    "resize": "arithmetic.resize",
    "save": "api",
    "save_pretrained": "api",
    "set_scale": "model.switching",
    "stats": "api",
    "verify": "verification",
    "write_adapter": "formats",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
