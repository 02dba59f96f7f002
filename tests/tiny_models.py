"""Small models of real architectures, and what is done with them.

Each is made from a small configuration, with fixed random weights, so that no file is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from assets import need
from torch import nn

import lora_param as lp

Batch = dict[str, torch.Tensor]


def gpt2(**more: Any) -> nn.Module:
    need("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **none, **more}))


def llama(**more: Any) -> nn.Module:
    need("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **more}))


def mixtral(seed: int = 0, **more: Any) -> nn.Module:
    need("transformers")
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **heads, **experts, **more}))


def qwen3_moe(**more: Any) -> nn.Module:
    need("transformers")
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **heads, **experts, **more}))


MODELS: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "gpt2": (gpt2, ["c_attn[:,0:16]", "c_attn[:,32:48]", "mlp.c_fc"]),
    "llama": (llama, ["{q,v}_proj", "down_proj:rank=4"]),
    "mixtral": (mixtral, ["experts.gate_up_proj[*]", "experts.down_proj[*]", "q_proj"]),
}


def batch(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (2, 10), generator=g)
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


def train(model: nn.Module, steps: int = 5, lr: float = 2e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(lp.parameters(model), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
