"""What the benchmarks share: the net, the contenders, the measuring loop and the output.

Times on a shared machine drift by more than the differences that matter here, so contenders are
measured side by side: each round gives every contender one turn of several steps, in an order that
rotates and turns round from round to round, and each turn is divided by the baseline's turn of the
same round. What is reported is the median of these paired ratios, with their quartiles; and as
`best` the ratio of the fastest turns, which other people's load disturbs least.

On a CPU: fp32, two threads, 4 layers of hidden size 768. On a CUDA device: bf16, 2 layers of a 7B
model, timed by CUDA events, with the peak of allocated memory.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_param as lp

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16
MIB = 2**20
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
Item = TypeVar("Item")


# --- the net ------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, kv: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, tokens, dim)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, hidden: int, intermediate: int, heads: int, kv: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.attention = Attention(hidden, heads, kv)
        self.feed_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.feed = FeedForward(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class LlamaNet(nn.Module):
    """Of Llama's shape, without its rotary embeddings. Takes token ids or their embeddings."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        layers: int,
        heads: int,
        vocab: int,
        kv: int | None = None,
    ) -> None:
        super().__init__()
        kv = hidden if kv is None else kv
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, intermediate, heads, kv) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        x = self.embed(ids) if embeds is None else embeds
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))  # (batch, tokens, vocab)
        return logits


@functools.cache
def base_net() -> LlamaNet:
    """The frozen model. Contenders that leave its weights alone share their memory."""
    torch.manual_seed(0)
    sizes = (4096, 11008, 2, 32, 512) if CUDA else (768, 2048, 4, 12, 512)
    with DEVICE:
        net = LlamaNet(*sizes)
    for parameter in net.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return net.to(DTYPE).requires_grad_(False)


def token_ids(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 512, (1, tokens), generator=generator).to(DEVICE)


# --- the contenders -----------------------------------------------------------------------------


class UnavailableError(Exception):
    """A contender does not do this, or is not installed; the message is shown as a note."""


@dataclass(frozen=True)
class Adaptation:
    """What is put on the seven projections of each layer."""

    rank: int = 8
    dropout: float = 0.0
    dora: bool = False


class Naive(nn.Module):
    """LoRA as a parametrization is usually written."""

    def __init__(self, W: Tensor, rank: int) -> None:
        super().__init__()
        dtype, device = torch.float32, W.device
        self.A = nn.Parameter(torch.empty(rank, W.shape[1], dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scale = ALPHA / rank

    def forward(self, W: Tensor) -> Tensor:
        return W + ((self.B @ self.A) * self.scale).to(W.dtype)


def put_naive(net: nn.Module, adaptation: Adaptation) -> nn.Module:
    if adaptation.dropout or adaptation.dora:
        raise UnavailableError("it sees no input to drop, and DoRA is a formula of its own")
    for name, module in list(net.named_modules()):
        if name.endswith(PROJECTIONS):
            lora = Naive(module.weight, adaptation.rank)
            parametrize.register_parametrization(module, "weight", lora)
            module.parametrizations.weight.original.requires_grad_(False)
    return net


def put_peft(net: nn.Module, adaptation: Adaptation, **options: Any) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnavailableError("not installed: pip install peft==0.21.2") from None
    config = LoraConfig(
        r=adaptation.rank,
        lora_alpha=ALPHA,
        lora_dropout=adaptation.dropout,
        use_dora=adaptation.dora,
        target_modules=list(PROJECTIONS),
    )
    with warnings.catch_warnings(action="ignore"):
        return get_peft_model(net, config, **options)  # type: ignore[no-any-return]


def put_ours(net: nn.Module, adaptation: Adaptation) -> nn.Module:
    variant = "dora" if adaptation.dora else "lora"
    try:
        return lp.apply(
            net,
            PROJECTIONS,
            rank=adaptation.rank,
            alpha=ALPHA,
            dropout=adaptation.dropout,
            variant=variant,
        )
    except lp.UserError as error:
        raise UnavailableError(str(error)) from None


def put_nothing(net: nn.Module, _: Adaptation) -> nn.Module:
    return net


def unfreeze(net: nn.Module, _: Adaptation) -> nn.Module:
    return net.requires_grad_(True)


MAKERS: dict[str, Callable[[nn.Module, Adaptation], nn.Module]] = {
    "floor": put_nothing,
    "full": unfreeze,
    "naive": put_naive,
    "peft": put_peft,
    "ours": put_ours,
}


def make(name: str, adaptation: Adaptation) -> nn.Module:
    """A contender's model in training mode, with no factor that is zero.

    Raises:
        UnavailableError: it does not do this.
    """
    base = base_net()
    shared = {} if name == "full" else {id(p): p for p in base.parameters()}
    torch.manual_seed(2)
    net = MAKERS[name](copy.deepcopy(base, shared), adaptation)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.01)
    return net.train()


def make_all(
    names: Iterable[str], adaptation: Adaptation, notes: list[str], case: str
) -> dict[str, nn.Module]:
    """The models of those contenders that are able to; a note for each that is not."""
    models = {}
    for name in names:
        try:
            models[name] = make(name, adaptation)
        except UnavailableError as reason:
            notes.append(f"{case}: {name} left out: {reason}")
    return models


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: as in the table.
        step: what is timed; it is given what `prepare` returned.
        prepare: called before each turn, outside the clock.
        finish: called after each turn with what `prepare` returned, outside the clock.
    """

    name: str
    step: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    finish: Callable[[Any], object] = lambda _: None


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: what was measured.
        contender: who.
        value: median of a step, in `unit`.
        unit: of `value`.
        ratio: median over the rounds of the contender's turn by the baseline's.
        quartiles: the first and third of these ratios.
        extra: further figures, by name.
    """

    case: str
    contender: str
    value: float
    unit: str
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    extra: dict[str, float] = field(default_factory=dict)


def compare(
    case: str,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    baseline: str,
    turn: float = 0.3,
    warmup: int = 2,
) -> list[Row]:
    """Time contenders side by side.

    Args:
        case: for the rows.
        contenders: who takes part.
        rounds: turns of each.
        baseline: name of the contender that the others are divided by.
        turn: seconds that a turn lasts at least; 0 for one step.
        warmup: steps of each before the first round; the last also says how many make a turn.
    """
    steps = {}
    for c in contenders:
        seconds = [_turn(c, 1)[0] for _ in range(max(warmup, 1))]
        steps[c.name] = max(1, math.ceil(turn / min(seconds)))
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    extra: dict[str, dict[str, float]] = {c.name: {} for c in contenders}
    for c in rotated(contenders, rounds):
        elapsed, peak = _turn(c, steps[c.name])
        times[c.name].append(elapsed)
        if CUDA:
            extra[c.name]["peak MiB"] = peak / MIB
    rows = ratios_of(case, times, baseline, extra)
    shares = ", ".join(f"{r.contender} {r.ratio:.3f}" for r in rows)
    print(f"{case}: {shares}", file=sys.stderr)  # a long run that is stopped has shown something
    return rows


def rotated(items: Sequence[Item], rounds: int) -> Iterator[Item]:
    """All items once in each round, in an order that rotates and turns round."""
    for r in range(rounds):
        start = r % len(items)
        order = [*items[start:], *items[:start]]
        yield from order if r % 2 == 0 else reversed(order)


def ratios_of(
    case: str,
    times: Mapping[str, Sequence[float]],
    baseline: str,
    extra: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    """Rows from the seconds of each contender's turns, one a round."""
    base = times[baseline]
    rows = []
    for name, mine in times.items():
        low, middle, high = _quartiles([t / b for t, b in zip(mine, base, strict=True)])
        more = {"best": min(mine) / min(base), **extra[name]}
        rows.append(Row(case, name, statistics.median(mine) * 1e3, "ms", middle, (low, high), more))
    return rows


def _turn(contender: Contender, steps: int) -> tuple[float, float]:
    """Seconds of a step, and the bytes that it allocates on a CUDA device at the most."""
    prepared = contender.prepare()
    gc.collect()
    gc.disable()
    try:
        return (_cuda_turn if CUDA else _cpu_turn)(contender.step, prepared, steps)
    finally:
        gc.enable()
        contender.finish(prepared)


def _cpu_turn(step: Callable[[Any], object], prepared: Any, steps: int) -> tuple[float, float]:
    start = time.perf_counter()
    for _ in range(steps):
        step(prepared)
    return (time.perf_counter() - start) / steps, 0.0


def _cuda_turn(step: Callable[[Any], object], prepared: Any, steps: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        step(prepared)
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return start.elapsed_time(end) / 1e3 / steps, peak


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


# --- command line and output ----------------------------------------------------------------------


def options(doc: str | None, cases: Iterable[str], rounds: int = 11) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--turn", type=float, default=0.3, help="seconds, at least; default: 0.3")
    known = list(cases)
    parser.add_argument("--case", action="append", choices=known, help="may be repeated")
    parser.set_defaults(known=known)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.rounds = 3 if args.quick else args.rounds
    args.cases = args.case or args.known
    torch.set_num_threads(2)
    return args


def show(title: str, rows: Sequence[Row], notes: Sequence[str], *, as_json: bool) -> None:
    """Print a table, or with `as_json` one JSON document."""
    if as_json:
        where = torch.cuda.get_device_name() if CUDA else f"cpu, {torch.get_num_threads()} threads"
        document = {
            "benchmark": title,
            "torch": torch.__version__,
            "device": where,
            "rows": [asdict(r) for r in rows],
            "notes": list(notes),
        }
        print(json.dumps(document, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    extras = list(dict.fromkeys(name for r in rows for name in r.extra))
    table.add_column("case")
    table.add_column("contender")
    for heading in (rows[0].unit if rows else "", "ratio", "quartiles", *extras):
        table.add_column(heading, justify="right")
    previous = None
    for r in rows:
        if previous not in (None, r.case):
            table.add_section()
        table.add_row(
            r.case if r.case != previous else "",
            r.contender,
            f"{r.value:,.1f}",
            "" if r.ratio is None else f"{r.ratio:.3f}",
            "" if r.quartiles is None else "{:.3f} to {:.3f}".format(*r.quartiles),
            *(_figure(e, r.extra) for e in extras),
        )
        previous = r.case
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _figure(name: str, extra: dict[str, float]) -> str:
    if name not in extra:
        return ""
    return f"{extra[name]:.3f}" if name == "best" else f"{extra[name]:,.1f}"
