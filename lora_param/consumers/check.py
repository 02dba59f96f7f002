"""`check`: what is wrong with an adapter, and what others will do with it, before it is served."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.fit import check_checkpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.consumers.facts import gather
from lora_param.consumers.judge import CONSUMERS, ITSELF, judge
from lora_param.consumers.verdict import Verdict
from lora_param.errors import BrokenFileError, LoraParamError, MismatchError, UnknownFileError
from lora_param.formats import read_adapter
from lora_param.names.table import read_names

__all__ = ["check"]

_KINDS = {
    "native": "a lora_param adapter",
    "peft": "a PEFT adapter",
    "kohya": "a kohya adapter",
    "lycoris": "a LyCORIS adapter",
    "diffusers": "a diffusers adapter",
    "gguf": "a GGUF adapter",
    "loralib": "a loralib adapter",
    "minlora": "a minLoRA adapter",
    "torchtune": "a torchtune adapter",
    "mlx": "an mlx adapter",
}


def check(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    consumer: str | Iterable[str] = (),
    *,
    names: str | os.PathLike[str] | None = None,
    key: str | None = None,
) -> Verdict:
    """Judge an adapter on disk by its headers, its config and its values; torch is not needed.

    Args:
        adapter: a file of any tool, or a directory as PEFT writes it.
        base: the checkpoint that it is for: names and shapes are then compared as well.
        consumer: who shall read it, one or several of `lora_param.consumers.judge.CONSUMERS`, each
            alone (its newest version) or with a version, as `vllm==0.11`; "all" for all.
        names: a file of further rules between names.
        key: which nested state dict of a pickled base.

    Returns:
        A verdict that prints itself: for each consumer accepted, differs (it loads and computes
        something else) or refused, with the reason, what to do, and the source of the rule.

    Raises:
        OptionError: an unknown consumer.
        FileError: the adapter or the base cannot be read, or is none.
        NameRuleError: `names` cannot be read.

    Example:
        >>> print(check("adapter", consumer="vllm"))  # doctest: +SKIP
    """
    asked = [consumer] if isinstance(consumer, str) else list(consumer)
    asked = [c for one in asked for c in (CONSUMERS if one == "all" else (one,))]
    rules = read_names(names)
    if base is None:
        facts = gather(adapter, None, rules) | _as_read(adapter, None, names)
    else:
        with open_checkpoint(base, key) as checkpoint:
            facts = gather(adapter, checkpoint.weights, rules)
            facts |= _as_read(adapter, checkpoint, names)
    if judge({**facts, "refusal": ""}):
        facts["refusal"] = ""  # the rules say what is wrong, and how to mend it
    here = {"ADAPTER": os.fspath(adapter), **({} if base is None else {"MODEL": os.fspath(base)})}
    findings = [replace(f, mend=_named(f.mend, here)) for f in judge(facts, asked)]
    return Verdict(os.fspath(adapter), _about(facts), tuple(findings), (ITSELF, *asked))


def _as_read(
    adapter: str | os.PathLike[str],
    base: Checkpoint | None,
    names: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """What `load` and `bake` say of it: the base may hold it in another layout, or under names of
    another tool, which headers alone do not tell."""
    try:
        record = read_adapter(adapter, names=names)
        if base is None:
            return {"refusal": ""}
        check_checkpoint(record, base, check_fingerprint=False)
    except (BrokenFileError, UnknownFileError, MismatchError) as error:
        return {"refusal": str(error).removesuffix(".")}
    except LoraParamError:  # it asks for what is not stored, or has something without a form here
        return {"refusal": ""}
    return {"refusal": "", "missing_in_base": 0, "shapes_of_base": 0}


def _named(command: str, here: dict[str, str]) -> str:
    """A command with the paths in question instead of their placeholders."""
    for placeholder, path in here.items():
        quoted = shlex.quote(path).replace("\\", r"\\")  # re.sub reads backslashes itself
        command = re.sub(rf"\b{placeholder}\b", quoted, command)
    return command


def _about(facts: dict[str, Any]) -> str:
    modules = facts["modules"]
    words = [f"{_KINDS[facts['kind']]}, {modules:,} module{'s' * (modules != 1)}"]
    if facts["max_rank"]:
        words.append(f"rank {facts['max_rank']}")
    if facts["max_scale"]:
        words.append(f"scale {facts['max_scale']:g}")
    return ", ".join(words)
