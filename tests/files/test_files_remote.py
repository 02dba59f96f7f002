"""Places: paths of this machine, URLs of fsspec's drivers, and what writes to them."""

import os
import pickle
from pathlib import Path

import fsspec
import pytest

import lora_param as lp
from lora_param.errors import BrokenFileError, MissingFileError, OutputError
from lora_param.files.header import read_header
from lora_param.files.places import FarPath, fetched, files_below, is_far, place
from lora_param.files.writer import check_output


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe("/m/a/x.bin", bytes(range(256)) * 1000)
    fs.pipe("/m/config.json", b'{"model_type": "x"}')
    yield fs
    fs.store.clear()


def test_what_is_a_path_and_what_a_place_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("model", "a/b.pt", "C:/x", "c://x", "python:a.b:c", "no:such", "memory:/x", "a:b"):
        assert type(place(text)) is type(Path())
        assert not is_far(text)
    assert place("file:///tmp/x") == place(Path("file:///tmp/x")) == Path("/tmp/x")
    for text in ("memory://m/x", "s3://bucket/a/b.safetensors", "simplecache::s3://bucket/a"):
        assert str(place(text)) == str(place(Path(text))) == text
        assert is_far(text)
        assert is_far(Path(text))
    (tmp_path / "memory:").mkdir()
    assert not is_far(Path("memory:/x"))


def test_a_place_answers_as_a_path_does(memory):
    here = place("memory://m")
    assert here.is_dir()
    assert not here.is_file()
    assert here.exists()
    assert not (here / "nothing").exists()
    assert sorted(p.name for p in here.iterdir()) == ["a", "config.json"]
    assert sorted(p.relative_to(here).as_posix() for p in files_below(here)) == [
        "a/x.bin",
        "config.json",
    ]
    assert (here / "config.json").read_text(encoding="utf-8") == '{"model_type": "x"}'
    x = here / "a/x.bin"
    assert (x.suffix, x.parent, x.with_name("y").name) == (".bin", here / "a", "y")
    assert x.stat().st_size == 256_000
    assert x.read_bytes() == memory.cat("/m/a/x.bin")
    with x.open("rb") as file:
        assert file.seek(-2, os.SEEK_END) == 255_998
        assert file.read() == b"\xfe\xff"
        file.seek(100_000)
        assert file.read(3) == bytes([160, 161, 162])
    assert pickle.loads(pickle.dumps(x)) == x
    with pytest.raises(FileNotFoundError):
        (here / "nothing").read_bytes()
    with pytest.raises(MissingFileError, match=r"memory://m/nothing does not exist"):
        read_header(here / "nothing")
    with pytest.raises(IsADirectoryError):
        here.open("rb")


def test_a_copy_for_the_time_being(memory):
    copy = fetched(place("memory://m/a/x.bin"))
    assert copy.name == "x.bin"
    assert copy.read_bytes() == memory.cat("/m/a/x.bin")
    assert fetched(place("memory://m/a/x.bin")) == copy
    memory.pipe("/m/a/x.bin", b"new")
    assert fetched(place("memory://m/a/x.bin")).read_bytes() == b"new"


def test_what_cannot_be_reached_is_one_sentence():
    for call in (lp.stats, lp.read_adapter, read_header, lp.plan):
        with pytest.raises(BrokenFileError) as caught:
            call("nope://x/y")
        assert str(caught.value) == "nope://x/y cannot be read: Protocol not known: nope."
    with pytest.raises(BrokenFileError, match="install gdrive_fs"):
        lp.stats("gdrive://x/y.safetensors")


@pytest.mark.parametrize("text", ["memory://m/out", "s3://bucket/out.safetensors", "hf://o/n"])
def test_nothing_is_written_elsewhere(text, memory):
    before = dict(memory.store)
    for path in (text, Path(text)):
        with pytest.raises(OutputError, match="copy it there") as caught:
            check_output(path, force=True)
        assert str(caught.value).startswith(f"{text} was not written")
    assert memory.store == before


def test_a_server_without_ranges_is_told(memory, monkeypatch):
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, **_: self.cat(path))
    monkeypatch.setattr(type(memory), "cat", lambda *_: bytes(256_000))
    with pytest.raises(BrokenFileError, match="no ranges"):
        FarPath("memory://m/a/x.bin").read_range(5, 10)
