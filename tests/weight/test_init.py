from __future__ import annotations

import math

import pytest
import torch

from lora_param.targets.settings import INITS, Settings
from lora_param.weight.init import METHODS, fresh_tensors


def make(init: str, matrix: tuple[int, ...] = (48, 400), rank: int = 4, **kwargs: object):  # type: ignore[no-untyped-def]
    W = torch.randn(matrix, generator=torch.Generator().manual_seed(9))
    options = {"generator": torch.Generator().manual_seed(0), **kwargs}
    settings = Settings(rank=rank, alpha=2.0, scaling="constant", init=init)
    factors = fresh_tensors(settings, matrix, lambda: W, **options)  # type: ignore[arg-type]
    return W, factors


@pytest.mark.parametrize("init", [*INITS, "normal:0.5"])
@pytest.mark.parametrize("matrix", [(48, 400), (3, 48, 40)])
def test_shapes_and_a_fresh_update_of_zero(init: str, matrix: tuple[int, ...]) -> None:
    _, f = make(init, matrix)
    assert f["lora_A"].shape == (*matrix[:-2], 4, matrix[-1])
    assert f["lora_B"].shape == (*matrix[:-1], 4)
    update = f["lora_B"] @ f["lora_A"]
    if "initial_A" in f:
        update = update - f["initial_B"] @ f["initial_A"]
        assert f["initial_A"].data_ptr() != f["lora_A"].data_ptr()
    assert not update.any()


def test_distributions() -> None:
    bounds = {"kaiming": 1 / math.sqrt(400), "he": math.sqrt(6 / 400)}
    for init, bound in bounds.items():
        A = make(init)[1]["lora_A"]
        assert A.abs().max() <= bound
        assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert make("normal:0.02")[1]["lora_A"].std().item() == pytest.approx(0.02, rel=0.1)
    assert make("normal")[1]["lora_A"].std().item() == pytest.approx(1 / 4, rel=0.1)
    A = make("orthogonal")[1]["lora_A"]
    torch.testing.assert_close(A @ A.T, torch.eye(4))


def test_kaiming_is_torchs_own() -> None:
    expected = torch.empty(4, 400)
    torch.nn.init.kaiming_uniform_(
        expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(make("kaiming")[1]["lora_A"], expected)


def test_pissa_starts_from_the_principal_directions() -> None:
    W, f = make("pissa")
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ V[:4]
    torch.testing.assert_close(2.0 * f["initial_B"] @ f["initial_A"], best, rtol=1e-4, atol=1e-4)


def test_olora_starts_from_an_orthonormal_basis() -> None:
    W, f = make("olora")
    B = f["lora_B"]
    torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=1e-4, atol=1e-5)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(2.0 * B @ f["lora_A"], Q[:, :4] @ R[:4], rtol=1e-4, atol=1e-4)


def test_seeds_repeat_and_differ() -> None:
    assert torch.equal(make("kaiming")[1]["lora_A"], make("kaiming")[1]["lora_A"])
    other = make("kaiming", generator=torch.Generator().manual_seed(1))[1]["lora_A"]
    assert not torch.equal(make("kaiming")[1]["lora_A"], other)


def test_every_name_has_a_method() -> None:
    assert set(METHODS) == set(INITS)
