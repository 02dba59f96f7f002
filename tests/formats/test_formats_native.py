import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_param.adapter import Adapter
from lora_param.api_files import bake_checkpoint
from lora_param.checkpoint.create import create_adapter
from lora_param.errors import (
    BrokenFileError,
    MissingFileError,
    NoMatchError,
    OptionError,
    OutputError,
    UnknownFileError,
)
from lora_param.fingerprint import BaseWeight
from lora_param.formats import is_adapter, read_adapter, toggle_file, write_adapter
from lora_param.targets.settings import Settings


@pytest.fixture
def adapter(tmp_path) -> Adapter:
    g = torch.Generator().manual_seed(0)
    base = {
        "a.q.weight": torch.randn(6, 4, generator=g),
        "a.v.weight": torch.randn(6, 4, generator=g).to(torch.bfloat16),
        "experts": torch.randn(3, 4, 5, generator=g),
    }
    save_file(base, tmp_path / "base.safetensors")
    _, fresh = create_adapter(
        tmp_path / "base.safetensors",
        ["a.q[0/2]:rank=1,alpha=3", "a.v", "experts[*]"],
        rank=2,
        scaling="rslora",
        dropout=0.1,
        seed=0,
        name="ärt",
    )
    return fresh


@pytest.fixture
def path(adapter, tmp_path):
    place = tmp_path / "adapter.safetensors"
    write_adapter(adapter, place)
    return place


def edited(path, change, tensors=None):
    """The file with its config changed by `change`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    change(config)
    metadata["config"] = json.dumps(config)
    save_file(load_file(path) | (tensors or {}), path, metadata)


def test_the_file_is_what_the_design_says(path, adapter):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {
            f"{key}.lora_{f}"
            for key in ("a.q.weight[0:3]", "a.v.weight", "experts[*]")
            for f in "AB"
        }
    assert metadata["format"] == "pt"
    assert metadata["lora_param"] == "1"
    config = json.loads(metadata["config"])
    assert config["name"] == "ärt"
    target = config["targets"]["a.q.weight[0:3]"]
    assert (target["rank"], target["alpha"], target["enabled"]) == (1, 3.0, True)
    assert target["scale"] == pytest.approx(3)
    assert config["base"]["a.v.weight"]["dtype"] == "bfloat16"
    assert config["base"]["a.v.weight"]["shape"] == [6, 4]
    assert config["base"]["a.v.weight"]["hash"] == adapter.base["a.v.weight"].hash


def test_reading_inverts_writing(path, adapter, tmp_path):
    targets = dict(adapter.targets)
    key = "a.v.weight"
    targets[key] = replace(targets[key], strength=0.5, enabled=False, also=("x",), apart=("y", "z"))
    adapter = replace(adapter, targets=targets)
    write_adapter(adapter, path)
    again = read_adapter(path)
    assert again.targets == adapter.targets
    assert again.base == adapter.base
    assert again.name == adapter.name
    assert again.source == str(path)
    assert set(again.tensors) == set(adapter.tensors)
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    write_adapter(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_initial_factors_are_kept(tmp_path, path):
    _, pissa = create_adapter(tmp_path / "base.safetensors", ["a.q"], rank=2, init="pissa")
    write_adapter(pissa, path)
    assert set(read_adapter(path).factors("a.q.weight")) == {
        "lora_A", "lora_B", "initial_A", "initial_B"
    }  # fmt: skip


def test_an_adapter_may_be_written_over_its_own_file(path, adapter):
    before = path.read_bytes()
    write_adapter(read_adapter(path), path)
    assert path.read_bytes() == before
    with pytest.raises(OutputError, match="force=True"):
        write_adapter(adapter, path, force=False)
    with pytest.raises(OptionError, match=r"native, .*peft"):
        write_adapter(adapter, path, "another")
    with pytest.raises(OutputError, match="not a directory"):
        write_adapter(adapter, path, "peft")


def set_in(config, *keys, value):
    for key in keys[:-1]:
        config = config[key]
    config[keys[-1]] = value


AV = ("targets", "a.v.weight")
BAD = {
    "no targets at all": (lambda c: c.pop("targets"), "lacks 'targets'"),
    "essential number": (lambda c: set_in(c, "essential", value=1), "essential is 1"),
    "no base": (lambda c: c["base"].pop("experts"), "experts.* has no base"),
    "no targets": (lambda c: set_in(c, "targets", value={}), "no targets"),
    "scale": (lambda c: set_in(c, *AV, "scale", value=1.0), "has scale 1.0"),
    "rank": (lambda c: set_in(c, *AV, "rank", value=0), "rank is 0"),
    "rank text": (lambda c: set_in(c, *AV, "rank", value="2"), "is no int|no int"),
    "enabled number": (lambda c: set_in(c, *AV, "enabled", value=1), "no bool"),
    "alpha nan": (lambda c: set_in(c, *AV, "alpha", value=float("nan")), "no float"),
    "shape": (lambda c: set_in(c, "base", "a.v.weight", "shape", value=[6, 5]), "takes"),
    "shape float": (lambda c: set_in(c, "base", "experts", "shape", value=[6.0]), "shape in base"),
    "scaling": (lambda c: set_in(c, *AV, "scaling", value="odd"), "scaling is 'odd'"),
    "also": (lambda c: set_in(c, *AV, "also", value=[1]), "also of a.v.weight"),
    "slice": (
        lambda c: set_in(c, "targets", "experts[0:9]", value=c["targets"].pop("experts[*]")),
        "rows",
    ),
    "spelling": (
        lambda c: set_in(c, "targets", "a.q.weight[:3]", value=c["targets"].pop("a.q.weight[0:3]")),
        "not how its target is written",
    ),
    "missing tensors": (
        lambda c: set_in(c, "targets", "a.q.weight[3:6]", value=c["targets"]["a.q.weight[0:3]"]),
        "is missing",
    ),
    "unused tensors": (lambda c: c["targets"].pop("a.v.weight"), "belongs to no target"),
    "not an object": (lambda c: set_in(c, *AV, value=3), "no dict"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_is_wrong_is_refused_by_name(name, path):
    change, why = BAD[name]
    edited(path, change)
    with pytest.raises(BrokenFileError, match=why) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)


def test_a_missing_field_takes_its_default(path, adapter):
    for field in ("strength", "enabled", "also", "apart", "scale", "dropout", "init", "variant"):
        edited(path, lambda c, field=field: c["targets"]["a.v.weight"].pop(field))
    edited(path, lambda c: c.pop("name"))
    again = read_adapter(path)
    written = adapter.targets["a.v.weight"]
    assert again.targets["a.v.weight"] == replace(
        written, settings=replace(written.settings, dropout=0.0)
    )
    assert again.name == "default"
    edited(path, lambda c: c["targets"]["a.v.weight"].pop("rank"))
    with pytest.raises(BrokenFileError, match="rank 8 on its base takes"):
        read_adapter(path)


# --- other versions ---------------------------------------------------------------------------

OLD = Path(__file__).parent / "files" / "adapter-0.1.0.safetensors"


def test_what_0_1_0_wrote_reads_as_it_was_and_is_written_as_it_was(tmp_path):
    old = read_adapter(OLD)
    assert old.name == "old"
    whole, first, last = (old.targets[k] for k in ("out.weight", *sorted(old.targets)[1:]))
    assert whole.settings == Settings(rank=1, alpha=3, scaling="rslora", variant="dora")
    assert not whole.enabled
    assert (str(first.target), first.settings) == ("qkv.weight[0:2]", Settings(rank=2, alpha=4))
    assert (first.scale, first.strength) == (2.0, 0.5)
    assert last.settings == Settings(rank=2, alpha=4, dropout=0.25, init="pissa")
    assert old.base["out.weight"] == BaseWeight((4, 3), "bfloat16", "7a758f44ff0a0906")
    assert old.factors("out.weight")["lora_A"].tolist() == [[3.0, 3.25, 3.5]]
    assert set(old.factors("qkv.weight[4:6]")) == {"lora_A", "lora_B", "initial_A", "initial_B"}
    write_adapter(old, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == OLD.read_bytes()


def of_0_9(config):
    """What a later version might write: more fields, none of which changes the adapter."""
    set_in(config, "trained_on", value={"steps": 3, "of": ["a", None]})
    set_in(config, "targets", "out.weight", "colour", value="red")
    set_in(config, "base", "qkv.weight", "revision", value=7)
    set_in(config, "essential", value=["warmth"])  # and one that would, but is not there


@pytest.fixture
def newer(tmp_path):
    path = tmp_path / "newer.safetensors"
    with safe_open(OLD, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(OLD), path, metadata | {"author": "someone"})
    edited(path, of_0_9)
    return path


def config_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]) | {"author": file.metadata()["author"]}


def test_fields_of_a_later_version_are_kept_by_toggles_and_by_writing_again(newer, tmp_path):
    old, read, before = read_adapter(OLD), read_adapter(newer), config_of(newer)
    assert (read.targets, read.base) == (old.targets, old.base)
    before.pop("essential")
    toggle_file(newer, True)
    assert not before["targets"]["out.weight"]["enabled"]
    set_in(before, "targets", "out.weight", "enabled", value=True)
    assert config_of(newer) == before
    write_adapter(read_adapter(newer), tmp_path / "copy.safetensors")
    assert config_of(tmp_path / "copy.safetensors") == before
    assert (tmp_path / "copy.safetensors").read_bytes() == newer.read_bytes()


@pytest.mark.parametrize(
    "where", [(), ("targets", "out.weight"), ("base", "qkv.weight")], ids=["", "target", "base"]
)
def test_a_field_that_changes_what_the_adapter_means_is_refused_by_name(newer, where):
    edited(newer, lambda c: set_in(c, *where, "warmth", value=2))
    before = newer.read_bytes()
    for use in (read_adapter, lambda path: toggle_file(path, False)):
        with pytest.raises(UnknownFileError, match=r"'warmth' in .* changes what it means") as told:
            use(newer)
        assert str(newer) in str(told.value)
    assert newer.read_bytes() == before


def test_tensors_that_do_not_fit(path):
    edited(path, lambda _: None, {"a.v.weight.lora_A": torch.ones(3, 4)})
    with pytest.raises(BrokenFileError, match=r"rank 2 on its base takes \(2, 4\)"):
        read_adapter(path)
    edited(path, lambda _: None, {"a.v.weight.lora_A": torch.ones(2, 4, dtype=torch.int32)})
    with pytest.raises(BrokenFileError, match="dtype I32"):
        read_adapter(path)


def test_configs_that_are_none(path):
    tensors = load_file(path)
    for config, why in (("{", "cannot be read"), ("[]", "no dict"), ('{"a":1,"a":2}', "twice")):
        save_file(tensors, path, {"lora_param": "1", "config": config})
        with pytest.raises(BrokenFileError, match=why):
            read_adapter(path)
    save_file(tensors, path, {"lora_param": "1"})
    with pytest.raises(BrokenFileError, match="lacks 'config'"):
        read_adapter(path)
    save_file(tensors, path, {"lora_param": "2", "config": "{}"})
    with pytest.raises(UnknownFileError, match="version '2'"):
        read_adapter(path)


def test_what_is_no_adapter_is_said_to_be_what_it_is(tmp_path):
    assert not is_adapter(tmp_path / "base.safetensors")
    for names, what in (
        (["model.layers.0.weight"], "a model"),
        (["diffusion_model.x.lokr_w1"], "LyCORIS"),
        (["oft_unet_x.oft_blocks"], "OFT adapter of sd-scripts"),
    ):
        save_file({n: torch.ones(2, 2) for n in names}, tmp_path / "x.safetensors")
        with pytest.raises(UnknownFileError, match=f"looks like a.*{what.removeprefix('a ')}"):
            read_adapter(tmp_path / "x.safetensors")
        with pytest.raises(UnknownFileError):
            toggle_file(tmp_path / "x.safetensors", False)
    (tmp_path / "peft").mkdir()
    with pytest.raises(UnknownFileError, match="a directory"):
        read_adapter(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(BrokenFileError, match=r"neither adapter_model.safetensors nor"):
        read_adapter(tmp_path / "peft")
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(UnknownFileError, match=r"not a \.safetensors"):
        read_adapter(tmp_path / "x.pt")
    with pytest.raises(MissingFileError):
        read_adapter(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(BrokenFileError, match="5 bytes"):
        read_adapter(tmp_path / "x.safetensors")


def test_toggling(path, adapter):
    path.chmod(0o640)
    whole = path.read_bytes()
    assert toggle_file(path, True) == sorted(adapter.targets)
    assert path.read_bytes() == whole
    inode = path.stat().st_ino
    toggle_file(path, True)
    assert path.stat().st_ino == inode  # not even written
    assert toggle_file(path, False, ["a.v"]) == ["a.v.weight"]
    again = read_adapter(path)
    assert {k for k, t in again.targets.items() if not t.enabled} == {"a.v.weight"}
    assert replace(again.targets["a.v.weight"], enabled=True) == adapter.targets["a.v.weight"]
    assert path.read_bytes().endswith(whole[-again.trainable * 4 :])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    assert toggle_file(path, True, (p for p in ["a.v", "a.q[0/2]"])) == [
        "a.q.weight[0:3]",
        "a.v.weight",
    ]
    assert path.read_bytes() == whole
    with pytest.raises(NoMatchError):
        toggle_file(path, False, "nothing")
    assert path.read_bytes() == whole
    assert os.listdir(path.parent).count(path.name) == 1  # noqa: PTH208
    assert not list(path.parent.glob(".*"))


def test_toggling_keeps_other_metadata(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"author": "someone"})
    toggle_file(path, False)
    with safe_open(path, "pt") as file:
        assert file.metadata()["author"] == "someone"


def test_toggling_and_settings_need_no_torch(path):
    code = (
        "import sys; from lora_param.formats import read_adapter, toggle_file;"
        f"toggle_file({str(path)!r}, False, 'a.v'); a = read_adapter({str(path)!r});"
        "assert a.trainable and len(a.targets) == 3; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert not read_adapter(path).targets["a.v.weight"].enabled


def test_baking_takes_paths_adapters_lists_and_mappings(path, adapter, tmp_path):
    g = torch.Generator().manual_seed(4)
    tensors = {k: torch.randn(t.shape, generator=g) for k, t in adapter.tensors.items()}
    adapter = replace(adapter, tensors=tensors)
    write_adapter(adapter, path)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"

    def baked(adapters):
        bake_checkpoint(base, adapters, out, force=True)
        return out.read_bytes()

    one = baked(path)
    assert one == baked(str(path)) == baked(adapter) == baked([path]) == baked([(path, 1)])
    half = baked({str(path): 0.5})
    assert half == baked([(adapter, 0.5)])
    assert half != one
    assert one != base.read_bytes()
