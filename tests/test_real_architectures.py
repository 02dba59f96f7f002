"""The laws on transformers' architectures, each tiny and with every linear weight adapted.

Falcon, Llama 4, Longformer, LED and Swin v2 write into what an adapted layer gives; heads of two
classes, gates and tables of types have less rows than the default rank.
"""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, architecture, outputs

import lora_param as lp

# transformers asks of torch what torch is about to drop, and says so at import.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert list(a) == list(b)
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_laws_on(name: str) -> None:
    plain, batch = architecture(name)
    model, _ = architecture(name)
    torch.manual_seed(1)
    assert lp.apply(model) is model
    with torch.no_grad():
        want = outputs(plain, batch)
        training, _ = architecture(name)
        for row in lp.stats(model).rows:  # torch chooses kernels by this, as for LED's encoder
            training.get_parameter(row.target).requires_grad_()
        assert not differing(outputs(model, batch), outputs(training, batch)), "fresh"

    base = copy.deepcopy(lp.base_state_dict(model))
    optimizer = torch.optim.Adam(lp.parameters(model), lr=0.02)
    for _ in range(2):  # the first moves B, the second A as well
        optimizer.zero_grad()
        outputs(model, batch)["loss"].backward()
        optimizer.step()
    assert not differing(lp.base_state_dict(model), base), "only the factors changed"
    assert {row.target for row in lp.stats(model).dead} == unused(name, model), "all were trained"

    copied, _ = architecture(name)
    copied.load_state_dict(lp.merged_state_dict(model))
    with torch.no_grad():
        on = outputs(model, batch)
        for key, value in outputs(copied, batch).items():
            torch.testing.assert_close(on[key], value, rtol=1e-4, atol=1e-5)
        assert differing(on, want), "trained"
        baked = outputs(lp.bake(copy.deepcopy(model)), batch)
        assert not differing(baked, outputs(copied, batch)), "baked"
        with lp.disabled(model):
            assert not differing(outputs(model, batch), want), "disabled"
        lp.remove(model)
        assert type(model) is type(plain)
        assert not differing(dict(model.state_dict()), dict(plain.state_dict())), "removed"
        assert not differing(outputs(model, batch), want), "removed"


def unused(name: str, adapted: torch.nn.Module) -> set[str]:
    """Targets whose plain weight gets no gradient either: those of global attention, mostly."""
    plain, batch = architecture(name)
    for parameter in plain.parameters():
        parameter.requires_grad_()
    outputs(plain, batch)["loss"].backward()
    moved = {n for n, p in plain.named_parameters() if p.grad is not None and p.grad.any()}
    return {row.target for row in lp.stats(adapted).rows} - moved


def test_a_weight_that_the_model_itself_writes_to_is_one_sentence() -> None:
    """RWKV divides weights in place before it is evaluated, unless it is told not to."""
    model, batch = architecture("rwkv")
    model.rwkv.config.rescale_every = 1
    lp.apply(model)
    with pytest.raises(lp.UserError, match="div_ writes into an adapted weight"):
        model(**batch)
    lp.bake(model)(**batch)
