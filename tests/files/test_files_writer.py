import os
import resource
import signal
import stat
import subprocess
import sys

import pytest

from lora_param.errors import BrokenFileError, OutputError
from lora_param.files import renaming, writer
from lora_param.files.writer import copy_range, replace_directory, replace_file


def test_new_files_obey_the_umask_and_old_ones_keep_their_mode(tmp_path):
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        with replace_file(path) as file:
            file.write(b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    with replace_file(path, force=True) as file:
        file.write(b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert path.read_bytes() == b"2"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "x", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with replace_file(link, force=True) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_exception_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write_half():
        with replace_file(path, force=True) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_must_not_be_written(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    for place, why in ((path, "exists"), (tmp_path, "not a file"), (tmp_path / "a/b", "not exist")):
        with pytest.raises(OutputError, match=why), replace_file(place):
            pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="not a directory"), replace_directory(path, force=True):
        pytest.fail("the block must not run")
    assert path.read_bytes() == b"old"


def test_an_unwritable_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"), replace_file(tmp_path / "x"):
        pytest.fail("the block must not run")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with (
            pytest.raises(OutputError, match="too large"),
            replace_file(path, force=True, sync=False) as file,
        ):
            file.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import sys, time
from pathlib import Path
from lora_param.files.writer import replace_directory, replace_file
if sys.argv[1] == "file":
    with replace_file(sys.argv[2], force=True) as file:
        file.write(b"half"); file.flush(); print("ready", flush=True); time.sleep(60)
else:
    with replace_directory(sys.argv[2], force=True) as place:
        (place / "x").write_bytes(b"half"); print("ready", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_killed_process_leaves_the_old_output(kind, tmp_path):
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
    inner = path / "x" if kind == "directory" else path
    inner.write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, kind, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert inner.read_bytes() == b"old"
    left = [p for p in tmp_path.iterdir() if p != path]
    assert [p.name.startswith(".out.") and p.suffix == ".tmp" for p in left] == [True]


@pytest.mark.parametrize("one_step", [True, False])
def test_a_directory_is_replaced_whole(one_step, tmp_path, monkeypatch):
    if not one_step:
        monkeypatch.setattr(renaming, "_renameat2", lambda *_: False)
    path = tmp_path / "out"
    path.mkdir(mode=0o750)
    (path / "old").write_bytes(b"old")
    with replace_directory(path, force=True) as place:
        (place / "new").write_bytes(b"new")
        assert (path / "old").exists()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_the_exchange_is_one_step_on_linux(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "1").touch()
    assert renaming._renameat2(a, b, 2)
    assert (b / "1").exists()


def test_a_failing_second_rename_is_rolled_back(tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "_renameat2", lambda *_: False)
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    monkeypatch.setattr(writer.Path, "chmod", lambda *_: None)
    with pytest.raises(OutputError), replace_directory(path, force=True) as place:
        place.rmdir()  # so that moving it into place fails
    assert (path / "old").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copies_ranges(in_kernel, tmp_path, monkeypatch):
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    source = tmp_path / "s"
    source.write_bytes(bytes(range(256)) * 100)
    seen = []
    with source.open("rb") as s, (tmp_path / "t").open("w+b") as t:
        t.write(b"<")
        copy_range(s, t, 10, 20_000, seen.append)
        t.write(b">")
        with pytest.raises(BrokenFileError, match="shorter"):
            copy_range(s, t, 25_600, 25_601)
    assert (tmp_path / "t").read_bytes() == b"<" + source.read_bytes()[10:20_000] + b">"
    assert sum(seen) == 19_990
