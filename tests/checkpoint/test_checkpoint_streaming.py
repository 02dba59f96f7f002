"""A bake by blocks and threads: the bits of the whole, whatever the system has."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_samples import expected, trained
from safetensors.torch import load_file, save_file
from torch import nn

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.formats import write_adapter


def large(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of several blocks, of odd sizes; zeros of both signs in one."""
    g = torch.Generator().manual_seed(0)
    made = {
        "q.weight": torch.randn(513, 1025, generator=g),
        "qkv.weight": torch.randn(900, 1100, generator=g),
        "experts": torch.randn(3, 600, 500, generator=g),
        "conv.weight": torch.randn(70, 90, 9, 9, generator=g),
        "untouched": torch.randn(1000, 600, generator=g),
    }
    made["q.weight"][::7] = 0.0
    made["q.weight"][3::7] = -0.0
    return {name: t.to(dtype) for name, t in made.items()}


SPARSE = torch.eye(3).to_sparse()
TARGETS = ["q.weight", "qkv.weight[0/3]", "qkv.weight[:,100:700]", "experts[*]", "conv.weight"]


class Holder(nn.Module):
    """A model of plain parameters, under the names of the file."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, t in weights.items():
            owner, _, last = name.rpartition(".")
            module = self
            if owner:
                module = self._modules.setdefault(owner, nn.Module())
            module.register_parameter(last, nn.Parameter(t.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("targets", [TARGETS[:2] + TARGETS[3:], TARGETS[2:3], TARGETS])
def test_a_file_of_many_blocks_has_the_bits_of_the_live_bake(
    dtype: torch.dtype, targets: list[str], tmp_path: Path
) -> None:
    original = large(dtype)
    save_file(original, tmp_path / "base.safetensors")
    for number, target in enumerate(targets):  # of their own, for some overlap
        _, fresh = create_adapter(
            tmp_path / "base.safetensors", [target], rank=7, alpha=5, seed=number
        )
        write_adapter(trained(fresh, size=0.1), tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{n}.safetensors" for n in range(len(targets))]
    report = lp.bake_checkpoint(
        tmp_path / "base.safetensors", paths, tmp_path / "out.safetensors", verify=True
    )
    baked = load_file(tmp_path / "out.safetensors")
    model = Holder(original)
    for number, path in enumerate(paths):
        lp.load(model, path, f"a{number}")
    live = lp.bake(model).state_dict()
    for name in original:
        assert torch.equal(baked[name].view(torch.uint8), live[name].view(torch.uint8)), name
    assert all(row.measured == row.total for row in report.rows)
    if len(targets) == 1:
        (row,) = report.rows
        W, kept = (t["qkv.weight"][:, 100:700] for t in (original, baked))
        assert row.changed == int((kept != W).sum())
        assert row.total == W.numel()


@pytest.mark.parametrize("verify", [False, True])
def test_norms_are_sampled_and_say_so_unless_verified(verify: bool, tmp_path: Path) -> None:
    original = large(torch.bfloat16)
    save_file(original, tmp_path / "base.safetensors")
    _, fresh = create_adapter(tmp_path / "base.safetensors", ["conv.weight", "q"], rank=4, seed=0)
    adapter = trained(fresh, size=0.1)
    out = tmp_path / "out.safetensors"
    report = lp.bake_checkpoint(tmp_path / "base.safetensors", adapter, out, verify=verify)
    baked = load_file(out)
    for row in report.rows:
        W, f = original[row.target].float(), adapter.factors(row.target)
        t = adapter.targets[row.target]
        delta = (f["lora_B"] @ f["lora_A"] * t.scale).view(W.shape)
        kept = baked[row.target].float() - W
        assert row.changed == int((kept != 0).sum())
        assert (row.measured == row.total) is verify
        near = {"rel": 1e-4} if verify else {"rel": 0.2}
        assert row.relative_norm == pytest.approx(float(delta.norm() / W.norm()), **near)
        assert row.rounding_loss == pytest.approx(
            float((kept - delta).norm() / delta.norm()), **near
        )
    assert any("every eighth block" in note for note in report.notes) is not verify


def test_the_bits_do_not_depend_on_threads_or_on_linux(tmp_path: Path, monkeypatch) -> None:
    save_file(large(torch.bfloat16), tmp_path / "base.safetensors")
    _, fresh = create_adapter(tmp_path / "base.safetensors", ["q", "experts[*]"], rank=4, seed=0)
    adapter, before = trained(fresh), torch.get_num_threads()
    reports = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            out = tmp_path / f"{number}.safetensors"
            reports.append(lp.bake_checkpoint(tmp_path / "base.safetensors", adapter, out))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert reports[0].rows == reports[1].rows

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "pwrite")
    lp.bake_checkpoint(tmp_path / "base.safetensors", adapter, tmp_path / "plain.safetensors")
    bits = {p: (tmp_path / f"{p}.safetensors").read_bytes() for p in ("1", "3", "plain")}
    assert bits["1"] == bits["3"] == bits["plain"]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum is that of its data
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_archive_of_torch_save_is_patched_and_its_other_members_stay(tmp_path: Path) -> None:
    original = large(torch.bfloat16)
    flat = torch.randn(2, 300_000)
    state = {**original, "tied": original["q.weight"], "half.a": flat[0].view(500, 600)}
    content = {"model": state, "note": ["x", 1], "other": {"half": flat[1], "sparse": SPARSE}}
    torch.save(content, tmp_path / "base.pt")
    _, fresh = create_adapter(
        tmp_path / "base.pt", ["q", "experts[*]", "half.a", "qkv[:,5:700]"], rank=4, tied="together"
    )
    adapter = trained(fresh, size=0.1)
    out = tmp_path / "out.pt"
    report = lp.bake_checkpoint(tmp_path / "base.pt", adapter, out, verify=True)
    assert len(report.rows) == 4
    before, after = members(tmp_path / "base.pt"), members(out)
    assert list(before) == list(after)
    assert sum(before[n] != after[n] for n in before) == 4
    assert out.stat().st_size == (tmp_path / "base.pt").stat().st_size
    baked = torch.load(out, weights_only=True)
    model = Holder(original | {"half.a": state["half.a"]})
    model.register_parameter("tied", model.q.weight)
    live = lp.bake(lp.attach(model, adapter)).state_dict()
    for name in ("q.weight", "experts", "qkv.weight", "half.a", "untouched"):
        assert torch.equal(baked["model"][name], live[name]), name
    assert baked["model"]["tied"].data_ptr() == baked["model"]["q.weight"].data_ptr()
    assert torch.equal(baked["other"]["half"], flat[1])


@pytest.mark.parametrize("how", ["apart", "shared", "gaps", "legacy"])
def test_an_archive_that_cannot_be_patched_is_written_anew(how: str, tmp_path: Path) -> None:
    w = torch.randn(40, 30)
    content = {"model": {"a.weight": w, "b.weight": torch.randn(3, 3)}}
    if how == "apart":
        content["model"]["c.weight"] = w
    if how == "shared":
        content["optimizer"] = {"state": [w[3:]]}
    if how == "gaps":
        content["model"]["a.weight"] = w.T
    path, out = tmp_path / "base.pt", tmp_path / "out.pt"
    torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    _, fresh = create_adapter(path, ["a"], rank=2, seed=0, tied="apart")
    adapter = trained(fresh)
    lp.bake_checkpoint(path, adapter, out, verify=True)
    baked = torch.load(out, weights_only=True)
    W = content["model"]["a.weight"]
    assert torch.equal(baked["model"]["a.weight"], expected(W, adapter, "a.weight"))
    if how == "apart":
        assert torch.equal(baked["model"]["c.weight"], w)
    if how == "shared":
        assert torch.equal(baked["optimizer"]["state"][0], w[3:])


def test_ranges_of_columns_that_share_rows(tmp_path):
    """A block of columns is whole rows: one of a range does not undo what another changed."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(48, 16, bias=False))
    torch.save(net.state_dict(), tmp_path / "m.pt")
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    lp.apply(net, ["0[:,0:16]", "0[:,32:48]"], rank=2)
    for p in lp.parameters(net):
        torch.nn.init.normal_(p)
    lp.save(net, tmp_path / "a.safetensors")
    expected = lp.merged_state_dict(net)["0.weight"]
    for name in ("m.pt", "m.safetensors"):
        out = tmp_path / f"out.{name}"
        lp.bake_checkpoint(tmp_path / name, tmp_path / "a.safetensors", out, verify=True)
        baked = torch.load(out) if name.endswith("pt") else load_file(out)
        assert torch.equal(baked["0.weight"], expected), name
