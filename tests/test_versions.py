"""The versions of torch and Python that are asked for, and those that are tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from versions import README, Row, row, updated

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
TESTED = re.findall(r"^\| (\d[\d.]+) \| (3\.\d+) \| \d+ \| (\d+) \|", README.read_text(), re.M)
ROW = "| 2.9.0 | 3.11 | 1 | 0 | 0 | then |"
TABLE = f"before <!-- versions: x -->\n| a |\n|---|\n{ROW}\n<!-- /versions -->"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def lowest(requirement: str) -> tuple[int, ...]:
    """The bound of a requirement that is a lower bound alone."""
    found = re.fullmatch(r"\w*>=([\d.]+)", requirement)
    assert found, requirement
    return numbers(found[1])


@pytest.mark.parametrize("package", ["torch", "numpy"])
def test_an_install_never_downgrades_torch(package: str) -> None:
    (requirement,) = (r for r in PROJECT["dependencies"] if r.startswith(package))
    lowest(requirement)


def test_the_lower_bounds_are_what_is_tested() -> None:
    (torch,) = (r for r in PROJECT["dependencies"] if r.startswith("torch"))
    assert min(numbers(t)[:2] for t, _, _ in TESTED) == lowest(torch)
    assert min(numbers(p) for _, p, _ in TESTED) == lowest(PROJECT["requires-python"])
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c}
    assert {p for _, p, _ in TESTED} <= named


def test_no_tested_version_fails() -> None:
    assert TESTED
    assert {failed for _, _, failed in TESTED} == {"0"}


def test_a_report_becomes_a_row() -> None:
    junit = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    assert row("2.9.1+cpu", "3.12.1", junit)[:5] == ("2.9.1", "3.12", 4, 3, 3)


def test_a_row_takes_the_place_of_the_older_one() -> None:
    new: list[Row] = [("2.9.0", "3.11", 5, 0, 0, "now"), ("2.10.0", "3.11", 6, 0, 0, "now")]
    found = updated(TABLE, new)
    assert found.startswith("before <!--")
    assert found.splitlines()[3:5] == [
        "| 2.10.0 | 3.11 | 6 | 0 | 0 | now |",
        "| 2.9.0 | 3.11 | 5 | 0 | 0 | now |",
    ]
    assert updated(found, []) == found
