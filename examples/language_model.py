"""A causal transformer of 8.1 M parameters, pretrained here, learns another text by LoRA of rank 4.

Pretrain on four fifths of a text; put LoRA on every nn.Linear of a copy and train its factors on
the last fifth, or on another text (--shift); do the same by full fine-tuning of a second copy.
Shown are the perplexity per byte of both texts before and after, what a step costs, and what each
model writes. The knobs to turn are RANK, ALPHA and the rates in TUNING.

    python examples/language_model.py --quick --shift

The texts are the King James Bible (Debian's bible-kjv) and the source of Python's standard library;
where the Bible is not installed, and in the quick run, Python's help pages stand for it.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import statistics
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lora_param as lp

RANK = 4
ALPHA = 1
INIT = "normal:0.01"
RATE = 0.01  # high for a transformer: hence warm-up, clipping, and normalised queries and keys
TUNING = {"full fine-tuning": 1e-3, "LoRA": 1e-3, "LoRA, rate × 10": 1e-2}
WARM_UP = 0.1  # of the steps
CLIP = 1.0
BATCH = 8
TEMPERATURE = 0.7
PRETRAINING_SHARE = 0.8
CONSOLE = Console()


@dataclass(frozen=True)
class Size:
    """The model, and how long it trains."""

    width: int
    layers: int
    heads: int
    context: int  # bytes
    steps: int
    tuning_steps: int
    windows: int  # of held-out text to measure on
    sample: int  # bytes to write


FULL = Size(288, 8, 9, 128, steps=600, tuning_steps=120, windows=256, sample=240)
QUICK = Size(128, 2, 4, 64, steps=300, tuning_steps=80, windows=64, sample=60)  # half a million


# --- the model --------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=2)
        )
        q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotated(x: Tensor) -> Tensor:
    """Queries or keys (N, heads, T, D), normalised, and turned by their positions."""
    angle = torch.outer(torch.arange(x.shape[2]), 1000 ** -torch.linspace(0, 1, x.shape[3] // 2))
    a, b = F.rms_norm(x, x.shape[3:]).chunk(2, dim=3)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 3)


class LanguageModel(nn.Module):
    """Bytes (N, T) → logits of the next byte (N, T, 256).

    Without a `get_output_embeddings`, by which transformers' models name their output head,
    "all-linear" takes `head` as well: every nn.Linear, as the original has it.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.context = size.context
        self.embedding = nn.Embedding(256, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=size.width**-0.5)
        for block in self.blocks:  # each begins as the identity
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids))))


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross entropy of each next byte, in nats; windows are (N, T + 1)."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LanguageModel, text: Tensor, windows: int) -> float:
    """Per byte, over windows spread evenly over a text."""
    starts = torch.linspace(0, len(text) - model.context - 1, windows).long()
    chosen = text[starts[:, None] + torch.arange(model.context + 1)].long()
    return math.exp(statistics.fmean(loss_of(model, w).item() for w in chosen.split(BATCH)))


@torch.no_grad()
def write(model: LanguageModel, prompt: str, count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(prompt.encode())])
    for _ in range(count):
        logits = model(ids[:, -model.context :])[:, -1] / TEMPERATURE
        ids = torch.cat([ids, torch.multinomial(logits.softmax(1), 1, generator=generator)], 1)
    return bytes(ids[0].tolist()).decode(errors="replace")


# --- texts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Bytes to learn from, and bytes to measure on."""

    name: str
    train: Tensor
    held_out: Tensor


def make_text(name: str, data: bytes) -> Text:
    """The last twentieth is held out."""
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cut = len(ids) * 19 // 20
    return Text(name, ids[:cut], ids[cut:])


def main_text(quick: bool) -> tuple[str, bytes]:
    if shutil.which("bible") and not quick:
        command = ["bible", "-f", "gen1:1-rev22:21"]
        verses = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
        return "Bible", b"\n".join(verse.partition(b" ")[2] for verse in verses)
    from pydoc_data.topics import topics

    return "Python's help", "\n".join(topics.values()).encode()


def source_code() -> tuple[str, bytes]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "Python's source", b"\n".join(file.read_bytes() for file in files)


def load(options: argparse.Namespace, size: Size) -> tuple[Text, Text]:
    """What to pretrain on, and what to fine-tune on."""
    try:
        if options.text:
            name, data = options.text.name, options.text.read_bytes()
        else:
            name, data = main_text(options.quick)
        if options.shifted_text:
            second = make_text(options.shifted_text.name, options.shifted_text.read_bytes())
        elif options.shift:
            second = make_text(*source_code())
        else:
            second = None
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"A text cannot be read: {error}") from error
    cut = int(len(data) * PRETRAINING_SHARE)
    rest = make_text(f"{name}, last fifth", data[cut:])
    texts = make_text(f"{name}, four fifths", data[:cut]), second or rest
    for text in texts:
        if len(text.held_out) <= size.context:
            raise SystemExit(f"{text.name} is too short: a twentieth of it is to be held out.")
    return texts


# --- training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a training step takes: milliseconds (the median), and bytes."""

    milliseconds: float
    gradients: int
    optimizer: int
    saved: int  # for backward, beside the model's own tensors


def train(
    model: LanguageModel, text: Tensor, steps: int, rate: float, seed: int, doing: str
) -> Cost:
    """Train what requires gradients on random windows of a text."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, steps, pct_start=WARM_UP, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)  # each contender sees the same windows
    times, saved = [], 0
    quiet = not CONSOLE.is_terminal
    for step in track(range(steps), doing, console=CONSOLE, transient=True, disable=quiet):
        starts = torch.randint(len(text) - model.context, (BATCH, 1), generator=generator)
        windows = text[starts + torch.arange(model.context + 1)].long()
        if step == 0:
            saved = saved_for_backward(model, windows)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model, windows).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        times.append(time.perf_counter() - start)
        schedule.step()
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    return Cost(1000 * statistics.median(times), gradients, state, saved)


def saved_for_backward(model: nn.Module, windows: Tensor) -> int:
    """Bytes that a forward keeps, each storage once, the parameters' own left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, windows)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss  # until here it held the graph, so that no address was used twice
    return sum(size for at, size in kept.items() if at not in own)


# --- the comparison ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Perplexities are (of the pretraining text, of the other); samples are bytes as text."""

    parameters: int
    trainable: int
    percent: float
    perplexity: dict[str, tuple[float, ...]]
    samples: dict[str, str]
    costs: dict[str, Cost]
    untouched: bool  # the base has its names and its bits still


def show(result: Result, texts: tuple[Text, Text]) -> None:
    shares = f"{result.trainable:,} of {result.parameters:,} ({result.percent:.2f} %)"
    CONSOLE.print(f"LoRA of rank {RANK} on every nn.Linear trains {shares}")
    table = Table("perplexity per byte", title="Held-out text", box=box.SIMPLE)
    for text in texts:
        table.add_column(text.name, justify="right")
    for name, values in result.perplexity.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    CONSOLE.print(table)

    table = Table("one step", title="What training takes", box=box.SIMPLE)
    for column in ("trained", "time", "gradients", "AdamW", "for backward"):
        table.add_column(column, justify="right")
    for name, cost in result.costs.items():
        count = result.trainable if name.startswith("LoRA") else result.parameters
        sizes = (f"{n / 1e6:.1f} MB" for n in (cost.gradients, cost.optimizer, cost.saved))
        table.add_row(name, f"{count:,}", f"{cost.milliseconds:.0f} ms", *sizes)
    CONSOLE.print(table)
    for name, sample in result.samples.items():
        CONSOLE.rule(f"written by: {name}", align="left")
        CONSOLE.print(sample, markup=False, highlight=False)


def draw(result: Result, texts: tuple[Text, Text], file: Path) -> None:
    """Perplexity on both texts, a pair of bars for each contender."""
    names = list(result.perplexity)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for offset, text, colour in ((-0.2, 0, "tab:gray"), (0.2, 1, "tab:orange")):
        values = [result.perplexity[name][text] for name in names]
        places = [i + offset for i in range(len(names))]
        bars = axes.barh(places, values, 0.38, color=colour, label=texts[text].name)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("perplexity per byte of held-out text (less is better)")
    axes.set_title("What each knows of the old text and of the new one")
    axes.legend()
    figure.savefig(file, dpi=120)


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, help="a file to pretrain on")
    parser.add_argument("--shifted-text", type=Path, help="a file to fine-tune on")
    parser.add_argument("--shift", action="store_true", help="fine-tune on Python's source")
    parser.add_argument("--prompt", default="\n", help="what the samples begin with")
    parser.add_argument("--out", type=Path, default=Path("language_model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a model of half a million")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    texts = load(options, size)
    first, second = texts
    seed = options.seed
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    base = LanguageModel(size)
    train(base, first.train, size.steps, RATE, seed, "pretraining")
    before = copy.deepcopy(base.state_dict())
    perplexities, samples, costs = {}, {}, {}

    def look(name: str, model: LanguageModel) -> None:
        perplexities[name] = tuple(perplexity(model, t.held_out, size.windows) for t in texts)
        with lp.cached(model):  # builds each adapted weight once, not for each byte
            samples[name] = write(model, options.prompt or "\n", size.sample, seed)

    look("base", base)
    for name, rate in TUNING.items():
        if name.startswith("LoRA"):
            model = lp.apply(base, "all-linear", rank=RANK, alpha=ALPHA, init=INIT, inplace=False)
        else:
            model = copy.deepcopy(base)
        costs[name] = train(model, second.train, size.tuning_steps, rate, seed, name)
        look(name, model)
    with lp.disabled(model):
        look("LoRA off", model)
    lp.save(model, options.out / "adapter.safetensors")

    stats, after = lp.stats(model), base.state_dict()
    result = Result(
        parameters=stats.base,
        trainable=stats.trainable,
        percent=stats.percent,
        perplexity=perplexities,
        samples=samples,
        costs=costs,
        untouched=list(after) == list(before)
        and all(torch.equal(after[name], tensor) for name, tensor in before.items()),
    )
    show(result, texts)
    draw(result, texts, options.out / "perplexity.png")
    return result


if __name__ == "__main__":
    main()
