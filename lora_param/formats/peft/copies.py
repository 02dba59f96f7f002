"""Full copies and biases, as PEFT has them: whole modules, all biases, or rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_param.adapter import Adapter, Layer
from lora_param.errors import NoFormError
from lora_param.formats.peft.kinds import split_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Copies", "sort_copies"]

_INSTEAD = "bake it (lora-param bake), or leave it out"


@dataclass
class Copies:
    """The full copies of an adapter, sorted.

    Attributes:
        whole: key of each copy of a whole tensor.
        picked: key of each copy of rows.
        updated: key of each update of a bias.
    """

    whole: list[str] = field(default_factory=list)
    picked: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)

    def check(self, adapter: Adapter, targeted: Mapping[str, Layer]) -> None:
        """Sort the whole copies into modules and biases.

        Raises:
            NoFormError: a part of a module is copied without the rest.
        """
        weights = adapter.weights_at_hand
        copied = {adapter.targets[k].target.name for k in self.whole}
        of_module: dict[str, set[str]] = {}
        for name in copied:
            of_module.setdefault(split_name(name)[0], set()).add(split_name(name)[1])
        for module, leaves in of_module.items():
            siblings = {split_name(n)[1] for n in weights if split_name(n)[0] == module}
            if leaves == {"bias"} and (module in targeted or siblings - leaves or not siblings):
                self.biases.append(f"{module}.bias")
            elif siblings - leaves or module in targeted:
                rest = ", ".join(sorted(siblings - leaves)) or "its factors"
                raise NoFormError(
                    adapter.source,
                    f"a full copy of {module}.{min(leaves)}",
                    f"and PEFT replaces whole modules, not {min(leaves)} without {rest}",
                    _INSTEAD,
                )
            else:
                self.modules.append(module)
        for module in self.modules:
            also = {split_name(n)[0] for n in weights if split_name(n)[0].endswith(module)}
            if extra := also - set(self.modules):
                raise NoFormError(
                    adapter.source,
                    f"a full copy of {module}",
                    f"and PEFT's modules_to_save would take {min(extra)} with it",
                    _INSTEAD,
                )
        self.modules.sort()

    def bias(self, adapter: Adapter, targeted: Mapping[str, Layer]) -> str:
        """What `bias` of the config has to say.

        Raises:
            NoFormError: some biases are copied, and not those that PEFT would.
        """
        if not self.biases:
            return "none"
        weights = adapter.weights_at_hand
        have = set(self.biases)
        every = {n for n in weights if split_name(n)[1] == "bias"} - {
            f"{m}.bias" for m in self.modules
        }
        own = {n for n in every if split_name(n)[0] in targeted}
        if not weights:  # as it was read
            return "lora_only" if all(split_name(n)[0] in targeted for n in have) else "all"
        if have == own:
            return "lora_only"
        if have == every:
            return "all"
        lacking = min((every if have - own else own) - have)
        raise NoFormError(
            adapter.source,
            f"full copies of {len(have)} biases",
            f"and PEFT copies all of them or those of targets, {lacking} as well",
            _INSTEAD,
        )

    def tensors(self, adapter: Adapter, targeted: Mapping[str, Layer]) -> dict[str, Tensor]:
        """The copies by their keys, without the prefix."""
        found: dict[str, Tensor] = {}
        for key in self.whole:
            name = adapter.targets[key].target.name
            module, leaf = split_name(name)
            path = f"{module}.base_layer.{leaf}" if module in targeted else name
            value = adapter.tensors[f"{key}.value"].detach().cpu()
            found[path] = value.reshape(adapter.base[name].shape).contiguous()
        for key in self.picked:
            module = split_name(adapter.targets[key].target.name)[0]
            value = adapter.tensors[f"{key}.value"].detach().cpu().contiguous()
            found[f"{module}.token_adapter.trainable_tokens_delta"] = value
        return found


def sort_copies(adapter: Adapter) -> Copies:
    """What of an adapter is no pair of factors of a matrix.

    Raises:
        NoFormError: a copy that PEFT has no form for.
    """
    found = Copies()
    for key, t in adapter.targets.items():
        name, region = t.target.name, t.target.region
        if t.settings.variant != "copy":
            if len(adapter.base[name].shape) < 2:
                found.updated.append(key)
            continue
        if not t.enabled or t.scale * t.strength != 1:
            raise NoFormError(
                adapter.source,
                f"the full copy {key}, disabled or not at full strength",
                "and PEFT has no such switch",
                "enable it, or take it out first",
            )
        if region.is_whole:
            found.whole.append(key)
        elif region.picked is not None and split_name(name)[1] == "weight":
            found.picked.append(key)
            found.rows[split_name(name)[0]] = list(region.picked)
        else:
            raise NoFormError(
                adapter.source,
                f"a full copy of {key}",
                "a part that PEFT has no form for",
                _INSTEAD,
            )
    return found
