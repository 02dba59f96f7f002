"""What is switched while it stays attached: who is named by what, and what is left afterwards."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_param as lp
from lora_param.errors import NoAdapterError, NoMatchError, OptionError

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def filled(model: nn.Module, std: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_(0, std)
    return model


@pytest.fixture
def model() -> nn.Module:
    """Adapters a and b on both weights."""
    model = lp.apply(net(), ["0", "2"], rank=2, adapter="a")
    return filled(lp.apply(model, ["0", "2"], rank=2, adapter="b"))


def enabled(model: nn.Module) -> dict[str, list[bool]]:
    rows = lp.stats(model, norms=False).rows
    return {a: [r.enabled for r in rows if r.adapter == a] for a in ("a", "b")}


def test_targets_stand_second_and_the_adapter_is_named(model: nn.Module) -> None:
    lp.disable(model, ["0"])
    assert enabled(model) == {"a": [False, True], "b": [False, True]}
    lp.enable(model, "0", adapter="b")
    assert enabled(model) == {"a": [False, True], "b": [True, True]}
    with lp.disabled(model, ["2"], adapter="a"):
        assert enabled(model) == {"a": [False, False], "b": [True, True]}
    lp.set_scale(model, 0.5, ["2"], adapter="a")
    rows = lp.stats(model, norms=False).rows
    assert [r.scale for r in rows if r.adapter == "a"] == [8.0, 4.0]
    assert [r.scale for r in rows if r.adapter == "b"] == [8.0, 8.0]


@pytest.mark.parametrize("verb", ["enable", "disable", "disabled", "set_scale"])
def test_the_verbs_over_targets_take_the_adapter_by_its_keyword(verb: str) -> None:
    parameters = inspect.signature(getattr(lp, verb)).parameters
    names = list(parameters)
    assert names[-2:] == ["targets", "adapter"]
    assert parameters["adapter"].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_verb_calls_an_adapters_name_adapter() -> None:
    """But where `adapter` is a record already, and in `get_adapter`, which is called for it."""
    for verb in lp.__all__:
        function = getattr(lp, verb)
        if inspect.isfunction(function) and verb not in ("get_adapter", "attach"):
            assert "name" not in inspect.signature(function).parameters, verb


NAMING: dict[str, Callable[[nn.Module, Path, Any], object]] = {
    "apply": lambda m, _, n: lp.apply(m, ["0"], adapter=n),
    "apply_checkpoint": lambda _, p, n: lp.apply_checkpoint(
        p / "base.pt", ["0"], p / "new.safetensors", adapter=n
    ),
    "attach": lambda m, _, n: lp.attach(m, lp.get_adapter(m, "a"), n),
    "bake": lambda m, _, n: lp.bake(m, n),
    "disable": lambda m, _, n: lp.disable(m, adapter=n),
    "disabled": lambda m, _, n: lp.disabled(m, adapter=n).__enter__(),
    "enable": lambda m, _, n: lp.enable(m, adapter=n),
    "get_adapter": lambda m, _, n: lp.get_adapter(m, n),
    "load": lambda m, p, n: lp.load(m, p / "a.safetensors", n),
    "param_groups": lambda m, _, n: lp.param_groups(m, 0.1, adapter=n),
    "parameters": lambda m, _, n: lp.parameters(m, n),
    "remove": lambda m, _, n: lp.remove(m, n),
    "save": lambda m, p, n: lp.save(m, p / "new.safetensors", n),
    "set_scale": lambda m, _, n: lp.set_scale(m, 0.5, adapter=n),
    "stats": lambda m, _, n: lp.stats(m, n),
    "verify": lambda m, _, n: lp.verify(m, lambda m: m(X).sum(), adapter=n),
}


@pytest.mark.parametrize("verb", NAMING)
@pytest.mark.parametrize("wrong", [["a"], ("a", "b"), 3], ids=repr)
def test_a_list_where_an_adapters_name_belongs_is_one_clear_error(
    model: nn.Module, verb: str, wrong: object, tmp_path: Path
) -> None:
    lp.save(model, tmp_path / "a.safetensors", "a")
    torch.save(net().state_dict(), tmp_path / "base.pt")
    before = model(X)
    with pytest.raises(OptionError, match=r"adapter is .*; accepted: the name of "):
        NAMING[verb](model, tmp_path, wrong)
    assert torch.equal(model(X), before)
    assert not (tmp_path / "new.safetensors").exists()


def test_an_adapters_name_where_targets_belong_is_told_its_keyword(model: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"targets is 'b'; .*adapter='b'"):
        lp.disable(model, "b")
    with pytest.raises(OptionError, match=r"adapter='b'"):
        lp.set_scale(model, 0.5, ["b"])
    with pytest.raises(NoMatchError):
        lp.disable(model, "c")
    with pytest.raises(NoAdapterError, match="no adapter named '0' on this model; it has a, b"):
        lp.disable(model, adapter="0")
    assert enabled(model) == {"a": [True, True], "b": [True, True]}


def test_a_file_is_switched_in_the_same_order(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lp.save(model, path, "a")
    lp.disable(path, ["2"])
    assert [t.enabled for t in lp.read_adapter(path).targets.values()] == [True, False]
    with pytest.raises(OptionError, match="adapter is 'a'; accepted: None for a file"):
        lp.enable(path, adapter="a")


# --- blocks that overlap ----------------------------------------------------------------------


def acting(model: nn.Module) -> list[bool]:
    return enabled(model)["a"] + enabled(model)["b"]


ALL, NONE = [True] * 4, [False] * 4


def test_overlapping_blocks_of_two_threads_leave_the_adapter_on(model: nn.Module) -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with lp.disabled(model):
            entered.set()
            left.wait(30)  # the main thread's block, which began first, ends first

    before, thread = model(X), threading.Thread(target=other)
    with lp.disabled(model):
        thread.start()
        assert entered.wait(30)
    assert acting(model) == NONE, "a block is still open"
    left.set()
    thread.join()
    assert acting(model) == ALL
    assert torch.equal(model(X), before)


def test_many_threads_in_and_out_leave_the_adapter_as_it_was(model: nn.Module) -> None:
    lp.disable(model, ["2"], adapter="b")
    before, seen = model(X), []

    def work(seed: int) -> None:
        adapter = (None, "a", "b")[seed % 3]
        for _ in range(50):
            with lp.disabled(model, adapter=adapter), lp.disabled(model, ["0"]):
                seen.append(acting(model)[0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] * 300
    assert acting(model) == [True, True, True, False]
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("last", ["first in", "last in"])
def test_blocks_over_different_targets_may_end_in_any_order(model: nn.Module, last: str) -> None:
    first, second = lp.disabled(model, ["0"]), lp.disabled(model, adapter="a")
    first.__enter__()
    second.__enter__()
    assert acting(model) == [False, False, False, True]
    blocks = [(second, [False, True, False, True]), (first, [False, False, True, True])]
    (block, meanwhile), (rest, _) = blocks if last == "first in" else blocks[::-1]
    block.__exit__(None, None, None)
    assert acting(model) == meanwhile
    rest.__exit__(None, None, None)
    assert acting(model) == ALL


def test_what_is_switched_within_a_block_holds_after_it(model: nn.Module, tmp_path: Path) -> None:
    lp.save(model, tmp_path / "a.safetensors", "a")
    with lp.disabled(model):
        lp.disable(model, ["0"])
        lp.enable(model, ["0"], adapter="b")
        assert acting(model) == NONE
    assert acting(model) == [False, True, True, True]
    with lp.disabled(model, ["2"]):
        lp.load(model, tmp_path / "a.safetensors", "a")
        assert acting(model) == [True, False, True, False]
    assert acting(model) == ALL


def test_a_copy_made_within_a_block_can_be_switched_on(model: nn.Module) -> None:
    with lp.disabled(model):
        twin = copy.deepcopy(model)
        lp.enable(twin)
        assert acting(twin) == ALL
        assert acting(model) == NONE
    assert acting(model) == ALL


def test_what_is_saved_within_a_block_is_as_it_is_outside_of_it(tmp_path: Path) -> None:
    model = lp.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], rank=2)
    lp.disable(model, ["1"])
    with lp.disabled(model):
        lp.save(model, tmp_path / "a.safetensors")
    targets = lp.read_adapter(tmp_path / "a.safetensors").targets
    assert [t.enabled for t in targets.values()] == [True, False]


def test_an_average_of_a_model_is_that_model(tmp_path: Path) -> None:
    model = lp.apply(nn.Sequential(nn.Linear(4, 4)), ["0"], rank=2)
    average = torch.optim.swa_utils.AveragedModel(model)
    lp.save(average, tmp_path / "a.safetensors")
    assert list(lp.read_adapter(tmp_path / "a.safetensors").targets) == ["0.weight"]
