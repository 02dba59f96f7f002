"""sd-scripts' files, beside their formula and what LyCORIS' own modules make of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_param as lp
from lora_param.errors import BrokenFileError, MismatchError, NoFormError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 6)
        self.ff_net = nn.Linear(6, 10)
        self.conv = nn.Conv2d(3, 5, 3)


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = Unet()
        self.text_encoder = nn.ModuleDict({"text_model": Block()})


def parts(rank: int, alpha: float | None, *shape: int, mid: bool = False) -> dict[str, Tensor]:
    """sd-scripts' tensors for a weight of this shape."""
    out, inner, *kernel = shape
    ones = [1] * len(kernel)
    found = {
        "lora_down.weight": torch.randn(rank, inner, *(ones if mid else kernel)),
        "lora_up.weight": torch.randn(out, rank, *ones),
    }
    if mid:
        found["lora_mid.weight"] = torch.randn(rank, rank, *kernel)
    return found if alpha is None else found | {"alpha": torch.tensor(alpha)}


def saved(path: Path, modules: dict[str, dict[str, Tensor]]) -> Path:
    tensors = {f"{n}.{s}": t for n, found in modules.items() for s, t in found.items()}
    save_file(tensors, path, {"ss_network_dim": "2", "ss_training_comment": "mine"})
    return path


def whole(tmp_path: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    torch.manual_seed(1)
    modules = {
        "lora_unet_down_blocks_0_to_q": parts(2, 3.0, 6, 6),
        "lora_unet_down_blocks_0_ff_net": parts(3, None, 10, 6),
        "lora_unet_down_blocks_1_conv": parts(2, 0.0, 5, 3, 3, 3),
        "lora_unet_down_blocks_0_conv": parts(2, 1.0, 5, 3, 3, 3, mid=True),
        "lora_te_text_model_to_q": parts(4, -2.0, 6, 6),
    }
    return saved(tmp_path / "kohya.safetensors", modules), modules


def of_kohya(found: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """ΔW by sd-scripts' and LyCORIS' formula."""
    down, up = found["lora_down.weight"].flatten(1), found["lora_up.weight"].flatten(1)
    rank = found["lora_down.weight"].shape[0]
    alpha = float(found["alpha"]) if "alpha" in found and float(found["alpha"]) else rank
    if "lora_mid.weight" in found:
        mid = found["lora_mid.weight"]
        return alpha / rank * torch.einsum("pqkl,op,qi->oikl", mid, up, down)
    return alpha / rank * (up @ down).reshape(shape)


NAMES = {
    "lora_unet_down_blocks_0_to_q": "unet.down_blocks.0.to_q.weight",
    "lora_unet_down_blocks_0_ff_net": "unet.down_blocks.0.ff_net.weight",
    "lora_unet_down_blocks_1_conv": "unet.down_blocks.1.conv.weight",
    "lora_unet_down_blocks_0_conv": "unet.down_blocks.0.conv.weight",
    "lora_te_text_model_to_q": "text_encoder.text_model.to_q.weight",
}


def test_alphas_convolutions_and_mid_are_read_as_the_formula_says(tmp_path: Path) -> None:
    path, modules = whole(tmp_path)
    base = dict(Pipeline().state_dict())
    merged = lp.load(Pipeline(), path)
    state = lp.merged_state_dict(merged)
    for lora, name in NAMES.items():
        wanted = base[name] + of_kohya(modules[lora], base[name].shape)
        torch.testing.assert_close(state[name], wanted, rtol=0, atol=2e-6)
    assert {n for n in state if not torch.equal(state[n], base[n])} == set(NAMES.values())


def test_baked_into_a_file(tmp_path: Path) -> None:
    path, modules = whole(tmp_path)
    base = dict(Pipeline().state_dict())
    save_file(base, tmp_path / "base.safetensors")
    lp.bake_checkpoint(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    for lora, name in NAMES.items():
        wanted = base[name] + of_kohya(modules[lora], base[name].shape)
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=2e-6)


def test_through_native_and_back_names_scales_and_bytes_are_kept(tmp_path: Path) -> None:
    path, _ = whole(tmp_path)
    lp.convert(path, "kohya", tmp_path / "again.safetensors", base=Pipeline())
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")
    mid = "lora_unet_down_blocks_0_conv"
    assert {k for k in before if not k.startswith(mid)} <= set(after)
    for key, tensor in before.items():
        if not key.startswith(mid) and float(tensor.flatten()[0]) != 0:
            assert torch.equal(after[key], tensor), key
    lp.convert(path, "native", tmp_path / "n.safetensors", base=Pipeline())
    lp.convert(tmp_path / "n.safetensors", "kohya", tmp_path / "third.safetensors", base=Pipeline())
    third = load_file(tmp_path / "third.safetensors")
    assert set(third) == set(after) | {"lora_unet_down_blocks_0_ff_net.alpha"}
    told = {k: t for k, t in after.items() if t.any()}  # an alpha of 0 is the rank
    assert all(torch.equal(third[k], t) for k, t in told.items())


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_dora_is_that_of_lycoris(layer: str, on_out: bool, tmp_path: Path) -> None:
    locon = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(3)
    model = Pipeline()
    block = model.unet.down_blocks[0]
    target = block.ff_net if layer == "linear" else block.conv
    theirs = locon.LoConModule(
        "x", target, lora_dim=2, alpha=3, weight_decompose=True, wd_on_out=on_out
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.rand(p.shape) * 0.3)
    state = {k: v.detach().clone() for k, v in theirs.custom_state_dict().items()}
    name = f"lycoris_unet_down_blocks_0_{'ff_net' if layer == 'linear' else 'conv'}"
    path = saved(tmp_path / "dora.safetensors", {name: state})
    wanted = theirs.get_merged_weight()[0].detach()
    ours = lp.load(model, path)
    found = lp.merged_state_dict(ours)[
        f"unet.down_blocks.0.{'ff_net' if layer == 'linear' else 'conv'}.weight"
    ]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    lp.save(ours, tmp_path / "b.safetensors", format="kohya")
    back = load_file(tmp_path / "b.safetensors")
    scale = next(t for k, t in back.items() if k.endswith("dora_scale"))
    assert torch.equal(scale, state["dora_scale"])


def test_two_names_that_are_one_underscored_are_refused(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})

    path = saved(tmp_path / "a.safetensors", {"lora_unet_a_b": parts(2, 1.0, 4, 4)})
    with pytest.raises(MismatchError, match=r"lora_unet_a_b could be any of a_b\.weight, a\.b"):
        lp.load(Twins(), path)
    model = lp.apply(Twins(), ["a_b"], rank=2)
    with pytest.raises(NoFormError, match="both calls lora_unet_a_b"):
        lp.save(model, tmp_path / "b.safetensors", format="kohya")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"lora_unet_elsewhere": parts(2, 1.0, 6, 6)}, MismatchError, "lora_unet_elsewhere"),
        ({"lora_unet_down_blocks_1_to_q": parts(2, 1.0, 7, 6)}, MismatchError, r"\(7, 6\)"),
        ({"unet.q": parts(2, 1.0, 6, 6)}, BrokenFileError, "no name of sd-scripts"),
        (
            {"lora_unet_down_blocks_1_to_q": {"lora_up.weight": torch.ones(6, 2)}},
            BrokenFileError,
            "no lora_down.weight",
        ),
        (
            {"lora_unet_down_blocks_1_to_q": {"oft_blocks": torch.ones(6, 2)}},
            BrokenFileError,
            "oft_blocks",
        ),
        (
            {"lora_unet_down_blocks_1_to_q": {"vera_d": torch.ones(6, 2)}},
            NoFormError,
            "vera_d",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, dict[str, Tensor]], error: type[Exception], told: str, tmp_path: Path
) -> None:
    _, modules = whole(tmp_path)
    path = saved(tmp_path / "bad.safetensors", modules | change)
    with pytest.raises(error, match=told):
        lp.load(Pipeline(), path)


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize("rank", [2, 9])
def test_low_precision_tucker_factors_lose_nothing(to: str, rank: int, tmp_path: Path) -> None:
    """Without its core, it is a product; of a rank above the sides of what it makes, too."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3))
    found = {k: t.bfloat16() for k, t in parts(rank, 3.0, 6, 4, 3, 3, mid=True).items()}
    path = saved(tmp_path / "a.safetensors", {"lora_unet_0": found})
    wanted = lp.merged_state_dict(lp.load(copy.deepcopy(plain), path))["0.weight"]
    out = tmp_path / ("b" if to == "peft" else "b.safetensors")
    lp.convert(path, to, out, base=copy.deepcopy(plain))
    again = lp.merged_state_dict(lp.load(copy.deepcopy(plain), out))["0.weight"]
    change = wanted - plain[0].weight.detach()
    assert (again - wanted).norm() <= 1e-6 * change.norm()


def test_low_precision_parts_of_two_scales_lose_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8))
    net = copy.deepcopy(plain)
    lp.apply(net, ["0[0:4]", "0[4:8]"], rank=2, alpha=3)
    for p in lp.parameters(net):
        p.data = torch.randn(p.shape).bfloat16()
    lp.set_scale(net, 0.7, ["0.weight[4:8]"])
    wanted = lp.merged_state_dict(net)["0.weight"]
    lp.save(net, tmp_path / "a.safetensors", format="kohya")
    found = lp.load(copy.deepcopy(plain), tmp_path / "a.safetensors")
    change = wanted - plain[0].weight.detach()
    assert (lp.merged_state_dict(found)["0.weight"] - wanted).norm() <= 1e-6 * change.norm()
