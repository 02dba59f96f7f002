from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rules_samples import STACK, clone, counting_builds, make, never_dense, normal, saved_beyond
from torch import Tensor

from lora_param.weight.update import merge

pytestmark = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="this torch has no grouped product on a CPU"
)

offs = torch.tensor([2, 2, 7], dtype=torch.int32)

PRODUCTS = {
    "weight": ((3, 8, 12), lambda w, x: F.grouped_mm(x, w, offs=offs)),
    "transposed": ((3, 12, 8), lambda w, x: F.grouped_mm(x, w.transpose(-2, -1), offs=offs)),
    "private": ((3, 8, 12), lambda w, x: torch._grouped_mm(x, w, offs=offs)),
}


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", PRODUCTS)
def test_it_equals_a_plain_stack(name: str, rank: int) -> None:
    shape, operation = PRODUCTS[name]
    w = make(shape, [STACK, STACK], rank=rank, dtype=torch.float32, frozen=False)
    x = normal(7, 8, dtype=torch.float32)
    wanted = [x, w.base, *(f for u in w.updates for f in (u.A, u.B))]
    expected = operation(merge(w.base, w.updates), x)
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wanted, g)
    with never_dense():
        found = operation(clone(w), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.autograd.grad(found, wanted, g), gradients, rtol=1e-4, atol=1e-4
        )
        with torch.no_grad():
            torch.testing.assert_close(operation(clone(w), x), expected, rtol=1e-4, atol=1e-4)


def test_no_stack_is_saved_or_built() -> None:
    w, x = make((3, 32, 24), [STACK], dtype=torch.float32), normal(7, 32, dtype=torch.float32)
    with counting_builds() as built:
        assert saved_beyond(lambda w, x: F.grouped_mm(x, w, offs=offs), w, x) == []
    assert not built


def test_low_precision() -> None:
    w = make((3, 8, 16), [STACK], dtype=torch.bfloat16)
    x: Tensor = normal(7, 8, dtype=torch.bfloat16)
    with never_dense():
        found = F.grouped_mm(x, clone(w), offs=offs)
    exact = w.base.float() + 0.7 * (w.updates[0].B @ w.updates[0].A)
    torch.testing.assert_close(
        found.float(), F.grouped_mm(x.float(), exact, offs=offs), rtol=0.05, atol=0.3
    )
    found.square().sum().backward()
    assert w.updates[0].A.grad is not None
    assert w.updates[0].A.grad.dtype == torch.float32


def test_a_whole_update_is_built() -> None:
    w, x = make((3, 8, 12), dtype=torch.float32), normal(7, 8, dtype=torch.float32)
    with counting_builds() as built:
        found = F.grouped_mm(x, w, offs=offs)
    assert len(built) == 1
    torch.testing.assert_close(found, F.grouped_mm(x, merge(w.base, w.updates), offs=offs))
