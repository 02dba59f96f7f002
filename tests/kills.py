"""Kills writers at random moments and looks at what they leave; run by `test_kills.py`.

    python tests/kills.py FOLDER COUNT SEED

One process has everything imported and forks the writers, so that a kill costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import lora_param as lp


def content(place: Path) -> dict[str, bytes] | bytes | None:
    """What is at a place, as far as a user sees it."""
    if place.is_dir():
        return {p.name: p.read_bytes() for p in place.iterdir()}
    return place.read_bytes() if place.exists() else None


def copy(source: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, place)


def forked(write: Callable[[], object], kill_after: float | None = None) -> bool:
    """Run it in a process of its own; True where the kill met it alive."""
    process = os.fork()
    if not process:
        try:
            write()
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, "the writer failed"
    return killed


def main(folder: Path, count: int, seed: int) -> dict[str, int]:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    weights = {f"{i}.weight": torch.randn(256, 256) for i in range(8)}
    model, shards = folder / "m.safetensors", folder / "m"
    save_file(weights, model)
    shards.mkdir()
    save_file(weights, shards / "model.safetensors")
    (shards / "config.json").write_text("{}")
    pickled = folder / "m.pt"
    torch.save(weights, pickled)
    chunks = folder / "c"
    dcp.save(weights, checkpoint_id=chunks, no_dist=True)
    adapter = folder / "a.safetensors"
    lp.apply_checkpoint(model, "all-linear", adapter, rank=4, init="normal:1")
    record = lp.read_adapter(adapter)
    ones = {k: torch.ones_like(t) for k, t in record.tensors.items()}
    lp.write_adapter(replace(record, tensors=ones), adapter)

    place = {
        n: folder / "out" / n for n in ("f.safetensors", "p.pt", "d", "c", "i.safetensors", "id")
    }
    place["t.safetensors"] = folder / "out" / "t.safetensors"
    (folder / "out").mkdir()
    options = {"force": True}
    jobs: dict[str, tuple[Path | None, Callable[[Path], object]]] = {
        "f.safetensors": (model, lambda p: lp.bake_checkpoint(model, adapter, p, **options)),
        "p.pt": (pickled, lambda p: lp.bake_checkpoint(pickled, adapter, p, **options)),
        "d": (shards, lambda p: lp.bake_checkpoint(shards, adapter, p, **options)),
        "c": (chunks, lambda p: lp.bake_checkpoint(chunks, adapter, p, **options)),
        "i.safetensors": (model, lambda p: lp.bake_checkpoint(p, adapter, in_place=True)),
        "id": (shards, lambda p: lp.bake_checkpoint(p, adapter, in_place=True)),
        "t.safetensors": (adapter, lambda p: lp.disable(p)),
    }
    old, new, seconds = {}, {}, {}
    for name, (source, write) in jobs.items():
        copy(source, place[name])
        old[name] = content(place[name])
        start = time.perf_counter()
        forked(partial(write, place[name]))
        seconds[name] = time.perf_counter() - start
        new[name] = content(place[name])
        assert old[name] != new[name]
    found: Counter[str] = Counter()
    while found["kills"] < count:
        name = draw.choice(list(jobs))
        source, write = jobs[name]
        exists = "i" in name.split(".")[0] or name.startswith("t") or draw.random() < 0.7
        if exists:
            copy(source, place[name])
        elif place[name].is_dir():
            shutil.rmtree(place[name])
        else:
            place[name].unlink(missing_ok=True)
        was = content(place[name])
        if not forked(partial(write, place[name]), draw.uniform(0, 1.05 * seconds[name])):
            found["finished first"] += 1
            continue
        found["kills"] += 1
        now = content(place[name])
        assert now in (was, new[name]), f"half of {name}"
        found["new" if now == new[name] else "old"] += 1
        left = [p for p in (folder / "out").iterdir() if p.name.startswith(".")]
        found["left behind"] += len(left)
        if name[0] in "i" and now == new[name]:
            copy(source, place[name])
        elif now == new[name] and name[0] == "t":
            lp.enable(place[name])  # disabling again would write nothing
        write(place[name])
        assert content(place[name]) == new[name], name
        assert not [p for p in (folder / "out").iterdir() if p.name.startswith(".")], "not removed"
    return dict(found)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
