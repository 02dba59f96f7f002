"""How long a training step takes: forward, backward and AdamW on what trains.

All seven projections of each layer are adapted, and every contender has the same loss and the same
optimizer. The baseline, `floor`, is the frozen model with gradients flowing through to its input
embeddings; it has nothing to step. `full` trains every weight. The other contenders' inputs ask for
no gradient, as in training on token ids; `--inputs-grad` has gradients flow through to them too.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import (
    Adaptation,
    Contender,
    Row,
    base_net,
    compare,
    make_all,
    options,
    parse,
    show,
    token_ids,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    tokens: int
    adaptation: Adaptation
    contenders: tuple[str, ...] = ("floor", "naive", "peft", "ours")


ALL = ("floor", "full", "naive", "peft", "ours")
PAIR = ("floor", "peft", "ours")
CASES = {
    "1024 r8": Case(1024, Adaptation(8), ALL),
    "1024 r64": Case(1024, Adaptation(64)),
    "64 r8": Case(64, Adaptation(8), ALL),
    "1024 r8 dropout": Case(1024, Adaptation(8, 0.1), PAIR),
    "64 r8 dropout": Case(64, Adaptation(8, 0.1), PAIR),
    "1024 r8 dora": Case(1024, Adaptation(8, dora=True), PAIR),
    "1024 r8 dora dropout": Case(1024, Adaptation(8, 0.1, dora=True), PAIR),
    "64 r8 dora": Case(64, Adaptation(8, dora=True), PAIR),
    "64 r8 dora dropout": Case(64, Adaptation(8, 0.1, dora=True), PAIR),
}


def step_of(name: str, model: nn.Module, ids: Tensor, inputs_grad: bool) -> Callable[[], None]:
    """One training step of a contender."""
    embeds = base_net().embed(ids)
    labels = ids.roll(-1).flatten()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def step() -> None:
        if name == "full":
            logits = model(ids)
        else:
            inputs = embeds.detach().requires_grad_(inputs_grad or name == "floor")
            logits = model(embeds=inputs)
        F.cross_entropy(logits.flatten(0, 1).float(), labels).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(name: str, args: Namespace, notes: list[str]) -> list[Row]:
    case = CASES[name]
    models = make_all(case.contenders, case.adaptation, notes, name)
    ids = token_ids(case.tokens)
    steps = {n: step_of(n, model, ids, args.inputs_grad) for n, model in models.items()}
    contenders = [Contender(n, lambda _, step=step: step()) for n, step in steps.items()]
    return compare(name, contenders, rounds=args.rounds, turn=args.turn, baseline="floor")


def main() -> None:
    parser = options(__doc__, CASES)
    parser.add_argument("--inputs-grad", action="store_true", help="see above")
    args = parse(parser)
    rows: list[Row] = []
    notes: list[str] = []
    for name in args.cases:
        rows += measure(name, args, notes)
    show("training step", rows, notes, as_json=args.json)


if __name__ == "__main__":
    main()
