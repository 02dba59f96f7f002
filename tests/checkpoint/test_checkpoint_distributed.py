"""Directories of torch.distributed.checkpoint, read from any number of ranks and baked."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import write_distributed
from checkpoint_samples import expected, trained, weights
from safetensors.torch import save_file

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import (
    BrokenFileError,
    FileError,
    OptionError,
    OutputError,
    UnknownFileError,
    UnsafePickleError,
)

RANKS = (1, 2, 4)

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled",
    "ignore:TypedStorage is deprecated",  # which older torch's own writer uses
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What 1, 2 and 4 processes write: directories `flat` and `fsdp`."""
    root = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, write_distributed.__file__, str(root), *map(str, RANKS)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    return {size: root / str(size) for size in RANKS}


def save(content, folder: Path) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return save(weights(), tmp_path / "flat")


@pytest.fixture
def same(tmp_path: Path) -> Path:
    path = tmp_path / "same.safetensors"
    save_file(weights(), path)
    return path


@pytest.fixture
def adapter(same: Path):
    _, fresh = create_adapter(same, ["q", "v"], rank=2, alpha=3, seed=0)
    return trained(fresh)


@pytest.mark.parametrize("size", RANKS)
def test_what_any_number_of_ranks_wrote_is_read_bit_for_bit(size, written):
    with open_checkpoint(written[size] / "flat") as checkpoint:
        assert isinstance(checkpoint, DistributedCheckpoint)
        assert set(checkpoint) == set(weights())
        for name, W in weights().items():
            found = checkpoint[name]
            assert found.dtype == W.dtype
            assert torch.equal(found, W)
            assert checkpoint.weights[name].shape == tuple(W.shape)
        assert checkpoint.nbytes == sum(W.numel() * W.itemsize for W in weights().values())
    chunks = checkpoint.index.tensors["b.q.weight"].chunks
    assert len(chunks) == size


@pytest.mark.parametrize("size", RANKS)
def test_fsdp_s_model_is_found_beside_its_optimizer(size, written):
    with open_checkpoint(written[size] / "fsdp") as checkpoint:
        assert checkpoint.key == "model"
        state = write_distributed.net().state_dict()
        assert set(checkpoint) == set(state)
        assert all(torch.equal(checkpoint[n], W) for n, W in state.items())
    with pytest.raises(OptionError, match="model"):
        open_checkpoint(written[size] / "fsdp", "nothing")


@pytest.mark.parametrize("size", RANKS)
def test_a_bake_is_that_of_the_same_model_as_safetensors(size, written, same, adapter, tmp_path):
    base, out = written[size] / "flat", tmp_path / "out"
    report = lp.bake_checkpoint(base, adapter, out, verify=True)
    lp.bake_checkpoint(same, adapter, tmp_path / "baked.safetensors")
    with open_checkpoint(out) as baked, open_checkpoint(tmp_path / "baked.safetensors") as other:
        assert set(baked) == set(other)
        for name in other:
            assert torch.equal(baked[name], other[name])
        assert torch.equal(
            baked["a.v.weight"], expected(weights()["a.v.weight"], adapter, "a.v.weight")
        )
    assert report.changed > 0
    assert set(report.files) == {p.name for p in base.iterdir()}
    # torch itself loads it, as it loads the base
    state = {name: torch.empty_like(W) for name, W in weights().items()}
    dcp.load(state, checkpoint_id=out, no_dist=True)
    with open_checkpoint(out) as baked:
        assert all(torch.equal(state[n], baked[n]) for n in state)


def test_every_byte_that_is_no_targeted_weight_s_stays(written, tmp_path):
    base, out = written[2] / "fsdp", tmp_path / "out"
    _, fresh = create_adapter(base, ["0.weight"], rank=2, seed=0)
    (base / "config.json").write_text('{"model_type": "x"}')
    lp.bake_checkpoint(base, trained(fresh), out)
    assert (out / ".metadata").read_bytes() == (base / ".metadata").read_bytes()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    index = open_checkpoint(base).index
    for file in index.files:
        old, new = (bytearray((d / file).read_bytes()) for d in (base, out))
        assert old != new
        for chunk in index.tensors["model.0.weight"].chunks:
            if chunk.file == file:
                old[chunk.start : chunk.stop] = new[chunk.start : chunk.stop] = b""
        assert old == new


def test_tensors_of_any_strides_are_patched(tmp_path):
    content = {"w": torch.randn(6, 4).T, "x": torch.randn(8, 8)[::2, 1:3], "c": torch.ones(2)}
    base, out = save(content, tmp_path / "base"), tmp_path / "out"
    _, fresh = create_adapter(base, ["w", "x"], rank=1, seed=0)
    adapter = trained(fresh)
    lp.bake_checkpoint(base, adapter, out, verify=True)
    with open_checkpoint(out) as baked:
        for name in ("w", "x"):
            merged = expected(content[name].contiguous(), adapter, name)
            assert torch.equal(baked[name], merged)


def test_in_place_and_link(flat, adapter, tmp_path):
    before = open_checkpoint(flat)["a.q.weight"]
    lp.bake_checkpoint(flat, adapter, tmp_path / "out", link=True)
    assert torch.equal(open_checkpoint(flat)["a.q.weight"], before)
    lp.bake_checkpoint(flat, adapter, in_place=True)
    with open_checkpoint(flat) as a, open_checkpoint(tmp_path / "out") as b:
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_every_command_takes_one(flat, same, adapter, tmp_path):
    ours, others = tmp_path / "ours.safetensors", tmp_path / "others.safetensors"
    plan = lp.apply_checkpoint(flat, ["q"], ours, rank=2, seed=3)
    assert plan.to_dict() == lp.apply_checkpoint(same, ["q"], others, rank=2, seed=3).to_dict()
    assert ours.read_bytes() == others.read_bytes()
    assert lp.plan(flat, ["q"]).to_dict() == lp.plan(same, ["q"]).to_dict()
    assert lp.stats(flat).total == lp.stats(same).total
    found, meant = (lp.stats(b, adapter).to_dict()["rows"] for b in (flat, same))
    assert found == meant
    assert lp.diff(flat, same).same
    assert lp.check(ours, flat).to_dict()["findings"] == lp.check(ours, same).to_dict()["findings"]
    merged = lp.bake_checkpoint(flat, adapter, tmp_path / "merged").path
    lp.write_adapter(adapter, tmp_path / "adapter.safetensors")
    assert lp.diff(merged, flat, tmp_path / "adapter.safetensors").same
    extracted = lp.extract(flat, merged, rank=2).adapter
    assert set(extracted.targets) == set(adapter.targets)


def test_headers_alone_need_no_torch(flat):
    code = (
        "import sys, lora_param as lp; print(lp.stats(sys.argv[1]).total);"
        "lp.plan(sys.argv[1], ['q']); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(flat)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_the_output_keeps_its_dtypes_and_shards(flat, adapter, tmp_path):
    with pytest.raises(OptionError, match="keeps its own"):
        lp.bake_checkpoint(flat, adapter, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(OptionError, match="max_shard_size"):
        lp.bake_checkpoint(flat, adapter, tmp_path / "out", max_shard_size="1GB")
    with pytest.raises(OutputError, match="directory"):
        lp.bake_checkpoint(flat, adapter, tmp_path / "out.safetensors")
    assert not (tmp_path / "out").exists()


# --- what must not be read ----------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_an_evil_index_runs_nothing(flat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metadata = dcp.FileSystemReader(flat).read_metadata()
    metadata.planner_data = Evil()
    (flat / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafePickleError, match=r"(posix|nt)\.system"):
        open_checkpoint(flat)
    assert not (tmp_path / "evil").exists()


def test_evil_data_run_nothing(flat, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chunk = open_checkpoint(flat).index.tensors["a.q.weight"].chunks[0]
    torch.save(Evil(), tmp_path / "evil.pt")
    evil, path = (tmp_path / "evil.pt").read_bytes(), flat / chunk.file
    metadata = dcp.FileSystemReader(flat).read_metadata()
    (info,) = (i for k, i in metadata.storage_data.items() if k.fqn == "a.q.weight")
    info.offset, info.length = path.stat().st_size, len(evil)
    path.write_bytes(path.read_bytes() + evil)
    (flat / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafePickleError, match=r"a\.q\.weight"):
        open_checkpoint(flat)["a.q.weight"]
    with pytest.raises(UnsafePickleError):
        lp.bake_checkpoint(flat, adapter, tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists()


def test_a_missing_or_short_file_is_named(flat, adapter, tmp_path):
    data = flat / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1000])
    with pytest.raises(BrokenFileError, match=r"__0_0\.distcp.*truncated"):
        open_checkpoint(flat)
    data.unlink()
    with pytest.raises(BrokenFileError, match=r"__0_0\.distcp, missing"):
        lp.bake_checkpoint(flat, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 1, 40, 500])
def test_a_damaged_index_is_one_sentence(cut, flat):
    path = flat / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BrokenFileError, match="damaged"):
        open_checkpoint(flat)
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(BrokenFileError, match="no index of torch"):
        open_checkpoint(flat)


def test_an_index_that_asks_for_memory_gets_none(flat):
    path = flat / ".metadata"
    metadata = dcp.FileSystemReader(flat).read_metadata()
    path.write_bytes(b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + path.read_bytes()[2:])
    with pytest.raises(FileError):
        open_checkpoint(flat)
    entry = metadata.state_dict_metadata["a.q.weight"]
    entry.size = torch.Size([2**40, 4])
    entry.chunks[0].sizes = entry.size
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(BrokenFileError, match="takes"):
        open_checkpoint(flat)


def changed_index(folder: Path, change) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def of_q(change):
    return lambda metadata: change(metadata.state_dict_metadata["a.q.weight"])


def of_places(name, value):
    def change(metadata):
        for info in metadata.storage_data.values():
            setattr(info, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (of_q(lambda entry: entry.chunks.pop()), "do not cover"),
        (of_q(lambda entry: setattr(entry, "size", torch.Size([7, 4]))), "do not cover"),
        (of_q(lambda entry: setattr(entry, "size", torch.Size([4, 6]))), "outside of its shape"),
        (of_q(lambda entry: entry.chunks.__setitem__(1, entry.chunks[0])), "overlap"),
        (lambda metadata: metadata.storage_data.clear(), "does not say where"),
        (of_places("relative_path", "../x.distcp"), "outside of its directory"),
        (of_places("length", 7), "it gives it 7"),
        (of_places("offset", -1), "not whole numbers"),
        (of_places("transform_descriptors", ["zstd"]), "zstd"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(change, why, written, tmp_path):
    folder = tmp_path / "flat"
    shutil.copytree(written[2] / "flat", folder)
    changed_index(folder, change)
    with pytest.raises((BrokenFileError, UnknownFileError), match=why):
        open_checkpoint(folder)


@pytest.mark.parametrize("zeros", [slice(0, 200), slice(200, 400), slice(-100, None)])
def test_damaged_data_are_named(zeros, flat):
    chunk = open_checkpoint(flat).index.tensors["a.q.weight"].chunks[0]
    data = bytearray((flat / chunk.file).read_bytes())
    item = data[chunk.start : chunk.stop]
    item[zeros] = bytes(len(item[zeros]))
    data[chunk.start : chunk.stop] = item
    (flat / chunk.file).write_bytes(data)
    with pytest.raises(BrokenFileError, match=r"__0_0\.distcp|a\.q\.weight"):
        open_checkpoint(flat)["a.q.weight"]


def test_an_optimizer_alone_is_no_model(tmp_path):
    content = {"optimizer": {"state": {"w": {"exp_avg": torch.ones(2)}}}, "step": 1}
    with pytest.raises(UnknownFileError, match="optimizer, step"):
        open_checkpoint(save(content, tmp_path / "o"))
    content = OrderedDict(student=weights(), teacher=weights())
    both = save(content, tmp_path / "both")
    with pytest.raises(UnknownFileError, match="several state dicts"):
        open_checkpoint(both)
    assert set(open_checkpoint(both, "teacher")) == set(weights())
    assert json.loads(json.dumps(lp.stats(both, key="student").to_dict()))
