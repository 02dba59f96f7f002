"""Low-rank factors, held against the full decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_param.errors import OptionError
from lora_param.weight.lowrank import Kept, factorize, reduce_product


def planted(m: int, n: int, rank: int, stack: tuple[int, ...] = ()) -> torch.Tensor:
    torch.manual_seed(m * n + rank)
    return torch.randn(*stack, m, rank) @ torch.randn(*stack, rank, n)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(40, 30), (300, 200), (200, 300)])
def test_a_planted_rank_returns(shape, exact):
    delta = planted(*shape, rank=5)
    low = factorize(delta, Kept(rank=5), exact=exact)
    assert low.A.shape == (5, shape[1])
    assert low.B.shape == (shape[0], 5)
    error = torch.linalg.norm(low.B @ low.A - delta) / torch.linalg.norm(delta)
    assert error < 1e-5
    assert low.energy == pytest.approx(1, abs=1e-6)


def test_a_stack_is_factorized_matrix_by_matrix():
    delta = planted(150, 100, rank=3, stack=(4,))
    low = factorize(delta, Kept(rank=3))
    assert torch.allclose(low.B @ low.A, delta, atol=1e-3)


def test_the_search_keeps_the_energy_of_the_full_decomposition():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 256)).Q for n in (512, 384))
    values = 1 / torch.arange(1, 257.0)  # a slow decay
    delta = (U * values) @ V.T
    low = factorize(delta, Kept(rank=32))
    best = float(values[:32].square().sum() / values.square().sum())
    assert best * 0.99 <= low.energy <= best * (1 + 1e-6)
    again = factorize(delta, Kept(rank=32))
    assert torch.equal(low.A, again.A)


@pytest.mark.parametrize(("keep", "rank"), [(Kept(energy=0.74), 3), (Kept(error=0.51), 3)])
def test_the_fewest_directions_that_hold_a_share(keep, rank):
    U, V = (torch.linalg.qr(torch.randn(n, 4)).Q for n in (100, 90))
    low = factorize((U * 2.0) @ V.T, keep)  # four directions of the same length
    assert low.A.shape[0] == rank
    assert low.energy == pytest.approx(0.75, abs=1e-5)


def test_nothing_has_factors_of_zero():
    low = factorize(torch.zeros(20, 30), Kept(energy=0.9))
    assert low.A.shape == (1, 30)
    assert not low.A.any()
    assert low.energy == 1


@given(m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 9), keep=st.integers(1, 9))
def test_a_product_is_reduced_as_its_matrix_would_be(m, n, r, keep):
    torch.manual_seed(m + 13 * n + 170 * r)
    A, B = torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64)
    low = reduce_product(A, B, Kept(rank=keep))
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    count = min(keep, r, m, n)
    best = (U[:, :count] * S[:count]) @ Vh[:count]
    assert torch.allclose(low.B @ low.A, best, atol=1e-8)
    assert low.A.shape[0] == count


def test_a_stack_of_products():
    A, B = torch.randn(3, 4, 20), torch.randn(3, 10, 4)
    low = reduce_product(A, B, Kept(rank=4))
    assert torch.allclose(low.B @ low.A, B @ A, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "nothing"),
        ({"rank": 2, "energy": 0.5}, "rank and energy"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"error": 1.0}, "error is 1.0"),
    ],
)
def test_what_to_keep_is_said_once(given, says):
    with pytest.raises(OptionError, match=says):
        Kept(**given)
