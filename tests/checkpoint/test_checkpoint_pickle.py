import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_samples import weights

from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.errors import (
    BrokenFileError,
    FileError,
    MissingFileError,
    OptionError,
    UnknownFileError,
    UnsafePickleError,
)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def optimizer_state():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_every_kind_and_runs_nothing(zipped, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.key == ""
        assert list(checkpoint) == list(weights())
        for name, tensor in weights().items():
            assert torch.equal(checkpoint[name], tensor)
    torch.save(
        {"w": torch.ones(2), "x": Harmful(tmp_path / "ran")},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UnsafePickleError, match=r"posix\.mkdir|nt\.mkdir"):
        open_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_plain_pickles_and_modules_name_what_they_need(tmp_path):
    path = tmp_path / "x.pkl.pt"
    path.write_bytes(pickle.dumps(Harmful(tmp_path / "ran"), protocol=4))
    with pytest.raises(UnsafePickleError, match="mkdir"):
        PickleCheckpoint(path)
    torch.save({"state_dict": weights(), "args": argparse.Namespace(x=1)}, path)
    with pytest.raises(UnsafePickleError, match=r"argparse\.Namespace") as caught:
        PickleCheckpoint(path)
    assert "weights_only" not in str(caught.value)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UnsafePickleError, match=r"nn\.modules\.linear\.Linear"):
        PickleCheckpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_one_sentence(zipped, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for content in (b"", b"garbage" * 100, whole[: len(whole) // 2], whole[:-1], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(BrokenFileError) as caught:
            PickleCheckpoint(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(MissingFileError):
        PickleCheckpoint(tmp_path / "none.pt")


def test_random_bytes_never_escape_as_other_errors(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    whole = bytearray(path.read_bytes())
    for position in range(0, 400, 3):
        mutated = bytearray(whole)
        mutated[position] ^= 0x55
        path.write_bytes(mutated)
        try:
            PickleCheckpoint(path)
        except (FileError, OptionError):
            continue


def test_archives_of_other_kinds(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(UnknownFileError, match="TorchScript"):
        PickleCheckpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(UnknownFileError, match="zip archive of another kind"):
        PickleCheckpoint(path)


NESTINGS = {
    "": lambda sd: sd,
    "state_dict": lambda sd: {"state_dict": sd, "state_dict_ema": sd, "epoch": 3},
    "model_state": lambda sd: {"step": 1, "model_state": sd, "optimizer_state": optimizer_state()},
    "model": lambda sd: {
        "ema": sd,
        "model": sd,
        "optimizer": optimizer_state(),
        "rng": torch.zeros(5),
    },
    "module": lambda sd: {"optim": {k: {"step": torch.ones(1)} for k in sd}, "module": sd},
    "model.net": lambda sd: {"model": {"net": sd, "version": 2}},
    "anything": lambda sd: {"anything": sd, "scaler": {"scale": 1.0, "growth": 2}},
}


@pytest.mark.parametrize("key", NESTINGS)
def test_finds_the_state_dict(key, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(NESTINGS[key](weights()), path)
    checkpoint = PickleCheckpoint(path)
    assert checkpoint.key == key
    assert set(checkpoint) == set(weights())


def test_asks_where_it_is_not_clear_and_takes_the_key(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"generator": weights(1), "discriminator": {"w.x": weights(2)}}, path)
    with pytest.raises(UnknownFileError, match=r"generator, discriminator\.w\.x.*key="):
        PickleCheckpoint(path)
    chosen = PickleCheckpoint(path, "discriminator.w.x")
    assert chosen.key == "discriminator.w.x"
    assert torch.equal(chosen["bias"], weights(2)["bias"])
    with pytest.raises(OptionError, match="generator, discriminator"):
        PickleCheckpoint(path, "critic")


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.ones(3), {"a": 1}, {"optimizer": optimizer_state()}, optimizer_state()],
)
def test_no_state_dict_is_said_so(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UnknownFileError, match="accepted: a state dict"):
        PickleCheckpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_ties_are_those_of_the_file(zipped, tmp_path):
    w = torch.randn(4, 3)
    flat = torch.randn(24)
    content = {
        "embed": w,
        "head": w,
        "copy": w.clone(),
        "transposed": w.t(),
        "first": flat[:12].view(3, 4),
        "second": flat[12:].view(3, 4),
        "empty": torch.empty(0, 2),
        "void": torch.empty(0, 2),
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = PickleCheckpoint(tmp_path / "x.pt").weights
    assert {n: x.tied for n, x in found.items() if x.tied} == {
        "embed": ("head",),
        "head": ("embed",),
    }


def test_parameters_and_extra_state(tmp_path):
    content = {"w": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.ones(2), "_extra_state": None}
    torch.save(content, tmp_path / "x.pt")
    checkpoint = PickleCheckpoint(tmp_path / "x.pt")
    assert set(checkpoint) == {"w", "b"}
    assert not checkpoint["w"].requires_grad
    with pytest.raises(KeyError):
        checkpoint["_extra_state"]


def test_unknown_names_are_told_by_content(tmp_path, base):
    torch.save(weights(), tmp_path / "weights.dat")
    assert isinstance(open_checkpoint(tmp_path / "weights.dat"), PickleCheckpoint)
    copy = tmp_path / "copy"
    copy.write_bytes(base.read_bytes())
    assert set(open_checkpoint(copy)) == set(weights())
    Path(tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UnknownFileError, match="another kind"):
        open_checkpoint(tmp_path / "x.txt")
    with pytest.raises(MissingFileError):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(OptionError, match="nothing is nested"):
        open_checkpoint(base, "model")


# --- what a file can be made of to harm whoever reads it ---------------------------------------


def test_19_a_mapping_in_many_places_or_in_itself_is_entered_once(tmp_path):
    path = tmp_path / "x.pt"
    itself = {"state_dict": weights()}
    itself["again"] = itself
    itself["more"] = {"back": itself, "state_dict_ema": itself["state_dict"]}
    torch.save(itself, path)
    checkpoint = PickleCheckpoint(path)
    assert checkpoint.key == "state_dict"
    assert PickleCheckpoint(path, "more.state_dict_ema").key == "more.state_dict_ema"
    shared = {f"k{i}": 0 for i in range(300)}
    for _ in range(4):
        shared = {f"k{i}": shared for i in range(300)}  # 300 ** 5 ways
    torch.save({"model": weights(), "shared": shared}, path)
    assert PickleCheckpoint(path).key == "model"
    torch.save({"deep": shared}, path)
    with pytest.raises(UnknownFileError):
        PickleCheckpoint(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_19_a_record_that_inflates_is_refused_before_it_is_read(record, tmp_path, monkeypatch):
    plain, path = tmp_path / "plain.pt", tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000, 1000), "text": "x"}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith(record):
                content += bytes(3_000_000)
                archive.writestr(info.filename, content, zipfile.ZIP_DEFLATED)
            else:
                archive.writestr(info.filename, content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(BrokenFileError, match=f"its record .*{record} is compressed, to .* bytes"):
        PickleCheckpoint(path)


def test_19_what_a_damaged_pickle_makes_of_the_unpickler(tmp_path):
    path = tmp_path / "x.pt"
    for content in (
        b"\x80\x02J\x01",  # struct.error: a number cut short
        b"\x80\x02G\x00\x00.",
        b"\x80\x02}(]\x88u.",  # a list as a key
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02\x8a\x0a",
        b"\x80\x02h\x05.",
        b"\x80\x02" + b"(" * 100_000 + b"." * 10,
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ):
        path.write_bytes(content)
        with pytest.raises(FileError) as caught:
            PickleCheckpoint(path)
        assert "\n" not in str(caught.value)


def test_19_what_is_needed_is_told_from_what_is_allowed(tmp_path):
    path = tmp_path / "x.pt"
    content = {"w": torch.ones(2, 2), "sizes": torch.Size([1]), "args": argparse.Namespace(x=1)}
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UnsafePickleError, match=r"it needs argparse\.Namespace"):
            PickleCheckpoint(path)
