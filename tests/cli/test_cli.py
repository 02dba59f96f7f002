"""Every command as it is meant to be used: what it prints, writes, and leaves alone."""

from __future__ import annotations

import filecmp
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import EFFICIENTNET, MINILM, RESEMBLYZER, SCEPTR, find_asset
from cli_samples import Cli, Done, fill, small_weights, snapshot
from safetensors.torch import load_file, save_file

import lora_param as lp
from lora_param.cli import terminal
from lora_param.cli.commands import app

ESCAPE = "\x1b"
OPTIONS = {
    "apply": "-t --target --exclude -r --rank --alpha --scaling --init --dropout --variant --seed "
    "--dry-run -o --output --tied --name --key --force --no-sync --json",
    "stats": "--fail-on-dead --norms --no-norms --html --key --layout --names "
    "--ignore-fingerprint --force --json",
    "enable": "-t --target --json",
    "disable": "-t --target --json",
    "bake": "-o --output --dtype --in-place --verify --no-sync --force --key --layout --names "
    "--ignore-fingerprint --json",
    "convert": "--to -o --output --base --key --layout --names --ignore-fingerprint --force "
    "--no-sync --json",
    "check": "--for --names --key --json",
    "extract": "-o --output -t --target -r --rank --energy --error --exact --name --seed --key "
    "--force --no-sync --json",
    "combine": "-o --output --method -r --rank --density --name --seed --force --no-sync --json",
    "resize": "-o --output -r --rank --energy --error --force --no-sync --json",
    "diff": "--html --key --ignore-fingerprint --force --json",
    "demo": "-o --output --seed --json",
}


def only_json(done: Done) -> Any:
    """The one JSON document that is all there is on standard output."""
    assert done.status == 0, done
    assert done.err == ""
    return json.loads(done.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def expected(base: torch.Tensor, adapter: lp.Adapter, key: str, weight: float = 1) -> torch.Tensor:
    f, t = adapter.factors(key), adapter.targets[key]
    merged = base.float().clone()
    part = merged[t.target.region.index]
    part += (t.scale * weight * (f["lora_B"] @ f["lora_A"])).reshape(part.shape)
    return merged.to(base.dtype)


# --- each command -----------------------------------------------------------------------------


def test_apply(cli: Cli) -> None:
    done = cli("apply", "m.safetensors", "-t", "*.*.*.{q,v}_proj", "-t", "fc1:rank=4", "-r", 2)
    assert done.status == 2, "-o is needed"
    options = ["-t", "*.*.*.{q,v}_proj", "-t", "fc1:rank=4,alpha=4", "-r", 2, "--seed", 3]
    done = cli("apply", "m.safetensors", *options, "-o", "x.safetensors")
    assert done.status == 0
    assert done.err == ""
    adapter = lp.read_adapter("x.safetensors")
    assert {k: (t.settings.rank, t.scale) for k, t in adapter.targets.items()} == {
        "blocks.0.attn.q_proj.weight": (2, 8.0),
        "blocks.0.attn.v_proj.weight": (2, 8.0),
        "fc1.weight": (4, 1.0),
    }
    assert all(not adapter.factors(k)["lora_B"].any() for k in adapter.targets)
    assert all(adapter.factors(k)["lora_A"].any() for k in adapter.targets)
    data = only_json(cli("apply", "m.safetensors", *options, "-o", "y.safetensors", "--json"))
    assert Path("x.safetensors").read_bytes() == Path("y.safetensors").read_bytes()
    assert data["output"] == "y.safetensors"
    assert data["trainable"] == adapter.trainable == 2 * 14 * 2 + 16 * 4
    assert data["base"] == 8 * 6 * 2 + 8 * 8 * 2 + 8 + 8, "integers are not counted"
    assert data["percent"] == pytest.approx(100 * data["trainable"] / data["base"])
    assert [(c["pattern"], c["matched"]) for c in data["counts"]] == [
        ("*.*.*.{q,v}_proj", 2),
        ("fc1:rank=4,alpha=4", 1),
    ]
    assert f"trainable {data['trainable']} of {data['base']} (" in done.out


def test_apply_without_a_seed_differs_each_time(cli: Cli) -> None:
    for name in "xy":
        cli("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", f"{name}.safetensors")
    assert Path("x.safetensors").read_bytes() != Path("y.safetensors").read_bytes()


@pytest.mark.parametrize("with_output", [True, False])
def test_dry_run_writes_nothing(cli: Cli, here: Path, with_output: bool) -> None:
    before = snapshot(here)
    output = ["-o", "x.safetensors"] if with_output else []
    done = cli("apply", "m.safetensors", "-t", "fc1", "-r", 2, "--dry-run", *output)
    assert done.status == 0
    assert "Wrote" not in done.out
    assert "trainable 32 of" in done.out
    data = only_json(cli("apply", "m.safetensors", "-r2", "--dry-run", "--json", *output))
    assert data["output"] is None
    assert snapshot(here) == before


def test_apply_says_what_all_linear_left_out(cli: Cli) -> None:
    weights = {"embed.weight": torch.ones(9, 4), "lm_head.weight": torch.ones(9, 4)}
    save_file(weights | {"fc.weight": torch.ones(4, 4)}, "lm.safetensors")
    done = cli("apply", "lm.safetensors", "-r", 2, "--dry-run")
    assert "left out: 2 weights" in done.out
    assert "an embedding, by its name" in done.out


def test_exclude(cli: Cli) -> None:
    run = ["apply", "m.safetensors", "-t", "fc1*", "-r", 2, "--exclude", "fc10", "--dry-run"]
    data = only_json(cli(*run, "--json"))
    assert [t["target"] for t in data["targets"]] == ["fc1.weight"], "fc1 is a prefix of fc10"


def test_stats(cli: Cli) -> None:
    model = only_json(cli("stats", "m.safetensors", "--json"))
    assert model["base"] == 240
    assert len(model["weights"]) == 8
    assert model["rows"] == []
    adapter = only_json(cli("stats", "a.safetensors", "--json"))
    assert adapter["trainable"] == 64
    assert [row["weight_norm"] for row in adapter["rows"]] == [None, None]
    both = only_json(cli("stats", "m.safetensors", "a.safetensors", "--json"))
    assert both["percent"] == pytest.approx(100 * 64 / 240)
    base, record = load_file("m.safetensors"), lp.read_adapter("a.safetensors")
    for row in both["rows"]:
        W = base[row["target"]].double()
        delta = expected(W, record, row["target"]).double() - W
        assert row["update_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert row["ratio"] == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)
        s = torch.linalg.svdvals(delta)[:2]
        share = s / s.sum()
        assert row["effective_rank"] == pytest.approx((-(share * share.log()).sum()).exp().item())
    cheap = only_json(cli("stats", "m.safetensors", "a.safetensors", "--json", "--no-norms"))
    assert cheap["rows"][0]["update_norm"] is None
    assert cheap["trainable"] == 64


def test_fail_on_dead(cli: Cli) -> None:
    assert cli("stats", "m.safetensors", "a.safetensors", "--fail-on-dead").status == 0
    cli("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", "fresh.safetensors")
    for arguments in (["fresh.safetensors"], ["m.safetensors", "fresh.safetensors", "--no-norms"]):
        done = cli("stats", *arguments, "--fail-on-dead")
        assert done.status == 1
        assert "1 of 1 target still zero" in done.out
        assert cli("stats", *arguments).status == 0
    done = cli("stats", "fresh.safetensors", "--fail-on-dead", "--json")
    assert done.status == 1
    assert json.loads(done.out)["dead"] == ["fc1.weight"]


def test_enable_and_disable(cli: Cli) -> None:
    before = Path("a.safetensors").read_bytes()
    done = cli("disable", "a.safetensors", "-t", "fc10")
    assert done.status == 0
    assert done.out == "a.safetensors: 1 of 2 targets enabled, 1 disabled.\n"
    shown = cli("stats", "m.safetensors", "a.safetensors")
    assert "1 of 2 targets disabled: the base alone" in shown.out
    assert only_json(cli("disable", "a.safetensors", "--json")) == {
        "adapter": "a.safetensors",
        "enabled": [],
        "disabled": ["fc1.weight", "fc10.weight"],
    }
    assert only_json(cli("enable", "a.safetensors", "-t", "fc1*", "--json"))["disabled"] == []
    assert Path("a.safetensors").read_bytes() == before


@pytest.mark.parametrize("base", ["m.safetensors", "m.pt"])
def test_bake(cli: Cli, base: str) -> None:
    out = "out" + Path(base).suffix
    report = only_json(cli("bake", base, "a.safetensors", "-o", out, "--verify", "--json"))
    assert report["verified"]
    assert report["changed"] == 128
    record = lp.read_adapter("a.safetensors")
    read = load_file if base.endswith(".safetensors") else torch.load
    before, after = read(base), read(out)
    assert list(before) == list(after)
    for name, W in before.items():
        want = expected(W, record, name) if name in record.targets else W
        assert torch.equal(after[name], want), name
    shown = cli("bake", base, "a.safetensors", "-o", f"2{out}", "--verify").out
    assert "verified" in shown
    assert "baked 2 of 2 targets, 128 elements changed" in shown


def test_bake_several_adapters_with_weights(cli: Cli) -> None:
    cli("apply", "m.safetensors", "-t", "fc1", "-t", "q_proj", "-r", 1, "-o", "b.safetensors")
    fill(Path("b.safetensors"), seed=2)
    adapters = ["a.safetensors=0.5", "b.safetensors=-2"]
    assert cli("bake", "m.safetensors", *adapters, "-o", "out.safetensors").status == 0
    base, after = load_file("m.safetensors"), load_file("out.safetensors")
    a, b = lp.read_adapter("a.safetensors"), lp.read_adapter("b.safetensors")
    W = base["fc1.weight"]
    want = expected(W, a, "fc1.weight", 0.5) + expected(W, b, "fc1.weight", -2) - W
    torch.testing.assert_close(after["fc1.weight"], want)
    want = expected(base["fc10.weight"], a, "fc10.weight", 0.5)
    assert torch.equal(after["fc10.weight"], want)
    q = "blocks.0.attn.q_proj.weight"
    assert torch.equal(after[q], expected(base[q], b, q, -2))


def test_bake_in_place(cli: Cli, here: Path) -> None:
    Path("dir").mkdir()
    Path("dir/model.safetensors").write_bytes(Path("m.safetensors").read_bytes())
    Path("dir/config.json").write_text("{}")
    for place, baked in (
        ("m.safetensors", "m.safetensors"),
        ("dir", "dir/model.safetensors"),
    ):
        before = Path(baked).read_bytes()
        assert cli("bake", place, "a.safetensors", "--in-place").status == 0
        assert Path(baked).read_bytes() != before
        assert cli("bake", place, "a.safetensors", "--in-place").status == 1, "not its base now"
    assert Path("dir/model.safetensors").read_bytes() == Path("m.safetensors").read_bytes()
    assert sorted(p.name for p in Path("dir").iterdir()) == ["config.json", "model.safetensors"]
    assert not [p for p in here.iterdir() if p.name.endswith(".tmp")]


def test_bake_in_another_dtype(cli: Cli) -> None:
    run = ["bake", "m.safetensors", "a.safetensors", "--verify", "--dtype", "bf16", "-o"]
    assert cli(*run, "out.safetensors").status == 0
    base, after = load_file("m.safetensors"), load_file("out.safetensors")
    record = lp.read_adapter("a.safetensors")
    want = expected(base["fc1.weight"], record, "fc1.weight").bfloat16()
    assert torch.equal(after["fc1.weight"], want)
    assert after["packed.weight"].dtype == torch.uint8
    assert after["steps"].dtype == torch.int64


def test_links_are_followed(cli: Cli) -> None:
    Path("link.safetensors").symlink_to("m.safetensors")
    Path("alink.safetensors").symlink_to("a.safetensors")
    Path("olink.safetensors").symlink_to("real.safetensors")
    Path("dlink").symlink_to("d")
    Path("d").mkdir()
    assert cli("disable", "alink.safetensors", "-t", "fc10").status == 0
    assert Path("alink.safetensors").is_symlink()
    out = "olink.safetensors"
    assert cli("bake", "link.safetensors", "alink.safetensors", "-o", out).status == 0
    assert Path(out).is_symlink()
    assert Path("real.safetensors").is_file()
    assert cli("bake", "link.safetensors", "alink.safetensors", "-o", "dlink/x.safetensors")
    assert Path("d/x.safetensors").read_bytes() == Path("real.safetensors").read_bytes()
    assert cli("bake", "link.safetensors", "alink.safetensors", "--in-place").status == 0
    assert Path("link.safetensors").is_symlink()
    assert Path("m.safetensors").read_bytes() == Path("real.safetensors").read_bytes()


def test_paths_in_all_their_forms(cli: Cli, here: Path) -> None:
    Path("dir/sub").mkdir(parents=True)
    Path("dir/model.safetensors").write_bytes(Path("m.safetensors").read_bytes())
    Path("dir").chmod(0o555)
    try:
        data = [
            only_json(cli("stats", path, "a.safetensors", "--json"))["rows"]
            for path in ("dir", "dir/", here / "dir", "./dir/sub/..", "dir/model.safetensors")
        ]
        assert all(rows == data[0] for rows in data)
        assert cli("bake", "dir/", "a.safetensors", "-o", "out/").status == 0
        assert cli("bake", "dir/", "a.safetensors", "-o", here / "two").status == 0
        run = ["bake", "dir/model.safetensors", "a.safetensors", "-o", "one.safetensors"]
        assert cli(*run).status == 0
        assert filecmp.cmp("out/model.safetensors", "one.safetensors", shallow=False)
        assert filecmp.cmp("two/model.safetensors", "one.safetensors", shallow=False)
    finally:
        Path("dir").chmod(0o755)


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    weights = small_weights()
    names = list(weights)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        save_file({n: weights[n] for n in held}, folder / shard, {"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in weights.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {n: s for s, held in shards.items() for n in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return weights


def test_a_directory_of_shards(cli: Cli) -> None:
    weights = sharded(Path("dir"))
    one = only_json(cli("stats", "m.safetensors", "a.safetensors", "--json"))
    for place in ("dir", "dir/model.safetensors.index.json"):
        data = only_json(cli("stats", place, "a.safetensors", "--json"))
        assert data["rows"] == one["rows"]
        assert data["base"] == one["base"]
        assert {w["name"] for w in data["weights"]} == set(weights)
    report = only_json(cli("bake", "dir", "a.safetensors", "-o", "out", "--verify", "--json"))
    assert len(report["files"]) == 5
    assert report["bytes"] == sum(p.stat().st_size for p in Path("out").iterdir())
    for path in Path("dir").iterdir():
        same = filecmp.cmp(path, Path("out") / path.name, shallow=False)
        held = load_file(path) if path.suffix == ".safetensors" else {}
        assert same == (not {"fc1.weight", "fc10.weight"} & set(held)), path
    run = ["bake", "dir", "a.safetensors", "-o", "half", "--verify", "--dtype", "fp16", "--json"]
    only_json(cli(*run))
    index = json.loads(Path("half/model.safetensors.index.json").read_text())
    held = [t for p in Path("half").glob("*.safetensors") for t in load_file(p).values()]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in held)
    assert json.loads(Path("half/config.json").read_text()) == {"dtype": "float16"}


def test_a_model_that_a_call_builds(cli: Cli) -> None:
    Path("my_net.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Linear(6, 5)\n"
    )
    try:
        run = ["apply", "python:my_net:net", "-t", "type:Linear", "-r", 2, "-o", "n.safetensors"]
        assert cli(*run).status == 0
        fill(Path("n.safetensors"))
        for out in ("n.pt", "out.safetensors"):
            assert cli("bake", "python:my_net:net", "n.safetensors", "-o", out).status == 0
        torch.manual_seed(0)
        W = torch.nn.Linear(6, 5).weight
        after = torch.load("n.pt")["weight"]
        assert torch.equal(after, expected(W, lp.read_adapter("n.safetensors"), "weight"))
        assert torch.equal(load_file("out.safetensors")["weight"], after)
    finally:
        sys.modules.pop("my_net", None)


def test_odd_tensors_beside(cli: Cli) -> None:
    """Scalars, nothing at all, complex, 8-bit floats, strides: kept as they are, or adapted."""
    flat = torch.randn(16, 8)
    weights = {
        "scalar": torch.tensor(2.0),
        "none.weight": torch.zeros(0, 4),
        "c.weight": torch.randn(4, 4, dtype=torch.complex64),
        "f8.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "h.weight": torch.randn(8, 8).half(),
        "b.weight": torch.randn(8, 8).bfloat16(),
        "d.weight": torch.randn(8, 8).double(),
        "t.weight": torch.randn(6, 8).t(),
        "v1.weight": flat[:8],
        "v2.weight": flat[8:],
        "e.weight": torch.randn(1, 8).expand(8, 8),
        "sparse": torch.eye(4).to_sparse(),
    }
    torch.save(weights, "odd.pt")
    save_file({k: v.contiguous() for k, v in weights.items() if k != "sparse"}, "odd.safetensors")
    for kind in ("pt", "safetensors"):
        model, adapter, out = f"odd.{kind}", f"odd-{kind}.safetensors", f"out.{kind}"
        run = ["apply", model, "-t", "{f8,h,b,d,t,v2,e}", "-r", 2, "--seed", 0]
        assert cli(*run, "-o", adapter).status == 0
        fill(Path(adapter))
        assert cli("bake", model, adapter, "-o", out, "--verify").status == 0
        after = torch.load(out) if kind == "pt" else load_file(out)
        record = lp.read_adapter(adapter)
        assert list(after) == [n for n in weights if n in after] or kind == "safetensors"
        for name, tensor in after.items():
            W = weights[name]
            if name == "sparse":
                assert torch.equal(tensor.to_dense(), W.to_dense())
            elif name not in record.targets:
                assert torch.equal(tensor, W)
            elif name == "d.weight":
                torch.testing.assert_close(tensor.float(), expected(W, record, name).float())
            else:
                want = expected(W, record, name)
                assert torch.equal(tensor.float(), want.float()), name
        half = ["bake", model, adapter, "-o", f"half.{kind}", "--verify", "--dtype", "bf16"]
        assert cli(*half).status == 0
        assert only_json(cli("stats", model, adapter, "--json"))["dead"] == []


def test_very_large_updates_are_shown_short(cli: Cli) -> None:
    record = lp.read_adapter("a.safetensors")
    tensors = {k: t * 1e30 for k, t in record.tensors.items()}
    lp.write_adapter(lp.Adapter(record.targets, tensors, record.base), "big.safetensors")
    done = cli("stats", "m.safetensors", "big.safetensors")
    assert "e+6" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


# --- how it looks -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_narrow_and_wide(cli: Cli, monkeypatch: Any, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (
        ["stats", "m.safetensors", "a.safetensors"],
        ["apply", "m.safetensors", "-t", "fc1*", "-t", "q_proj", "-r", 2, "--dry-run"],
        ["bake", "m.safetensors", "a.safetensors", "-o", "o.safetensors", "--force"],
    ):
        shown = cli(*arguments).out
        assert ESCAPE not in shown
        assert max(map(len, shown.splitlines())) <= width
        assert all(line == line.rstrip() for line in shown.splitlines())
        assert "fc10.weight" in shown, "no name is cut"


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(cli: Cli, monkeypatch: Any, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = cli(command, "--help")
    assert done.status == 0
    for option in OPTIONS[command].split():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.out), option
    assert re.search(r"(^|\s)-h\b", done.out)


def test_help_lists_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert done.status == 0
    listed = {c.name or c.callback.__name__ for c in app.registered_commands}  # type: ignore[union-attr]
    assert listed == set(OPTIONS)
    for name in listed:
        assert re.search(rf"│ {name} ", done.out), name


def terminal_output(command: list[str], here: Path, **env: str) -> str:
    """What a command shows on a terminal of its own."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    whole = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_param", *command],
        cwd=here,
        stdout=follower,
        stderr=follower,
        env=whole | {"TERM": "xterm-256color"} | env,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(leader)
    return shown.decode()


def test_colour_on_a_terminal_alone(here: Path) -> None:
    command = ["stats", "m.safetensors", "a.safetensors"]
    assert ESCAPE in terminal_output(command, here)
    assert "\x1b[3" not in terminal_output(command, here, NO_COLOR="1")
    assert ESCAPE not in terminal_output([*command, "--json"], here)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_after_a_second_and_on_a_terminal_alone(monkeypatch: Any) -> None:
    def shown(stream: io.StringIO, quiet: bool = False) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.progress_bar("Baking [x]", quiet=quiet) as report:
            if report is not None:
                for i in range(4):
                    report(i, 4, "[bold]")
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    assert shown(Terminal()) == "", "all was done within a second"
    monkeypatch.setattr(terminal, "_SHOW_AFTER", -1.0)
    assert "Baking" in shown(Terminal())
    assert shown(io.StringIO()) == ""
    assert shown(Terminal(), quiet=True) == ""


def test_files_are_closed_and_nothing_warns(here: Path) -> None:
    commands = [
        ["apply", "m.pt", "-t", "fc1", "-r", "2", "-o", "n.safetensors"],
        ["stats", "m.safetensors", "a.safetensors"],
        ["disable", "a.safetensors", "-t", "fc1"],
        ["bake", "m.safetensors", "a.safetensors", "-o", "o.safetensors", "--verify"],
        ["bake", "m.pt", "a.safetensors", "-o", "o.pt", "--verify"],
    ]
    code = (
        "import gc, json, sys\n"
        "from lora_param.cli.commands import app\n"
        "from lora_param.cli.terminal import run\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = command\n"
        "    assert run(app) == 0, command\n"
        "    gc.collect()\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code, json.dumps(commands)],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "lora_param" in line], done.stderr
    assert "ResourceWarning" not in done.stderr


# --- many weights -----------------------------------------------------------------------------


def test_many_weights(cli: Cli) -> None:
    """4,000 weights, half of them targets: anything quadratic would be felt here."""
    names = [f"layers.{i}.attn.{p}_proj.weight" for i in range(1000) for p in "qkvo"]
    save_file({n: torch.ones(4, 4) for n in names}, "big.safetensors")
    run = ["apply", "big.safetensors", "-t", "{q,v}_proj", "-r", 1, "-o", "big-a.safetensors"]
    assert cli(*run, "--no-sync").status == 0
    assert cli("disable", "big-a.safetensors", "-t", "q_proj").status == 0
    assert "2,000 targets" in cli("stats", "big.safetensors", "big-a.safetensors").out


# --- the demo ---------------------------------------------------------------------------------


def test_demo_as_json(cli: Cli) -> None:
    data = only_json(cli("demo", "-o", "demo", "--json"))
    assert (data["parameters"], data["trainable"]) == (2_807_010, 6_794)
    assert round(data["percent"], 2) == 0.24
    assert data["off_is_before"]
    assert data["baked_is_on"]
    base, adapter = "demo/base.safetensors", "demo/adapter.safetensors"
    assert only_json(cli("stats", base, adapter, "--json"))["trainable"] == 6_794
    out = "demo/again.safetensors"
    assert cli("bake", base, adapter, "-o", out).status == 0
    assert Path(out).read_bytes() == Path("demo/baked.safetensors").read_bytes()


# --- real weights -----------------------------------------------------------------------------


@pytest.mark.assets
def test_minilm(cli: Cli, tmp_path: Path) -> None:
    base, adapter, out = find_asset(*MINILM), tmp_path / "real.safetensors", tmp_path / "out"
    done = cli("apply", base, "-t", "query", "-t", "value", "-r", 8, "-o", adapter)
    assert done.status == 0
    assert "trainable 73,728 of 22,713,216 (0.32 %)" in done.out
    assert "12 targets" in done.out
    fill(adapter)
    shown = cli("stats", base, adapter).out
    assert "trainable 73,728 of 22,713,216 (0.32 %)" in shown
    assert "LoRA" in shown
    assert cli("bake", base, adapter, "-o", out, "--verify", "--no-sync").status == 0
    before = load_file(base / "model.safetensors")
    after = load_file(out / "model.safetensors")
    record = lp.read_adapter(adapter)
    assert len(record.targets) == 12
    for name, W in before.items():
        want = expected(W, record, name) if name in record.targets else W
        assert torch.equal(after[name], want), name
    assert cli("disable", adapter).status == 0
    assert "12 of 12 targets disabled" in cli("stats", base, adapter).out
    assert cli("bake", base, adapter, "-o", out, "--force", "--no-sync").status == 0
    for path in base.rglob("*"):
        if path.is_file():
            assert filecmp.cmp(path, out / path.relative_to(base), shallow=False), path


@pytest.mark.assets
@pytest.mark.parametrize(
    ("asset", "patterns", "total"),
    [
        (RESEMBLYZER, ["lstm.weight_*"], 1_423_618),
        (EFFICIENTNET, ["_fc", "**._project_conv"], 4_652_008),
        (SCEPTR, ["in_proj_weight[0/3]", "in_proj_weight[2/3]"], 153_656),
    ],
    ids=["resemblyzer", "efficientnet", "sceptr"],
)
def test_real_pickles(
    cli: Cli, tmp_path: Path, asset: tuple[str, str], patterns: list[str], total: int
) -> None:
    base, adapter = find_asset(*asset), tmp_path / "real.safetensors"
    options = [x for p in patterns for x in ("-t", p)]
    plan = only_json(cli("apply", base, *options, "-r", 4, "-o", adapter, "--json"))
    assert plan["base"] == total, "buffers and the optimizer's state are no weights"
    fill(adapter)
    stats = only_json(cli("stats", base, adapter, "--json"))
    assert stats["trainable"] == plan["trainable"]
    assert stats["base"] == total
    out = tmp_path / f"out{base.suffix}"
    report = only_json(cli("bake", base, adapter, "-o", out, "--verify", "--no-sync", "--json"))
    assert set(report["baked"]) == {t["target"] for t in plan["targets"]}
    assert report["changed"] > 0
    assert cli("disable", adapter).status == 0
    assert cli("bake", base, adapter, "-o", out, "--force", "--no-sync").status == 0
    assert filecmp.cmp(base, out, shallow=False)


def test_print_of_a_plan_is_what_dry_run_shows(cli: Cli) -> None:
    for patterns in (["fc1"], ["fc1", "q_proj:rank=4", "!fc10"], ["all-linear"]):
        targets = [a for p in patterns for a in ("-t", p)]
        done = cli("apply", "m.safetensors", *targets, "-r", 2, "--dry-run")
        assert done.out == f"{lp.plan('m.safetensors', patterns, rank=2)}\n"


def test_a_bake_prints_its_report(cli: Cli) -> None:
    done = cli("bake", "m.safetensors", "a.safetensors", "-o", "o.safetensors")
    report = lp.bake_checkpoint("m.safetensors", ["a.safetensors"], "o.safetensors", force=True)
    assert done.out == f"{report}\n"


def zero_A(path: Path) -> None:
    """A trained B on an A that is all zero."""
    adapter = lp.read_adapter(path)
    tensors = {k: t * (0 if k.endswith("lora_A") else 1) for k, t in adapter.tensors.items()}
    lp.write_adapter(replace(adapter, tensors=tensors), path)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dead_means_the_same_to_stats_and_bake(variant: str, cli: Cli) -> None:
    """Zero A with a trained B, zero B, and factors that are trained."""
    for name, change in (("zero_A", zero_A), ("fresh", lambda _: None), ("trained", fill)):
        path = Path(f"{name}.safetensors")
        lp.apply_checkpoint("m.safetensors", ["fc1", "fc10"], path, rank=2, variant=variant)
        change(path)
        report = lp.bake_checkpoint("m.safetensors", [path], f"{name}.out.safetensors")
        shown = [row.dead for row in lp.stats("m.safetensors", path).rows]
        assert shown == [row.dead for row in report.rows] == [name != "trained"] * 2
        assert bool(report.dead) is (name != "trained")
        done = cli("stats", "m.safetensors", path, "--fail-on-dead")
        assert done.status == (name != "trained")
        assert ("still zero" in done.out) is ("still zero" in str(report)) is (name != "trained")
