"""The blocks that weights are merged in, and the law that they are the same everywhere."""

from __future__ import annotations

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st

from lora_param.targets.regions import Region
from lora_param.weight import blocks
from lora_param.weight.blocks import BLOCK, blocks_of, flat_range
from lora_param.weight.update import make_update, merge
from lora_param.weight.variants import variant_named

SHAPES = [(700, 1030), (5, 2 * BLOCK), (9, 300, 200), (3, 700, 600), (40_000, 17), (2, 3)]


@draws(60)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=3), st.integers(1, 40))
def test_blocks_cover_a_weight_once_and_in_order(sizes: list[int], limit: int) -> None:
    shape, whole = tuple(sizes), torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", limit)
        found = list(blocks_of(shape))
        taken = [whole[index].flatten() for index in found]
        ranges = [torch.arange(*flat_range(index, shape)) for index in found]
    assert torch.equal(torch.cat([whole.new_empty(0), *taken]), whole.flatten())
    assert all(torch.equal(a, b) for a, b in zip(taken, ranges, strict=True))
    assert all(len(t) <= max(limit, shape[-1]) for t in taken)


def tensors_of(variant: str, shape: tuple[int, ...], rank: int) -> dict[str, torch.Tensor]:
    *lead, m, n = shape
    g = torch.Generator().manual_seed(3)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*lead, *sizes, generator=g) * 0.1

    if variant == "miss":
        return {"lora_M": draw(rank, m)}
    pair = {"lora_A": draw(rank, n), "lora_B": draw(m, rank)}
    return pair if variant == "lora" else {**pair, "magnitude": draw(m).abs() + 1}


@pytest.mark.parametrize("variant", ["lora", "dora", "miss"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_by_blocks_has_the_bits_of_the_whole(
    variant: str, shape: tuple[int, ...]
) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    made = tensors_of(variant, shape, 7)
    region = Region(stacked=len(shape) == 3)
    u = make_update(variant_named(variant), made, 1.3, 0.7, region)
    whole = u.delta(W, torch.float32)
    for index in blocks_of(shape):
        part = u.of_block(index)
        assert torch.equal(part.delta(W[index], torch.float32), whole[index])


@pytest.mark.parametrize("shape", [(513, 1025), *[(m, 512) for m in (5, 6, 9, 11, 21)]], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_bits_depend_neither_on_threads_nor_on_gradients(
    threads: int, shape: tuple[int, int]
) -> None:
    g = torch.Generator().manual_seed(0)
    W, made = torch.randn(shape, generator=g), tensors_of("lora", shape, 4)
    before = torch.get_num_threads()

    def merged(number: int) -> torch.Tensor:
        torch.set_num_threads(number)
        try:
            return merge(W, [make_update(variant_named("lora"), made, 1.5, 1.0)])
        finally:
            assert torch.get_num_threads() == number
            torch.set_num_threads(before)

    expected = merged(1)
    for tensor in made.values():
        tensor.requires_grad_()
    found = merged(threads)
    assert found.requires_grad
    assert torch.equal(found, expected)
