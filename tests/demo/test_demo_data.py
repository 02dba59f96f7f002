import pytest
import torch
from safetensors import safe_open

from lora_param.demo.data import DIGITS, load_digits
from lora_param.demo.net import digit_net


def test_the_file_is_small_and_says_where_it_is_from():
    assert DIGITS.stat().st_size < 150_000
    with safe_open(DIGITS, "pt") as file:
        said = file.metadata()
    assert said["licence"].startswith("CC BY 4.0")
    assert "Alpaydin" in said["authors"]
    assert "archive.ics.uci.edu" in said["source"]
    assert "CC BY 4.0" in DIGITS.with_name("README.md").read_text("utf-8")


def test_it_equals_the_copy_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    with safe_open(DIGITS, "pt") as file:
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
    assert torch.equal(images.double(), torch.from_numpy(theirs.images))
    assert torch.equal(labels.long(), torch.from_numpy(theirs.target).long())


def test_halves_are_apart_complete_and_always_the_same():
    digits, again = load_digits(), load_digits()
    assert torch.equal(digits.train, again.train)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.shape[1] == 784
    assert digits.train.min() >= 0
    assert digits.train.max() <= 1
    assert torch.bincount(digits.test_labels, minlength=10).min() > 70


def test_net():
    net = digit_net()
    assert sum(p.numel() for p in net.parameters()) == 2_807_010
    assert [tuple(p.shape) for p in net.parameters() if p.dim() == 2] == [
        (1000, 784),
        (2000, 1000),
        (10, 2000),
    ]
