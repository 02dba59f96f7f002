"""SIGKILL at random moments of a bake or a toggle: the old or the new, never half; then clean.

`LORA_PARAM_KILLS=5000` makes a long run, `LORA_PARAM_FUZZ_SEED` another one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = int(os.environ.get("LORA_PARAM_KILLS", "100"))
SEED = int(os.environ.get("LORA_PARAM_FUZZ_SEED", "0"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_leave_the_old_or_the_new_and_the_next_write_cleans_up(tmp_path, capsys):
    script = Path(__file__).parent / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(COUNT), str(SEED)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{found}")
    assert found["kills"] == COUNT
    assert found["old"]
    assert found["left behind"], "no kill met a writer at work"
