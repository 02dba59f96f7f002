"""Nested tensors, function transforms, forward-mode derivatives and traces of adapted models.

They work, or say in one sentence what does.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import BY_NAME, CASES, Case, randomize
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

import lora_param as lp
from lora_param.errors import BelowAutogradError, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit:DeprecationWarning"
    ),  # torch's own, in forward AD
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning"),  # from 2.14 on
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
VARIANTS = pytest.mark.parametrize("variant", ["lora", "dora", "miss"])


def _layer(variant: str) -> nn.Linear:
    torch.manual_seed(0)
    return randomize(lp.apply(nn.Linear(6, 4), ["weight"], rank=2, variant=variant))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _grads(layer: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, lp.parameters(layer)))


# --- nested tensors -----------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)  # (N, 2, ragged, 3)
        return self.out(y.transpose(1, 2).flatten(-2))


PARTS = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 5)]


def _nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(PARTS, layout=layout)


def _pieces(nested: Tensor) -> Tensor:
    return torch.cat(list(nested.unbind()))


@VARIANTS
def test_a_strided_nested_tensor_through_a_linear_layer(variant: str) -> None:
    layer = _layer(variant)
    expected = torch.cat([layer(p) for p in PARTS])
    found = _pieces(layer(_nested(torch.strided)))
    _close(found, expected)
    for a, b in zip(
        _grads(layer, found.square().sum()), _grads(layer, expected.square().sum()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        _close(_pieces(layer(_nested(torch.strided))), expected)


@VARIANTS
def test_a_jagged_nested_tensor_through_a_linear_layer(variant: str) -> None:
    layer = _layer(variant)
    expected = torch.cat([layer(p) for p in PARTS])
    with torch.no_grad():
        _close(_pieces(layer(_nested(torch.jagged))), expected)
    with pytest.raises(BelowAutogradError, match=re.escape("parametrize.cached()")):
        layer(_nested(torch.jagged))
    with parametrize.cached():
        found = _pieces(layer(_nested(torch.jagged)))
    _close(found, expected)
    for a, b in zip(
        _grads(layer, found.square().sum()), _grads(layer, expected.square().sum()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@VARIANTS
def test_jagged_attention(variant: str) -> None:
    torch.manual_seed(0)
    net = randomize(lp.apply(SelfAttention(), "all-linear", rank=2, variant=variant))
    expected = torch.cat([net(p.unsqueeze(0)).squeeze(0) for p in PARTS])
    with torch.no_grad():
        _close(_pieces(net(_nested(torch.jagged))), expected)
    with pytest.raises(BelowAutogradError):
        net(_nested(torch.jagged))
    with parametrize.cached():
        found = _pieces(net(_nested(torch.jagged)))
    _close(found, expected)
    assert all(g.any() for g in _grads(net, found.square().sum()))


def test_a_nested_sequence_through_attention_in_evaluation() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    randomize(lp.apply(attention, ["in_proj_weight", "out_proj"], rank=2))
    x = _nested(torch.strided)
    with torch.no_grad():
        found = attention(x, x, x, need_weights=False)[0]
        for part, y in zip(PARTS, found.unbind(), strict=True):
            row = part.unsqueeze(0)
            _close(y, attention(row, row, row, need_weights=False)[0].squeeze(0))


# --- function transforms ------------------------------------------------------------------------


OVER_THE_WEIGHT: dict[str, Callable[[Tensor], Any]] = {
    "vmap": lambda w: torch.vmap(lambda row: (row * row).sum())(w),
    "grad": lambda w: torch.func.grad(lambda w: F.linear(w, w).sum())(w),
    "vjp": lambda w: torch.func.vjp(lambda w: F.linear(w, w), w)[1](torch.ones(4, 4))[0],
    "jacrev": lambda w: torch.func.jacrev(lambda w: F.linear(w, w))(w),
    "jacfwd": lambda w: torch.func.jacfwd(lambda w: F.linear(w, w))(w),
    "jvp": lambda w: torch.func.jvp(lambda w: F.linear(w, w), (w,), (torch.ones(4, 6),))[1],
}


@VARIANTS
@pytest.mark.parametrize("name", OVER_THE_WEIGHT)
def test_transforms_over_the_weight_work_or_say_what_does(name: str, variant: str) -> None:
    layer, transform = _layer(variant), OVER_THE_WEIGHT[name]
    expected = transform(layer.weight.clone().detach())
    try:
        _close(transform(layer.weight), expected)
    except UserError as error:
        assert "weight.clone()" in str(error)  # noqa: PT017  either is right
    _close(transform(layer.weight.clone()), expected)
    with torch.no_grad():
        _close(transform(layer.weight), expected)
    with parametrize.cached():
        _close(transform(layer.weight), expected)


@VARIANTS
def test_vmap_keeps_the_gradients_of_the_factors(variant: str) -> None:
    layer = _layer(variant)
    found = _grads(layer, torch.vmap(lambda row: (row * row).sum())(layer.weight.clone()).sum())
    expected = _grads(layer, layer.weight.square().sum())
    for a, b in zip(found, expected, strict=True):
        _close(a, b)


# --- forward-mode derivatives -------------------------------------------------------------------


FLOATS = [
    case
    for case in CASES
    if case.dtype.itemsize >= 4
    and not case.dropout
    and all(d.is_floating_point() for d in case.data())
    and not re.match("lstm|gru|rnn|packed-base", case.name)  # torch has no such derivative of RNNs
]


BY_FACTORS = "linear mlp conv2d mha embedding experts mlp-miss linear-dora"


@pytest.mark.parametrize("case", FLOATS, ids=lambda case: case.name)
def test_forward_mode_by_the_input(case: Case) -> None:
    data, model = case.data(), case.adapted().eval()
    tangents = tuple(torch.randn_like(d) for d in data)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.autograd.functional.jvp(model, data, tangents)  # by backward, twice
        with forward_ad.dual_level():
            y = model(*map(forward_ad.make_dual, data, tangents))
            found = forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        _, found = torch.func.jvp(model, data, tangents)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BY_FACTORS.split())
def test_forward_mode_by_the_factors(name: str) -> None:
    case = BY_NAME[name]
    data, model = case.data(), case.adapted().eval()
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tangents = {n: torch.randn_like(p) for n, p in factors.items()}

    def run(*values: Tensor) -> Tensor:
        replaced = dict(zip(factors, values, strict=True))
        return torch.func.functional_call(model, replaced, data)

    _, expected = torch.autograd.functional.jvp(
        run, tuple(factors.values()), tuple(tangents.values())
    )
    with forward_ad.dual_level():
        y = run(*(forward_ad.make_dual(factors[n], tangents[n]) for n in factors))
        found = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# --- traces -------------------------------------------------------------------------------------


TRACED = """linear linear-4d-input linear-rows mlp embedding conv2d conv-transpose mha bare-stack
lstm gru-cell experts packed linear-dora conv2d-dora mlp-miss mlp-bf16 mlp-two"""


@pytest.mark.parametrize("name", TRACED.split())
def test_a_trace_computes_trains_and_is_saved(name: str) -> None:
    case = BY_NAME[name]
    data, model = case.data(), case.adapted().eval()
    expected = model(*data)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in lp.parameters(model)]
    model.zero_grad()
    trace = torch.jit.trace(model, data)
    found = trace(*data)
    torch.testing.assert_close(found, expected, **case.tolerance)
    found.square().sum().backward()
    for p, grad in zip(lp.parameters(model), grads, strict=True):
        torch.testing.assert_close(
            p.grad, grad, rtol=5e-2, atol=1e-3 + 1e-2 * float(grad.abs().max())
        )
    file = io.BytesIO()
    torch.jit.save(trace, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(*data), expected, **case.tolerance)
