"""`stats --html`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_samples import Cli

import lora_param as lp


def test_the_page_is_written_besides_the_text(cli: Cli) -> None:
    plain = cli("stats", "m.safetensors", "a.safetensors")
    done = cli("stats", "m.safetensors", "a.safetensors", "--html", "report.html")
    assert (done.status, done.err) == (0, "")
    assert done.out == plain.out + "Wrote report.html.\n"
    expected = lp.stats("m.safetensors", "a.safetensors").to_html()
    assert Path("report.html").read_text("utf-8") == expected


def test_with_json(cli: Cli) -> None:
    plain = json.loads(cli("stats", "a.safetensors", "--json").out)
    found = json.loads(cli("stats", "a.safetensors", "--json", "--html", "report.html").out)
    assert found == {**plain, "html": "report.html"}
    assert Path("report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--html", "missing/report.html"], "does not exist"),
        (["--html", "old.html"], "--force"),
        (["--html", "m.safetensors", "--force"], "it exists, and is not an HTML page"),
        (["--html", "."], "not a file"),
    ],
)
def test_a_page_that_cannot_be_written(arguments: list[str], sentence: str, cli: Cli) -> None:
    Path("old.html").write_text("<!doctype html>")
    before = {p.name: p.read_bytes() for p in Path.cwd().iterdir()}
    done = cli("stats", "m.safetensors", "a.safetensors", *arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    assert sentence in " ".join(done.err.split())
    assert {p.name: p.read_bytes() for p in Path.cwd().iterdir()} == before


def test_a_page_is_replaced_with_force_and_dead_targets_still_fail(cli: Cli) -> None:
    lp.apply_checkpoint("m.safetensors", ["fc1"], "fresh.safetensors", rank=2)
    Path("old.html").write_text("<!DOCTYPE html>")
    arguments = ["stats", "fresh.safetensors", "--html", "old.html", "--force", "--fail-on-dead"]
    assert cli(*arguments).status == 1
    assert "still zero" in Path("old.html").read_text("utf-8")
