"""How long a bake takes and what memory it needs, on a synthetic `.safetensors`.

40 square fp32 weights, of which an adapter of rank 8 targets every other one; `--size` says how
large the file is. Contenders, each in a process of its own, whose imports are not counted:

- `copy`: the file copied, the baseline;
- `load, merge, save`: all of it loaded with `safetensors.torch`, merged in place, and saved;
- `ours`: `lora_param.bake_checkpoint`, all its checks included, with `sync=False`, for the others
  do not wait for the disk either;
- `copy, synced` and `ours, synced`: both until the data are on the disk.

`peak MiB` is by how much the process grew: its resident memory at the most, pages of mapped files
included, over what it was before.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ALPHA, MIB, Row, options, parse, ratios_of, rotated, show
from safetensors.torch import load_file, save_file

import lora_param as lp

WEIGHTS, RANK = 40, 8


def copy(base: Path, adapter: Path, out: Path) -> None:  # noqa: ARG001  one signature for all
    shutil.copyfile(base, out)


def copy_synced(base: Path, adapter: Path, out: Path) -> None:
    copy(base, adapter, out)
    with out.open("rb") as file:
        os.fsync(file.fileno())


def load_merge_save(base: Path, adapter: Path, out: Path) -> None:
    weights, factors = load_file(base), load_file(adapter)
    for name, A in factors.items():
        target, _, factor = name.rpartition(".")
        if factor == "lora_A":
            weights[target] += (factors[f"{target}.lora_B"] @ A) * (ALPHA / RANK)
    save_file(weights, out)


def ours(base: Path, adapter: Path, out: Path) -> None:
    lp.bake_checkpoint(base, adapter, out, sync=False, force=True)


def ours_synced(base: Path, adapter: Path, out: Path) -> None:
    lp.bake_checkpoint(base, adapter, out, force=True)


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    "copy": copy,
    "load, merge, save": load_merge_save,
    "ours": ours,
    "copy, synced": copy_synced,
    "ours, synced": ours_synced,
}


def make_files(folder: Path, size: int) -> None:
    """`base.safetensors` of about `size` MB, and an adapter on every other weight."""
    width = round((size * 1e6 / 4 / WEIGHTS) ** 0.5)
    base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
    save_file({f"w{i:02}.weight": torch.randn(width, width) for i in range(WEIGHTS)}, base)
    targets = [f"w{i:02}" for i in range(0, WEIGHTS, 2)]
    lp.apply_checkpoint(base, targets, adapter, rank=RANK, alpha=ALPHA)
    factors = lp.read_adapter(adapter)
    for tensor in factors.tensors.values():
        tensor.normal_(std=0.01)
    lp.write_adapter(factors, adapter)


def resident_peak() -> int:
    """Bytes of resident memory at the most so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, not inherited from the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_here(way: str, folder: Path) -> None:
    """One contender, in this process; prints its seconds and bytes."""
    torch.set_num_threads(2)
    lp.bake_checkpoint, lp.read_adapter  # noqa: B018  imported before the clock starts
    before = resident_peak()
    start = time.perf_counter()
    WAYS[way](folder / "base.safetensors", folder / "adapter.safetensors", folder / "out")
    print(json.dumps([time.perf_counter() - start, resident_peak() - before]))


def run_apart(way: str, folder: Path) -> tuple[float, float]:
    """One contender, in a process of its own: seconds and bytes."""
    out = folder / "out"
    out.unlink(missing_ok=True)
    line = [sys.executable, __file__, "--worker", way, "--directory", str(folder)]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def main() -> None:
    parser = options(__doc__, ["bake"], rounds=5)
    parser.add_argument("--size", type=int, default=400, help="of the file in MB; default: 400")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--worker", choices=WAYS, help="internal: run one contender here")
    args = parse(parser)
    if args.worker:
        run_here(args.worker, args.directory)
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        rows = measure(Path(name), args.size, args.rounds)
    show("bake", rows, [], as_json=args.json)


def measure(folder: Path, size: int, rounds: int) -> list[Row]:
    make_files(folder, size)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks = dict.fromkeys(WAYS, 0.0)
    for way in rotated(list(WAYS), rounds):
        seconds, peak = run_apart(way, folder)
        times[way].append(seconds)
        peaks[way] = max(peaks[way], peak / MIB)
    case = f"{size} MB, {WEIGHTS // 2} of {WEIGHTS}"
    return ratios_of(case, times, "copy", {w: {"peak MiB": p} for w, p in peaks.items()})


if __name__ == "__main__":
    main()
