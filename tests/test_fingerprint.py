"""What the sampled fingerprint catches, and what it does not: as the README says."""

from pathlib import Path

import pytest
import torch

from lora_param.fingerprint import tensor_base_weight


def test_23_the_readme_says_what_is_sampled():
    text = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    assert (
        "The fingerprint is sampled: of each targeted weight its name, shape and dtype, and" in text
    )
    assert "a hash of 1,024 of its elements" in text
    assert "it does not catch a change of a few elements" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda W: W + torch.randn(300, 1) @ torch.randn(1, 200) * 1e-3,  # baked already
        lambda W: W - 1e-4 * torch.randn(300, 200),  # trained a step further
        lambda W: W.bfloat16(),
        lambda W: W.bfloat16().float(),
        lambda W: W.T.contiguous(),
    ],
)
def test_23_what_it_catches(change):
    torch.manual_seed(0)
    W = torch.randn(300, 200)
    assert tensor_base_weight(change(W)) != tensor_base_weight(W)


def test_23_what_it_does_not_catch():
    W = torch.randn(300, 200)
    changed = W.clone()
    changed[0, 1] += 1  # beside the first sampled element
    assert tensor_base_weight(changed) == tensor_base_weight(W)
    small = torch.randn(8, 128)  # 1,024 elements: all of them count
    for i in range(0, small.numel(), 100):
        changed = small.clone()
        changed.view(-1)[i] += 1
        assert tensor_base_weight(changed) != tensor_base_weight(small)
