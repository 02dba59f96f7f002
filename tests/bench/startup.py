"""How long the command line takes to answer: whole processes, from start to exit.

Beside it, in the same rounds, an empty Python, one that imports what the command line is made of
(`typer, rich`), and one that imports torch. The baseline is `import typer, rich`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import PROJECTIONS, Contender, compare, options, parse, show
from safetensors.torch import save_file

import lora_param as lp

BASELINE = "import typer, rich"


def commands(folder: Path) -> dict[str, list[str]]:
    model, adapter = str(folder / "model.safetensors"), str(folder / "adapter.safetensors")
    names = [f"layers.{i}.{p}.weight" for i in range(16) for p in PROJECTIONS]
    save_file({name: torch.randn(64, 64) for name in names}, model)
    lp.apply_checkpoint(model, PROJECTIONS, adapter, rank=4)
    ours = [sys.executable, "-m", "lora_param"]
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        BASELINE: [sys.executable, "-c", BASELINE],
        "import torch": [sys.executable, "-c", "import torch"],
        "lora-param --help": [*ours, "--help"],
        "lora-param stats MODEL": [*ours, "stats", model],
        "lora-param stats ADAPTER": [*ours, "stats", adapter],
        "lora-param stats MODEL ADAPTER": [*ours, "stats", model, adapter],
    }


def main() -> None:
    args = parse(options(__doc__, ["process"], rounds=9))
    with tempfile.TemporaryDirectory() as folder:
        contenders = [_contender(n, line) for n, line in commands(Path(folder)).items()]
        rows = compare("process", contenders, rounds=args.rounds, turn=0, baseline=BASELINE)
    show("startup", rows, [], as_json=args.json)


def _contender(name: str, line: list[str]) -> Contender:
    def run(_: object) -> None:
        subprocess.run(line, check=True, capture_output=True)

    return Contender(name, run)


if __name__ == "__main__":
    main()
