"""Replicas of `nn.DataParallel`: torch's own `replicate`, with copies on one device."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from catalogue import CASES, Case
from torch import Tensor, nn
from torch.nn.parallel import replicate

import lora_param as lp


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(
        tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False
    ) -> list[list[Tensor]]:
        made = [[t.clone() for t in tensors] for _ in devices]
        return [[t.detach() for t in ts] for ts in made] if detach else made

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)


def _run(model: nn.Module, data: tuple[Tensor, ...]) -> Tensor:
    return model(*data)


COPYABLE = [case for case in CASES if "packed-base" not in case.name]  # as test tensors go


@pytest.mark.parametrize("case", COPYABLE, ids=lambda case: case.name)
def test_replicas_compute_and_train_as_the_model(case: Case) -> None:
    data, model = case.data(), case.adapted().eval()
    expected = _run(model, data)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in lp.parameters(model)]
    model.zero_grad()
    first, second = replicate(model, [0, 1])
    assert torch.equal(_run(first, data), expected)
    (_run(first, data).square().sum() + _run(second, data).square().sum()).backward()
    for parameter, grad in zip(lp.parameters(model), grads, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * grad, rtol=2e-2, atol=1e-4)


def test_factors_as_plain_attributes() -> None:
    """As FSDP has them that flattens parameters: views, deleted from the module's own."""
    layer = lp.apply(nn.Linear(4, 3), ["weight"], rank=2)
    with torch.no_grad():
        for p in lp.parameters(layer):
            p.normal_()
    x = torch.randn(2, 4)
    expected = layer(x)
    lora = layer.parametrizations.weight[0]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in lora.parameters()]))
    shapes = {n: p.shape for n, p in lora.named_parameters()}
    parts = flat.split([s.numel() for s in shapes.values()])
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        delattr(lora, name)
        setattr(lora, name, part.view(shape))
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert flat.grad is not None
    assert flat.grad.abs().sum() > 0
