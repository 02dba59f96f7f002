"""The factored product against autograd on a plain weight: values, gradients, both orders."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_param.targets.regions import WHOLE, Region
from lora_param.weight import factored
from lora_param.weight.dropout import draw_bits, keep_probability, masks
from lora_param.weight.factored import factored_linear
from lora_param.weight.rules.linear import composed
from lora_param.weight.update import NormalForm, Update, merge


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, list[Region], list[int]]:
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 3), (9,), (0,), (2, 1, 4)]))

    def part(size: int) -> tuple[int, int] | None:
        start = draw(st.integers(0, size - 1))
        return draw(st.sampled_from([None, (start, draw(st.integers(start + 1, size)))]))

    regions = [Region(part(m), part(n)) for _ in range(draw(st.integers(1, 2)))]
    ranks = [draw(st.integers(1, 3)) for _ in regions]
    return (*batch, n), m, n, regions, ranks


@draws(150)
@given(
    problems(), st.booleans(), st.sampled_from(["contiguous", "strided", "expanded"]), st.booleans()
)
def test_it_equals_a_plain_weight(
    problem: tuple[tuple[int, ...], int, int, list[Region], list[int]],
    with_bias: bool,
    layout: str,
    frozen: bool,
) -> None:
    shape, m, n, regions, ranks = problem
    x, W, bias = tensors(shape, (m, n), (m,))
    W.requires_grad_(not frozen)
    if layout == "strided":
        x = torch.randn(*shape[:-1], 2 * n, dtype=torch.float64)[..., ::2].requires_grad_()
        W = torch.randn(n, m, dtype=torch.float64).t().requires_grad_(not frozen)
    elif layout == "expanded":
        x = torch.randn(n, dtype=torch.float64).expand(shape).requires_grad_()
    updates = [
        Update(
            torch.randn(r, region.matrix((m, n))[1], dtype=torch.float64).requires_grad_(),
            torch.randn(region.matrix((m, n))[0], r, dtype=torch.float64).requires_grad_(),
            0.7,
            region,
        )
        for region, r in zip(regions, ranks, strict=True)
    ]
    b = bias if with_bias else None
    inputs = [t for t in (x, W, *(f for u in updates for f in (u.A, u.B))) if t.requires_grad]
    expected = F.linear(x, merge(W, updates), b)
    g = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, g, retain_graph=True)
    V = NormalForm(W, updates, None)
    for product in (lambda: factored_linear(x, W, b, updates), lambda: composed(x, V, b)):
        found = product()
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, inputs, g), expected_grads)
        with torch.no_grad():
            torch.testing.assert_close(product(), expected)


@pytest.mark.parametrize("rows", [2, 20], ids=["factored", "built"])
@pytest.mark.parametrize("region", [WHOLE, Region((1, 4), (0, 2))], ids=["whole", "block"])
def test_gradcheck_once_and_twice(rows: int, region: Region) -> None:
    out, into = region.matrix((5, 4))
    x, W, b, A, B = tensors((rows, 4), (5, 4), (5,), (2, into), (out, 2))

    def product(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return factored_linear(x, W, b, [Update(A, B, 0.7, region)])

    assert torch.autograd.gradcheck(product, (x, W, b, A, B))
    assert torch.autograd.gradgradcheck(product, (x, W, b, A, B))


def test_both_orders_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = factored._build
    monkeypatch.setattr(factored, "_build", lambda *a: built.append(1) or build(*a))
    for rows, expected in ((2, 0), (20, 2)):
        built.clear()
        x, W, A, B = tensors((rows, 4), (5, 4), (2, 4), (5, 2))
        factored_linear(x, W.requires_grad_(False), None, [Update(A, B, 1.0)]).sum().backward()
        assert len(built) == expected


def test_no_matrix_is_saved_and_x_once() -> None:
    x, W, A, B = tensors((64, 32), (48, 32), (2, 32), (48, 2))
    W.requires_grad_(False)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first = factored_linear(x, W, None, [Update(A, B, 1.0)])
        factored_linear(x, W, None, [Update(A * 1, B * 1, 1.0)]).add(first)
    own = {t.data_ptr() for t in (x, W, A, B)}
    extra = sum(size for pointer, size in saved.items() if pointer not in own)
    assert x.data_ptr() in saved
    assert extra < 8 * 2 * (32 + 48 + 64) * 2 + 8 * 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs_in_its_own_dtype(dtype: torch.dtype) -> None:
    x, W, A, B = tensors((40, 16), (24, 16), (2, 16), (24, 2), dtype=torch.float32)
    update = Update(A, B, 0.5)
    low_x, low_W = x.detach().to(dtype).requires_grad_(), W.detach().to(dtype)
    y = factored_linear(low_x, low_W, None, [update])
    assert y.dtype == dtype
    y.float().square().sum().backward()
    expected = F.linear(low_x.float(), low_W.float() + 0.5 * (B @ A))
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=5e-2)
    dA, dB = torch.autograd.grad(expected.square().sum(), (A, B))
    assert A.grad is not None
    assert A.grad.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(A.grad.flatten(), dA.flatten(), 0) > 0.999
    assert torch.nn.functional.cosine_similarity(B.grad.flatten(), dB.flatten(), 0) > 0.999


def test_dropout_draws_what_it_says() -> None:
    for p in (0.1, 0.5, 0.9):
        for rows, columns in ((3, 5), (3000, 768), (7, 1), (1, 200_000)):
            x = torch.ones(rows, columns)
            bits = draw_bits(rows, columns, p, x.device)
            assert bits.dtype == torch.uint8
            assert bits.numel() <= rows * columns / 8 + 1 + rows
            blocks = list(masks(x, bits))
            mask = torch.cat([m for _, m in blocks])
            assert mask.shape == x.shape
            stops = itertools.accumulate(len(m) for _, m in blocks)
            assert [start for start, _ in blocks] == [0, *list(stops)[:-1]]
            assert set(mask.unique().tolist()) <= {0, 1}
            if rows * columns > 100_000:
                deviation = (keep_probability(p) * (1 - keep_probability(p)) / mask.numel()) ** 0.5
                assert abs(mask.float().mean().item() - keep_probability(p)) < 5 * deviation
                assert abs(keep_probability(p) - (1 - p)) < 1 / 65536
    torch.manual_seed(3)
    first = draw_bits(50, 60, 0.3, torch.device("cpu"))
    second = draw_bits(50, 60, 0.3, torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(draw_bits(50, 60, 0.3, torch.device("cpu")), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (400, 700)])
def test_dropout_is_the_same_forward_and_backward(shape: tuple[int, ...]) -> None:
    n = shape[-1]
    x, W, A, B = tensors(shape, (4, n), (2, n), (4, 2))
    p, seed = 0.3, 11
    update = Update(A, B, 0.7, WHOLE, p)
    torch.manual_seed(seed)
    y = factored_linear(x, W, None, [update])
    found = torch.autograd.grad(y.square().mean(), (x, W, A, B))
    torch.manual_seed(seed)
    flat = x.reshape(-1, n)
    bits = draw_bits(flat.shape[0], n, p, x.device)
    mask = torch.cat([m for _, m in masks(flat, bits)]).view(shape) / keep_probability(p)
    plain = F.linear(x, W) + 0.7 * F.linear(F.linear(x * mask, A), B)
    torch.testing.assert_close(y, plain)
    expected = torch.autograd.grad(plain.square().mean(), (x, W, A, B))
    torch.testing.assert_close(found, expected)


def test_dropout_can_be_differentiated_twice() -> None:
    x, W, A, B = tensors((6, 4), (5, 4), (2, 4), (5, 2))

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(5)
        return factored_linear(x, W, None, [Update(A, B, 0.7, WHOLE, 0.4)])

    assert torch.autograd.gradcheck(product, (x, A, B))
    assert torch.autograd.gradgradcheck(product, (x, A, B))
