import pytest
import torch

from lora_param.checkpoint.module import ModuleCheckpoint
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import UnknownFileError, UserError

SOURCE = """
import torch
from torch import nn
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    model[3].weight = model[0].weight
    return model
class Holder:
    @staticmethod
    def build(): return nn.Linear(2, 2)
def number(): return 3
def fails(): raise RuntimeError("no data")
def leaves(): raise SystemExit(2)
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return f"python:{name}:"


def test_reads_a_model_built_by_a_call(spec):
    checkpoint = open_checkpoint(spec + "net")
    assert isinstance(checkpoint, ModuleCheckpoint)
    assert set(checkpoint) == set(checkpoint.module.state_dict())
    assert checkpoint.weights["0.weight"].tied == ("3.weight",)
    assert "Embedding" in checkpoint.weights["0.weight"].classes
    assert checkpoint.weights["2.num_batches_tracked"].dtype == "int64"
    assert torch.equal(checkpoint["1.weight"], checkpoint.module[1].weight)
    assert len(open_checkpoint(spec + "Holder.build")) == 2


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("number", "returns a int"),
        ("fails", "RuntimeError: no data"),
        ("leaves", "SystemExit"),
        ("nothing", "AttributeError"),
        ("", "incomplete"),
    ],
)
def test_what_cannot_be_used_names_the_text(spec, end, why):
    with pytest.raises(UnknownFileError, match=why) as caught:
        open_checkpoint(spec + end)
    assert spec in str(caught.value)


def test_missing_modules():
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        open_checkpoint("python:no_such_package.at_all:net")
