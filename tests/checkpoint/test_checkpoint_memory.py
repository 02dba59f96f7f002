"""The memory of a bake does not grow with the file: some blocks, whatever the weights' sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import trained
from safetensors.torch import save_file

from lora_param.checkpoint.create import create_adapter
from lora_param.formats import write_adapter

MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from lora_param.api_files import bake_checkpoint
def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
torch.set_num_threads(2)
base, adapter, out = sys.argv[1:]
import lora_param.checkpoint.bake
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():  # which an older torch needs for archives: 70 MiB of modules
    torch.empty(1)
before = peak = anonymous()
over = threading.Event()
def watch():
    global peak
    while not over.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch, daemon=True)
thread.start()
bake_checkpoint(base, adapter, out, force=True, sync=False)
over.set()
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word on memory is Linux's")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_bake_holds_some_blocks_however_large_the_file_is(suffix: str, tmp_path: Path) -> None:
    paths = []
    for rows in (1_000, 40_000):  # the second is of 156 MiB
        path = tmp_path / f"{rows}{suffix}"
        weights = {"q.weight": torch.full((rows, 2048), 0.02).bfloat16()}
        save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
        paths.append(path)
        _, fresh = create_adapter(path, ["q"], rank=2, seed=0)
        write_adapter(trained(fresh), tmp_path / f"{rows}.adapter.safetensors")
    found = []
    for one in paths:
        adapter = tmp_path / f"{one.stem}.adapter.safetensors"
        line = [sys.executable, "-c", MEASURED, one, adapter, tmp_path / f"out{suffix}"]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        found.append(int(done.stdout))
    assert max(found) < 80 * 2**20, found
    assert found[1] - found[0] < 40 * 2**20, found  # the second file is 152 MiB larger
