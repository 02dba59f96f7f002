"""`--resume`: what a killed bake has written is kept, and the result is the same to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_samples import trained
from safetensors.torch import save_file

import lora_param as lp
from lora_param.adapter import Adapter
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.merging import Merging
from lora_param.errors import OutputError
from lora_param.files.journal import Journal, is_journal_of
from lora_param.formats import write_adapter

KILLED = """
import json, sys, torch
torch.set_num_threads(1)
from lora_param.api_files import bake_checkpoint
from lora_param.checkpoint import jobs, streaming
from lora_param.checkpoint.merging import Merging
streaming._MERGED, streaming._COPIED = 1 << 16, 1 << 18
left, whole = int(sys.argv[4]), Merging.merge
def merge(self, *args):
    global left
    left -= 1
    if left < 0:
        print("killed here", flush=True)
        sys.stdin.read()
    return whole(self, *args)
Merging.merge = merge
bake_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], **json.loads(sys.argv[5]))
print("whole", flush=True)
"""


@pytest.fixture(autouse=True)
def _small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal has a line for each."""
    monkeypatch.setattr("lora_param.checkpoint.streaming._MERGED", 1 << 16)
    monkeypatch.setattr("lora_param.checkpoint.streaming._COPIED", 1 << 18)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each block that is merged in this process."""
    names: list[str] = []
    whole = Merging.merge

    def merge(self, name, *args):
        names.append(name)
        return whole(self, name, *args)

    monkeypatch.setattr(Merging, "merge", merge)
    return names


def make(folder: Path, kind: str, targets: Sequence[str] = ("a", "b", "d")) -> tuple[Path, Adapter]:
    """A base of twelve blocks to merge, and an adapter."""
    g = torch.Generator().manual_seed(0)
    weights = {f"{n}.weight": torch.randn(1000, 700, generator=g).bfloat16() for n in "abcd"}
    base = folder / "base"
    if kind == "directory":
        base.mkdir()
        (base / "config.json").write_text("{}")
        (base / "config.json").chmod(0o400)
        home = {}
        for k, names in enumerate((("a", "b"), ("c", "d"))):
            file = f"model-0000{k + 1}-of-00002.safetensors"
            save_file({f"{n}.weight": weights[f"{n}.weight"] for n in names}, base / file)
            home |= {f"{n}.weight": file for n in names}
        index = str({"weight_map": home}).replace("'", '"')
        (base / "model.safetensors.index.json").write_text(index)
    elif kind == "quantized":
        base.mkdir()
        tensors = {}
        for name, W in weights.items():
            scale = W.abs().max().float() / 448
            tensors[name] = (W.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale.reshape(1)
        save_file(tensors, base / "model.safetensors")
        (base / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    elif kind == "distributed":
        dcp.save(weights, checkpoint_id=base, no_dist=True)
    elif kind == "pickle":
        base = base.with_suffix(".pt")
        torch.save({"model": weights, "step": 3}, base)
    else:
        base = base.with_suffix(".safetensors")
        save_file(weights, base)
    _, fresh = create_adapter(base, targets, rank=4, seed=0)
    adapter = trained(fresh, size=0.1)
    write_adapter(adapter, folder / "adapter.safetensors")
    return base, lp.read_adapter(folder / "adapter.safetensors")


def kill(base: Path, out: Path, after: int, **options: object) -> None:
    """A bake in another process, killed in the middle of a block."""
    adapter = out.parent / "adapter.safetensors"
    line = [sys.executable, "-c", KILLED, str(base), str(adapter), str(out), str(after)]
    line.append(json.dumps(options))
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == "killed here\n"
        p.kill()
    assert not out.exists()
    assert len(list(out.parent.glob(f".{out.name}.*.tmp"))) == 1


def content(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("kind", ["file", "directory", "pickle"])
def test_a_killed_bake_is_finished_with_the_bits_of_a_whole_one(
    kind: str, tmp_path: Path, counted: list[str]
) -> None:
    base, adapter = make(tmp_path, kind)
    out, other = (tmp_path / f"{n}{base.suffix}" for n in ("out", "whole"))
    whole = lp.bake_checkpoint(base, adapter, other)
    blocks = len(counted)
    for after in (3, 5):  # killed twice, the second time by a block that the first did not reach
        kill(base, out, after, resume=after == 5)
    counted.clear()
    report = lp.bake_checkpoint(base, adapter, out, resume=True)
    assert len(counted) == blocks - 8
    assert content(out) == content(other)
    assert report.rows == whole.rows
    assert report.notes[0].startswith("Resumed: ")
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(OutputError, match="force=True"):
        lp.bake_checkpoint(base, adapter, out, resume=True)


@pytest.mark.parametrize("what", ["adapter", "base", "dtype", "start"])
def test_what_is_left_of_another_bake_is_not_used_and_this_is_said(
    what: str, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make(tmp_path, "directory")
    out = tmp_path / "out"
    kill(base, out, 5)
    options = {"dtype": "fp16"} if what == "dtype" else {}
    if what == "adapter":
        tensors = dict(adapter.tensors)
        tensors["a.weight.lora_B"] = tensors["a.weight.lora_B"] * 2
        adapter = replace(adapter, tensors=tensors)
    elif what == "base":
        next(base.glob("*1-of-00002*")).touch()
    elif what == "start":  # what a crash left may not be on the disk: of another run of the system
        monkeypatch.setattr("lora_param.files.temporaries._machine", lambda: ("0" * 6, "1" * 6))
        left = next(tmp_path.glob(".out.*.tmp"))
        left.rename(tmp_path / f".out.{'2' * 6}{'1' * 6}.0123abcd.tmp")
    report = lp.bake_checkpoint(base, adapter, out, resume=True, **options)
    said = "nothing to resume" if what == "start" else "of another base, adapter or setting"
    assert said in report.notes[0]
    assert not list(tmp_path.glob(".*"))
    blocks = len(counted)
    lp.bake_checkpoint(base, adapter, tmp_path / "whole", **options)
    assert len(counted) == 2 * blocks
    assert content(out) == content(tmp_path / "whole")


def test_without_resume_what_is_left_goes_and_nothing_is_said(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "file")
    out = tmp_path / "out.safetensors"
    kill(base, out, 5)
    report = lp.bake_checkpoint(base, adapter, out)
    assert not any("resume" in note.lower() for note in report.notes)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("directory", {"max_shard_size": "1MB"}),
        ("directory", {"dtype": "float16"}),
        ("quantized", {"quantized": "dense"}),
        ("quantized", {"quantized": "same"}),
        ("distributed", {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_every_kind_of_output_is_finished(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter = make(tmp_path, kind)
    before, out = content(base), tmp_path / "out"
    whole = lp.bake_checkpoint(base, adapter, tmp_path / "whole", **options)
    for after in (2, 4):
        kill(base, out, after, resume=after == 4, **options)
    report = lp.bake_checkpoint(base, adapter, out, resume=True, **options)
    assert report.notes[0].startswith("Resumed: ")
    assert content(out) == content(tmp_path / "whole")
    assert report.rows == whole.rows
    assert content(base) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("again", [True, False])
def test_links_that_a_kill_leaves_are_never_written_through(again: bool, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, "directory", ["d"])  # the first shard is linked
    before, out = content(base), tmp_path / "out"
    lp.bake_checkpoint(base, adapter, tmp_path / "whole")
    kill(base, out, 2, link=True)
    (left,) = tmp_path.glob(".out.*.tmp")
    assert any(f.samefile(base / f.name) for f in left.rglob("*") if (base / f.name).exists())
    lp.bake_checkpoint(base, adapter, out, link=again, resume=True)
    assert content(base) == before
    assert content(out) == content(tmp_path / "whole")


def opened(path: Path, plan: str, *lines: tuple[str, object]) -> list[str]:
    """What is done by a journal, to which lines are then added."""
    with closing(Journal(path, plan)) as journal:
        for line in lines:
            journal.add(*line)
        return list(journal.done)


def test_a_journal_ends_with_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert opened(path, "plan", ("a 0", [[0, "k", [1, 2.5]]]), ("b 1", None)) == []
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        assert is_journal_of(path, "plan") is (lines > 0)
        left = ["a 0", "b 1"][: max(lines - 1, 0)]
        assert opened(path, "plan", ("c 2", 1)) == left
        assert opened(path, "plan") == [*left, "c 2"]
    for other in (b"\xff\n", b"[1]\n", b'"plan"\n{}\n', b""):
        path.write_bytes(other)
        assert opened(path, "new") == []
        assert is_journal_of(path, "new")
