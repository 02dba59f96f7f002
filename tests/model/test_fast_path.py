"""torch's fused kernels for encoders and attention in evaluation: kept, padding included."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pytest
import torch
from catalogue import randomize
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lora_param as lp
from lora_param.errors import ComputedWeightError
from lora_param.weight import adapted

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

MASK = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
CAUSAL = torch.triu(torch.ones(5, 5), 1).bool()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.mha(x, x, x, key_padding_mask=src_key_padding_mask)[0]


def _layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(_layer(), 2),
    "layer": _layer,
    "attention": Attention,
}
TARGETS = {
    "all": ["in_proj_weight", "out_proj", "linear1", "linear2"],
    "linear1": ["linear1"],
    "the last layer alone": ["re:.*layers.1.linear2.weight"],
    "the query alone": ["in_proj_weight[0/3]"],
}
CASES = [
    (model, name)
    for model in MODELS
    for name in TARGETS
    if not (model == "attention" and name in ("linear1", "all"))
    and not (model != "encoder" and name == "the last layer alone")
] + [("attention", "attention's own")]
TARGETS["attention's own"] = ["in_proj_weight", "out_proj"]
MASKS = {
    "no mask": {},
    "padded": {"src_key_padding_mask": MASK},
}


def _built(model: str) -> nn.Module:
    torch.manual_seed(0)
    net = MODELS[model]().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return net


@pytest.mark.parametrize("variant", ["lora", "dora", "miss"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("model", "targets"), CASES)
def test_evaluation_is_that_of_a_plain_module_bit_for_bit(
    model: str,
    targets: str,
    mode: Callable[[], AbstractContextManager[None]],
    mask: str,
    variant: str,
) -> None:
    base, x, options = _built(model), torch.randn(3, 5, 8), MASKS[mask]
    net = lp.apply(copy.deepcopy(base), TARGETS[targets], rank=2, variant=variant)
    with mode():
        expected = base(x, **options)
        assert torch.equal(net(x, **options), expected)
    randomize(net)
    plain = copy.deepcopy(base)
    plain.load_state_dict(lp.merged_state_dict(net))
    copies = (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)))
    with mode():
        trained = plain(x, **options)
        assert not torch.equal(trained, expected)
        for twin in copies:
            assert torch.equal(twin(x, **options), trained)
        with lp.disabled(net):
            assert torch.equal(net(x, **options), expected)
        for keeping in (lp.cached(net), parametrize.cached()):
            with keeping:
                assert torch.equal(net(x, **options), trained)


def test_the_kernel_is_run_and_each_weight_built_once() -> None:
    net = randomize(lp.apply(_built("layer"), TARGETS["all"], rank=2))
    with (
        torch.no_grad(),
        mock.patch.object(adapted, "merge", wraps=adapted.merge) as merge,
        mock.patch.object(net, "_sa_block", side_effect=AssertionError("the slow way")),
    ):
        net(torch.randn(3, 5, 8))
    assert merge.call_count <= 2 * len(TARGETS["all"])


def test_training_and_gradients_take_the_factored_way() -> None:
    net = randomize(lp.apply(_built("encoder"), TARGETS["all"], rank=2))
    net(torch.randn(3, 5, 8), src_key_padding_mask=MASK).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lp.parameters(net))


def test_removing_gives_the_class_back() -> None:
    net = lp.apply(_built("layer"), TARGETS["all"], rank=2)
    lp.remove(net)
    assert type(net.linear1) is nn.Linear
    assert type(net.self_attn) is nn.MultiheadAttention


WRITES: dict[str, Callable[[Tensor], object]] = {
    "zero_": Tensor.zero_,
    "torch.zero_": torch.zero_,
    "relu_": nn.functional.relu_,
    "init": nn.init.zeros_,
    "[]=": lambda w: w.__setitem__(0, 1.0),
    "+=": lambda w: w.__iadd__(1),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "out=": lambda w: torch.add(torch.ones(16, 8), 1, out=w),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_kernels_are_given_cannot_be_written_to(write: str) -> None:
    net = randomize(lp.apply(_built("layer"), ["linear1"], rank=2))
    with torch.no_grad():
        before = net.linear1.weight.clone()
        with pytest.raises(ComputedWeightError):
            WRITES[write](net.linear1.weight)
        assert torch.equal(net.linear1.weight, before)


READS: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda w: w.numpy(),
    "asarray": np.asarray,
    "tolist": lambda w: w.tolist(),
    "data": lambda w: w.data.numpy(),
    "[]": lambda w: w[1:3, 2].numpy(),
    "detach": lambda w: torch.detach(w).numpy(),
    "+": lambda w: (w + 1).numpy(),
    "cat": lambda w: torch.cat([w, w]).numpy(),
    "float64": lambda w: w.double().numpy(),
    "shape": lambda w: (w.shape, w.dtype, w.device, w.stride(), w.requires_grad),
    "repr": lambda w: repr(w).split("tensor")[1][:60],
    "deepcopy": lambda w: copy.deepcopy(w).numpy(),
    "pickle": lambda w: pickle.loads(pickle.dumps(w)).numpy(),
}


@pytest.mark.parametrize("read", READS)
def test_what_kernels_are_given_reads_as_the_weight(read: str) -> None:
    net = randomize(lp.apply(_built("layer"), ["linear1"], rank=2))
    with torch.no_grad():
        np.testing.assert_equal(
            READS[read](net.linear1.weight), READS[read](net.linear1.weight.clone())
        )


@pytest.mark.parametrize("model", MODELS)
def test_compiled_evaluation(model: str) -> None:
    targets = TARGETS["attention's own"]
    base, x = _built(model), torch.randn(3, 5, 8)
    net = randomize(lp.apply(copy.deepcopy(base), targets, rank=2))
    plain = copy.deepcopy(base)
    plain.load_state_dict(lp.merged_state_dict(net))
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(net, backend="aot_eager")(x)
        torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-5)
