"""Layers, and LyCORIS' methods on them: shared by what writes the fixtures and what reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["CASES", "layer_of", "model"]

LAYERS = {
    "linear": lambda: nn.Linear(12, 18),
    "conv": lambda: nn.Conv2d(6, 8, 3),
    "point": lambda: nn.Conv2d(6, 8, 1),
    "line": lambda: nn.Conv1d(6, 8, 3),
    "norm": lambda: nn.LayerNorm(7),
    "group": lambda: nn.GroupNorm(2, 6),
    "even": lambda: nn.Linear(5, 16),
}


def _with(method: str, kinds: str, tag: str = "", **options: Any) -> dict[str, Any]:
    return {
        f"{method}{tag}_{kind}": (method, kind, options)
        for kind in kinds.split()
        if not (tag.endswith("tucker") and kind in ("linear", "point"))
    }


_DORA = {"weight_decompose": True, "wd_on_out": True}
_COLUMNS = {"weight_decompose": True, "wd_on_out": False}
_RANK = {"lora_dim": 2, "alpha": 3}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **_with("locon", "linear conv point line", **_RANK),
    **_with("locon", "conv line", "tucker", **_RANK, use_tucker=True),
    **_with("locon", "conv", "rowstucker", **_RANK, use_tucker=True, **_DORA),
    **_with("locon", "linear conv", "columns", **_RANK, **_COLUMNS),
    **_with("locon", "linear", "rs", lora_dim=4, alpha=3, rs_lora=True),
    **_with("loha", "linear conv point line", **_RANK),
    **_with("loha", "conv line", "tucker", **_RANK, use_tucker=True),
    **_with("loha", "linear conv", "rows", **_RANK, **_DORA),
    **_with("loha", "linear conv", "columns", **_RANK, **_COLUMNS),
    **_with("loha", "linear", "rs", lora_dim=4, alpha=3, rs_lora=True),
    **_with("lokr", "linear conv point line", lora_dim=1, alpha=3),
    **_with("lokr", "linear", "factor", lora_dim=2, alpha=3, factor=2),
    **_with("lokr", "linear conv", "both", lora_dim=1, alpha=3, decompose_both=True),
    **_with("lokr", "linear conv", "full", lora_dim=2, alpha=3, full_matrix=True),
    **_with("lokr", "conv", "tucker", lora_dim=1, alpha=3, use_tucker=True),
    **_with("lokr", "linear conv", "rows", lora_dim=1, alpha=3, **_DORA),
    **_with("lokr", "linear conv", "columns", lora_dim=1, alpha=3, **_COLUMNS),
    **_with("full", "linear conv"),
    **_with("norm", "norm group"),
    **_with("oft", "linear conv", lora_dim=3),
    **_with("oft", "linear", "bound", lora_dim=3, constraint=0.01),
    **_with("oft", "linear conv", "rescaled", lora_dim=3, rescaled=True),
    **_with("boft", "even", lora_dim=4),
    **_with("boft", "even", "rescaled", lora_dim=4, rescaled=True, constraint=0.02),
}
"""Case → method, kind of layer, and the options that LyCORIS is given."""


def layer_of(case: str) -> nn.Module:
    """The layer of a case, the same each time."""
    torch.manual_seed(sum(map(ord, case)))
    layer = LAYERS[CASES[case][1]]()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    return layer


def model() -> nn.ModuleDict:
    """All of them."""
    return nn.ModuleDict({case: layer_of(case) for case in CASES})
