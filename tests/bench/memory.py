"""How much memory a forward keeps for backward.

Counted by `torch.autograd.graph.saved_tensors_hooks` over distinct storages at 1,024 tokens: `MiB`
leaves out the storages of parameters and buffers, which are there anyway, `with params` has them.
The difference to `floor`, the frozen model, is what adapting its seven projections costs. On a CUDA
device the peak of allocated memory over forward and backward is shown as well.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from common import (
    CUDA,
    MIB,
    Adaptation,
    Row,
    base_net,
    make_all,
    options,
    parse,
    show,
    token_ids,
)
from torch import Tensor, nn

CASES = {
    "1024 r8": Adaptation(8),
    "1024 r8 dropout": Adaptation(8, 0.1),
    "1024 r8 dora": Adaptation(8, dora=True),
    "1024 r8 dora dropout": Adaptation(8, 0.1, dora=True),
}
CONTENDERS = ("floor", "full", "naive", "peft", "ours")


def saved(name: str, model: nn.Module) -> tuple[float, dict[str, float]]:
    """MiB kept for backward beside the model's own tensors, and further figures."""
    ids = token_ids(1024)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    inputs = base_net().embed(ids).requires_grad_(name == "floor")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids) if name == "full" else model(embeds=inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1).flatten())
    own = itertools.chain(model.parameters(), model.buffers())
    owned = {t.untyped_storage().data_ptr() for t in own}
    extra = {"with params": sum(storages.values()) / MIB}
    loss.backward()
    if CUDA:
        extra["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / MIB
    model.zero_grad()
    return sum(n for at, n in storages.items() if at not in owned) / MIB, extra


def main() -> None:
    args = parse(options(__doc__, CASES, rounds=1))
    rows: list[Row] = []
    notes: list[str] = []
    for case in args.cases:
        models = make_all(CONTENDERS, CASES[case], notes, case)
        floor = None
        for name, model in models.items():
            value, extra = saved(name, model)
            floor = value if floor is None else floor
            rows.append(Row(case, name, value, "MiB", value / floor, extra=extra))
    show("memory saved for backward", rows, notes, as_json=args.json)


if __name__ == "__main__":
    main()
