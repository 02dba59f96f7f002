"""The example runs, and what it claims holds."""

from __future__ import annotations

from collections.abc import Callable


def test_rotated_digits(example: Callable[[list[str]], dict[str, float]]) -> None:
    found = example(["--quick"])
    assert found["upright, base"] > 0.85
    assert found["rotated, adapter on"] > found["rotated, base"] + 0.2
    assert found["upright, adapter off"] == found["upright, base"]
    assert found["rotated, baked"] == found["rotated, adapter on"]
    assert found["trainable, %"] < 20
