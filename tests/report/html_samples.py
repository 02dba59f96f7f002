"""Rows and adapters for pages."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_param as lp
from lora_param.report.stats import Stats, TargetRow

HOSTILE = (
    '"><script src=//evil.example/x></script><img onerror=a(1) src=http://evil.example/&amp;.w'
)


class Page(HTMLParser):
    """What is on a page."""

    VOID = ("meta", "wbr", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def row(target: str, **changes: object) -> TargetRow:
    values = {
        "shape": (8, 8), "dtype": "float32", "adapter": "default", "rank": 2, "alpha": 16.0,
        "scale": 8.0, "enabled": True, "trainable": 32, "dead": False, "update_norm": 5.0,
        "weight_norm": 50.0, "effective_rank": 1.9, "singular_values": (4.0, 3.0),
    }  # fmt: skip
    return TargetRow(target, **{**values, **changes})  # type: ignore[arg-type]


def odd_rows() -> Stats:
    """Every state, in one model."""
    nothing = {"update_norm": 0.0, "effective_rank": 0.0, "singular_values": (0.0, 0.0)}
    broken = {
        "update_norm": math.nan, "effective_rank": math.nan, "singular_values": (math.nan,) * 2,
    }  # fmt: skip
    return Stats(
        (
            row("h.0.q"),
            row("h.1.q", dead=True, **nothing),
            row("h.2.q", enabled=False),
            row("h.3.q", dead=True, enabled=False, **nothing),
            row("h.4.q", **broken),
            row("h.5.q", weight_norm=0.0),
        ),
        base=10_000,
        source="odd",
        unfrozen=7,
    )


def tuned(weights: dict[str, torch.Tensor], targets: list[str], folder: Path, rank: int) -> Stats:
    """Stats of a base and an adapter, whose updates differ in size and in rank."""
    base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
    save_file(weights, base)
    lp.apply_checkpoint(base, targets, adapter, rank=rank, seed=0)
    fill(adapter)
    return lp.stats(base, adapter)


def fill(path: Path, leave: tuple[str, ...] = ()) -> None:
    """Give an adapter values, sizes from layer to layer apart; targets in `leave` stay zero."""
    generator = torch.Generator().manual_seed(0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, B in tensors.items():
        if name.endswith(".lora_B") and name.removesuffix(".lora_B") not in leave:
            size = 10 ** (1.5 * torch.rand(1, generator=generator) - 2.5)
            steep = torch.rand(1, generator=generator)
            falling = torch.exp(-steep * torch.arange(B.shape[-1]))
            tensors[name] = torch.randn(B.shape, generator=generator) * size * falling
    save_file(tensors, path, metadata)
