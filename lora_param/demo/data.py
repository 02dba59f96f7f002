"""The digits that ship inside the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lora_param.checkpoint.open import open_checkpoint

__all__ = ["DIGITS", "Digits", "load_digits"]

DIGITS = Path(__file__).with_name("digits.safetensors")


@dataclass(frozen=True, slots=True)
class Digits:
    """Images as rows of pixels from 0 to 1, (N, 784), and their labels, (N,).

    Attributes:
        train: images to learn from.
        train_labels: what they show.
        test: images to measure on.
        test_labels: what they show.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1,797 digits, scaled from 8 × 8 to 28 × 28, one half to learn from and one to measure on.

    The split is the same each time: large enough a test half that each digit has about ninety
    images in it.

    Example:
        >>> digits = load_digits()
        >>> digits.train.shape, digits.test.shape
        (torch.Size([897, 784]), torch.Size([900, 784]))
    """
    with open_checkpoint(DIGITS) as file:
        small = file["images"].to(torch.float32)[:, None] / 16  # (N, 1, 8, 8)
        labels = file["labels"].to(torch.int64)
    images = interpolate(small, size=(28, 28), mode="bilinear", align_corners=False).flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:897], order[897:]
    return Digits(images[train], labels[train], images[test], labels[test])
