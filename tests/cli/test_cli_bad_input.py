"""Bad input, as a user gives it: one clear sentence, a status that is not 0, nothing touched."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_samples import Cli, fill, small_weights, snapshot
from safetensors.torch import load_file, save_file

import lora_param as lp
from lora_param.files import writer

Refused = Callable[..., str]


@pytest.fixture
def refused(cli: Cli, here: Path) -> Refused:
    """Run a command that has to fail: its one sentence."""

    def run(*arguments: object, status: int = 1) -> str:
        before = snapshot(here)
        done = cli(*arguments)
        assert done.status == status, done
        assert done.out == ""
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1, "one sentence in one line"
        assert "Traceback" not in done.err
        assert "internal error" not in done.err
        assert snapshot(here) == before, "something was written"
        return done.err

    return run


def header(tree: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["stats", "PATH"],
        ["stats", "m.safetensors", "PATH"],
        ["apply", "PATH", "-t", "fc1", "-o", "new.safetensors"],
        ["apply", "PATH", "--dry-run"],
        ["bake", "PATH", "a.safetensors", "-o", "out.safetensors"],
        ["bake", "m.safetensors", "PATH", "-o", "out.safetensors"],
        ["bake", "m.safetensors", "PATH=0.5", "-o", "out.safetensors"],
        ["enable", "PATH"],
        ["disable", "PATH"],
    ],
    ids=" ".join,
)
def test_missing_path(refused: Refused, command: list[str]) -> None:
    said = refused(*(c.replace("PATH", "gone.safetensors") for c in command))
    assert "gone.safetensors does not exist; accepted: " in said


def test_empty_path_is_not_the_current_directory(refused: Refused) -> None:
    Path("model.safetensors").write_bytes(Path("m.safetensors").read_bytes())
    assert "''" in refused("stats", "")
    assert "''" in refused("bake", "", "a.safetensors", "--in-place")
    refused("bake", "m.safetensors", "a.safetensors", "-o", "")
    refused("bake", "m.safetensors", "a.safetensors", "-o", "", "--force")


BROKEN = {
    "empty.safetensors": b"",
    "empty.pt": b"",
    "empty.bin": b"",
    "empty.index.json": b"",
    "garbage.safetensors": bytes(range(256)) * 20,
    "garbage.pt": bytes(range(7, 256)) * 20,
    "garbage.bin": b"hello, world",
    "garbage.index.json": b"{'a'",
    "list.index.json": b"[]",
    "no-map.index.json": b"{}",
    "hole.safetensors": header(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    ),
    "overlap.safetensors": header(
        {
            "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        bytes(12),
    ),
    "reversed.safetensors": header(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)
    ),
    "short.safetensors": header(
        {"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(8)
    ),
    "shape.safetensors": header(
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "trailing.safetensors": header(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(80)
    ),
    "limit.safetensors": header({}, bytes(100), length=100_000_001),
    "negative.safetensors": header(
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "huge.safetensors": header(
        {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "dtype.safetensors": header(
        {"w": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(refused: Refused, name: str) -> None:
    Path(name).write_bytes(BROKEN[name])
    assert f"{name} cannot be read: " in refused("stats", name)
    refused("apply", name, "-o", "new.safetensors")
    assert name in refused("bake", name, "a.safetensors", "-o", "out" + Path(name).suffix)
    assert name in refused("bake", "m.safetensors", name, "-o", "out.safetensors")
    assert name in refused("disable", name)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "a.safetensors", "old.pt"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_truncated_files(refused: Refused, name: str, share: float) -> None:
    if name == "old.pt":
        torch.save(small_weights(), name, _use_new_zipfile_serialization=False)
    whole = Path(name).read_bytes()
    Path(f"cut-{name}").write_bytes(whole[: int(len(whole) * share)])
    assert f"cut-{name} cannot be read: " in refused("stats", f"cut-{name}")


def test_a_file_under_the_other_kinds_name(refused: Refused) -> None:
    Path("x.bin").write_bytes(Path("m.safetensors").read_bytes())
    Path("x.safetensors").write_bytes(Path("m.pt").read_bytes())
    assert "it is a safetensors file; rename it" in refused("stats", "x.bin")
    assert "it is a file of torch.save; rename it" in refused("stats", "x.safetensors")


@pytest.mark.parametrize(
    ("shard", "why"),
    [
        ("gone.safetensors", "is missing"),
        ("../m.safetensors", "lies outside"),
        ("sub/../../m.safetensors", "lies outside"),
        ("/etc/m.safetensors", "lies outside"),
        ("C:\\m.safetensors", "lies outside"),
        ("m.txt", "no weights file"),
    ],
)
def test_index_with_a_shard_that_is_not_there(refused: Refused, shard: str, why: str) -> None:
    Path("dir").mkdir()
    index = Path("dir/model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"fc1.weight": shard}}))
    for model in ("dir", "dir/", index):
        said = refused("stats", model)
        assert repr(shard) in said
        assert why in said


def test_index_that_disagrees_with_its_shards(refused: Refused) -> None:
    Path("dir").mkdir()
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2)}, "dir/x.safetensors")
    index = Path("dir/model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "c": "x.safetensors"}}))
    assert "which lacks them" in refused("stats", "dir")
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert "does not list b" in refused("stats", "dir")


def test_directories_without_weights(refused: Refused) -> None:
    Path("dir").mkdir()
    assert "an empty directory" in refused("stats", "dir")
    Path("dir/README").write_text("x")
    assert "README" in refused("stats", "dir")
    assert "is a directory" in refused("disable", "dir")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_needs_code(refused: Refused, zipped: bool) -> None:
    torch.save(torch.nn.Linear(2, 2), "mod.pt", _use_new_zipfile_serialization=zipped)
    content = {"state_dict": small_weights(), "args": argparse.Namespace(a=1)}
    torch.save(content, "args.ckpt", _use_new_zipfile_serialization=zipped)
    for name, needs in (("mod.pt", "Linear"), ("args.ckpt", "argparse.Namespace")):
        said = refused("stats", name)
        assert "needs code to be run" in said
        assert needs in said
        assert "safetensors.torch.save_file" in said
        assert "weights_only=False" not in said


def test_pickle_that_would_run_a_command(refused: Refused, here: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return os.system, (f"touch {here}/owned",)

    Path("evil.bin").write_bytes(pickle.dumps({"w": Evil()}))
    assert "system" in refused("stats", "evil.bin")
    torch.save({"w": Evil()}, "evil.pt")
    assert "system" in refused("stats", "evil.pt")
    assert not Path("owned").exists()


def test_pickle_without_data(refused: Refused) -> None:
    torch.save(small_weights() | {"gone.weight": torch.empty(4, 4, device="meta")}, "meta.pt")
    said = refused("bake", "meta.pt", "a.safetensors", "-o", "out.pt")
    assert "gone.weight is on the meta device" in said


def test_key_of_a_nested_state_dict(refused: Refused) -> None:
    torch.save({"ours": small_weights(), "theirs": small_weights()}, "two.pt")
    said = refused("stats", "two.pt")
    assert "ours, theirs" in said
    assert "--key" in said
    assert "accepted: ours, theirs" in refused("stats", "two.pt", "--key", "other")
    assert "nothing is nested" in refused("stats", "m.safetensors", "--key", "x")


def test_python_models(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "incomplete" in refused("stats", "python:x")
    assert "No module named" in refused("stats", "python:no_such_module:x")
    assert "returns a str" in refused("stats", "python:os:getcwd")
    said = refused("bake", "python:lora_param.demo.net:digit_net", "a.safetensors", "--in-place")
    assert "needs an output" in said


# --- choosing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["q_porj"], ["'q_porj' matches none of 8 weights", "Nearest: q_proj"]),
        (["fc1", "fc11"], ["'fc11' matches none", "fc1"]),
        (["**.nope.*"], ["matches none"]),
        (["re:("], ["regular expression"]),
        ([""], ["empty"]),
        (["[bold]x"], ["'[bold]x'"]),
        (["type:Linear"], ["needs a live model", "python:"]),
        (["fc1[0:99]"], ["fc1.weight[0:99]", "0:8"]),
        (["fc1[3/3]"], ["fc1.weight[3/3]"]),
        (["fc1[*]"], ["at least three dimensions"]),
        (["fc1", "fc1[0:4]"], ["overlap"]),
        (["fc1:rnak=2"], ["'rnak' is not a setting"]),
        (["fc1:rank=x"], ["rank in", "'x'"]),
        (["!fc1"], ["at least one pattern"]),
        (["fc1", "!fc1"], ["nothing is left"]),
        (["steps"], ["steps cannot be adapted", "int64"]),
        (["packed"], ["packed.weight cannot be adapted", "quantized", "packed.weight_scale"]),
        (["fc1.bias"], ["fc1.bias cannot be adapted", "1-dimensional"]),
    ],
)
def test_patterns(refused: Refused, patterns: list[str], says: list[str]) -> None:
    options = [x for p in patterns for x in ("-t", p)]
    said = refused("apply", "m.safetensors", *options, "-r", 2, "-o", "new.safetensors")
    for part in says:
        assert part in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-r", "0"], "rank is 0; accepted: a whole number of at least 1"),
        (["-r", "-1"], "rank is -1"),
        (["-r", "2", "--alpha", "nan"], "alpha is nan"),
        (["-r", "2", "--alpha", "0"], "alpha is 0"),
        (["-r", "2", "--dropout", "1"], "dropout is 1"),
        (["-r", "2", "--scaling", "x"], "accepted: standard, rslora, constant"),
        (["-r", "2", "--init", "x"], "accepted: kaiming"),
        (["-r", "2", "--variant", "x"], "accepted: lora"),
        (["-r", "2", "--tied", "x"], "accepted: error, together, apart"),
        (["-r", "2", "--seed", "-1"], "seed is -1"),
        (["-r", "2", "--seed", str(2**64)], "2**64 - 1"),
        (["-r", "2", "--name", ""], "adapter is ''"),
        (["-r", "2", "--exclude", "zzz"], "'zzz' matches none"),
    ],
)
def test_settings(refused: Refused, options: list[str], says: str) -> None:
    target = ["apply", "m.safetensors", "-t", "fc1", "-o", "new.safetensors"]
    assert says in refused(*target, *options)


def test_wrong_usage(refused: Refused) -> None:
    assert "--dry-run" in refused("apply", "m.safetensors", "-t", "fc1", status=2)
    assert "'-r'" in refused("apply", "m.safetensors", "-r", "two", status=2)
    assert "MODEL" in refused("apply", status=2)
    assert "--frobnicate" in refused("stats", "--frobnicate", "m.safetensors", status=2)
    assert "'frobnicate'" in refused("frobnicate", status=2)
    assert "--in-place" in refused("bake", "m.safetensors", "a.safetensors", status=2)
    both = ("bake", "m.safetensors", "a.safetensors", "--in-place", "-o", "x.safetensors")
    assert "--in-place" in refused(*both, status=2)


def test_one_side_of_a_tied_pair(refused: Refused, cli: Cli) -> None:
    shared = torch.randn(10, 6)
    torch.save({"emb.weight": shared, "head.weight": shared}, "tied.pt")
    said = refused("apply", "tied.pt", "-t", "head", "-r", 2, "-o", "new.safetensors")
    for part in ("head.weight is tied to emb.weight", "--tied together", "--tied apart"):
        assert part in said
    for choice, changed in (("together", {"emb", "head"}), ("apart", {"head"})):
        path = f"{choice}.safetensors"
        assert not cli("apply", "tied.pt", "-t", "head", "-r2", "-o", path, "--tied", choice).status
        fill(Path(path))
        assert not cli("bake", "tied.pt", path, "-o", f"{choice}.pt", "--verify").status
        after = torch.load(f"{choice}.pt", weights_only=True)
        assert {n for n in after if not torch.equal(after[n], shared)} == {
            f"{n}.weight" for n in changed
        }


# --- the adapter and its base -----------------------------------------------------------------


def changed_adapter(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    adapter = lp.read_adapter("a.safetensors")
    tensors = {k: change(t.clone()) if "fc10" in k else t for k, t in adapter.tensors.items()}
    lp.write_adapter(replace(adapter, tensors=tensors), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_factors_that_are_no_numbers(refused: Refused, cli: Cli, value: float) -> None:
    changed_adapter("bad.safetensors", lambda t: t.index_fill_(0, torch.tensor(0), value))
    for out in (["-o", "out.safetensors"], ["--in-place"]):
        said = refused("bake", "m.safetensors", "bad.safetensors", *out)
        assert "of fc10.weight in bad.safetensors holds NaN or infinite values" in said
    assert "1 of 2 targets not finite" in cli("stats", "bad.safetensors").out


def test_a_merged_weight_that_overflows(refused: Refused) -> None:
    changed_adapter("big.safetensors", lambda t: t * 1e30)
    assert "fc10.weight" in refused(
        "bake", "m.safetensors", "big.safetensors", "-o", "out.safetensors"
    )
    changed_adapter("big16.safetensors", lambda t: t * 1e4)
    bake = ("bake", "m.safetensors", "big16.safetensors", "-o", "out.safetensors")
    assert "float16" in refused(*bake, "--dtype", "fp16")


def test_another_base(refused: Refused, cli: Cli) -> None:
    base = load_file("m.safetensors")
    others = {
        "names": {f"net.{k}": v for k, v in base.items()},
        "shapes": base | {"fc1.weight": torch.ones(9, 9)},
        "values": base | {"fc1.weight": base["fc1.weight"] + 1},
        "dtypes": base | {"fc1.weight": base["fc1.weight"].half()},
    }
    said = {}
    for kind, weights in others.items():
        save_file(weights, f"{kind}.safetensors")
        bake = ("bake", f"{kind}.safetensors", "a.safetensors", "-o", "out.safetensors")
        said[kind] = refused(*bake)
        assert f"{kind}.safetensors" in said[kind]
        refused("stats", f"{kind}.safetensors", "a.safetensors")
        flag = "--ignore-fingerprint"
        if kind in ("names", "shapes"):
            assert refused(*bake, flag) == said[kind], "the flag is for the fingerprint alone"
            assert flag not in said[kind]
        else:
            assert flag in said[kind]
            assert cli(*bake, flag).status == 0
            assert cli("stats", f"{kind}.safetensors", "a.safetensors", flag).status == 0
            Path("out.safetensors").unlink()
    assert "0 of 2 targets fit" in said["names"]
    assert "In the adapter alone: fc1.weight, fc10.weight." in said["names"]
    assert "The base has, for instance, net.fc1.weight, net.fc10.weight." in said["names"]
    assert "fc1.weight is (9, 9), the adapter was made on (8, 8)" in said["shapes"]
    assert "fc1.weight (values)" in said["values"]
    assert "fc1.weight (dtype float16, not float32)" in said["dtypes"]


def test_a_model_is_no_adapter(refused: Refused) -> None:
    for command in (["disable", "m.safetensors"], ["stats", "m.pt", "m.safetensors"]):
        said = refused(*command)
        assert "it looks like a model" in said
        assert "lora-param apply" in said
    assert "not a .safetensors file" in refused("enable", "m.pt")
    names = {"base_model.model.fc1.lora_A.weight": torch.ones(2, 8)}
    save_file(names, "peft.safetensors")
    assert "a PEFT adapter" in refused("stats", "m.safetensors", "peft.safetensors")


def test_an_adapter_that_was_tampered_with(refused: Refused) -> None:
    raw = Path("a.safetensors").read_bytes()
    for old, new in ((b'\\"rank\\":2', b'\\"rank\\":3'), (b'\\"scale\\":8.0', b'\\"scale\\":9.0')):
        assert old in raw
        Path("bad.safetensors").write_bytes(raw.replace(old, new))
        assert "bad.safetensors cannot be read: its adapter config" in refused(
            "bake", "m.safetensors", "bad.safetensors", "-o", "out.safetensors"
        )


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("x", "the weight of a.safetensors is 'x'; accepted: a number"),
        ("", "the weight of a.safetensors is ''"),
        ("nan", "a finite number"),
        ("1e999", "a finite number"),
    ],
)
def test_weights_of_adapters(refused: Refused, weight: str, says: str) -> None:
    adapter = f"a.safetensors={weight}"
    assert says in refused("bake", "m.safetensors", adapter, "-o", "out.safetensors")


def test_a_bake_that_would_change_nothing(refused: Refused, cli: Cli) -> None:
    cli("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", "fresh.safetensors")
    for out in (["-o", "out.safetensors"], ["--in-place"]):
        said = refused("bake", "m.safetensors", "fresh.safetensors", *out)
        assert "no element would change" in said
        assert "still zero" in said
    changed_adapter("tiny.safetensors", lambda t: t * 1e-9)
    cli("disable", "tiny.safetensors", "-t", "fc1")
    said = refused("bake", "m.safetensors", "tiny.safetensors", "-o", "out.safetensors")
    assert "too small for the stored dtype" in said
    # What is asked for is done: disabled, or with the weight 0, it gives the base.
    assert cli("disable", "fresh.safetensors").status == 0
    for adapter in ("fresh.safetensors", "a.safetensors=0"):
        assert cli("bake", "m.safetensors", adapter, "-o", "out.safetensors", "--force").status == 0
        assert Path("out.safetensors").read_bytes() == Path("m.safetensors").read_bytes()


def test_toggling_what_is_not_there(refused: Refused) -> None:
    for command in ("enable", "disable"):
        assert "'v_proj' matches none" in refused(command, "a.safetensors", "-t", "v_proj")
        refused(command, "a.safetensors", "-t", "fc1", "-t", "nope")
        refused(command, "a.safetensors", "-t", "fc1[0:4]")


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["apply", "none.safetensors", "--tied", "x"],
        ["apply", "none.safetensors", "--init", "x"],
        ["bake", "none.safetensors", "none", "--layout", "x"],
        ["bake", "none.safetensors", "none", "--dtype", "x"],
        ["bake", "none.safetensors", "none", "--as", "x"],
        ["bake", "none.safetensors", "none", "--max-shard-size", "x"],
        ["convert", "none.safetensors", "--to", "x"],
        ["convert", "none.safetensors", "--to", "peft", "--layout", "x"],
        ["combine", "none.safetensors", "--method", "x"],
    ],
)
def test_a_misspelled_value_is_told_before_a_file_is_looked_at(
    refused: Refused, command: list[str]
) -> None:
    Path("old.safetensors").write_text("mine")
    assert "is 'x'; accepted: " in refused(*command, "-o", "old.safetensors")


def test_options_are_called_as_they_are_here_and_as_keywords_in_the_library(
    refused: Refused,
) -> None:
    command = ("combine", "a.safetensors", "-o", "a.safetensors")
    assert "replace it with --force." in refused(*command)
    with pytest.raises(lp.UserError, match=r"replace it with force=True\."):
        lp.write_adapter(lp.read_adapter("a.safetensors"), "a.safetensors", force=False)


def test_model_and_adapter_in_the_wrong_order(refused: Refused) -> None:
    said = refused("stats", "a.safetensors", "m.safetensors")
    assert "accepted: the model first: m.safetensors a.safetensors." in said


def test_an_output_that_exists(refused: Refused, cli: Cli) -> None:
    Path("old.safetensors").write_text("mine")
    apply = ("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", "old.safetensors")
    bake = ("bake", "m.safetensors", "a.safetensors", "-o", "old.safetensors")
    for command in (apply, bake):
        assert "old.safetensors was not written: it exists" in refused(*command)
        assert "--force" in refused(*command)
        assert cli(*command, "--force").status == 0
        assert Path("old.safetensors").read_bytes() != b"mine"


def test_an_output_that_is_the_input(refused: Refused, here: Path) -> None:
    Path("link.safetensors").symlink_to("m.safetensors")
    Path("dir").mkdir()
    Path("dir/model.safetensors").write_bytes(Path("m.safetensors").read_bytes())
    for out in ("m.safetensors", "./m.safetensors", here / "m.safetensors", "link.safetensors"):
        for force in ([], ["--force"]):
            refused("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", out, *force)
            refused("bake", "m.safetensors", "a.safetensors", "-o", out, *force)
    bake = ("bake", "dir", "a.safetensors", "--force", "-o")
    for out in ("dir", "dir/", "./dir/../dir", here / "dir", "dir/inner", "."):
        refused(*bake, out)
    said = refused("bake", "m.safetensors", "a.safetensors", "-o", "a.safetensors", "--force")
    assert "the adapter a.safetensors is there" in said


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("gone/x.safetensors", "does not exist"),
        ("m.pt/x.safetensors", "is not a directory"),
        ("dir", ""),
        ("x.pt", ""),
        ("x", ""),
        ("/dev/null/x.safetensors", "is not a directory"),
        ("/proc/x.safetensors", ""),
    ],
)
def test_an_output_that_cannot_be_written(refused: Refused, out: str, why: str) -> None:
    Path("dir").mkdir()
    said = refused("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", out)
    assert f"{out} was not written: " in said
    assert why in said
    if out != "x":
        said = refused("bake", "m.safetensors", "a.safetensors", "-o", out)
        assert f"{out} was not written: " in said


def test_a_full_disk(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(writer.os, "fsync", full)
    for command in (
        ("bake", "m.safetensors", "a.safetensors", "-o", "x.safetensors"),
        ("bake", "m.safetensors", "a.safetensors", "--in-place"),
        ("bake", "m.pt", "a.safetensors", "--in-place"),
        ("apply", "m.safetensors", "-t", "fc1", "-r", 2, "-o", "x.safetensors"),
        ("disable", "a.safetensors"),
    ):
        assert "No space left on device" in refused(*command)


def test_a_directory_without_permission(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("locked").mkdir()
    # Root may write anywhere: the question is answered as anyone else would hear it.
    monkeypatch.setattr(writer.os, "access", lambda *_: False)
    bake = ("bake", "m.safetensors", "a.safetensors", "-o", "locked/x.safetensors")
    assert "is not writable" in refused(*bake)


def test_the_output_has_the_kind_of_the_input(refused: Refused) -> None:
    assert ".safetensors" in refused("bake", "m.safetensors", "a.safetensors", "-o", "x.pt")
    assert "torch.save" in refused("bake", "m.pt", "a.safetensors", "-o", "x.safetensors")
    said = refused("bake", "m.safetensors", "a.safetensors", "-o", "x.safetensors", "--dtype", "i8")
    assert "dtype is 'i8'; accepted: float32" in said


def test_a_directory_that_is_no_checkpoint_is_not_replaced(refused: Refused) -> None:
    for name in ("base", "precious"):
        Path(name).mkdir()
    Path("base/model.safetensors").write_bytes(Path("m.safetensors").read_bytes())
    Path("precious/thesis.txt").write_text("years")
    said = refused("bake", "base", "a.safetensors", "-o", "precious", "--force")
    assert "holds no checkpoint" in said


# --- text that is no markup, and bugs ---------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["[bold]x[red]", "[0:64]", "a b  c", "é–‖", "-r", "a=b", "=1", ":smile:", "a\\[b]", "x%s{y}"],
)
def test_names_are_shown_as_they_are(cli: Cli, here: Path, name: str) -> None:
    model, adapter, out = f"{name}.safetensors", f"{name}-a.safetensors", f"{name}-o.safetensors"
    Path(model).write_bytes(Path("m.safetensors").read_bytes())
    done = cli("apply", "-t", "fc1", "-r", 2, f"-o{adapter}", "--", model)
    assert done.status == 0, done
    assert f"Wrote {adapter}." in done.out
    fill(Path(adapter))
    assert model in cli("stats", "--", model).out
    assert adapter in cli("stats", "--", model, adapter).out
    done = cli("bake", f"--output={out}", "--", model, adapter)
    assert done.status == 0, done
    assert out in done.out
    assert cli("bake", f"--output={out}", "--force", "--", model, f"{adapter}=0.5").status == 0
    done = cli("disable", "--", adapter)
    assert f"{adapter}: 0 of 1 target" in done.out
    assert f"{name} does not exist" in cli("stats", "--", name).err
    again = cli("apply", "-t", "fc1", "-r", 2, f"-o{adapter}", "--", model)
    assert f"{adapter} was not written" in again.err
    assert here.exists()


def test_a_bug_of_ours_is_one_sentence_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("x\ny" * 400)

    monkeypatch.setattr(lp, "stats", broken)
    done = cli("stats", "x")
    assert done.status == 70
    assert "internal error: ZeroDivisionError" in done.err
    assert done.err.count("\n") == 1
    assert len(done.err) < 500
    monkeypatch.setenv("LORA_PARAM_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli("stats", "x")


def test_a_reader_that_has_gone(here: Path) -> None:
    code = "import sys; from lora_param.cli import main; main()"
    command = [sys.executable, "-c", code, "stats", "m.safetensors"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=here, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""
