"""The models that every law is tested on, and the reference that it is tested against.

The reference never goes through the library's mathematics: it computes W + scale·(B @ A) from an
adapter's factors on its own, and runs the plain model on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from packed import Int8Flat, Int8Rows, PackedLayers, PackedNet
from torch import Tensor, nn
from torch.func import functional_call

import lora_param as lp


@dataclass(frozen=True)
class Case:
    """A model, what to adapt on it, and how to run it."""

    name: str
    make: Callable[[], nn.Module]
    targets: list[str]
    inputs: Callable[[], tuple[Any, ...]]
    rank: int = 2
    variant: str = "lora"
    init: str = "kaiming"
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    adapters: tuple[str, ...] = ("default",)
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def tolerance(self) -> dict[str, float]:
        """Of an output against the reference's."""
        if self.dtype.itemsize < 4:
            return {"rtol": 4e-2, "atol": 4e-2}
        return {"rtol": 1e-4, "atol": 1e-5}

    @property
    def exact_weights(self) -> bool:
        """The reference's arithmetic is the library's own, operation for operation. DoRA's norms
        are added up in another order, and so are an initial pair and a second adapter."""
        lengths = "dora" in self.variant or "form" in self.kwargs
        factors = self.variant not in ("loha", "lokr")  # scaled last, after a product of products
        return factors and not lengths and self.init == "kaiming" and len(self.adapters) == 1

    @property
    def exact_when_fresh(self) -> bool:
        """A fresh adapter changes no bit: not where an update is a difference of equals."""
        return self.init == "kaiming"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().to(self.dtype)
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.copy_(torch.randn(p.shape) * 0.3)
        return model

    def apply(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        options = {
            "rank": self.rank,
            "variant": self.variant,
            "init": self.init,
            "dropout": self.dropout,
            **self.kwargs,
            **kwargs,
        }
        for adapter in [kwargs["adapter"]] if "adapter" in kwargs else self.adapters:
            lp.apply(model, self.targets, **{**options, "adapter": adapter})
        return model

    def adapted(self) -> nn.Module:
        """The model with factors that are not zero."""
        return randomize(self.apply(self.build()))

    def data(self) -> tuple[Any, ...]:
        torch.manual_seed(1)
        return tuple(d.to(self.dtype) if d.is_floating_point() else d for d in self.inputs())


class Bare(nn.Module):
    """Weights that belong to no layer: used by matmul, and a stack by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6, 5))
        self.stack = nn.Parameter(torch.zeros(3, 5, 4))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x @ self.w.T)  # (N, 6)
        return torch.bmm((y @ self.w).expand(3, *x.shape), self.stack)


class TopLevel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.emb(ids))))


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ParameterList([torch.zeros(5, 5), torch.zeros(5, 5)])
        self.named = nn.ParameterDict({"down": torch.zeros(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.items:
            x = torch.tanh(x @ w)
        return x @ self.named["down"]


class Attention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.mha(q, kv, kv)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(5, 6, num_layers=2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], 6)
        for step in x:
            h, c = self.cell(step, (h, c))
        return h


class GruCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 6)
        for step in x:
            h = self.cell(step, h)
        return h


class Experts(nn.Module):
    """Stacks of experts, as transformers keeps them: indexed one by one, and as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(3, 8, 5))
        self.down = nn.Parameter(torch.zeros(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(3):
            gate, up = nn.functional.linear(x, self.gate_up[e]).chunk(2, -1)  # (N, 4) each
            out = out + nn.functional.linear(torch.tanh(gate) * up, self.down[e])
        ids = torch.tensor([2, 0])
        batch = torch.bmm(x.expand(2, *x.shape), self.gate_up[ids].mT)  # (2, N, 8)
        return out + torch.einsum("eni,eoi->no", batch[..., :4], self.down[ids])


class Packed(nn.Module):
    """Weights cut up, transposed and gathered by hand; `addmm` as GPT-2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(5, 15))
        self.kv = nn.Parameter(torch.zeros(10, 5))
        self.table = nn.Parameter(torch.zeros(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.addmm(torch.ones(15), x, self.qkv).split(5, -1)  # (N, 5) each
        w_k, w_v = self.kv.chunk(2)
        k = k + nn.functional.linear(x, w_k)
        v = v + x @ w_v.T + nn.functional.embedding(torch.tensor([0, 6, 6]), self.table)
        return torch.softmax(q @ k.T, -1) @ v + self.table[1:4]


def _x(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(shape),)


def _ids(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(0, 11, shape),)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


CASES = [
    Case("linear", lambda: nn.Linear(7, 5), ["weight"], _x(3, 7)),
    Case("linear-nobias-1d", lambda: nn.Linear(7, 5, bias=False), ["weight"], _x(7)),
    Case("linear-4d-input", lambda: nn.Linear(7, 5), ["weight"], _x(2, 3, 4, 7)),
    Case("linear-rows", lambda: nn.Linear(7, 6), ["weight[1:4]"], _x(3, 7)),
    Case("linear-columns", lambda: nn.Linear(7, 6), ["weight[:,2:6]"], _x(3, 7)),
    Case("linear-block", lambda: nn.Linear(7, 6), ["weight[0:3,1:4]"], _x(3, 7)),
    Case("linear-parts", lambda: nn.Linear(7, 6), ["weight[0/3]", "weight[2/3]"], _x(3, 7)),
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)),
        ["0", "2:rank=3,alpha=5"],
        _x(3, 6),
    ),
    Case("embedding", lambda: nn.Embedding(11, 6), ["weight"], _ids(2, 4)),
    Case("embedding-pad", lambda: nn.Embedding(11, 6, padding_idx=3), ["weight"], _ids(2, 4)),
    Case("embedding-bag", lambda: nn.EmbeddingBag(11, 6), ["weight"], _ids(2, 4)),
    Case("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), ["weight"], _x(2, 4, 9)),
    Case(
        "conv1d-reflect",
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"),
        ["weight"],
        _x(2, 4, 9),
    ),
    Case("conv2d", lambda: nn.Conv2d(4, 6, 3), ["weight"], _x(2, 4, 7, 7)),
    Case(
        "conv2d-dilated",
        lambda: nn.Conv2d(4, 6, 3, dilation=2, stride=2, padding="valid"),
        ["weight"],
        _x(2, 4, 9, 9),
    ),
    Case("conv2d-1x1", lambda: nn.Conv2d(4, 6, 1), ["weight"], _x(2, 4, 5, 5)),
    Case("conv2d-rows", lambda: nn.Conv2d(4, 6, 3), ["weight[2:5]"], _x(2, 4, 7, 7)),
    Case("conv2d-columns", lambda: nn.Conv2d(4, 6, 3), ["weight[:,1:3]"], _x(2, 4, 7, 7)),
    Case("conv2d-grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), ["weight"], _x(2, 4, 7, 7)),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), ["weight"], _x(2, 4, 7, 7)),
    Case("conv3d", lambda: nn.Conv3d(2, 4, (1, 2, 2)), ["weight"], _x(1, 2, 3, 4, 4)),
    Case("conv-transpose", lambda: nn.ConvTranspose2d(4, 6, 3), ["weight"], _x(2, 4, 5, 5)),
    Case(
        "conv-transpose-grouped",
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2),
        ["weight"],
        _x(2, 4, 5),
    ),
    Case("bilinear", lambda: nn.Bilinear(3, 4, 5), ["weight"], lambda: (*_x(2, 3)(), *_x(2, 4)())),
    Case(
        "mha",
        Attention,
        ["in_proj_weight", "out_proj"],
        lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 8)),
    ),
    Case(
        "mha-q-and-v",
        Attention,
        ["in_proj_weight[0/3]", "in_proj_weight[2/3]:rank=1"],
        lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 8)),
    ),
    Case(
        "mha-cross",
        lambda: Attention(kdim=5, vdim=5),
        ["{q,k,v}_proj_weight", "out_proj"],
        lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 5)),
    ),
    Case("encoder", _encoder, ["in_proj_weight", "out_proj", "linear1", "linear2"], _x(2, 3, 8)),
    Case("lstm", lambda: Recurrent(nn.LSTM), ["type:LSTM"], _x(4, 3, 5)),
    Case("gru", lambda: Recurrent(nn.GRU), ["re:.*weight_hh.*"], _x(4, 3, 5)),
    Case("rnn", lambda: Recurrent(nn.RNN), ["rnn.weight_ih_l{0..1}"], _x(4, 3, 5)),
    Case("lstm-cell", Cell, ["cell.weight_ih", "cell.weight_hh"], _x(4, 3, 5)),
    Case("bare", Bare, ["w", "inner"], _x(3, 5)),
    Case("bare-stack", Bare, ["w", "stack[*]"], _x(3, 5)),
    Case("bare-stack-whole", Bare, ["stack"], _x(3, 5)),
    Case("top-level", TopLevel, ["w"], _x(3, 4)),
    Case("tied", Tied, ["emb", "head"], _ids(2, 4)),
    Case("tied-together", Tied, ["emb", "mid"], _ids(2, 4), kwargs={"tied": "together"}),
    Case("tied-apart", Tied, ["head", "mid"], _ids(2, 4), kwargs={"tied": "apart"}),
    Case("shared-module", SharedModule, ["first"], _x(3, 6), kwargs={"tied": "together"}),
    Case("parameter-list", Lists, ["items.*", "named.down"], _x(3, 5)),
    Case("experts", Experts, ["gate_up[*]", "down[*]"], _x(4, 5)),
    Case("experts-whole", Experts, ["gate_up", "down"], _x(4, 5)),
    Case("packed", Packed, ["qkv", "kv", "table"], _x(3, 5)),
    Case("packed-parts", Packed, ["qkv[:,5:15]", "kv[1/2]", "table[2:5]"], _x(3, 5)),
    Case("gru-cell", GruCell, ["cell.weight_ih", "cell.weight_hh"], _x(4, 3, 5)),
    Case("rslora", lambda: nn.Linear(7, 5), ["weight"], _x(3, 7), kwargs={"scaling": "rslora"}),
    Case("constant", lambda: nn.Linear(7, 5), ["weight"], _x(3, 7), kwargs={"scaling": "constant"}),
    Case("double", lambda: nn.Linear(7, 5), ["weight"], _x(3, 7), dtype=torch.float64),
    Case("packed-base", PackedNet, ["table", "fc", "bare"], _ids(2, 4)),
    Case("packed-base-parts", PackedNet, ["table[:,1:3]", "fc[1:4]", "bare[0:2]"], _ids(2, 4)),
    Case("packed-base-flat", lambda: PackedNet(Int8Flat), ["table", "fc", "bare"], _ids(2, 4)),
    Case(
        "packed-base-layers",
        PackedLayers,
        ["conv", "in_proj_weight", "out_proj", "stack[*]", "cell.weight_*"],
        _x(2, 2, 4, 4),
    ),
]
_DECOMPOSED = """linear linear-4d-input linear-rows linear-columns linear-parts mlp embedding conv2d
conv2d-rows conv2d-grouped conv-transpose mha mha-q-and-v encoder lstm bare-stack tied-together
tied-apart experts packed-parts rslora double"""
_DROPPED = "linear mlp conv2d mha encoder experts bare-stack"
_LENGTHS = "linear linear-rows mlp embedding conv2d mha lstm bare-stack packed-base"
_OTHERS = """linear linear-rows linear-block mlp embedding embedding-pad conv2d conv2d-grouped
conv-transpose mha mha-q-and-v encoder lstm gru-cell bare-stack tied-together tied-apart experts
packed packed-parts packed-base"""


def _also(names: str, label: str, **fields: Any) -> list[Case]:
    chosen = [case for case in PLAIN if case.name in names.split()]
    assert len(chosen) == len(names.split())
    return [replace(case, name=f"{case.name}-{label}", **fields) for case in chosen]


PLAIN = CASES
CASES = [
    *PLAIN,
    *_also(f"{_DECOMPOSED} packed-base packed-base-layers embedding-pad", "dora", variant="dora"),
    *_also(_OTHERS, "miss", variant="miss"),
    *_also(_OTHERS, "loha", variant="loha"),
    *_also(_OTHERS, "lokr", variant="lokr"),
    *_also(_LENGTHS, "loha-rows", variant="loha", kwargs={"form": "rows"}),
    *_also(_LENGTHS, "lokr-full-rows", variant="lokr", kwargs={"form": "full+rows"}),
    *_also(_LENGTHS, "loha-columns", variant="loha", kwargs={"form": "columns"}),
    *_also("linear mlp conv2d", "loha-bf16", dtype=torch.bfloat16, variant="loha"),
    *_also("linear conv2d", "loha-dropout", dropout=0.3, variant="loha"),
    *_also(f"{_DECOMPOSED} packed-base", "dora-columns", variant="dora_columns"),
    *_also("linear mlp embedding conv2d mha encoder lstm experts", "bf16", dtype=torch.bfloat16),
    *_also("linear mlp", "half", dtype=torch.float16),
    *_also("linear mlp conv2d", "dora-bf16", dtype=torch.bfloat16, variant="dora"),
    *_also(f"{_DROPPED} packed-base-layers", "dropout", dropout=0.3),
    *_also("linear conv2d mha", "dora-dropout", dropout=0.3, variant="dora"),
    *_also("linear mlp conv2d bare-stack embedding mha lstm packed-base", "pissa", init="pissa"),
    *_also("linear mlp conv2d bare-stack embedding mha packed-base", "olora", init="olora"),
    *_also("linear embedding", "dora-pissa", init="pissa", variant="dora"),
    *_also("linear mlp embedding conv2d mha experts packed-base", "two", adapters=("default", "b")),
    *_also("linear conv2d embedding", "dora-two", adapters=("default", "b"), variant="dora"),
]
BY_NAME = {case.name: case for case in CASES}


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Factors that are not zero, the same for the same model."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lp.parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """A plain model's state dict, with packed weights as the numbers that they stand for."""
    state = model.state_dict()
    return {k: v.dequantize() if isinstance(v, Int8Rows) else v.clone() for k, v in state.items()}


def reference_delta(
    tensors: dict[str, Tensor], scale: float, W: Tensor, of_columns: bool = False
) -> Tensor:
    """ΔW over the matrix W (*, out, in), as its variant defines it, by plain torch."""
    if "lora_M" in tensors:
        M = tensors["lora_M"]  # (*, rank, out)
        blocks = -(-W.shape[-1] // M.shape[-2])
        repeated = M.mT.repeat(*[1] * (M.dim() - 1), blocks)  # (*, out, ≥ in)
        return scale * repeated[..., : W.shape[-1]]
    if "hada_w1_a" in tensors:
        first, second = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in "12")
        update = scale * first * second
    elif "lokr_w1" in tensors:
        if (w2 := tensors.get("lokr_w2")) is None:
            w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
        blocks = torch.einsum("...ac,...bd->...abcd", tensors["lokr_w1"], w2)
        update = scale * blocks.reshape(W.shape)
    else:
        update = scale * (tensors["lora_B"] @ tensors["lora_A"])
    if "initial_A" in tensors:
        update = update - scale * (tensors["initial_B"] @ tensors["initial_A"])
    if "magnitude" not in tensors:
        return update
    V, m = W + update, tensors["magnitude"]
    if of_columns:
        return m[..., None, :] * V / V.norm(dim=-2, keepdim=True) - W
    return m[..., None] * V / V.norm(dim=-1, keepdim=True) - W


def reference_weight(
    W: Tensor, slice_text: str, tensors: dict[str, Tensor], scale: float, of_columns: bool = False
) -> Tensor:
    """W + ΔW on a slice, in the dtype of the factors."""
    merged = W.to(next(iter(tensors.values())).dtype).clone()
    if slice_text in ("", "[*]"):
        matrix = merged.reshape(*W.shape[: 2 if slice_text else 1], -1)
        return merged + reference_delta(tensors, scale, matrix, of_columns).reshape(W.shape)
    rows, _, columns = slice_text.strip("[]").partition(",")
    index = tuple(
        slice(*(int(v) if v else None for v in part.split(":"))) for part in (rows, columns) if part
    )
    part = merged[index]
    delta = reference_delta(tensors, scale, part.reshape(part.shape[0], -1), of_columns)
    merged[index] = part + delta.reshape(part.shape)
    return merged


def reference_weights(
    model: nn.Module,
    base: dict[str, Tensor],
    factors: dict[str, Tensor] | None = None,
    adapters: tuple[str, ...] = ("default",),
) -> dict[str, Tensor]:
    """Name → W + ΔW of the adapters on `model`, over a plain model's parameters, not yet rounded.

    `factors` may stand in for the adapters' own (by adapter and key), so that gradients can be
    taken to them.
    """
    weights: dict[str, Tensor] = {}
    for adapter in adapters:
        record = lp.get_adapter(model, adapter)
        for key, target in record.targets.items():
            name, slice_text = re.fullmatch(r"(.*?)(\[[^\]]*\])?", key).groups(default="")
            tensors = record.factors(key)
            if factors is not None:
                tensors |= {
                    n: factors[f"{adapter}:{key}.{n}"]
                    for n in tensors
                    if f"{adapter}:{key}.{n}" in factors
                }
            W = base[name]
            settings = target.settings
            of_columns = settings.variant == "dora_columns" or "columns" in settings.form
            new = reference_weight(W, slice_text, tensors, target.scale, of_columns)
            if name in weights:  # each adds what it adds to W alone
                new = weights[name] + (new - W)
            for n in (name, *target.also):
                weights[n] = new
    return weights


def reference_output(
    case: Case, model: nn.Module, data: tuple[Any, ...], factors: dict[str, Tensor] | None = None
) -> Tensor:
    """What the plain model gives with W + ΔW in place of W."""
    plain = case.build().train(model.training)
    plain.requires_grad_(False)
    base = {n: p.detach() for n, p in plain.named_parameters(remove_duplicate=False)}
    base = {n: p.dequantize() if isinstance(p, Int8Rows) else p for n, p in base.items()}
    weights = reference_weights(model, base, factors, case.adapters)
    weights = {n: w.to(case.dtype) for n, w in weights.items()}
    return functional_call(plain, {**base, **weights}, data, tie_weights=False)
