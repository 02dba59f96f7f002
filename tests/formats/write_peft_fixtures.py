"""Writes `peft-0.18.1/`: adapters of an older PEFT, and what its model computes with each.

Run it where that version is installed without its requirements, beside a transformers of today:

    pip install --no-deps --target old peft==0.18.1
    PYTHONPATH=old python tests/formats/write_peft_fixtures.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
from peft_cases import CASES, saved
from safetensors.torch import save_file

NAMES = [
    "llama-rslora-patterns",
    "llama-dora",
    "llama-embedding",
    "llama-tokens",
    "llama-saved-head",
    "llama-olora",
    "gpt2-bias",
    "gpt2-pissa",
    "bert-lora-bias",
    "mixtral",
    "convs-dora",
    "attention",
    "parameter",
    "stacks-6x6",
    "stacks-6x6-transposed",
    "stacks-6x8",
    "stacks-6x8-transposed",
]

if __name__ == "__main__":
    assert peft.__version__ == "0.18.1", peft.__version__
    for name in NAMES:
        directory = Path(__file__).parent / "peft-0.18.1" / name
        shutil.rmtree(directory, ignore_errors=True)
        _, outputs = saved(CASES[name], directory)
        (directory / "README.md").unlink()
        save_file({"outputs": outputs.contiguous()}, directory / "outputs.safetensors")
