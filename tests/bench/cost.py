"""Both ways of an operation, built and with factors, and which of them the library chooses.

`lora_param/weight/cost.py` has the model. Each row gives the time of the built way over that of the
factored one, without gradients and for a training step: below 1 building is the quicker. Measured
in pairs, as medians: `python tests/bench/cost.py [RANK...]`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.targets.regions import Region
from lora_param.weight.adapted import adapted
from lora_param.weight.rules import common
from lora_param.weight.update import Update

ROUNDS = 11
Operation = Callable[[Tensor, Tensor], Tensor]


def convolution(into: int, out: int, kernel: int, side: int) -> tuple[Tensor, Tensor, Operation]:
    x, W = torch.randn(2, into, side, side), torch.randn(out, into, kernel, kernel)
    return x, W, lambda x, w: F.conv2d(x, w, padding=kernel // 2)


CASES: dict[str, tuple[Tensor, Tensor, Operation]] = {}
for shape in (
    (3, 64, 7, 112),
    (64, 64, 1, 56),
    (64, 64, 3, 56),
    (256, 256, 3, 14),
    (512, 512, 3, 7),
):
    CASES["conv {} → {}, kernel {}, side {}".format(*shape)] = convolution(*shape)
for rows in (32, 128, 384, 512, 1024, 2048):
    CASES[f"W x, 512 × 512, {rows} columns"] = (
        *(torch.randn(512, rows), torch.randn(512, 512)),
        lambda x, w: w @ x,
    )
for rows in (16, 64, 128, 256, 512):
    CASES[f"x W, stack of 8 × 256 × 256, {rows} rows"] = (
        *(torch.randn(8, rows, 256), torch.randn(8, 256, 256)),
        torch.bmm,
    )


def ratio(x: Tensor, W: Tensor, operation: Operation, rank: int, train: bool) -> tuple[float, bool]:
    """Time of the built way over that of the factored one, and whether it is chosen."""
    region = Region(stacked=W.dim() == 3)
    *lead, m, n = region.matrix(tuple(W.shape))
    A, B = (torch.randn(*lead, *s).requires_grad_() for s in ((rank, n), (m, rank)))
    x, decide, said = x.clone().requires_grad_(), common.prefers_built, []

    def once(choose: Callable[..., bool]) -> float:
        start = time.perf_counter()
        with mock.patch.object(common, "prefers_built", choose), torch.set_grad_enabled(train):
            y = operation(x, adapted(W, [Update(A, B, 1.0, region)]))
            if train:
                y.sum().backward()
        return time.perf_counter() - start

    def own(*args: object, **how: object) -> bool:
        said.append(decide(*args, **how))  # type: ignore[arg-type]
        return said[-1]

    once(own)
    pairs = [(once(lambda *_, **__: True), once(lambda *_, **__: False)) for _ in range(ROUNDS)]
    return statistics.median(b / f for b, f in pairs), said[0]


def main(ranks: list[int]) -> None:
    torch.set_num_threads(1)
    for rank in ranks:
        for name, (x, W, operation) in CASES.items():
            found = [ratio(x, W, operation, rank, train) for train in (False, True)]
            cells = (f"{r:6.2f} {'built' if b else 'factored':8}" for r, b in found)
            print(f"{name:42} rank {rank:3}   infer, train: " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main([int(r) for r in sys.argv[1:]] or [8, 64])
