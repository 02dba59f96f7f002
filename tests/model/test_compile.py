"""torch.compile: whole graphs, few of them, and never a stale result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_param as lp

# Compiling warns about things inside torch: its own deprecations, and the .grad of its inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def adapted(layers: int = 1, **kwargs: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(layers)))
    lp.apply(model, rank=2, **kwargs)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_(0, 0.3)
    return model


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in lp.parameters(model) if p.grad is not None]


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_forward_and_backward_are_one_graph_and_equal(backend: str) -> None:
    model = adapted()
    expected = train_step(model, X)
    model.compile(fullgraph=True, backend=backend)
    found = train_step(model, X)
    close(found, expected)
    with torch.no_grad():
        close(model(X), expected[0])


def test_toggles_scales_and_swaps_cost_two_graphs() -> None:
    model = adapted()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i in range(10):
        lp.disable(model)
        close(compiled(X), model(X))
        lp.enable(model)
        lp.set_scale(model, 0.5 + i / 7)
        close(compiled(X), model(X))
        with torch.no_grad():
            for p in lp.parameters(model):
                p.add_(0.1)
        close(compiled(X), model(X))
    assert counter.frame_count <= 2


def test_loading_factors_of_the_same_rank_costs_no_graph(tmp_path: object) -> None:
    model = adapted()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(X)
    lp.save(model, f"{tmp_path}/a.safetensors")
    with torch.no_grad():
        for p in lp.parameters(model):
            p.zero_()
    changed = compiled(X)
    lp.load(model, f"{tmp_path}/a.safetensors")
    close(compiled(X), model(X))
    assert not torch.equal(compiled(X), changed)
    assert counter.frame_count == 1


def test_blocks_compiled_one_by_one_share_their_graphs() -> None:
    model, x = adapted(layers=12).double(), X.double()  # through twelve blocks rounding grows
    expected = train_step(model, x)
    counter = CompileCounter()
    for block in model:
        block.compile(fullgraph=True, backend=counter)
    close(train_step(model, x), expected)
    assert counter.frame_count <= 2
    lp.disable(model, targets=["3.up"])
    found = model(x)
    for block in model:
        block._compiled_call_impl = None
    close(found, model(x))


def test_dynamic_shapes() -> None:
    model = adapted()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 7, 30):
        x = torch.randn(rows, 6)
        close(compiled(x), model(x))
    assert counter.frame_count <= 2


def test_removing_and_baking_after_compiling_is_never_stale() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(X)
    lp.bake(model)
    close(compiled(X), expected)
    lp.apply(model, rank=2)
    close(compiled(X), expected)
    lp.remove(model)
    close(compiled(X), expected)


def test_export() -> None:
    model = adapted().eval()
    exported = torch.export.export(model, (X,))
    close(exported.module()(X), model(X))


def test_dense_reads_compile_too() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))
            self.conv = nn.Conv1d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((torch.tanh(self.w) * x @ self.w).T[None])

    model = lp.apply(Dense(), ["w", "conv"], rank=2)
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_()
    x = torch.randn(6, 6)
    expected = train_step(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    close(train_step(model, x), expected)


def test_functional_call_and_vmap_over_stacked_factors() -> None:
    model = adapted()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters()}
    stacked = {n: values[n] for n in names}
    found = torch.func.vmap(lambda f: torch.func.functional_call(model, f, (X,)))(stacked)
    for i in range(2):
        one = {n: v[i] for n, v in stacked.items()}
        close(found[i], torch.func.functional_call(model, one, (X,)))
    grads = torch.func.grad(lambda f: torch.func.functional_call(model, f, (X,)).square().sum())(
        {n: v[0] for n, v in stacked.items()}
    )
    expected = train_step(model, X)[1]
    close(list(grads.values()), expected)
