"""Small checkpoints and adapters for the command line, and what a command answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import lora_param as lp


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


Cli = Callable[..., Done]


def small_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.attn.q_proj.weight": torch.randn(8, 6, generator=g),
        "blocks.0.attn.v_proj.weight": torch.randn(8, 6, generator=g),
        "fc1.weight": torch.randn(8, 8, generator=g),
        "fc10.weight": torch.randn(8, 8, generator=g),
        "fc1.bias": torch.randn(8, generator=g),
        "steps": torch.tensor(3),
        "packed.weight": torch.randint(0, 9, (8, 8), dtype=torch.uint8, generator=g),
        "packed.weight_scale": torch.randn(8, 1, generator=g),
    }


def fill(path: Path, seed: int = 1) -> Path:
    """Give an adapter file factors that are not zero, as training would."""
    adapter = lp.read_adapter(path)
    g = torch.Generator().manual_seed(seed)
    tensors = {
        k: (torch.randn(t.shape, generator=g) * 0.3).to(t.dtype) for k, t in adapter.tensors.items()
    }
    lp.write_adapter(replace(adapter, tensors=tensors), path)
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder and what it holds, hidden ones included."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }
