"""minLoRA's state dicts beside its formula: X + (B @ A).view(X.shape)·alpha/rank, of embeddings
X + (A @ B)·alpha/rank, as its parametrization's `lora_forward` has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_param as lp
from lora_param.errors import BrokenFileError, MismatchError, NoFormError, UnsettledError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(12, 6)
        self.fc = nn.Linear(6, 10)
        self.square = nn.Linear(6, 6)
        self.conv = nn.Conv2d(3, 5, 3)


SHAPES = {
    "emb": ((12, 2), (2, 6)),  # swapped: A is (V, rank)
    "fc": ((3, 6), (10, 3)),
    "square": ((2, 6), (6, 2)),
    "conv": ((2, 27), (5, 2)),
}


def of_minlora(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file as `torch.save(get_lora_state_dict(model))` writes it, and ΔW of each weight."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    base = Net().state_dict()
    for name, (a, b) in SHAPES.items():
        A, B = torch.randn(a) * 0.3, torch.randn(b) * 0.3
        stem = f"{name}.parametrizations.weight.0"
        state |= {f"{stem}.lora_A": A, f"{stem}.lora_B": B}
        X = base[f"{name}.weight"]
        product, rank = (A @ B, a[1]) if name == "emb" else (B @ A, a[0])
        deltas[f"{name}.weight"] = product.view(X.shape) * (5 / rank)
    torch.save(state, directory / "lora.pt")
    return directory / "lora.pt", deltas


def test_each_layer_is_what_the_formula_says(tmp_path: Path) -> None:
    path, deltas = of_minlora(tmp_path)
    base = dict(Net().state_dict())
    model = lp.load(Net(), path, alpha=5)
    merged = lp.merged_state_dict(model)
    save_file(base, tmp_path / "base.safetensors")
    lp.bake_checkpoint(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors", alpha=5)
    baked = load_file(tmp_path / "out.safetensors")
    for name, delta in deltas.items():
        for found in (merged, baked):
            torch.testing.assert_close(found[name], base[name] + delta, rtol=0, atol=1e-6)


def test_written_again_it_is_the_same_bytes(tmp_path: Path) -> None:
    path, _ = of_minlora(tmp_path)
    record = lp.convert(path, "minlora", tmp_path / "again.pt", base=Net(), alpha=5)
    assert "alpha 5" in record.notes[-1]
    lp.convert(tmp_path / "again.pt", "minlora", tmp_path / "third.pt", base=Net(), alpha=5)
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "third.pt").read_bytes()
    before, after = (torch.load(p, weights_only=True) for p in (path, tmp_path / "again.pt"))
    assert set(before) == set(after)
    assert all(torch.equal(before[k], t) for k, t in after.items())


def test_what_is_not_told_or_does_not_fit_is_named(tmp_path: Path) -> None:
    path, _ = of_minlora(tmp_path)
    with pytest.raises(UnsettledError, match=r"alpha .*minLoRA does not store"):
        lp.load(Net(), path)
    state = torch.load(path, weights_only=True)
    stem = "fc.parametrizations.weight.0"
    moved = {k.replace(stem, f"other.{stem}"): t for k, t in state.items()}
    torch.save(moved, path)
    with pytest.raises(MismatchError, match=r"other\.fc\.weight"):
        lp.load(Net(), path, alpha=5)
    twice = {k.replace("weight.0", "weight.1"): t for k, t in state.items() if k.startswith(stem)}
    torch.save(state | twice, path)
    with pytest.raises(NoFormError, match=r"several adapters on fc\.weight"):
        lp.load(Net(), path, alpha=5)
    torch.save(state | {"fc.lora_A": torch.ones(2, 6)}, path)
    with pytest.raises(BrokenFileError, match=r"fc\.lora_A"):
        lp.load(Net(), path, alpha=5)


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    path, _ = of_minlora(tmp_path)
    state = torch.load(path, weights_only=True)
    whole = state | {"fc.parametrizations.weight.original": torch.ones(10, 6)}
    torch.save(whole, tmp_path / "model.pt")
    assert lp.stats(tmp_path / "model.pt").rows == ()
