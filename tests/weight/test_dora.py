"""DoRA against the definition: m ∘ V / ‖V‖ with V = W + scale·(B @ A), by plain torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import lora_param as lp
from lora_param.errors import MismatchError
from lora_param.targets.regions import Region
from lora_param.weight.dora import row_norms, row_ratios, row_squares
from lora_param.weight.dropout import draw_bits, keep_probability, masks
from lora_param.weight.update import Deferred, Update, lower_all
from lora_param.weight.variants import variant_named

NAMES = ("lora_A", "lora_B", "magnitude")


def layer(
    m: int = 5, n: int = 7, *, dtype: torch.dtype = torch.float64, targets: str = "weight"
) -> nn.Linear:
    """A linear layer with a DoRA of random factors."""
    torch.manual_seed(0)
    linear = nn.Linear(n, m, dtype=dtype)
    lp.apply(linear, [targets], rank=2, variant="dora")
    with torch.no_grad():
        for p in lp.parameters(linear):
            p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.3)
    return linear


def by_definition(linear: nn.Linear, x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
    V = linear.parametrizations.weight.original + 8.0 * (B @ A)
    W = magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    return F.linear(x, W, linear.bias)


def parts(linear: nn.Module) -> list[Tensor]:
    lora = linear.parametrizations.weight[0]
    return [getattr(lora, name) for name in NAMES]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(rows: int, bias: bool) -> None:
    linear = layer()
    if not bias:
        linear.bias = None
    x = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
    leaves = [x, *parts(linear)]
    found, expected = linear(x), by_definition(linear, x, *parts(linear))
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_first_and_second_derivatives() -> None:
    linear = layer(3, 4)
    linear.bias.requires_grad_()

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        named = {f"parametrizations.weight.0.{n}": t for n, t in zip(NAMES, factors, strict=True)}
        return functional_call(linear, named, (x,))

    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p.detach().clone().requires_grad_() for p in parts(linear))]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_a_bias_that_trains_gets_its_gradient() -> None:
    linear = layer()
    linear.bias.requires_grad_()
    x = torch.randn(40, 7, dtype=torch.float64)
    g = torch.randn(40, 5, dtype=torch.float64)
    linear(x).backward(g)
    torch.testing.assert_close(linear.bias.grad, g.sum(0))


def test_a_base_that_trains_gets_the_exact_gradient() -> None:
    linear = layer()
    W = linear.parametrizations.weight.original.requires_grad_()
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.autograd.grad(by_definition(linear, x, *parts(linear)).square().sum(), W)
    torch.testing.assert_close(torch.autograd.grad(linear(x).square().sum(), W), expected)


@draws(40)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    r=st.integers(1, 4),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_the_closed_form_of_the_norms(m: int, n: int, r: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    W, A, B, magnitude = draw(m, n), draw(r, n), draw(m, r), draw(m)
    expected = magnitude / (W + scale * (B @ A)).norm(dim=1)
    found = row_ratios(W, A, B, magnitude, scale, row_squares(W))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 8), (40, 8)])
def test_fresh_is_the_base_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, dtype=dtype)
    plain = copy.deepcopy(linear).requires_grad_(False)
    lp.apply(linear, ["weight"], rank=2, variant="dora")
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(linear(x), plain(x))
    with torch.no_grad():
        assert torch.equal(linear(x), plain(x))
        assert torch.equal(linear.weight.build(), plain.weight)
    assert torch.equal(lp.bake(linear).weight, plain.weight)


def test_a_row_of_zeros_stays_finite() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    before = linear(torch.ones(2, 4)).detach()
    lp.apply(linear, ["weight"], rank=2, variant="dora")
    assert torch.equal(linear(torch.ones(2, 4)), before)
    optimizer = torch.optim.AdamW(lp.parameters(linear), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        linear(torch.ones(2, 4)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in lp.parameters(linear))
        optimizer.step()
    assert linear.weight.isfinite().all()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -1.0])
@pytest.mark.parametrize("targets", ["weight", "weight[1:4]", "weight[:,2:5]"])
def test_strength_goes_from_the_base_to_what_was_trained(strength: float, targets: str) -> None:
    linear = layer(targets=targets)
    base, full = linear.parametrizations.weight.original.detach(), linear.weight.detach().clone()
    lp.set_scale(linear, strength)
    expected = base + strength * (full - base)
    x = torch.randn(40, 7, dtype=torch.float64)
    torch.testing.assert_close(linear.weight.detach(), expected)
    torch.testing.assert_close(linear(x), F.linear(x, expected, linear.bias))
    with torch.no_grad():
        torch.testing.assert_close(linear(x), F.linear(x, expected, linear.bias))


def test_beside_a_plain_adapter_each_adds_its_own() -> None:
    linear = layer()
    base, first = linear.parametrizations.weight.original.detach(), linear.weight.detach().clone()
    lp.apply(linear, ["weight[1:4]"], rank=1, adapter="second")
    with torch.no_grad():
        linear.parametrizations.weight[1].lora_B.fill_(0.5)
        linear.parametrizations.weight[0].enabled = False
        second = linear.weight.detach().clone()
        linear.parametrizations.weight[0].enabled = True
        x = torch.randn(40, 7, dtype=torch.float64)
        expected = F.linear(x, first + second - base, linear.bias)
        torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x), expected)


def test_dropout_acts_on_what_A_reads_alone() -> None:
    torch.manual_seed(0)
    linear = lp.apply(nn.Linear(64, 8, bias=False), ["weight"], rank=2, dropout=0.5, variant="dora")
    x = torch.randn(9, 64)
    with torch.no_grad():
        linear.parametrizations.weight[0].lora_B.normal_()
    W, lora = linear.parametrizations.weight.original, linear.parametrizations.weight[0]
    V = W + 8 * lora.lora_B @ lora.lora_A
    ratio = (lora.magnitude / V.norm(dim=1)).detach()
    moved = (linear(x).detach() - ratio * (x @ W.T)) / ratio  # 8·(dropped x Aᵀ) Bᵀ
    lora.eval()
    whole = (linear(x).detach() - ratio * (x @ W.T)) / ratio
    torch.testing.assert_close(whole, 8 * (x @ lora.lora_A.T @ lora.lora_B.T).detach())
    assert not torch.allclose(moved, whole)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_is_drawn_without_gradients_too(variant: str) -> None:
    torch.manual_seed(0)
    linear = lp.apply(nn.Linear(32, 16), ["weight"], rank=4, dropout=0.3, variant=variant)
    with torch.no_grad():
        linear.parametrizations.weight[0].lora_B.normal_()
    for rows in (0, 3, 600):
        x = torch.randn(rows, 32)
        torch.manual_seed(5)
        y = linear(x)
        y.sum().backward()
        torch.manual_seed(5)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), y)
        if rows:
            assert not torch.allclose(linear(x), y)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(3, 9, 7), (600, 9, 7), (600, 640, 5)])
def test_each_way_through_the_base(shape: tuple[int, int, int], dropout: float) -> None:
    """Few rows, many, and many but fewer than outputs: with and without dropout's mask."""
    rows, m, n = shape
    linear = layer(m, n)
    linear.parametrizations.weight[0].configure(
        replace(linear.parametrizations.weight[0].settings, dropout=dropout)
    )
    x = torch.randn(rows, n, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = linear(x)
    mask: Tensor | float = 1.0
    if dropout:
        torch.manual_seed(3)
        bits = draw_bits(rows, n, dropout, x.device)
        mask = torch.cat([part for _, part in masks(x, bits)]) / keep_probability(dropout)
    A, B, magnitude = parts(linear)
    W = linear.parametrizations.weight.original
    ratios = magnitude / (W + 8.0 * (B @ A)).norm(dim=1)
    plain = (x @ W.T + 8.0 * (x * mask) @ A.T @ B.T) * ratios + linear.bias
    torch.testing.assert_close(y, plain)
    leaves, g = [x, A, B, magnitude], torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, g)
    torch.testing.assert_close(found, torch.autograd.grad(plain, leaves, g))


def test_read_in_inference_mode_and_then_trained() -> None:
    linear = layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.inference_mode():
        linear(x)
    linear(x).sum().backward()
    assert all(p.grad is not None for p in lp.parameters(linear))


def test_known_squares_follow_the_base() -> None:
    linear = layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    chain = linear.parametrizations.weight

    def check() -> None:
        torch.testing.assert_close(linear(x), by_definition(linear, x, *parts(linear)))

    check()
    with torch.no_grad():
        chain.original.mul_(3)
    check()
    chain.original.data = torch.randn_like(chain.original)
    check()
    linear.float().double()
    check()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(linear)))
    with torch.no_grad():
        twin.parametrizations.weight.original.mul_(0.5)
    torch.testing.assert_close(twin(x), by_definition(twin, x, *parts(twin)))
    check()


def test_forms_without_a_factor_for_each_row_are_declined() -> None:
    W, A, B = torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    plain = Update(A, B, 1.0)
    tensors = {"lora_A": A, "lora_B": B, "magnitude": torch.ones(3)}
    u = Deferred(variant_named("dora"), tensors, 1.0, 1.0)
    form = lower_all(W, [plain, u])
    assert form.updates[0] is plain
    torch.testing.assert_close(form.alpha[:, 0], 1 / row_norms(row_squares(W + 1)))
    assert isinstance(form.updates[1], Update)
    part = Deferred(u.variant, {**tensors, "lora_A": A[:, :2]}, 1.0, 1.0, Region(columns=(0, 2)))
    assert lower_all(W, [part]) is None
    assert lower_all(W.requires_grad_(), [u]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, dtype=dtype)
    lp.apply(linear, ["weight"], rank=4, variant="dora")
    assert linear.parametrizations.weight[0].magnitude.dtype == torch.float32
    with torch.no_grad():
        for p in lp.parameters(linear):
            p.add_(torch.randn(p.shape) * 0.05)
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    y = linear(x)
    assert y.dtype == dtype
    W = linear.weight.detach().float()
    torch.testing.assert_close(
        y.float(), F.linear(x.float(), W, linear.bias.float()), rtol=3e-2, atol=3e-2
    )
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lp.parameters(linear))
    assert all(p.grad.abs().max() > 0 for p in lp.parameters(linear))


def test_under_autocast_the_norms_stay_in_full_precision() -> None:
    linear = layer(16, 32, dtype=torch.float32)
    x = torch.randn(40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), by_definition(linear, x, *parts(linear)), rtol=3e-2, atol=3e-2
    )


def test_compiled_once_for_toggles_and_strengths() -> None:
    torch._dynamo.reset()
    graphs: list[object] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    linear = layer()
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    x = torch.randn(40, 7, dtype=torch.float64)
    for strength in (1.0, 0.5, 2.0, 0.25):
        lp.set_scale(linear, strength)
        torch.testing.assert_close(compiled(x), linear(x))
        with lp.disabled(linear):
            torch.testing.assert_close(compiled(x), linear(x))
    assert len(graphs) <= 2


def test_save_and_load(tmp_path: Path) -> None:
    linear = layer()
    lp.save(linear, tmp_path / "a.safetensors")
    other = layer()
    lp.remove(other)
    lp.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.weight.detach(), linear.weight.detach())
    with torch.no_grad():
        other.parametrizations.weight[0].magnitude.zero_()
    lp.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.weight.detach(), linear.weight.detach())
    lp.remove(other)
    lp.apply(other, ["weight"], rank=2)
    with pytest.raises(MismatchError, match="variant dora in the file, lora here"):
        lp.load(other, tmp_path / "a.safetensors")


def test_stats_count_and_measure_the_magnitude() -> None:
    linear = layer()
    stats = lp.stats(linear)
    W, base = linear.weight.detach(), linear.parametrizations.weight.original.detach()
    assert stats.trainable == 2 * (5 + 7) + 5
    assert stats.rows[0].update_norm == pytest.approx((W - base).norm().item())
    assert not stats.rows[0].dead
    fresh = lp.apply(nn.Linear(7, 5), ["weight"], rank=2, variant="dora")
    assert lp.stats(fresh).rows[0].dead
    with torch.no_grad():
        fresh.parametrizations.weight[0].magnitude.mul_(1.5)
    assert not lp.stats(fresh).rows[0].dead
    assert len(lp.param_groups(fresh, 1e-3)[0]["params"]) == 2
