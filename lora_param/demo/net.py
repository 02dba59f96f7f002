"""The digit net: large linear layers, so that the share of a rank-1 adapter is small."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["digit_net"]


def digit_net() -> nn.Sequential:
    """784 → 1000 → 2000 → 10 with ReLU between: 2,807,010 parameters, freshly initialised.

    Also a MODEL for the command line: `python:lora_param.demo.net:digit_net`.

    Example:
        >>> sum(p.numel() for p in digit_net().parameters())
        2807010
    """
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, 1000),
            relu1=nn.ReLU(),
            fc2=nn.Linear(1000, 2000),
            relu2=nn.ReLU(),
            fc3=nn.Linear(2000, 10),
        )
    )
