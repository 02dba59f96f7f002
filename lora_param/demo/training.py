"""Training and measuring the digit net: plain PyTorch, nothing of LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Accuracy", "measure", "predict", "train_base", "train_until"]

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of test images read rightly, in percent.

    Attributes:
        digits: of each digit from 0 to 9.
        all: of all images.
    """

    digits: tuple[float, ...]
    all: float

    @property
    def worst(self) -> int:
        """The digit read least well."""
        return min(range(len(self.digits)), key=self.digits.__getitem__)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10), without gradients."""
    with torch.no_grad():
        logits: Tensor = model(images)
        return logits


def measure(logits: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of logits (N, 10) against labels (N,)."""
    right = (logits.argmax(1) == labels).double() * 100
    digits = tuple(right[labels == digit].mean().item() for digit in range(10))
    return Accuracy(digits, right.mean().item())


def train_base(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, tick: Tick
) -> None:
    """Train every parameter for a few epochs; `tick` is called after each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images), 64):
            batch = order[start : start + 64]
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        tick()


def train_until(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    images: Tensor,
    labels: Tensor,
    *,
    loss: float,
    steps: int,
    tick: Tick,
) -> int:
    """Train some parameters on all images at once until the loss is low enough.

    Stopping early matters where all images show one digit: a net that learns nothing else for
    long ends up seeing it everywhere.

    Returns:
        The number of steps it took, at most `steps`.
    """
    optimizer = torch.optim.Adam(parameters, lr=5e-4)
    for step in range(steps):
        optimizer.zero_grad()
        error = cross_entropy(model(images), labels)
        if error.item() < loss:
            return step
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tick()
    return steps
