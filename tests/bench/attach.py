"""How long attaching takes: 560 projections of a meta model of a 70B Llama's shape, rank 8.

80 layers of hidden size 8,192, intermediate size 28,672 and key/value size 1,024. Building the
model is not timed. `peft` is `get_peft_model` with `low_cpu_mem_usage=True`, which makes the
factors on the meta device, as the others do; with `peft, defaults` they are made on the CPU, filled
with random numbers and then moved. The baseline is `peft`, or `naive` where PEFT is not installed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from common import (
    Adaptation,
    Contender,
    LlamaNet,
    UnavailableError,
    compare,
    options,
    parse,
    put_naive,
    put_ours,
    put_peft,
    show,
)
from torch import nn

WAYS: dict[str, Callable[[nn.Module, Adaptation], nn.Module]] = {
    "peft": functools.partial(put_peft, low_cpu_mem_usage=True),
    "peft, defaults": put_peft,
    "naive": put_naive,
    "ours": put_ours,
}


@functools.cache
def meta_net() -> LlamaNet:
    with torch.device("meta"):
        return LlamaNet(8192, 28672, 80, 64, 512, kv=1024).requires_grad_(False)


def main() -> None:
    args = parse(options(__doc__, ["70B"], rounds=7))
    small = LlamaNet(8, 8, 1, 1, 8)
    contenders = []
    notes: list[str] = []
    for name, way in WAYS.items():
        try:
            way(copy.deepcopy(small), Adaptation(4))
        except UnavailableError as reason:
            notes.append(f"{name} left out: {reason}")
            continue
        contenders.append(_contender(name, way))
    baseline = contenders[0].name if contenders[0].name == "peft" else "naive"
    rows = compare("70B", contenders, rounds=args.rounds, turn=0, warmup=1, baseline=baseline)
    count = sum(isinstance(m, nn.Linear) for m in meta_net().modules()) - 1  # but the head
    show(f"attach to {count} projections", rows, notes, as_json=args.json)


def _contender(name: str, way: Callable[[nn.Module, Adaptation], nn.Module]) -> Contender:
    def attach(net: nn.Module) -> None:
        way(net, Adaptation(8))

    return Contender(name, attach, prepare=lambda: copy.deepcopy(meta_net()))


if __name__ == "__main__":
    main()
