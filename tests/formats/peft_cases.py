"""Small real models and PEFT configs over all of its kinds of layers; the live ones by PEFT itself.

`write_peft_fixtures.py` uses the same cases with an older PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CASES", "Case", "adapt", "base_of", "deltas", "load_peft", "outputs", "quiet", "saved"]


@contextmanager
def quiet() -> Iterator[list[str]]:
    """PEFT and transformers warn of much; here their warnings are read, not shown."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(w.message) for w in caught]


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(6, 8, 3)
        self.c2 = nn.Conv2d(2, 4, (2, 3), stride=2, padding=1)
        self.c3 = nn.Conv3d(1, 3, 2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.c1(x)  # (2, 8, L)
        b = self.c2(a.reshape(2, 2, 4, -1))
        c = self.c3(b.reshape(2, 1, 4, b.shape[2], b.shape[3]))
        return self.head(self.norm(b).mean((2, 3))) + c.mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attn(x, x, x)[0])


class Mixed(nn.Module):
    """Square and oblong linear layers, an embedding, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.square = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 9)
        self.score = nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(torch.tanh(self.wide(torch.tanh(self.square(self.emb(ids))))))


class Experts(nn.Module):
    """Stacks of both layouts, square and oblong, two on one module."""

    def __init__(self, n: int = 6, m: int = 6, *, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.zeros(3, *((n, m) if transposed else (m, n))))
        self.down = nn.Parameter(torch.zeros(3, *((m, n) if transposed else (n, m))))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        return torch.bmm(torch.tanh(torch.bmm(x, up)), down).sum(0)


class Stacked(nn.Module):
    def __init__(self, n: int = 6, m: int = 6, *, transposed: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(n, n)
        self.experts = Experts(n, m, transposed=transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.proj(x).expand(3, *x.shape))


def _hf(kind: str, **kwargs: Any) -> nn.Module:
    import transformers as t

    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        config = t.LlamaConfig(
            vocab_size=32, intermediate_size=24, num_key_value_heads=2, **common, **kwargs
        )
        return t.LlamaForCausalLM(config)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32)
        )
    if kind == "bert":
        config = t.BertConfig(
            vocab_size=32, intermediate_size=24, max_position_embeddings=32, **common
        )
        return t.BertForSequenceClassification(config)
    return t.MixtralForCausalLM(
        t.MixtralConfig(
            vocab_size=32,
            intermediate_size=24,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            **common,
        )
    )


def _ids() -> Tensor:
    return torch.arange(10).reshape(2, 5)


def _floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], Tensor]
    tolerance: float = 2e-6

    @property
    def tied(self) -> bool:
        """One tensor under two names: PEFT's merge changes both, its forward one."""
        return "tied" in self.name


_R = {"r": 2, "lora_alpha": 3}
CASES = {
    c.name: c
    for c in [
        Case("llama", lambda: _hf("llama"), {**_R, "target_modules": "all-linear"}, _ids),
        Case(
            "llama-rslora-patterns",
            lambda: _hf("llama"),
            {
                "r": 3,
                "lora_alpha": 5,
                "use_rslora": True,
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 1},
                "alpha_pattern": {"v_proj": 7, "layers.1.mlp.down_proj": 2.5},
            },
            _ids,
        ),
        Case(
            "llama-dora",
            lambda: _hf("llama"),
            {**_R, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
            _ids,
        ),
        Case(
            "llama-embedding",
            lambda: _hf("llama"),
            {**_R, "target_modules": ["embed_tokens", "lm_head"]},
            _ids,
        ),
        Case(
            "llama-tied-embedding",
            lambda: _hf("llama", tie_word_embeddings=True),
            {**_R, "target_modules": ["model.embed_tokens"]},
            _ids,
        ),
        Case(
            "llama-tokens",
            lambda: _hf("llama"),
            {**_R, "target_modules": ["q_proj"], "trainable_token_indices": [7, 1, 4]},
            _ids,
        ),
        Case(
            "llama-tied-tokens",
            lambda: _hf("llama", tie_word_embeddings=True),
            {
                **_R,
                "target_modules": ["q_proj"],
                "trainable_token_indices": {"embed_tokens": [2, 3]},
            },
            _ids,
        ),
        Case(
            "llama-saved-head",
            lambda: _hf("llama"),
            {**_R, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
            _ids,
        ),
        Case(
            "llama-pissa",
            lambda: _hf("llama"),
            {**_R, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
            _ids,
            5e-6,
        ),
        Case(
            "llama-olora",
            lambda: _hf("llama"),
            {**_R, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"},
            _ids,
            5e-6,
        ),
        Case(
            "gpt2",
            lambda: _hf("gpt2"),
            {**_R, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
            _ids,
        ),
        Case(
            "gpt2-dora",
            lambda: _hf("gpt2"),
            {
                **_R,
                "target_modules": ["c_attn", "c_proj"],
                "fan_in_fan_out": True,
                "use_dora": True,
            },
            _ids,
        ),
        Case(
            "gpt2-bias",
            lambda: _hf("gpt2"),
            {**_R, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
            _ids,
        ),
        Case(
            "gpt2-pissa",
            lambda: _hf("gpt2"),
            {
                **_R,
                "target_modules": ["c_attn", "c_fc"],
                "fan_in_fan_out": True,
                "init_lora_weights": "pissa",
            },
            _ids,
            5e-6,
        ),
        Case(
            "bert",
            lambda: _hf("bert"),
            {
                **_R,
                "target_modules": ["query", "value"],
                "modules_to_save": ["classifier"],
                "bias": "lora_only",
            },
            _ids,
        ),
        Case(
            "bert-lora-bias",
            lambda: _hf("bert"),
            {**_R, "target_modules": ["query", "value"], "lora_bias": True},
            _ids,
        ),
        Case(
            "mixtral",
            lambda: _hf("mixtral"),
            {
                **_R,
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                "rank_pattern": {"experts.down_proj": 3},
            },
            _ids,
        ),
        Case(
            "convs",
            Convs,
            {**_R, "target_modules": ["c1", "c2"], "modules_to_save": ["head"]},
            _floats(2, 6, 18),
        ),
        Case(
            "convs-dora",
            Convs,
            {**_R, "target_modules": ["c1", "c2", "c3"], "use_dora": True},
            _floats(2, 6, 18),
        ),
        Case("attention", Attention, {**_R, "target_modules": ["attn", "out"]}, _floats(2, 5, 8)),
        Case(
            "embedding-dora",
            Mixed,
            {**_R, "target_modules": ["emb", "square"], "use_dora": True},
            _ids,
        ),
        Case("square", Mixed, {**_R, "target_modules": ["square"]}, _ids),
        Case(
            "parameter",
            Mixed,
            {**_R, "target_modules": [], "target_parameters": ["wide.weight"]},
            _ids,
        ),
        *(
            Case(
                f"stacks-{n}x{m}{'-transposed' * transposed}",
                lambda n=n, m=m, transposed=transposed: Stacked(n, m, transposed=transposed),
                {**_R, "target_modules": ["proj"], "target_parameters": ["experts.up", "down"]},
                _floats(4, n),
            )
            for n, m in ((6, 6), (6, 8))
            for transposed in (False, True)
        ),
    ]
}


def base_of(case: Case) -> nn.Module:
    """The model with its own weights, the same each time."""
    torch.manual_seed(0)
    model = case.make().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.copy_(torch.rand(b.shape) + 0.5)
    return model


def adapt(case: Case, **more: Any) -> Any:
    """The model adapted by PEFT, with factors, copies and rows moved from their start."""
    torch.manual_seed(1)
    with quiet():
        import peft

        config = peft.LoraConfig(**{**case.config, **more})
        model = peft.get_peft_model(base_of(case), config)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i))
                p.add_(noise * (0.05 if "magnitude" in name else 0.2))
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, case: Case) -> Tensor:
    """What it computes."""
    found = model(case.inputs())
    return found if isinstance(found, Tensor) else found.logits


def saved(case: Case, directory: Path, **more: Any) -> tuple[Any, Tensor]:
    """PEFT's model and its outputs; the adapter is in `directory`."""
    model = adapt(case, **more)
    with quiet():
        model.save_pretrained(str(directory))
        return model, outputs(model, case)


def load_peft(case: Case, directory: Path) -> tuple[Any, list[str]]:
    """The base with an adapter that PEFT has loaded, and what PEFT has warned of."""
    with quiet() as told:
        import peft

        model = peft.PeftModel.from_pretrained(base_of(case), str(directory)).eval()
    return model, told


def deltas(model: Any) -> dict[str, Tensor]:
    """ΔW of each of PEFT's layers by its own `get_delta_weight`, by the weight's name."""
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "lora_A"):
            continue
        leaf = getattr(module, "parameter_name", "weight")
        leaf = "in_proj_weight" if type(module).__name__ == "MultiheadAttention" else leaf
        segments = path.removeprefix("base_model.model.").split(".")
        name = ".".join([*(s for s in segments if s != "base_layer"), leaf])
        found[name] = module.get_delta_weight("default").detach()
    return found
