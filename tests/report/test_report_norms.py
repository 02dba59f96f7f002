import numpy as np
import pytest
import torch
from torch import nn

import lora_param as lp
from lora_param.report.norms import effective_rank, measure, singular_values, update_norm

rng = np.random.default_rng(0)


@pytest.mark.parametrize("lead", [(), (4,)])
@pytest.mark.parametrize(("rows", "rank", "columns"), [(30, 4, 20), (5, 5, 40), (3, 2, 2)])
def test_equals_the_dense_decomposition(lead, rows, rank, columns):
    A, B = rng.normal(size=(*lead, rank, columns)), rng.normal(size=(*lead, rows, rank))
    dense = np.linalg.svd(1.5 * (B @ A), compute_uv=False)
    values = singular_values(A, B, 1.5)
    np.testing.assert_allclose(values, dense[..., : values.shape[-1]], rtol=1e-10, atol=1e-12)
    assert update_norm(A, B, 1.5) == pytest.approx(np.linalg.norm(1.5 * (B @ A)))
    norm, _, spectrum = measure(A, B, -1.5)
    assert norm == pytest.approx(update_norm(A, B, 1.5))
    assert np.linalg.norm(spectrum) == pytest.approx(norm)
    if not lead:
        np.testing.assert_allclose(spectrum, values)


def test_an_initial_pair_is_subtracted():
    layer = lp.apply(nn.Linear(8, 6), ["weight"], rank=3, init="pissa")
    assert lp.stats(layer).rows[0].update_norm == 0
    base = layer.parametrizations.weight.original
    with torch.no_grad():
        for p in lp.parameters(layer):
            p.normal_()
        moved = float((layer.weight - base).norm())
    row = lp.stats(layer).rows[0]
    assert row.update_norm == pytest.approx(moved, rel=1e-5)
    assert len(row.singular_values) == 6, "twice the rank"


def test_effective_rank_counts_equal_directions():
    assert effective_rank([3.0] * 5 + [0.0] * 2) == pytest.approx(5)
    assert effective_rank([0.0, 0.0]) == 0
    assert effective_rank([[1.0, 1.0], [1.0, 0.0]]) == pytest.approx(1.5)  # the mean of a stack
    s = np.array([4.0, 2.0, 1.0])
    p = s / s.sum()
    assert effective_rank(s) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_zero_and_non_finite_factors():
    A, B = np.ones((2, 4)), np.zeros((3, 2))
    assert measure(A, B, 1.0) == (0.0, 0.0, (0.0, 0.0))
    B[0, 0] = np.nan
    norm, rank, spectrum = measure(A, B, 1.0)
    assert np.isnan([norm, rank, *spectrum]).all()
    assert np.isnan(update_norm(A, np.full((3, 2), np.inf), 1.0))


@pytest.mark.parametrize("rows", [50, 3000])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-9])
def test_small_directions_keep_their_digits(rows, spread):
    """Gram matrices square what lies between the directions: where it is much, QR is taken."""
    U, _ = np.linalg.qr(rng.normal(size=(rows, 3)))
    V, _ = np.linalg.qr(rng.normal(size=(40, 3)))
    turned, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    expected = np.array([1.0, spread**0.5, spread])
    A, B = turned @ V.T, (U * expected) @ turned.T
    np.testing.assert_allclose(singular_values(A, B, 1.0), expected, rtol=1e-6)
    assert update_norm(A, B, 2.0) == pytest.approx(2 * np.linalg.norm(expected), rel=1e-12)
