import pytest
import torch
from checkpoint_samples import weights
from safetensors.torch import load_file

from lora_param.checkpoint.create import create_adapter
from lora_param.errors import NoMatchError, OptionError, UnsuitableWeightError
from lora_param.formats import write_adapter


def test_factors_and_settings(base):
    plan, adapter = create_adapter(
        base, ["q", "b.v:rank=1"], rank=2, alpha=4, scaling="rslora", dropout=0.1, seed=0, name="x"
    )
    assert sorted(adapter.targets) == ["a.q.weight", "b.q.weight", "b.v.weight"]
    assert adapter.name == "x"
    assert adapter.trainable == plan.trainable == sum(t.numel() for t in adapter.tensors.values())
    assert adapter.targets["a.q.weight"].scale == pytest.approx(4 / 2**0.5)
    assert adapter.tensors["b.q.weight.lora_A"].dtype == torch.float32
    assert adapter.tensors["b.v.weight.lora_A"].dtype == torch.float64
    assert adapter.tensors["b.v.weight.lora_A"].shape == (1, 3)
    assert not any(t.any() for n, t in adapter.tensors.items() if n.endswith("lora_B"))
    assert set(adapter.base) == set(adapter.targets)
    assert all(b.hash for b in adapter.base.values())


def test_a_seed_gives_the_same_bytes(base, tmp_path):
    def made(seed):
        _, adapter = create_adapter(base, "all-linear", rank=2, seed=seed)
        write_adapter(adapter, tmp_path / "a.safetensors")
        return (tmp_path / "a.safetensors").read_bytes()

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_pissa_starts_at_the_base(base):
    _, adapter = create_adapter(base, "a.q", rank=4, init="pissa")
    f = adapter.factors("a.q.weight")
    assert torch.equal(f["lora_A"], f["initial_A"])
    W = f["lora_B"] @ f["lora_A"] * adapter.targets["a.q.weight"].scale
    torch.testing.assert_close(W, weights()["a.q.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"variant": "odd"}, OptionError),
        ({"targets": ["a.q:variant=odd"]}, OptionError),
        ({"init": "magic"}, OptionError),
        ({"rank": 0}, OptionError),
        ({"targets": ["nothing"]}, NoMatchError),
        ({"targets": ["steps"]}, UnsuitableWeightError),
    ],
)
def test_bad_settings(options, error, base):
    with pytest.raises(error):
        create_adapter(base, **({"targets": ["q"]} | options))


def test_dora_starts_at_the_norms_of_the_rows(base):
    plan, adapter = create_adapter(base, ["a.q"], rank=2, variant="dora", seed=0)
    W = load_file(base)["a.q.weight"].float()
    magnitude = adapter.tensors["a.q.weight.magnitude"]
    torch.testing.assert_close(magnitude, W.norm(dim=1))
    assert plan.trainable == adapter.trainable == sum(t.numel() for t in adapter.tensors.values())
