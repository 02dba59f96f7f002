"""Other tools' files with bytes changed, cut or put in: read, or refused in a sentence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from test_gguf_adapters import theirs
from test_minlora import of_minlora

import lora_param as lp
from lora_param.errors import UserError

TOOLS = Path(__file__).parent / "tools"
FILES = {
    "loralib": (TOOLS / "loralib" / "lora.pt", 3.0),
    "torchtune": (TOOLS / "torchtune" / "adapter_model.pt", 5.0),
    "mlx": (TOOLS / "mlx" / "adapters.safetensors", None),
    "mlx config": (TOOLS / "mlx" / "adapter_config.json", None),
    "diffusers": (TOOLS / "diffusers" / "pytorch_lora_weights.safetensors", None),
    "gguf": (None, None),
    "minlora": (None, 5.0),
}


def damaged(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(min(len(data), 3000))
    kind = draw.choice(["byte", "cut", "end", "zeros", "more"])
    if kind == "byte":
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    if kind == "zeros":
        return data[:at] + bytes(8) + data[at + 8 :]
    if kind == "more":
        return data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:]
    return data[:at] if kind == "end" else data[:at] + data[at + draw.randrange(1, 40) :]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    source, alpha = FILES[name]
    if name == "gguf":
        source = theirs(tmp_path / "a.gguf")
    elif source is None:
        source, _ = of_minlora(tmp_path)
    directory = tmp_path / "damaged"
    directory.mkdir()
    if name.startswith("mlx"):
        for file in ("adapters.safetensors", "adapter_config.json"):
            shutil.copy(TOOLS / "mlx" / file, directory)
    path = directory if name.startswith("mlx") else directory / source.name
    draw = random.Random(name)
    refused: list[str] = []
    for _ in range(60):
        (directory / source.name).write_bytes(damaged(source.read_bytes(), draw))
        try:
            assert lp.read_adapter(path, alpha=alpha).targets
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in told for told in refused)
