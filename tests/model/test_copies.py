"""Full copies: tensors, biases and rows that take the place of the base's (issue 10, section 1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_param as lp
from lora_param.adapter import AdapterTarget
from lora_param.errors import OptionError
from lora_param.fingerprint import BaseWeight
from lora_param.targets.regions import Region, Target
from lora_param.targets.settings import Settings

COPY = Settings(rank=1, alpha=1.0, scaling="constant", variant="copy")


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(7, 4, dtype=dtype)
        self.fc = nn.Linear(4, 3, dtype=dtype)
        self.norm = nn.LayerNorm(3, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.fc(self.emb(ids)))


IDS = torch.arange(7)


def values() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "fc.weight": torch.randn(3, 4, generator=g) * 3,
        "fc.bias": torch.randn(3, generator=g) * 1e-3,
        "norm.weight": torch.randn(3, generator=g),
        "emb.weight[1,4,5]": torch.randn(3, 4, generator=g),
    }


def record() -> lp.Adapter:
    targets = {
        "fc.weight": Target("fc.weight"),
        "fc.bias": Target("fc.bias"),
        "norm.weight": Target("norm.weight"),
        "emb.weight[1,4,5]": Target("emb.weight", Region(picked=(1, 4, 5))),
    }
    shapes = {"fc.weight": (3, 4), "fc.bias": (3,), "norm.weight": (3,), "emb.weight": (7, 4)}
    return lp.Adapter(
        {key: AdapterTarget(t, COPY) for key, t in targets.items()},
        {f"{k}.value": v if v.dim() > 1 else v[:, None] for k, v in values().items()},
        {name: BaseWeight(shape) for name, shape in shapes.items()},
    )


def replaced(dtype: torch.dtype = torch.float32) -> Net:
    """A plain net that holds the copies."""
    net = Net(dtype)
    with torch.no_grad():
        found = values()
        net.fc.weight.copy_(found["fc.weight"])
        net.fc.bias.copy_(found["fc.bias"])
        net.norm.weight.copy_(found["norm.weight"])
        net.emb.weight[[1, 4, 5]] = found["emb.weight[1,4,5]"].to(dtype)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attached_they_are_the_copies_bit_for_bit(dtype: torch.dtype) -> None:
    net = lp.attach(Net(dtype), record())
    wanted = replaced(dtype)
    for name, tensor in wanted.state_dict().items():
        module, _, leaf = name.rpartition(".")
        found = getattr(net.get_submodule(module), leaf)
        assert torch.equal(found.build() if hasattr(found, "build") else found, tensor), name
    assert torch.equal(net(IDS), wanted(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compiled_they_are_the_copies(dtype: torch.dtype) -> None:
    net = lp.attach(Net(dtype), record())
    compiled = torch.compile(net, backend="eager")(IDS)  # where the strength is a tensor
    torch.testing.assert_close(compiled, replaced(dtype)(IDS))


def test_they_toggle_by_name_and_removing_restores() -> None:
    net, base = lp.attach(Net(), record()), Net()
    lp.disable(net)
    assert torch.equal(net(IDS), base(IDS))
    lp.enable(net, ["fc.bias"])
    base.fc.bias.data.copy_(values()["fc.bias"])
    assert torch.equal(net(IDS), base(IDS))
    with lp.disabled(net):
        assert torch.equal(net(IDS), Net()(IDS))
    lp.remove(net)
    assert torch.equal(net(IDS), Net()(IDS))
    assert {n: type(m).__name__ for n, m in net.named_modules()} == {
        n: type(m).__name__ for n, m in Net().named_modules()
    }


def test_they_are_listed() -> None:
    stats = lp.stats(lp.attach(Net(), record()))
    rows = {row.target: row for row in stats.rows}
    assert set(rows) == set(record().targets)
    assert rows["fc.bias"].trainable == 3
    moved = (replaced().emb.weight - Net().emb.weight).norm().item()
    assert rows["emb.weight[1,4,5]"].update_norm == pytest.approx(moved, rel=1e-5)
    assert {row.variant for row in stats.rows} == {"copy"}
    assert "copy" in str(stats)


def test_half_strength_is_half_way() -> None:
    net = lp.attach(Net(), record())
    lp.set_scale(net, 0.5)
    half = (Net().fc.weight + replaced().fc.weight) / 2
    torch.testing.assert_close(net.fc.weight.build(), half)


def test_live_and_file_bake_are_the_copies(tmp_path: Path) -> None:
    lp.save(lp.attach(Net(), record()), tmp_path / "a.safetensors")
    torch.save(Net().state_dict(), tmp_path / "base.pt")
    lp.bake_checkpoint(
        tmp_path / "base.pt", tmp_path / "a.safetensors", tmp_path / "out.pt", verify=True
    )
    live = lp.bake(lp.attach(Net(), record())).state_dict()
    baked = torch.load(tmp_path / "out.pt")
    for name, tensor in replaced().state_dict().items():
        assert torch.equal(live[name], tensor), name
        assert torch.equal(baked[name], tensor), name


def test_the_native_file_holds_and_switches_them(tmp_path: Path) -> None:
    net = lp.attach(Net(), record())
    lp.save(net, tmp_path / "a.safetensors")
    lp.disable(tmp_path / "a.safetensors", ["emb"])
    again = lp.load(Net(), tmp_path / "a.safetensors")
    lp.disable(net, ["emb"])
    assert torch.equal(again(IDS), net(IDS))
    lp.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_adapter_adds_to_a_copy() -> None:
    net = lp.attach(Net(), record())
    lp.apply(net, ["fc", "emb"], rank=2, adapter="more")
    with torch.no_grad():
        for p in lp.parameters(net, "more"):
            p.copy_(torch.randn(p.shape))
    wanted = lp.apply(replaced(), ["fc", "emb"], rank=2)
    for a, b in zip(lp.parameters(wanted), lp.parameters(net, "more"), strict=True):
        a.data.copy_(b)
    torch.testing.assert_close(net(IDS), wanted(IDS))
    torch.testing.assert_close(lp.bake(net)(IDS), wanted(IDS))


def test_gradients_reach_a_copy() -> None:
    net, wanted = lp.attach(Net(), record()), replaced()
    net(IDS).square().sum().backward()
    wanted(IDS).square().sum().backward()
    grads = {n.split(".")[0] + n.split(".")[2]: p.grad for n, p in net.named_parameters()
             if p.requires_grad}  # fmt: skip
    torch.testing.assert_close(grads["fcweight"], wanted.fc.weight.grad)
    torch.testing.assert_close(grads["fcbias"], wanted.fc.bias.grad[:, None])
    torch.testing.assert_close(grads["embweight"], wanted.emb.weight.grad[[1, 4, 5]])


def test_they_are_not_made_by_apply_and_rows_are_not_patterns() -> None:
    with pytest.raises(OptionError, match="copy comes in files of other tools alone"):
        lp.apply(Net(), ["fc"], variant="copy")
    with pytest.raises(OptionError, match="copy, for single rows"):
        AdapterTarget(Target("emb.weight", Region(picked=(1,))), Settings())
