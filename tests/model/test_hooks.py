"""Hooks and the tools of torch that work by them, on adapted models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from catalogue import BY_NAME, randomize
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.modules import module as hooking
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import lora_param as lp
from lora_param.errors import ComputedWeightError


def _nothing(*_: Any) -> None:
    return None


@contextmanager
def _on_every_module(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for m in model.modules():
            for register in (m.register_forward_hook, m.register_full_backward_hook):
                stack.callback(register(_nothing).remove)
        yield


@contextmanager
def _global(model: nn.Module) -> Iterator[None]:  # noqa: ARG001
    with ExitStack() as stack:
        for register in (
            hooking.register_module_forward_pre_hook,
            hooking.register_module_forward_hook,
            hooking.register_module_full_backward_pre_hook,
            hooking.register_module_full_backward_hook,
        ):
            stack.callback(register(_nothing).remove)
        yield


TOOLS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "every module": _on_every_module,
    "global": _global,
    "flops": lambda _: FlopCounterMode(display=False),
    "tracker": lambda _: ModuleTracker(),
    "communication": lambda _: CommDebugMode(),
}
NAMES = """linear mlp embedding conv2d mha encoder lstm bare-stack tied experts packed
linear-dora mha-dora conv2d-dora embedding-dora mlp-miss linear-bf16 mlp-pissa linear-two
packed-base"""


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # inputs are data
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", NAMES.split())
def test_a_tool_changes_nothing(name: str, tool: str) -> None:
    case = BY_NAME[name]
    data, model = case.data(), case.adapted()
    expected = model(*data)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in lp.parameters(model)]
    model.zero_grad()
    with TOOLS[tool](model):
        found = model(*data)
        found.square().sum().backward()
    torch.testing.assert_close(found, expected, **case.tolerance)
    for p, grad in zip(lp.parameters(model), grads, strict=True):
        torch.testing.assert_close(
            p.grad, grad, rtol=1e-2, atol=1e-5 + 1e-2 * float(grad.abs().max())
        )


def test_flops_are_those_of_the_factored_way() -> None:
    model = randomize(lp.apply(nn.Sequential(nn.Linear(64, 32)), ["0"], rank=2))
    with FlopCounterMode(display=False) as plain, lp.disabled(model):
        model(torch.randn(10, 64))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(10, 64))
    extra = counter.get_total_flops() - plain.get_total_flops()
    assert 0 < extra <= 2 * 10 * 2 * (64 + 32)  # torch does not count what is added in place


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # W is frozen
def test_a_hook_on_a_parametrization_sees_the_whole_gradient() -> None:
    model = BY_NAME["linear"].adapted()
    seen: list[Tensor] = []
    model.parametrizations.weight[0].register_full_backward_hook(
        lambda _, __, outputs: seen.append(outputs[0])
    )
    x = torch.randn(4, 7)
    model(x).sum().backward()
    torch.testing.assert_close(seen[0], torch.ones(4, 5).T @ x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_hook_on_an_adapted_weight_is_called_for_what_trains(variant: str) -> None:
    layer = randomize(lp.apply(nn.Linear(4, 3), ["weight"], rank=2, variant=variant))
    weight, seen = layer.weight, []
    handle = weight.register_hook(lambda g: seen.append(g.shape))
    nn.functional.linear(torch.randn(2, 4), weight).sum().backward()
    assert len(seen) == len(lp.parameters(layer))
    handle.remove()
    nn.functional.linear(torch.randn(2, 4), weight).sum().backward()
    assert len(seen) == len(lp.parameters(layer))
    weight.register_hook(lambda g: g * 2)
    with pytest.raises(ComputedWeightError, match="replac"):
        nn.functional.linear(torch.randn(2, 4), weight).sum().backward()
