"""Models and adapters elsewhere: headers by ranges of bytes, tensors as they are needed."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_samples import trained, weights
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save_file
from served import serving

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import BrokenFileError, FingerprintError, MissingFileError, OutputError

KILOBYTES = 300_000


class Counted(MemoryFileSystem):
    """`memory://`, counting what is read of it."""

    protocol = "counted"
    store = MemoryFileSystem.store
    sent = 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("counted://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start, end, **kwargs)
        type(self).sent += len(data)
        return data

    def _open(self, path, *_, **__):
        raise AssertionError(f"{path} is opened as a whole")


class InMemory:
    """Folders of this machine, put under `counted://`."""

    def __init__(self):
        fsspec.register_implementation("counted", Counted, clobber=True)
        self.url = "counted:/"

    @property
    def sent(self):
        return Counted.sent

    def put(self, folder: Path) -> None:
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe(f"/{path.relative_to(folder).as_posix()}", path.read_bytes())


class OverHttp:
    """A folder of this machine, served."""

    def __init__(self, server):
        self.server, self.url = server, server.url

    @property
    def sent(self):
        return self.server.sent

    def put(self, folder: Path) -> None:
        shutil.copytree(folder, self.server.folder, dirs_exist_ok=True)


@pytest.fixture(params=["memory", "http"])
def far(request, tmp_path):
    if request.param == "memory":
        yield InMemory()
        fsspec.filesystem("memory").store.clear()
        return
    pytest.importorskip("aiohttp")
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        yield OverHttp(server)


def large(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = [f"layers.{i}.{n}.weight" for i in range(4) for n in ("q_proj", "up_proj")]
    return {name: torch.randn(512, 1024, generator=g).bfloat16() for name in names}


@pytest.fixture
def here(tmp_path) -> Path:
    """A model as one file and as shards, with an adapter for it, of this machine."""
    folder = tmp_path / "here"
    (folder / "shards").mkdir(parents=True)
    save_file(large(), folder / "model.safetensors")
    names = list(large())
    for number, half in enumerate((names[:3], names[3:])):
        part = {n: large()[n] for n in half}
        save_file(part, folder / f"shards/model-{number}.safetensors")
    home = {n: f"model-{int(n in names[3:])}.safetensors" for n in names}
    index = {"metadata": {"total_size": 1}, "weight_map": home}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "shards/config.json").write_text('{"model_type": "llama"}')
    (folder / "shards/more").mkdir()
    (folder / "shards/more/notes.txt").write_text("kept")
    _, fresh = create_adapter(folder / "model.safetensors", ["q_proj"], rank=2, seed=0)
    lp.write_adapter(trained(fresh), folder / "adapter.safetensors")
    (folder / "peft").mkdir()
    tensors = {
        f"base_model.model.{n.replace('.weight.', '.')}.weight": t
        for n, t in trained(fresh).tensors.items()
    }
    save_file(tensors, folder / "peft/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "peft/adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "model", ["model.safetensors", "shards", "shards/model.safetensors.index.json"]
)
def test_headers_are_kilobytes(model, far, here, tmp_path):
    far.put(here)
    url, path, before = f"{far.url}/{model}", here / model, far.sent
    size = sum(t.numel() * 2 for t in large().values())
    assert lp.stats(url).total == lp.stats(path).total
    assert lp.plan(url, ["q_proj"]).to_dict() == lp.plan(path, ["q_proj"]).to_dict()
    adapter = here / "adapter.safetensors"
    found = lp.check(adapter, url).to_dict()["findings"]
    assert found == lp.check(adapter, path).to_dict()["findings"]
    made = lp.apply_checkpoint(url, ["q_proj"], tmp_path / "made.safetensors", rank=2, seed=1)
    assert [str(t.target) for t in made.targets] == [n for n in sorted(large()) if "q_proj" in n]
    read = far.sent - before
    assert 0 < read < KILOBYTES < size / 20
    # values of the base were not read, and so are not compared
    hashes = {b.hash for b in lp.read_adapter(tmp_path / "made.safetensors").base.values()}
    assert hashes == {None}


def test_one_tensor_is_read_as_it_is_asked_for(far, here):
    far.put(here)
    with open_checkpoint(f"{far.url}/model.safetensors") as checkpoint:
        before = far.sent
        W = checkpoint["layers.2.q_proj.weight"]
        assert far.sent - before == W.numel() * 2
        assert torch.equal(W, large()["layers.2.q_proj.weight"])
        assert checkpoint.array("layers.1.up_proj.weight").shape == (512, 1024)


@pytest.mark.parametrize("adapter", ["adapter.safetensors", "peft"])
@pytest.mark.parametrize("model", ["model.safetensors", "shards"])
def test_a_bake_streams_from_a_base_elsewhere(model, adapter, far, here, tmp_path):
    far.put(here)
    before = far.sent
    for name in ("far", "near"):
        (tmp_path / name).mkdir()
    out = tmp_path / "far" / model
    report = lp.bake_checkpoint(f"{far.url}/{model}", f"{far.url}/{adapter}", out)
    lp.bake_checkpoint(here / model, here / adapter, tmp_path / "near" / model)
    for near in (tmp_path / "near").rglob("*"):
        if near.is_file():
            found = tmp_path / "far" / near.relative_to(tmp_path / "near")
            assert found.read_bytes() == near.read_bytes(), near.name
    assert report.changed > 0
    size = sum(t.numel() * 2 for t in large().values())
    # once, and the targeted half twice where the adapter knows the values of its base
    assert far.sent - before < size * (1.6 if adapter == "adapter.safetensors" else 1.1)


def test_a_result_from_elsewhere_is_verified(far, here, tmp_path):
    far.put(here)
    out = tmp_path / "out"
    report = lp.bake_checkpoint(f"{far.url}/shards", f"{far.url}/peft", out, verify=True)
    assert report.verified
    assert (out / "more/notes.txt").read_text() == "kept"


def test_another_base_elsewhere_is_told(far, here, tmp_path):
    save_file(large(seed=1), here / "model.safetensors")
    far.put(here)
    url = f"{far.url}/model.safetensors"
    with pytest.raises(FingerprintError):
        lp.bake_checkpoint(url, here / "adapter.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_adapters_elsewhere(far, here):
    far.put(here)
    for name in ("adapter.safetensors", "peft"):
        near, there = lp.read_adapter(here / name), lp.read_adapter(f"{far.url}/{name}")
        assert near.targets.keys() == there.targets.keys()
        assert all(torch.equal(near.tensors[n], t) for n, t in there.tensors.items())
        assert lp.diff(here / name, f"{far.url}/{name}").same
        assert lp.stats(f"{far.url}/{name}").to_dict()["rows"]
        assert lp.check(f"{far.url}/{name}").worst == lp.check(here / name).worst
    with pytest.raises(OutputError, match="copy it there"):
        lp.disable(f"{far.url}/adapter.safetensors")


def test_pickles_and_distributed_checkpoints_elsewhere(far, tmp_path):
    folder = tmp_path / "kinds"
    folder.mkdir()
    torch.save({"model": weights()}, folder / "x.pt")
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(weights(), checkpoint_id=folder / "dcp", no_dist=True)
    save_file(weights(), folder / "x.safetensors")
    (folder / "bin").mkdir()
    torch.save(weights(), folder / "bin/pytorch_model.bin")
    far.put(folder)
    for kind in ("x.pt", "dcp", "bin", "x.safetensors"):
        with open_checkpoint(f"{far.url}/{kind}") as checkpoint:
            assert all(torch.equal(checkpoint[n], W) for n, W in weights().items()), kind
        out = tmp_path / f"baked-{kind}"
        _, fresh = create_adapter(f"{far.url}/{kind}", ["q"], rank=1, seed=0)
        lp.bake_checkpoint(f"{far.url}/{kind}", trained(fresh), out)
        assert lp.diff(out, tmp_path / "baked-x.pt").same


def test_what_is_wrong_elsewhere_is_one_sentence(far, here, tmp_path):
    (here / "broken.safetensors").write_bytes(b"\x00" * 20)
    (here / "shards/model-1.safetensors").unlink()
    far.put(here)
    with pytest.raises(MissingFileError, match="nothing"):
        lp.stats(f"{far.url}/nothing.safetensors")
    with pytest.raises(BrokenFileError, match=r"/broken\.safetensors"):
        lp.stats(f"{far.url}/broken.safetensors")
    with pytest.raises(BrokenFileError, match=r"model-1\.safetensors', which is missing"):
        lp.stats(f"{far.url}/shards")
    with pytest.raises(OutputError, match="not on this machine"):
        lp.bake_checkpoint(
            f"{far.url}/model.safetensors", here / "adapter.safetensors", in_place=True
        )
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_changes_meanwhile_is_told(far, here):
    far.put(here)
    with open_checkpoint(f"{far.url}/model.safetensors") as checkpoint:
        save_file(large(seed=2) | {"x": torch.ones(1)}, here / "model.safetensors")
        far.put(here)
        with pytest.raises(BrokenFileError, match="changed"):
            checkpoint["layers.0.q_proj.weight"]
