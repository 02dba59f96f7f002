"""One place, several writers: locks, renames that replace nothing, and what the dead left."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import lora_param as lp
from lora_param.errors import OutputError
from lora_param.files import locks, renaming, temporaries, writer
from lora_param.files.writer import RESULT, replace_directory, replace_file
from lora_param.formats import toggle_file

HOLD = """
import sys, time
from pathlib import Path
from lora_param.files.writer import replace_directory, replace_file
kind, path = sys.argv[1:]
with (replace_file if kind == "file" else replace_directory)(path, force=True) as place:
    if kind == "file":
        place.write(b"half")
        place.flush()
    else:
        (place / "x").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def holder(kind, path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def write(kind, path, content=b"new", **options):
    if kind == "file":
        with replace_file(path, **options) as file:
            file.write(content)
    else:
        with replace_directory(path, **options) as place:
            (place / "x").write_bytes(content)


def content_of(path):
    return (path / "x" if path.is_dir() else path).read_bytes()


KINDS = pytest.mark.parametrize("kind", ["file", "directory"])


# --- 20: concurrent writers -------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("native", [True, False], ids=["renameat2", "portable"])
def test_20_an_output_that_appears_meanwhile_is_kept_without_force(
    kind, native, tmp_path, monkeypatch
):
    if not native:
        monkeypatch.setattr(renaming, "_renameat2", lambda *_: False)
    path = tmp_path / "out"

    def overtaken():
        with (replace_file if kind == "file" else replace_directory)(path) as place:
            if kind == "directory":
                (place / "x").write_bytes(b"second")
            write(kind, path, b"first")

    with pytest.raises(OutputError, match=r"out was not written: it exists; .*force=True"):
        overtaken()
    assert content_of(path) == b"first"
    assert list(tmp_path.iterdir()) == [path]
    with (replace_file if kind == "file" else replace_directory)(path, force=True) as place:
        if kind == "directory":
            (place / "x").write_bytes(b"third")
        else:
            place.write(b"third")
    assert content_of(path) == b"third"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def adapter(tmp_path):
    weights = {f"{n}.weight": torch.ones(8, 6) for n in ("fc1", "fc10", "q_proj", "v_proj")}
    save_file(weights, tmp_path / "m.safetensors")
    path = tmp_path / "a.safetensors"
    lp.apply_checkpoint(tmp_path / "m.safetensors", ["fc1", "fc10", "{q,v}_proj"], path, rank=2)
    return path


TOGGLE = """
import sys
import lora_param as lp
sys.stdin.readline()
for _ in range(8):
    lp.enable(sys.argv[1], sys.argv[2])
    lp.disable(sys.argv[1], sys.argv[2])
"""


def test_20_toggles_of_two_processes_at_once_all_count(adapter):
    targets = ("fc1", "fc10", "q_proj", "v_proj")
    processes = [
        subprocess.Popen([sys.executable, "-c", TOGGLE, str(adapter), t], stdin=subprocess.PIPE)
        for t in targets
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    assert [process.wait() for process in processes] == [0] * 4
    assert not any(t.enabled for t in lp.read_adapter(adapter).targets.values())
    assert {p.name for p in adapter.parent.iterdir()} == {"m.safetensors", "a.safetensors"}


def toggled_by_two_threads(adapter, monkeypatch):
    """Another thread disables a target after this one has read the file."""
    errors, threads = [], []

    def other():
        try:
            toggle_file(adapter, False, "fc10")
        except OutputError as error:
            errors.append(error)

    whole = writer.check_output

    def slow(path, **options):
        if not threads:
            threads.append(threading.Thread(target=other))
            threads[0].start()
            threads[0].join(0.3)
        return whole(path, **options)

    monkeypatch.setattr(writer, "check_output", slow)
    try:
        toggle_file(adapter, False, "fc1")
    except OutputError as error:
        errors.append(error)
    threads[0].join()
    return errors


def test_20_a_toggle_waits_for_the_one_before(adapter, monkeypatch):
    assert toggled_by_two_threads(adapter, monkeypatch) == []
    targets = lp.read_adapter(adapter).targets
    assert [k for k, t in targets.items() if not t.enabled] == ["fc1.weight", "fc10.weight"]


def test_20_without_locks_the_second_toggle_says_so(adapter, monkeypatch):
    monkeypatch.setattr(locks, "take", lambda *_, **__: None)
    (error,) = toggled_by_two_threads(adapter, monkeypatch)
    assert "a.safetensors was not written: another process changed it meanwhile" in str(error)
    targets = lp.read_adapter(adapter).targets
    assert [k for k, t in targets.items() if not t.enabled] == ["fc10.weight"], "nothing is lost"


BAKE = """
import sys
import lora_param as lp
sys.stdin.readline()
try:
    lp.bake_checkpoint(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))
except lp.UserError as error:
    sys.exit(f"Error: {error}")
"""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [("out='out.safetensors'", "it exists; replace it"), ("in_place=True", "fingerprint differs")],
)
def test_20_of_bakes_to_one_place_one_wins_and_the_others_say_so(
    options, sentence, adapter, monkeypatch
):
    monkeypatch.chdir(adapter.parent)
    record = lp.read_adapter(adapter)
    for i in range(2):
        filled = {k: t * 0 + 0.01 * (i + 1) for k, t in record.tensors.items()}
        lp.write_adapter(replace(record, tensors=filled), f"a{i}.safetensors")
        lp.bake_checkpoint("m.safetensors", f"a{i}.safetensors", f"meant{i}.safetensors")
    meant = [(adapter.parent / f"meant{i}.safetensors").read_bytes() for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BAKE, "m.safetensors", f"a{i}.safetensors", f"dict({options})"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], said
    out = adapter.parent / ("m.safetensors" if "in_place" in options else "out.safetensors")
    assert out.read_bytes() == meant[codes.index(0)], "what the one that succeeded meant"
    assert all(sentence in s for s, code in zip(said, codes, strict=True) if code), said


# --- 21: what is left behind ------------------------------------------------------------------


@KINDS
def test_21_the_next_write_removes_what_a_killed_process_left(kind, tmp_path):
    path = tmp_path / "out"
    process = holder(kind, path)
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 1, "what the dead left"
    write(kind, path)
    assert list(tmp_path.iterdir()) == [path]
    assert content_of(path) == b"new"


@KINDS
def test_21_the_temporary_of_a_living_process_stays(kind, tmp_path):
    path = tmp_path / "out"
    process = holder(kind, path)
    try:
        (living,) = tmp_path.iterdir()
        write(kind, path)
        assert set(tmp_path.iterdir()) == {path, living}
        assert content_of(living / RESULT if kind == "directory" else living) == b"half"
    finally:
        process.kill()
        process.wait()


def test_21_what_is_not_ours_for_certain_stays(tmp_path, monkeypatch):
    path = tmp_path / "out"
    kept = [
        tmp_path / ".out.0123abcd.tmp",
        tmp_path / f".out.{'0' * 12}.0123abcd.tmp",  # of another machine
        tmp_path / f".other.{''.join(temporaries._machine())}.0123abcd.tmp",
        tmp_path / f".out.{''.join(temporaries._machine())}.0123abcd.old",
    ]
    ours = tmp_path / f".out.{''.join(temporaries._machine())}.0123abcd.tmp"
    for place in (*kept, ours):
        place.touch()
    monkeypatch.setattr(temporaries, "take", lambda *_: None)  # a file system without locks
    write("file", path)
    assert set(tmp_path.iterdir()) == {path, ours, *kept}
    monkeypatch.undo()
    write("file", path, force=True)
    assert set(tmp_path.iterdir()) == {path, *kept}


@pytest.mark.parametrize("mark", [0, 1], ids=["this boot", "this machine"])
def test_21_one_mark_of_the_machine_is_enough(mark, tmp_path):
    path = tmp_path / "out"
    marks = ["0" * 6, "0" * 6]
    marks[mark] = temporaries._machine()[mark]
    (tmp_path / f".out.{''.join(marks)}.0123abcd.tmp").touch()
    write("file", path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["é" * 127, "x" * 255, "漢" * 85, "a[b]*?", ".hidden"])
def test_21_temporaries_of_long_and_odd_names(name, tmp_path):
    path = tmp_path / name
    process = holder("file", path)
    process.kill()
    process.wait()
    write("file", path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_21_a_forked_worker_does_not_hold_the_lock_for_ever(tmp_path):
    path = tmp_path / "out"
    with replace_file(path) as file:
        file.write(b"1")
        worker = os.fork()
        if not worker:
            signal.pause()
    try:
        write("file", path, force=True)  # would wait for ever
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
    assert content_of(path) == b"new"
