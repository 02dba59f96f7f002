"""Weights that LoRA cannot adapt are not baked into, whatever check is ignored."""

import warnings

import pytest
import torch
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_param as lp
from lora_param.checkpoint.base import packed_reason, packed_reasons
from lora_param.errors import UnsuitableWeightError

W = torch.arange(48.0).reshape(8, 6)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([W[:2], W[2:]], layout=layout)


def compressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return W.to_sparse_csr()


UNSUITABLE = {
    "complex": (lambda: W * (1 + 2j), "of dtype complex64"),
    "int8": (lambda: W.to(torch.int8), "of dtype int8"),
    "bool": (lambda: W > 3, "of dtype bool"),
    "sparse coo": (lambda: W.to_sparse(), "sparse, of layout torch.sparse_coo"),
    "sparse csr": (compressed, "sparse, of layout torch.sparse_csr"),
    "quantized": (quantized, "quantized, of dtype torch.qint8"),
    "nested": (lambda: nested(torch.strided), "a nested tensor"),
}


@pytest.fixture
def adapter(tmp_path):
    save_file({"q.weight": W}, tmp_path / "m.safetensors")
    path = tmp_path / "a.safetensors"
    lp.apply_checkpoint(tmp_path / "m.safetensors", ["q"], path, rank=2, init="normal:1")
    return path


@pytest.mark.parametrize("scaled", [False, True], ids=["alone", "with a scale beside it"])
@pytest.mark.parametrize("end", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", UNSUITABLE)
def test_18_ignoring_the_fingerprint_bakes_nothing_into_it(kind, end, scaled, adapter, tmp_path):
    value, why = UNSUITABLE[kind][0](), UNSUITABLE[kind][1]
    weights = {"q.weight": value, "k.weight": W + 1}
    if scaled:
        weights["q.weight_scale"], why = torch.ones(8, 1), "q.weight_scale is stored beside it"
    if end == "pt":
        torch.save(weights, tmp_path / "x.pt")
    elif kind in ("complex", "int8", "bool"):
        save_file(weights, tmp_path / "x.safetensors")
    else:
        return  # safetensors holds dense tensors alone
    before = (tmp_path / f"x.{end}").read_bytes()
    for options in ({"out": tmp_path / f"o.{end}"}, {"in_place": True}):
        with pytest.raises(UnsuitableWeightError) as caught:
            lp.bake_checkpoint(tmp_path / f"x.{end}", adapter, check_fingerprint=False, **options)
        assert f"q.weight cannot be adapted: it is {why}" in str(caught.value).replace(
            "quantized: ", ""
        )
    with pytest.raises(UnsuitableWeightError):
        lp.stats(tmp_path / f"x.{end}", adapter, check_fingerprint=False)
    assert (tmp_path / f"x.{end}").read_bytes() == before
    assert not (tmp_path / f"o.{end}").exists()


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("kind", UNSUITABLE)
def test_18_beside_the_targets_they_stay_as_they_are(kind, dtype, adapter, tmp_path):
    value = UNSUITABLE[kind][0]()
    torch.save({"q.weight": W, "odd.weight": value}, tmp_path / "x.pt")
    report = lp.bake_checkpoint(tmp_path / "x.pt", adapter, tmp_path / "o.pt", dtype=dtype)
    assert report.baked == ("q.weight",)
    lp.bake_checkpoint(
        tmp_path / "x.pt", adapter, tmp_path / "o.pt", dtype=dtype, force=True, verify=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.load(tmp_path / "o.pt", weights_only=True)["odd.weight"]
    assert written.layout == value.layout
    if kind == "nested":
        assert all(torch.equal(a, b) for a, b in zip(written, value, strict=True))
    elif kind == "quantized":
        assert torch.equal(written.int_repr(), value.int_repr())
    else:
        assert torch.equal(written.to_dense().to(value.dtype), value.to_dense())


BESIDE = ["", "_scale", "_scales", ".absmax", ".scales", ".qzeros", "_packed"]
BESIDE += [".quant_state.bitsandbytes__nf4", ".weight_packed", ".scale_weight"]


@draws(80)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b.c"]),
            st.sampled_from(["", ".weight", ".qweight", ".bias"]),
            st.sampled_from(BESIDE),
        ).map("".join),
        max_size=8,
    )
)
def test_reasons_of_all_names_at_once_are_those_of_each(names: list[str]) -> None:
    every = dict.fromkeys(names, 0)
    each = {name: packed_reason(name, every) for name in every}
    assert packed_reasons(every) == {name: reason for name, reason in each.items() if reason}
