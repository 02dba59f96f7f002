"""A small CNN learns digits, then reads them lying on their side, with an adapter of a few percent.

Shows LoRA inside convolutions as well as in linear layers, on real digits that ship with the
package: train the net, register LoRA on all its weights, train the factors alone on rotated digits,
and read upright digits again with the adapter off. The knob to turn is RANK.

    python examples/rotated_digits.py --quick
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lora_param as lp
from lora_param.demo.data import load_digits

RANK = 8
ALPHA = 8
LEARNING_RATE = 2e-3
ADAPTER_LEARNING_RATE = 4e-3
STEPS = 400
BATCH = 64


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> None:
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return (net(x).argmax(1) == y).float().mean().item()


def rotated(x: Tensor) -> Tensor:
    return x.view(-1, 28, 28).rot90(1, (1, 2)).flatten(1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--quick", action="store_true", help="half the steps")
    options = parser.parse_args(arguments)
    steps = STEPS // 2 if options.quick else STEPS

    torch.manual_seed(options.seed)
    digits = load_digits()
    train_x, train_y = digits.train, digits.train_labels
    test_x, test_y = digits.test, digits.test_labels
    net = make_net()
    train(net, torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE), train_x, train_y, steps)
    result = {
        "upright, base": accuracy(net, test_x, test_y),
        "rotated, base": accuracy(net, rotated(test_x), test_y),
    }

    lp.apply(net, ["{1,3,6,8}"], rank=options.rank, alpha=ALPHA)
    optimizer = torch.optim.AdamW(lp.parameters(net), lr=ADAPTER_LEARNING_RATE)
    train(net, optimizer, rotated(train_x), train_y, steps)
    result["rotated, adapter on"] = accuracy(net, rotated(test_x), test_y)
    with lp.disabled(net):
        result["upright, adapter off"] = accuracy(net, test_x, test_y)
    stats = lp.stats(net)
    lp.bake(net)
    result["rotated, baked"] = accuracy(net, rotated(test_x), test_y)
    result["trainable, %"] = stats.percent

    console = Console()
    console.print(stats)
    table = Table("", "accuracy", title="Digits, upright and on their side")
    for name, value in result.items():
        if name != "trainable, %":
            table.add_row(name, f"{value:.1%}")
    console.print(table)
    return result


if __name__ == "__main__":
    main()
