"""`extract`, `combine`, `resize` and `diff` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_samples import Cli, fill

import lora_param as lp


@pytest.fixture(autouse=True)
def there(here: Path) -> Path:
    """`here`, with `tuned.safetensors` = m + a, and a second adapter `b`."""
    lp.bake_checkpoint("m.safetensors", "a.safetensors", "tuned.safetensors")
    lp.apply_checkpoint("m.safetensors", ["fc1"], "b.safetensors", rank=1, alpha=2, seed=1)
    fill(Path("b.safetensors"))
    return here


def test_extract_combine_resize_diff(cli: Cli):
    done = cli("extract", "m.safetensors", "tuned.safetensors", "-r", "2", "-o", "x.safetensors")
    assert (done.status, done.err) == (0, "")
    assert "2 targets" in done.out
    assert "Wrote x.safetensors." in done.out
    done = cli("diff", "tuned.safetensors", "m.safetensors", "a.safetensors")
    assert done.status == 0
    assert "yes: it is base and adapter, bit for bit" in done.out
    done = cli("combine", "a.safetensors=0.5", "b.safetensors=-1", "-o", "c.safetensors")
    assert done.status == 0
    assert "3 → 3" in done.out
    done = cli("resize", "c.safetensors", "-r", "1", "-o", "r.safetensors")
    assert done.status == 0
    assert "3 → 1" in done.out
    done = cli("diff", "c.safetensors", "r.safetensors")
    assert done.status == 3
    assert "rank 3 and 1" in done.out
    done = cli("diff", "tuned.safetensors", "m.safetensors")
    assert done.status == 3
    assert "2 weights differ" in done.out


def test_diff_writes_a_page_and_refuses_a_place_before_it_compares(cli: Cli):
    done = cli("diff", "tuned.safetensors", "m.safetensors", "--html", "d.html")
    assert done.status == 3
    assert "Wrote d.html." in done.out
    page = lp.diff("tuned.safetensors", "m.safetensors").to_html()
    assert Path("d.html").read_text() == page
    done = cli("diff", "none.safetensors", "m.safetensors", "--html", "d.html")
    assert done.status == 1
    assert "d.html" in done.err
    done = cli("diff", "a.safetensors", "a.safetensors", "--html", "d.html", "--force", "--json")
    assert json.loads(done.out)["html"] == "d.html"


def test_json(cli: Cli):
    done = cli("extract", "m.safetensors", "tuned.safetensors", "-o", "x.safetensors", "--json")
    found = json.loads(done.out)
    assert (len(found["rows"]), found["output"]) == (2, "x.safetensors")
    done = cli("combine", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--json")
    assert [t["target"] for t in json.loads(done.out)["targets"]]
    done = cli("resize", "c.safetensors", "--energy", "0.9", "-o", "r.safetensors", "--json")
    assert json.loads(done.out)["output"] == "r.safetensors"
    done = cli("diff", "a.safetensors", "a.safetensors", "--json")
    assert json.loads(done.out)["same"] is True
    assert done.status == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["extract", "m.safetensors", "m.safetensors", "-o", "x.safetensors"], "no matrix of"),
        (["extract", "m.safetensors", "tuned.safetensors", "-o", "a.safetensors"], "--force"),
        (["combine", "a.safetensors", "--method", "x", "-o", "c.safetensors"], "cat, svd"),
        (["combine", "a.safetensors", "--density", "0.3", "-o", "c.safetensors"], "none with cat"),
        (["combine", "a.safetensors", "none.safetensors", "-o", "c.safetensors"], "none"),
        (["resize", "a.safetensors", "-o", "c.safetensors"], "one of -r, --energy and --error"),
        (["diff", "a.safetensors", "m.safetensors"], "MERGED BASE ADAPTER"),
        (["diff", "m.safetensors", "none.safetensors"], "none.safetensors"),
    ],
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(there, cli: Cli, arguments, says):
    before = {p.name: p.read_bytes() for p in there.iterdir()}
    done = cli(*arguments)
    assert done.status == 1
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in there.iterdir()} == before


def test_what_no_error_is_known_of_is_null_in_json(cli: Cli):
    done = cli("combine", "a.safetensors", "--method", "dare", "-o", "c.safetensors", "--json")
    rows = json.loads(done.out, parse_constant=pytest.fail)["targets"]
    assert {row["error"] for row in rows} == {None}


def test_a_sum_of_adapters_counts_what_it_changes_once(cli: Cli):
    one = json.loads(cli("bake", "m.safetensors", "a.safetensors", "-o", "1.st", "--json").out)
    two = json.loads(
        cli("bake", "m.safetensors", "a.safetensors", "a.safetensors", "-o", "2.st", "--json").out
    )
    assert one["changed"] == two["changed"]


def test_diff_takes_another_base_where_it_is_told_to(cli: Cli):
    arguments = ["diff", "tuned.safetensors", "tuned.safetensors", "a.safetensors"]
    assert "--ignore-fingerprint" in cli(*arguments).err
    assert cli(*arguments, "--ignore-fingerprint").status == 3
