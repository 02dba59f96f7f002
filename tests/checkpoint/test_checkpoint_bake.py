import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_samples import disabled, expected, trained, weights
from safetensors.torch import load_file, save_file
from test_checkpoint_shards import shard

from lora_param.api_files import bake_checkpoint
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import (
    FingerprintError,
    MismatchError,
    NonFiniteError,
    OptionError,
    OutputError,
)
from lora_param.formats import write_adapter

TARGETS = ["a.q.weight", "a.v.weight", "b.q.weight"]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def check(baked, adapter, keys=TARGETS, original=None):
    """Targets are W + ΔW rounded once; the others are the base, bit for bit."""
    for name, W in (original or weights()).items():
        want = expected(W, adapter, name) if name in keys else W
        assert same(baked[name], want), name


def test_safetensors(base, adapter, tmp_path):
    out = tmp_path / "out.safetensors"
    seen = []
    report = bake_checkpoint(
        base, [(adapter, 1.0)], out, verify=True, progress=lambda *args: seen.append(args)
    )
    check(load_file(out), adapter)
    head = base.read_bytes().index(b"}}") + 2
    assert out.read_bytes()[:head] == base.read_bytes()[:head]
    assert report.baked == tuple(TARGETS)
    assert report.bytes == out.stat().st_size
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert seen[-1][0] == seen[-1][1]
    assert json.dumps(report.to_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


def test_report_measures_each_target(base, adapter, tmp_path):
    report = bake_checkpoint(base, [(adapter, 1.0)], tmp_path / "o.safetensors")
    for row in report.rows:
        W = weights()[row.target].float()
        f = adapter.factors(row.target)
        delta = f["lora_B"] @ f["lora_A"] * 1.5
        kept = expected(weights()[row.target], adapter, row.target).float() - W
        assert row.total == W.numel()
        assert row.changed == int((kept != 0).sum())
        assert row.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        assert row.rounding_loss == pytest.approx(
            float((kept - delta).norm() / delta.norm()), rel=1e-4, abs=1e-9
        )
    assert not report.dead


def test_disabled_targets_add_nothing(base, adapter, tmp_path):
    out = tmp_path / "o.safetensors"
    off = disabled(adapter)
    report = bake_checkpoint(base, [(off, 1.0)], out)
    assert out.read_bytes() == base.read_bytes()
    assert report.rows == ()
    assert report.disabled == tuple(TARGETS)
    assert "No target is enabled" in report.notes[0]
    half = disabled(adapter, "a.q.weight")
    report = bake_checkpoint(base, [(half, 1.0)], out, force=True)
    check(load_file(out), adapter, TARGETS[1:])
    assert report.disabled == ("a.q.weight",)


def test_dead_and_lost_updates_are_seen(base, adapter, tmp_path):
    _, fresh = create_adapter(base, ["q"], rank=2, seed=0, name="fresh")
    report = bake_checkpoint(base, [(fresh, 1.0)], tmp_path / "o.safetensors")
    assert report.dead == ("fresh",)
    assert report.changed == 0
    assert report.lost == ()
    tiny = replace(adapter, tensors={k: t * 1e-6 for k, t in adapter.tensors.items()})
    report = bake_checkpoint(base, [(tiny, 1.0)], tmp_path / "p.safetensors")
    assert "a.v.weight" in report.lost
    assert report.dead == ()
    assert any("Too small" in note for note in report.notes)
    _, pissa = create_adapter(base, ["a.q"], rank=2, init="pissa", name="pissa")
    report = bake_checkpoint(base, [(pissa, 1.0)], tmp_path / "q.safetensors")
    assert report.dead == ("pissa",)


@pytest.mark.parametrize("dtype", ["bf16", torch.float16, "float64"])
def test_dtype_rounds_once(dtype, base, adapter, tmp_path):
    out = tmp_path / "o.safetensors"
    bake_checkpoint(base, [(adapter, 1.0)], out, dtype=dtype, verify=True)
    wanted = {"bf16": torch.bfloat16, "float64": torch.float64}.get(dtype, dtype)
    baked = load_file(out)
    for name, W in weights().items():
        to = wanted if W.is_floating_point() else W.dtype
        want = expected(W, adapter, name, to) if name in TARGETS else W.to(to)
        assert same(baked[name], want), name
    assert open_checkpoint(out).metadata == {"format": "pt", "note": "é"}
    with pytest.raises(OptionError, match="int8"):
        bake_checkpoint(base, [(adapter, 1.0)], out, dtype="int8")


def test_a_cast_that_overflows_is_refused(adapter, tmp_path):
    path = tmp_path / "loud.safetensors"
    save_file(weights() | {"bias": torch.tensor([1e5, float("inf")])}, path)
    with pytest.raises(NonFiniteError, match=r"bias, stored as torch\.float16"):
        bake_checkpoint(path, [(adapter, 1.0)], tmp_path / "o.safetensors", dtype="fp16")
    bake_checkpoint(path, [(adapter, 1.0)], tmp_path / "o.safetensors", dtype="bf16", verify=True)


def test_adapters_on_one_weight_are_added_in_fp32_and_rounded_once(base, adapter, tmp_path):
    other = trained(adapter, seed=5, size=0.01)
    bake_checkpoint(base, [(adapter, 0.5), (other, -2.0)], tmp_path / "o.safetensors")
    W = weights()["a.v.weight"]
    total = W.float()
    for a, weight in ((adapter, 0.5), (other, -2.0)):
        f = a.factors("a.v.weight")
        total = total + (f["lora_B"] @ f["lora_A"]) * (1.5 * weight)
    assert same(load_file(tmp_path / "o.safetensors")["a.v.weight"], total.to(torch.bfloat16))


def test_slices_and_stacks(tmp_path):
    g = torch.Generator().manual_seed(0)
    original = {"qkv": torch.randn(9, 4, generator=g), "experts": torch.randn(3, 4, 5, generator=g)}
    save_file(original, tmp_path / "b.safetensors")
    _, fresh = create_adapter(tmp_path / "b.safetensors", ["qkv[0/3]", "experts[*]"], rank=2)
    a = trained(fresh)
    bake_checkpoint(tmp_path / "b.safetensors", [(a, 1.0)], tmp_path / "o.safetensors")
    baked = load_file(tmp_path / "o.safetensors")
    assert same(baked["qkv"], expected(original["qkv"], a, "qkv[0:3]"))
    assert torch.equal(baked["qkv"][3:], original["qkv"][3:])
    assert same(baked["experts"], expected(original["experts"], a, "experts[*]"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_factors_are_subtracted(init, base, tmp_path):
    _, a = create_adapter(base, ["a.q"], rank=2, init=init)
    tensors = dict(a.tensors)
    tensors["a.q.weight.lora_B"] = tensors["a.q.weight.lora_B"] + 0.1
    bake_checkpoint(base, [(replace(a, tensors=tensors), 1.0)], tmp_path / "o.safetensors")
    W = weights()["a.q.weight"]
    f = {k.rpartition(".")[2]: v for k, v in tensors.items()}
    want = W + 2.0 * 4 * (f["lora_B"] @ f["lora_A"] - f["initial_B"] @ f["initial_A"])
    got = load_file(tmp_path / "o.safetensors")["a.q.weight"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_writes_nothing(base, adapter, tmp_path):
    out = tmp_path / "o.safetensors"

    def refused(error, *, a=adapter, of=base, **options):
        with pytest.raises(error):
            bake_checkpoint(of, [(a, options.pop("weight", 1.0))], out, **options)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    save_file(weights(9), tmp_path / "other.safetensors")
    refused(FingerprintError, of=tmp_path / "other.safetensors")
    save_file({"a.q.weight": torch.ones(6, 4)}, tmp_path / "less.safetensors")
    refused(MismatchError, of=tmp_path / "less.safetensors", check_fingerprint=False)
    for value in (float("nan"), float("inf")):
        tensors = dict(adapter.tensors)
        tensors["b.q.weight.lora_A"] = torch.full((2, 8), value)
        refused(NonFiniteError, a=replace(adapter, tensors=tensors))
    refused(OptionError, weight=float("nan"))
    loud = {k: t * 500 for k, t in adapter.tensors.items()}  # beyond what fp16 holds
    refused(NonFiniteError, a=replace(adapter, tensors=loud))
    bake_checkpoint(
        tmp_path / "other.safetensors", [(adapter, 1.0)], out, check_fingerprint=False, verify=True
    )
    check(load_file(out), adapter, original=weights(9))


def test_where_it_must_not_go(base, adapter, tmp_path):
    before = base.read_bytes()
    pairs = [(adapter, 1.0)]
    link = tmp_path / "link.safetensors"
    link.symlink_to(base)
    for place, why in (
        (base, "it is the input"),
        (link, "it is the input"),
        (tmp_path, "not a file"),
        (tmp_path / "none" / "o.safetensors", "does not exist"),
        (tmp_path / "o.pt", "the input is a .safetensors"),
    ):
        with pytest.raises(OutputError, match=why):
            bake_checkpoint(base, pairs, place, force=True)
    (tmp_path / "there.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="force=True"):
        bake_checkpoint(base, pairs, tmp_path / "there.safetensors")
    source = str(tmp_path / "there.safetensors")
    with pytest.raises(OutputError, match="the adapter"):
        bake_checkpoint(base, [(replace(adapter, source=source), 1.0)], source, force=True)
    with pytest.raises(OptionError, match="in_place"):
        bake_checkpoint(base, pairs)
    with pytest.raises(OptionError, match="at least one"):
        bake_checkpoint(base, [], tmp_path / "o.safetensors")
    assert base.read_bytes() == before


def test_in_place(base, adapter):
    report = bake_checkpoint(base, [(adapter, 1.0)], in_place=True, verify=True)
    check(load_file(base), adapter)
    assert report.path == base


def test_verify_catches_what_is_not_meant(base, adapter, tmp_path, monkeypatch):
    from lora_param.checkpoint import streaming

    monkeypatch.setattr(streaming, "tensor_bytes", lambda t: bytes(t.numel() * t.element_size()))
    out = tmp_path / "o.safetensors"
    with pytest.raises(OutputError, match="is not what was written"):
        bake_checkpoint(base, [(adapter, 1.0)], out, verify=True)
    assert not out.exists()


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_directories_of_shards(pickled, dtype, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    files = shard(model, pickled)
    (model / "sub").mkdir()
    (model / "sub" / "vocab.txt").write_text("a\nb\n")
    (model / "config.json").write_text('{"torch_dtype": "float32", "x": 1}')
    (model / "tokenizer.json").symlink_to(model / "sub" / "vocab.txt")
    _, fresh = create_adapter(model, ["a.q"], rank=2, seed=0)
    a = trained(fresh)
    out = tmp_path / "out"
    report = bake_checkpoint(model, [(a, 1.0)], out, dtype=dtype, verify=True)
    wanted = torch.bfloat16 if dtype else None
    with open_checkpoint(out) as baked:
        for name, W in weights().items():
            to = wanted if wanted and W.is_floating_point() else W.dtype
            want = expected(W, a, name, to) if name == "a.q.weight" else W.to(to)
            assert same(baked[name], want), name
    copied = ["sub/vocab.txt", "tokenizer.json"]
    if dtype is None:
        copied += ["config.json", files[1], next(p.name for p in model.glob("*.index.json"))]
    else:
        assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "bfloat16", "x": 1}
        index = json.loads(next(out.glob("*.index.json")).read_text())
        assert index["metadata"]["total_size"] == baked.nbytes
    for name in copied:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert set(report.files) == {
        p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_directory_rules(base, adapter, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(base, model / "model.safetensors")
    torch.save(weights(), model / "pytorch_model.bin")
    pairs = [(adapter, 1.0)]
    for place, why in (
        (model, "it is the input"),
        (model / "out", "in the other"),
        (tmp_path, "in the other"),
        (base, "not a directory"),
    ):
        with pytest.raises(OutputError, match=why):
            bake_checkpoint(model, pairs, place, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="would be lost"):
        bake_checkpoint(model, pairs, other, force=True)
    shutil.copytree(model, tmp_path / "out")
    with pytest.raises(OutputError, match="force=True"):
        bake_checkpoint(model, pairs, tmp_path / "out")
    (tmp_path / "out" / "extra").write_text("x")
    report = bake_checkpoint(model, pairs, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "extra").exists()
    assert report.notes == ("pytorch_model.bin was copied as it is: baked was model.safetensors.",)
    before = (model / "pytorch_model.bin").read_bytes()
    bake_checkpoint(model, pairs, in_place=True)
    check(load_file(model / "model.safetensors"), adapter)
    assert (model / "pytorch_model.bin").read_bytes() == before
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputError, match="current directory"):
        bake_checkpoint(model, pairs, tmp_path / "out", force=True, check_fingerprint=False)


def pickled(tmp_path, zipped=True):
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    flat = torch.arange(24.0)
    state = {
        "embed.weight": w,
        "head.weight": w,
        "rnn.a": flat[:12].view(3, 4),
        "rnn.b": flat[12:].view(3, 4),
        "p": torch.nn.Parameter(torch.ones(2, 2)),
        "_extra_state": {"n": 1},
    }
    content = {
        "epoch": 3,
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": flat}}, "param_groups": []},
    }
    path = tmp_path / "base.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path, content


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_keep_nesting_ties_and_all_else(zipped, tmp_path):
    path, content = pickled(tmp_path, zipped)
    _, fresh = create_adapter(path, ["embed", "rnn.a", "p"], rank=2, tied="together", seed=0)
    a = trained(fresh)
    out = tmp_path / "o.pt"
    report = bake_checkpoint(path, [(a, 1.0)], out, verify=True)
    assert report.key == "model"
    baked = torch.load(out, weights_only=True)
    state = baked["model"]
    for name in ("embed.weight", "rnn.a", "p"):
        assert same(state[name].detach(), expected(content["model"][name].detach(), a, name))
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert isinstance(state["p"], torch.nn.Parameter)
    assert torch.equal(state["rnn.b"], content["model"]["rnn.b"])
    assert state["_extra_state"] == {"n": 1}
    assert baked["epoch"] == 3
    assert torch.equal(baked["optimizer"]["state"][0]["exp_avg"], torch.arange(24.0))
    assert list(state) == list(content["model"])
    assert open_checkpoint(path)["rnn.a"][0, 1] == 1  # the input is as it was
    off = bake_checkpoint(path, [(disabled(a), 1.0)], tmp_path / "off.pt")
    assert not off.rows
    assert (tmp_path / "off.pt").read_bytes() == path.read_bytes()


def test_a_tie_can_be_adapted_apart(tmp_path):
    path, content = pickled(tmp_path)
    _, fresh = create_adapter(path, ["embed"], rank=2, tied="apart", seed=0)
    a = trained(fresh)
    bake_checkpoint(path, [(a, 1.0)], tmp_path / "o.pt", verify=True)
    state = torch.load(tmp_path / "o.pt", weights_only=True)["model"]
    w = content["model"]["embed.weight"]
    assert same(state["embed.weight"], expected(w, a, "embed.weight"))
    assert torch.equal(state["head.weight"], w)


def test_pickles_do_not_grow_when_weights_share_a_buffer(tmp_path):
    flat = torch.randn(2, 50_000)
    torch.save({"a": flat[0].view(250, 200), "b": flat[1].view(250, 200)}, tmp_path / "b.pt")
    _, fresh = create_adapter(tmp_path / "b.pt", ["a"], rank=2)
    bake_checkpoint(tmp_path / "b.pt", [(trained(fresh), 1.0)], tmp_path / "o.pt")
    assert (tmp_path / "o.pt").stat().st_size < 1.05 * (tmp_path / "b.pt").stat().st_size
    again = torch.load(tmp_path / "o.pt", weights_only=True)
    assert torch.equal(again["b"], flat[1].view(250, 200))


def test_pickles_in_another_dtype(tmp_path):
    path, content = pickled(tmp_path)
    _, fresh = create_adapter(path, ["rnn.a"], rank=2)
    a = trained(fresh)
    bake_checkpoint(path, [(a, 1.0)], tmp_path / "o.pt", dtype="bf16", verify=True)
    state = torch.load(tmp_path / "o.pt", weights_only=True)["model"]
    assert same(state["rnn.a"], expected(content["model"]["rnn.a"], a, "rnn.a", torch.bfloat16))
    assert state["rnn.b"].dtype == state["p"].dtype == torch.bfloat16
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    with pytest.raises(OutputError, match=r"torch\.save"):
        bake_checkpoint(path, [(a, 1.0)], tmp_path / "o.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_models_built_by_a_call(suffix, tmp_path, monkeypatch):
    name = f"bakenets_{suffix[1:]}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    m = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))\n"
        "    m[2].weight = m[0].weight\n    return m\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = f"python:{name}:net"
    _, fresh = create_adapter(spec, ["0"], rank=2, tied="together", seed=0)
    a = trained(fresh)
    out = tmp_path / f"o{suffix}"
    bake_checkpoint(spec, [(a, 1.0)], out, verify=True)
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    model = open_checkpoint(spec).module
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert same(model[2].weight.detach(), expected(before["0.weight"], a, "0.weight"))
    assert same(model[1].running_mean, before["1.running_mean"])
    with pytest.raises(OutputError, match="file of its own"):
        bake_checkpoint(spec, [(a, 1.0)], in_place=True)
    with pytest.raises(OutputError, match=r"none of \.safetensors"):
        bake_checkpoint(spec, [(a, 1.0)], tmp_path / "model")


def test_a_failure_midway_leaves_all_as_it_was(base, adapter, tmp_path, monkeypatch):
    from lora_param.checkpoint.merging import Merging

    count = 0
    whole = Merging.merge

    def fails_second(self, *args):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, os.strerror(28))
        return whole(self, *args)

    monkeypatch.setattr(Merging, "merge", fails_second)
    before = base.read_bytes()
    with pytest.raises(OutputError, match="No space left"):
        bake_checkpoint(base, [(adapter, 1.0)], in_place=True)
    assert base.read_bytes() == before
    assert list(tmp_path.iterdir()) == [base]
    assert isinstance(base, Path)


def test_a_side_file_that_cannot_be_copied_is_named(base, adapter, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(base, model / "model.safetensors")
    (model / "vocab.txt").symlink_to("gone.txt")
    with pytest.raises(OutputError, match=r"vocab\.txt cannot be copied"):
        bake_checkpoint(model, [(adapter, 1.0)], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "model"]


KILLED = """
import sys, time
from lora_param.api_files import bake_checkpoint
from lora_param.checkpoint.merging import Merging
whole, count = Merging.merge, 0
def slow(self, *args):
    global count
    count += 1
    if count == 2:
        print("midway", flush=True)
        time.sleep(60)
    return whole(self, *args)
Merging.merge = slow
bake_checkpoint(sys.argv[1], sys.argv[2], in_place=True)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_bake_killed_midway_leaves_the_old_checkpoint(kind, base, adapter, tmp_path):
    write_adapter(adapter, tmp_path / "a.safetensors")
    model = base
    if kind == "directory":
        model = tmp_path / "model"
        model.mkdir()
        shard(model)
    before = {p: p.read_bytes() for p in ([model] if kind == "file" else model.iterdir())}
    command = [sys.executable, "-c", KILLED, str(model), str(tmp_path / "a.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "midway\n"
        process.kill()
    assert {p: p.read_bytes() for p in before} == before
    bake_checkpoint(model, [(adapter, 1.0)], in_place=True, verify=True)
