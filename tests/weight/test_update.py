from __future__ import annotations

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from lora_param.targets.regions import Region
from lora_param.weight.update import Update, fold_initial, merge
from lora_param.weight.variants.base import product

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2), (1, 7)])
def test_merge_rounds_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    W = torch.randn(shape).to(dtype)
    A = torch.randn(1, W[0].numel(), dtype=wide) * 1e-2
    B = torch.randn(shape[0], 1, dtype=wide)
    expected = (W.to(wide) + 0.5 * (B @ A).reshape(shape)).to(dtype)
    assert torch.equal(merge(W, [Update(A, B, 0.5)]), expected)


def test_several_updates_are_rounded_together() -> None:
    W = torch.ones(1, 1, dtype=torch.bfloat16)
    third = Update(torch.full((1, 1), 2**-7 * 0.4), torch.ones(1, 1), 1.0)  # a bf16 step is 2⁻⁷
    assert merge(W, [third]).item() == 1.0
    assert merge(merge(W, [third]), [third]).item() == 1.0
    assert merge(W, [third, third]).item() == 1.0 + 2**-7


def test_merge_never_aliases_the_weight() -> None:
    W = torch.randn(3, 3)
    assert merge(W, []).data_ptr() != W.data_ptr()


def test_the_update_is_fp32_under_autocast_and_however_it_is_stored() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(4, 33), torch.randn(65, 4)
    expected = product(A, B, 2.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(A, B, 2.0, torch.float32), expected)
    strided = (A.T.contiguous().T, B.T.contiguous().T)
    assert torch.equal(product(*strided, 2.0, torch.float32), expected)


@draws(60)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.data(),
    st.sampled_from(DTYPES),
)
def test_regions_add_where_they_should(
    shape: tuple[int, int], data: st.DataObject, dtype: torch.dtype
) -> None:
    def part(size: int) -> tuple[int, int] | None:
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        return data.draw(st.sampled_from([None, (start, stop)]))

    region = Region(rows=part(shape[0]), columns=part(shape[1]))
    rows, columns = region.matrix(shape)
    A, B = torch.randn(2, columns), torch.randn(rows, 2)
    W = torch.randn(shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = W.to(wide).clone()
    expected[region.index] += 3.0 * (B.to(wide) @ A.to(wide))
    torch.testing.assert_close(merge(W, [Update(A, B, 3.0, region)]), expected.to(dtype))
    outside = torch.ones(shape, dtype=torch.bool)
    outside[region.index] = False
    assert torch.equal(merge(W, [Update(A, B, 3.0, region)])[outside], W[outside])


def test_merge_passes_gradcheck() -> None:
    torch.manual_seed(0)
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    A = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    B = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    region = Region(rows=(1, 3))
    assert torch.autograd.gradcheck(
        lambda w, a, b: merge(w, [Update(a, b, 0.7, region)]), (W, A, B)
    )


def test_joined_factors_subtract_the_initial_ones() -> None:
    torch.manual_seed(0)
    A, B, A0, B0 = torch.randn(2, 5), torch.randn(4, 2), torch.randn(2, 5), torch.randn(4, 2)
    tensors = {"lora_A": A, "lora_B": B}
    joined = fold_initial({**tensors, "initial_A": A0, "initial_B": B0})
    torch.testing.assert_close(joined["lora_B"] @ joined["lora_A"], B @ A - B0 @ A0)
    assert fold_initial(tensors) is tensors
