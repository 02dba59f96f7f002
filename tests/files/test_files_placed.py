"""Bytes at their place, with the kernel's calls and where a system has none of them."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_param.errors import BrokenFileError
from lora_param.files import placed
from lora_param.files.placed import PlacedFile, clone_file

LINUX_ONLY = ["copy_file_range", "posix_fallocate", "pwrite"]


@pytest.fixture(params=["linux", "elsewhere", "refused"])
def system(request, monkeypatch):
    """With all of Linux's calls, with none, and on a file system that refuses them."""
    if request.param == "elsewhere":
        monkeypatch.setattr(placed.sys, "platform", "win32")
        for name in LINUX_ONLY:
            monkeypatch.delattr(os, name, raising=False)
    if request.param == "refused":

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        monkeypatch.setattr(os, "copy_file_range", refuse)


@pytest.mark.usefixtures("system")
def test_ranges_land_where_they_belong_from_several_threads(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    source = tmp_path / "source"
    source.write_bytes(data)
    seen: list[int] = []
    with (tmp_path / "out").open("x+b") as file, ThreadPoolExecutor(4) as pool:
        target = PlacedFile(file, len(data))
        assert (tmp_path / "out").stat().st_size == len(data)
        starts = range(0, len(data), 300_000)
        jobs = [
            pool.submit(target.copy, source, s, s + 300_000, s, seen.append)
            if s % 600_000
            else pool.submit(target.write, data[s : s + 300_000], s)
            for s in starts
        ]
        for job in jobs:
            job.result()
        with pytest.raises(BrokenFileError, match="shorter"):
            target.copy(source, len(data), len(data) + 1, 0)
    assert (tmp_path / "out").read_bytes() == data
    assert sum(seen) == 5 * 300_000


@pytest.mark.usefixtures("system")
def test_a_clone_is_equal_or_not_made_at_all(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10_000)
    with (tmp_path / "out").open("x+b") as file:
        made = clone_file(source, file)
    assert (tmp_path / "out").read_bytes() == (source.read_bytes() if made else b"")


def test_a_full_disk_is_an_error_and_no_reason_to_try_another_way(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(b"x")
    with (tmp_path / "out").open("x+b") as file:
        target = PlacedFile(file, 1)
        monkeypatch.setattr(os, "copy_file_range", full)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            target.copy(tmp_path / "source", 0, 1, 0)
        with pytest.raises(OSError, match="No space"):
            PlacedFile(file, 1)
