"""Recurrent networks: cells composed of two linear products, whole layers with built weights.

A layer's kernel reads its weights at every time step, so that one build serves them all: once for
each forward, and not kept beyond it, though the module holds on to the weights it was given. A
cell is one step, for which the factors are the cheaper way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, adapted, implements
from lora_param.weight.rules.common import lowered, tracing
from lora_param.weight.rules.linear import product

__all__: list[str] = []


def _applies(w_ih: Any, w_hh: Any, *others: Any) -> bool:
    """Both weights are plain or can stay factored, and nothing else is adapted."""
    weights = (w_ih, w_hh)
    return all(
        lowered(w) is not None or not isinstance(w, AdaptedWeight) for w in weights
    ) and not any(isinstance(t, AdaptedWeight) for t in others)


def _linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. torch.compile asks no rule from within a rule, so that ours is called by name."""
    V = lowered(weight)
    return F.linear(x, weight, bias) if V is None else product(x, V, bias)


@implements(torch.lstm_cell)
def lstm_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """One step of an LSTM. input (N, in), hx two of (N, hidden) → two of (N, hidden)."""
    if not _applies(w_ih, w_hh, input, *hx, b_ih, b_hh):
        return NotImplemented
    h, c = hx
    gates = _linear(h, w_hh, b_hh) + _linear(input, w_ih, b_ih)  # (N, 4·hidden)
    i, f, g, o = _parts(gates, 4)  # (N, hidden) each
    i, f, g, o = _within(_SIGMOID, i), _within(_SIGMOID, f), _within(_TANH, g), _within(_SIGMOID, o)
    c = f * c + i * g
    return o * c.tanh(), c


@implements(torch.gru_cell)
def gru_cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """One step of a GRU. input (N, in), hx (N, hidden) → (N, hidden)."""
    if not _applies(w_ih, w_hh, input, hx, b_ih, b_hh):
        return NotImplemented
    r_i, z_i, n_i = _parts(_linear(input, w_ih, b_ih), 3)  # (N, hidden) each
    r_h, z_h, n_h = _parts(_linear(hx, w_hh, b_hh), 3)  # (N, hidden) each
    r, z = _within(_SIGMOID, _within(_ADD, r_h, r_i)), _within(_SIGMOID, _within(_ADD, z_h, z_i))
    n = (n_i + _within(_MUL, n_h, r)).tanh()
    return (hx - n) * z + n


_Operations = tuple[Callable[..., Tensor], Callable[..., Tensor]]
_SIGMOID: _Operations = torch.sigmoid, torch.sigmoid_
_TANH: _Operations = torch.tanh, torch.tanh_
_ADD: _Operations = torch.add, Tensor.add_
_MUL: _Operations = torch.mul, Tensor.mul_


def _within(operation: _Operations, gate: Tensor, *others: Tensor) -> Tensor:
    """The operation on a gate, in its place: torch's own cell computes it there, and an activation
    has other bits in memory of its own, where a CPU takes more elements at a time."""
    apart, in_place = operation
    return apart(gate, *others) if tracing() else in_place(gate, *others)


def _parts(gates: Tensor, count: int) -> Sequence[Tensor]:
    """The gates of each unit, side by side in one tensor. (N, count·hidden) → (N, hidden) each"""
    return gates.chunk(count, 1) if tracing() else torch.unsafe_chunk(gates, count, 1)


def _simple(activation: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def rule(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        """One step of an Elman network. input (N, in), hx (N, hidden) → (N, hidden)."""
        if not _applies(w_ih, w_hh, input, hx, b_ih, b_hh):
            return NotImplemented
        return activation(_linear(hx, w_hh, b_hh) + _linear(input, w_ih, b_ih))

    return rule


implements(torch.rnn_tanh_cell)(_simple(torch.tanh))
implements(torch.rnn_relu_cell)(_simple(torch.relu))


def _layer(operation: Callable[..., Any]) -> Callable[..., Any]:
    def rule(*args: Any, **named: Any) -> Any:
        """All steps of a network, with every adapted weight built once."""
        if tracing():
            return NotImplemented
        known: dict[int, Tensor] = {}

        def build(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)([build(v) for v in value])
            if not isinstance(value, AdaptedWeight):
                return value
            if id(value) not in known:  # a twin keeps what it built, and goes when we return
                known[id(value)] = adapted(value.base, value.updates).build()
            return known[id(value)]

        return operation(*build(args), **{k: build(v) for k, v in named.items()})

    return rule


for _operation in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    implements(_operation)(_layer(_operation))
