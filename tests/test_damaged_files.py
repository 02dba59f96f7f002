"""A seeded fuzzer: whatever a damaged file holds, the answer is success or one sentence.

No other exception, no hang, no crash, no line that steers a terminal, no memory beyond what the
file justifies. `LORA_PARAM_FUZZ=100000` makes a long run, `LORA_PARAM_FUZZ_SEED` another one.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import damage
import pytest
import torch

import lora_param as lp
from lora_param.errors import InternalError, LoraParamError

FILES = int(os.environ.get("LORA_PARAM_FUZZ", "2000"))
SEED = int(os.environ.get("LORA_PARAM_FUZZ_SEED", "0"))
MOST_SECONDS = 20  # for one file of a few kilobytes: a hang, not a slow machine
MOST_MEMORY = 400 << 20  # above what it was before, over the whole run
KINDS: dict[str, Callable[[random.Random, bytes], tuple[str, bytes]]] = {
    "safetensors": lambda draw, _: damage.safetensors_file(draw),
    "adapter": damage.adapter_file,
    "zip pickle": lambda draw, _: damage.zip_pickle(draw),
    "legacy pickle": lambda draw, _: damage.legacy_pickle(draw),
    "index": lambda draw, _: damage.index_file(draw),
    "config": lambda draw, _: damage.config_file(draw),
    "chunks' index": lambda draw, _: damage.distributed_index(draw),
    "chunks": lambda draw, _: damage.distributed_data(draw),
}


class Hang(BaseException):
    pass


@contextmanager
def no_longer_than(seconds: float):
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def use(path: Path, folder: Path, kind: str, draw: random.Random) -> None:
    """What the commands do with a file, each step as if it were the first."""
    base, whole = folder / "weights.safetensors", folder / "whole.safetensors"
    out = folder.parent / "out" / kind
    options = {"check_fingerprint": False, "force": True, "sync": False, "verify": True}
    target = out.with_suffix(".safetensors")
    steps: list[Callable[[], object]]
    if kind == "adapter":
        steps = [
            lambda: str(lp.stats(path)) and lp.stats(path).to_dict(),
            lambda: lp.disable(path, draw.choice((None, "q"))),
            lambda: lp.bake_checkpoint(base, path, out.with_suffix(".safetensors"), **options),
            lambda: lp.stats(base, path, check_fingerprint=False),
        ]
    elif kind == "config":
        steps = [
            lambda: lp.stats(path.parent),
            lambda: lp.bake_checkpoint(path.parent, whole, out, dtype="fp16", **options),
        ]
    elif kind.startswith("chunks"):
        steps = [
            lambda: lp.stats(path.parent),
            lambda: lp.apply_checkpoint(path.parent, "**", target, rank=2, force=True, sync=False),
            lambda: lp.bake_checkpoint(path.parent, whole, out, **options),
        ]
    else:
        place = out if kind == "index" else out.with_suffix(path.suffix)
        steps = [
            lambda: str(lp.stats(path)) and lp.stats(path).to_dict(),
            lambda: lp.apply_checkpoint(path, "**", target, rank=2, force=True, sync=False),
            lambda: lp.bake_checkpoint(path, whole, place, **options),
            lambda: lp.bake_checkpoint(path, whole, place, dtype="bfloat16", **options),
            lambda: lp.stats(path, whole, check_fingerprint=False),
        ]
    failed: list[str] = []
    said: list[str] = []
    for step in steps:
        try:
            step()
        except InternalError:
            raise
        except LoraParamError as error:
            said.append(str(error))
            failed.append(type(error).__name__)
    assert all(sentence and sentence.isprintable() for sentence in said), ascii(said)
    outcomes[kind, failed[0] if failed else "success"] += 1


outcomes: Counter[tuple[str, str]] = Counter()


def memory() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def damaged(folder: Path, whole: bytes, kind: str, seed: str) -> tuple[Path, random.Random]:
    """One file, and what draws what is done with it."""
    draw = random.Random(seed)
    name, content = KINDS[kind](draw, whole)
    path = folder / name
    path.write_bytes(content)
    return path, draw


@pytest.mark.parametrize(
    ("kind", "seed", "holds"),
    [
        ("zip pickle", "11/1004", None),  # escapes in a damaged pickle: Python warned
        ("zip pickle", "11/7004", None),
        ("zip pickle", "11/6056", b"arch\x7fve/byteorder"),  # directory and members disagree
        ("adapter", "11/3373", b"NaN"),  # in a field of a later version, which is passed on
    ],
)
def test_what_a_long_run_found(
    kind: str, seed: str, holds: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    for made in (folder, tmp_path / "out"):
        made.mkdir()
    monkeypatch.chdir(tmp_path)
    path, draw = damaged(folder, damage.prepare(folder), kind, seed)
    assert holds is None or holds in path.read_bytes()
    with no_longer_than(MOST_SECONDS):
        use(path, folder, kind, draw)


def test_the_fuzzer_of_damaged_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    for made in (folder, tmp_path / "out"):
        made.mkdir()
    monkeypatch.chdir(tmp_path)
    whole = damage.prepare(folder)
    beside = set(folder.iterdir())
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch takes when it first computes
    before = memory()
    outcomes.clear()
    failures: list[str] = []
    for number in range(FILES):
        kind = list(KINDS)[number % len(KINDS)]
        path, draw = damaged(folder, whole, kind, f"{SEED}/{number}")
        try:
            with no_longer_than(MOST_SECONDS):
                use(path, folder, kind, draw)
        except (Exception, Hang) as error:
            failures.append(f"file {number}, {kind}: {type(error).__name__}: {error!s:.200}")
        path.unlink()
        assert set(folder.iterdir()) == beside, (number, kind)
        assert not list((tmp_path / "out").glob(".*")), (number, kind)
    grown = memory() - before
    with capsys.disabled():
        shown = ", ".join(f"{k}: {v} {n}" for (k, v), n in sorted(outcomes.items()))
        print(f"\n{sum(outcomes.values())} damaged files ({shown}), {grown >> 20} MiB more")
    assert not failures, f"{len(failures)} of seed {SEED}: " + "\n".join(failures[:20])
    assert sum(outcomes.values()) == FILES
    assert grown < MOST_MEMORY
    for kind in KINDS:
        assert outcomes[kind, "success"] < FILES / len(KINDS), f"{kind} is not damaged enough"
