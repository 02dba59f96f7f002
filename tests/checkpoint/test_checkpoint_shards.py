import json

import pytest
import torch
from checkpoint_samples import weights
from safetensors.torch import save_file

from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint
from lora_param.errors import BrokenFileError, UnknownFileError

INDEX = "model.safetensors.index.json"


def shard(directory, pickled=False, index=None):
    names = list(weights())
    suffix = "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else "model"
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    halves = [names[:3], names[3:]]
    for file, half in zip(files, halves, strict=True):
        part = {n: weights()[n] for n in half}
        torch.save(part, directory / file) if pickled else save_file(part, directory / file)
    mapping = {n: f for f, half in zip(files, halves, strict=True) for n in half}
    content = {"metadata": {"total_size": 1}, "weight_map": mapping} | (index or {})
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    return files


@pytest.mark.parametrize("pickled", [False, True])
def test_one_mapping_over_all_shards(pickled, tmp_path):
    files = shard(tmp_path, pickled)
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint, DirectoryCheckpoint)
        assert list(checkpoint.parts) == files
        assert set(checkpoint) == set(weights())
        for name, tensor in weights().items():
            assert torch.equal(checkpoint[name], tensor)
    assert checkpoint.index is not None
    assert set(open_checkpoint(checkpoint.index)) == set(weights())


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "C:x.safetensors",
        "a/../../x.safetensors",
        "..\\x.safetensors",
    ],
)
def test_shards_elsewhere_are_refused(name, tmp_path):
    shard(tmp_path, index={"weight_map": {"x": name}})
    with pytest.raises(BrokenFileError, match="outside"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    files = shard(tmp_path)
    good = json.loads((tmp_path / INDEX).read_text())

    def with_map(mapping):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": mapping}))
        with pytest.raises(BrokenFileError) as caught:
            open_checkpoint(tmp_path)
        return str(caught.value)

    assert "lists more" in with_map(good["weight_map"] | {"more": files[0]})
    assert "does not list bias" in with_map(
        {k: v for k, v in good["weight_map"].items() if k != "bias"}
    )
    assert "missing" in with_map(good["weight_map"] | {"more": "model-3.safetensors"})
    assert "no weights file" in with_map(good["weight_map"] | {"more": "config.json"})
    assert "no file name" in with_map(good["weight_map"] | {"more": 3})
    assert "weight_map" in with_map({})
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(BrokenFileError, match="not JSON"):
        open_checkpoint(tmp_path)


def test_a_directory_prefers_what_the_hub_does(tmp_path):
    torch.save({"other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path)) == {"other"}
    save_file(weights(), tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == set(weights())


def test_a_directory_with_one_file_or_none(tmp_path):
    with pytest.raises(UnknownFileError, match="empty directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UnknownFileError, match=r"README\.md"):
        open_checkpoint(tmp_path)
    torch.save({"model": weights()}, tmp_path / "epoch1.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == set(weights())
    assert checkpoint.key == "model"
    torch.save({"model": weights()}, tmp_path / "epoch2.pt")
    with pytest.raises(UnknownFileError, match=r"epoch1\.pt, epoch2\.pt"):
        open_checkpoint(tmp_path)


def test_other_directories_are_told(tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    with pytest.raises(UnknownFileError, match="PEFT adapter"):
        open_checkpoint(peft)


def test_a_scale_in_another_shard_is_seen(tmp_path):
    save_file({"q.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    save_file({"q.weight_scale": torch.ones(1)}, tmp_path / "b.safetensors")
    mapping = {"q.weight": "a.safetensors", "q.weight_scale": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": mapping}))
    assert "quantized" in open_checkpoint(tmp_path).weights["q.weight"].packed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"weight_map": {"w": "%s.safetensors"}}' % ("x" * 300), "File name too long"),
        ('{"weight_map": {"w": "\\ud800.safetensors"}}', "missing"),
        ('{"weight_map": {"\\ud800": "x.safetensors"}}', "no Unicode text"),
        ('{"weight_map": {"w": "a\\u001b[2J/x.safetensors"}}', "missing"),
    ],
    ids=["long", "surrogate shard", "surrogate tensor", "control"],
)
def test_19_names_in_an_index_that_no_file_has(text, why, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(BrokenFileError, match=why) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
