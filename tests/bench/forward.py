"""How long a forward without gradients takes, against the base model's.

- `1024 enabled`: 1,024 tokens, adapted.
- `1 cached`: one token, with what a contender has for keeping the built weight: `lp.cached`, and
  `parametrize.cached` for the naive way. PEFT has nothing of the kind and runs as it is.
- `1024 disabled`, `1 disabled`: adapted, but switched off.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from common import (
    Adaptation,
    Contender,
    Row,
    UnavailableError,
    base_net,
    compare,
    make,
    options,
    parse,
    show,
    token_ids,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_param as lp

Mode = Callable[[nn.Module], AbstractContextManager[Any]]


def plain(_: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


def cached(model: nn.Module) -> AbstractContextManager[Any]:
    if not hasattr(lp, "cached"):
        raise UnavailableError("this version has no lora_param.cached")
    manager: AbstractContextManager[Any] = lp.cached(model)
    return manager


def naive_cached(_: nn.Module) -> AbstractContextManager[Any]:
    return parametrize.cached()


def peft_disabled(model: nn.Module) -> AbstractContextManager[Any]:
    manager: AbstractContextManager[Any] = model.disable_adapter()  # type: ignore[operator]
    return manager


ENABLED: dict[str, Mode] = {"floor": plain, "naive": plain, "peft": plain, "ours": plain}
CACHED: dict[str, Mode] = {"floor": plain, "naive": naive_cached, "peft": plain, "ours": cached}
DISABLED: dict[str, Mode] = {"floor": plain, "peft": peft_disabled, "ours": lp.disabled}
CASES: dict[str, tuple[int, dict[str, Mode]]] = {
    "1024 enabled": (1024, ENABLED),
    "1 enabled": (1, ENABLED),
    "1 cached": (1, CACHED),
    "1024 disabled": (1024, DISABLED),
    "1 disabled": (1, DISABLED),
}


class Forward:
    """A contender's forward; its mode is entered before a turn and left before the next."""

    def __init__(self, model: nn.Module, mode: Mode, embeds: Tensor) -> None:
        self.model, self.mode, self.embeds = model.eval(), mode, embeds
        with self.mode(self.model):
            self()  # so that what is missing shows, and caches are warm

    def __call__(self) -> None:
        with torch.no_grad():
            self.model(embeds=self.embeds)


def measure(name: str, args: Namespace, notes: list[str]) -> list[Row]:
    tokens, modes = CASES[name]
    embeds = base_net().embed(token_ids(tokens))
    contenders = []
    for contender, mode in modes.items():
        try:
            forward = Forward(make(contender, Adaptation(8)), mode, embeds)
        except UnavailableError as reason:
            notes.append(f"{name}: {contender} left out: {reason}")
            continue
        contenders.append(_contender(contender, forward))
    return compare(name, contenders, rounds=args.rounds, turn=args.turn, baseline="floor")


def _contender(name: str, forward: Forward) -> Contender:
    def prepare() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(forward.mode(forward.model))
        forward()
        return stack

    return Contender(name, lambda _: forward(), prepare, finish=ExitStack.close)


def main() -> None:
    args = parse(options(__doc__, CASES, rounds=15))
    rows: list[Row] = []
    notes: list[str] = []
    for name in args.cases:
        rows += measure(name, args, notes)
    show("forward without gradients", rows, notes, as_json=args.json)


if __name__ == "__main__":
    main()
