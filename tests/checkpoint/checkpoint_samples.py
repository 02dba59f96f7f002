"""Small weights, and what baking an adapter into them must give."""

from dataclasses import replace

import torch

from lora_param.adapter import Adapter


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "a.q.weight": torch.randn(6, 4, generator=g),
        "a.v.weight": torch.randn(6, 4, generator=g).to(torch.bfloat16),
        "b.q.weight": torch.randn(5, 8, generator=g).to(torch.float16),
        "b.v.weight": torch.randn(3, 3, generator=g, dtype=torch.float64),
        "bias": torch.randn(5, generator=g),
        "steps": torch.tensor(7),
    }


def trained(adapter: Adapter, seed: int = 1, size: float = 0.5) -> Adapter:
    """The adapter with factors that are not zero."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        k: (torch.randn(t.shape, generator=g) * size).to(t.dtype)
        for k, t in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


def expected(W: torch.Tensor, adapter: Adapter, key: str, dtype: torch.dtype | None = None):
    """W + ΔW by the definition: in fp32 (fp64 for fp64), rounded once."""
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    f = adapter.factors(key)
    t = adapter.targets[key]
    delta = (f["lora_B"].to(wide) @ f["lora_A"].to(wide)) * t.scale
    merged = W.to(wide).clone()
    merged[t.target.region.index] += delta.reshape(t.target.region.shape(tuple(W.shape)))
    return merged.to(dtype or W.dtype)


def disabled(adapter: Adapter, *keys: str) -> Adapter:
    """The adapter with the targets of these keys disabled; all of them without keys."""
    targets = {
        k: replace(t, enabled=t.enabled and bool(keys) and k not in keys)
        for k, t in adapter.targets.items()
    }
    return replace(adapter, targets=targets)
