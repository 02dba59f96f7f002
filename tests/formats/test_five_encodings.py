"""One random expert stack in five encodings gives one ΔW (issue 10, names as data).

PEFT's two eras of `target_parameters`, a tensor for each expert, a server's three dimensions
(llama.cpp's), and factors of which the experts share the outer one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_param as lp

EXPERTS, OUT, IN, RANK, ALPHA = 4, 6, 10, 2, 3
STACK = "model.layers.0.mlp.experts"
DISK = "model.layers.0.block_sparse_moe.experts.{}.w2"


def factors() -> tuple[Tensor, Tensor]:
    """A (rank, in), which all experts share, and B (E, out, rank)."""
    torch.manual_seed(0)
    return torch.randn(RANK, IN) * 0.3, torch.randn(EXPERTS, OUT, RANK) * 0.3


def base(directory: Path) -> Path:
    """The file of single experts that transformers writes for a Mixtral."""
    directory.mkdir()
    torch.manual_seed(1)
    weights = {f"{DISK.format(e)}.weight": torch.randn(OUT, IN) for e in range(EXPERTS)}
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return directory


def peft(directory: Path, version: str, tensors: dict[str, Tensor], **config: object) -> Path:
    directory.mkdir()
    save_file({f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()},
              directory / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "peft_version": version, **config}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    return directory


def of_peft_now(path: Path) -> Path:
    """A (E·r, in) by experts, B (out, r·E) by ranks."""
    A, B = factors()
    tensors = {
        f"{STACK}.lora_A.weight": A.repeat(EXPERTS, 1),
        f"{STACK}.lora_B.weight": B.permute(1, 2, 0).reshape(OUT, RANK * EXPERTS),
    }
    return peft(path, "0.21.2", tensors, target_parameters=["mlp.experts.down_proj"])


def of_peft_before(path: Path) -> Path:
    """Up to 0.19.0 both sides are swapped: A (E·r, out), B (in, r·E), ΔW_e = (B_e @ A_e)ᵀ."""
    A, B = factors()
    tensors = {
        f"{STACK}.lora_A.weight": B.mT.reshape(EXPERTS * RANK, OUT),
        f"{STACK}.lora_B.weight": A.T[:, :, None].expand(-1, -1, EXPERTS).reshape(IN, -1),
    }
    return peft(path, "0.18.1", tensors, target_parameters=["mlp.experts.down_proj"])


def per_expert(path: Path) -> Path:
    A, B = factors()
    tensors = {f"{DISK.format(e)}.lora_A.weight": A.clone() for e in range(EXPERTS)}
    tensors |= {f"{DISK.format(e)}.lora_B.weight": B[e] for e in range(EXPERTS)}
    return peft(path, "0.21.2", tensors, target_modules=["w2"])


def of_llama_cpp(path: Path) -> Path:
    """`ffn_down_exps` with (E, r, in) and (E, out, r)."""
    gguf = pytest.importorskip("gguf")
    A, B = factors()
    file = path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ALPHA))
    name = "blk.0.ffn_down_exps.weight"
    stacked = A.expand(EXPERTS, -1, -1).numpy()
    writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(stacked))
    writer.add_tensor(f"{name}.lora_b", B.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def shared_outer(path: Path) -> Path:
    """One A for all: the experts side by side are one matrix (E·out, in) of the same rank."""
    A, B = factors()
    directory = path.with_name("stacked")
    directory.mkdir()
    rows = B.reshape(EXPERTS * OUT, RANK)
    rules = path.with_suffix(".txt")
    parts = " ~ ".join(f"*.{DISK.format(e).partition('.0.')[2]}.weight" for e in range(EXPERTS))
    rules.write_text(f"*.experts.all_down.weight = {parts}\n")
    tensors = {f"{STACK}.all_down.lora_A.weight": A, f"{STACK}.all_down.lora_B.weight": rows}
    tensors = {n.replace(".mlp.", "."): t for n, t in tensors.items()}
    return peft(path, "0.21.2", tensors, target_modules=["all_down"])


ENCODINGS: dict[str, Callable[[Path], Path]] = {
    "PEFT since 0.19.1": of_peft_now,
    "PEFT before": of_peft_before,
    "per expert": per_expert,
    "a server's 3-D": of_llama_cpp,
    "shared outer factor": shared_outer,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_five_encodings_of_one_random_expert_stack_give_the_same_update(
    encoding: str, tmp_path: Path
) -> None:
    directory = base(tmp_path / "base")
    adapter = ENCODINGS[encoding](tmp_path / "adapter")
    rules = tmp_path / "adapter.txt"
    record = lp.read_adapter(adapter, names=rules if rules.exists() else None)
    lp.bake_checkpoint(directory, record, tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    A, B = factors()
    for e in range(EXPERTS):
        name = f"{DISK.format(e)}.weight"
        wanted = before[name] + ALPHA / RANK * (B[e] @ A)
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-6, msg=name)
