"""The examples run, and what they claim holds."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_rotated_digits() -> None:
    main = runpy.run_path(str(EXAMPLES / "rotated_digits.py"))["main"]
    found = main(["--quick"])
    assert found["upright, base"] > 0.85
    assert found["rotated, adapter on"] > found["rotated, base"] + 0.2
    assert found["upright, adapter off"] == found["upright, base"]
    assert found["rotated, baked"] == found["rotated, adapter on"]
    assert found["trainable, %"] < 20


def test_every_example_is_listed_and_tested() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert script.name in listed
        assert script.name in tested
