"""Training an adapter for a few steps, on trial: what happened is told, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_param.errors import ModelError, NoAdapterError, OptionError
from lora_param.model.sites import Patterns, own_sites, sites, unwrapped
from lora_param.model.snapshot import Snapshot
from lora_param.model.switching import disabled
from lora_param.targets.matching import match_targets
from lora_param.targets.weights import Weight

__all__ = ["Trial", "try_out"]


@dataclass(frozen=True)
class Trial:
    """What was seen while an adapter trained on trial.

    Attributes:
        trainable: number of elements that train: of the factors, and of whatever is not frozen.
        base: number of elements of all parameters but factors.
        factors: names of the adapter's factors.
        without_gradient: name of a factor → why no gradient, or no finite one, came to it.
        unfrozen: names of parameters that train, besides the factors and what was allowed.
        idle: patterns that allow a change to parameters that are frozen, and where nothing changed.
        losses: before the first step, and after each.
        compared: number of tensors that had to stay as they are.
        changed: names of those that did not.
        base_losses: with the adapter disabled: twice before the steps, and once after them.
    """

    trainable: int
    base: int
    factors: tuple[str, ...]
    without_gradient: dict[str, str]
    unfrozen: tuple[str, ...]
    idle: tuple[str, ...]
    losses: tuple[float, ...]
    compared: int
    changed: tuple[str, ...]
    base_losses: tuple[float, float, float]


def try_out(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    steps: int,
    lr: float,
    adapter: str | None,
    besides: Patterns,
) -> Trial:
    """Train an adapter for a few steps, and put everything back.

    Each time the loss is asked for from the same random states, so that dropout and draws are the
    same and one loss can be held against another.
    """
    inner = unwrapped(model)
    found = own_sites(sites(inner, adapter))
    if not found:
        raise NoAdapterError(adapter, [])
    if any(p.is_meta for p in inner.parameters()):
        raise ModelError("the model is on the meta device and has no values: it cannot train.")
    off = {s.key for s in found if not s.lora.enabled}
    factors = {f"{s.key}.{n}": p for s in found for n, p in s.lora.named_parameters()}
    others = {id(p) for s in sites(inner) for p in s.lora.parameters()}
    # gradients are wanted even where the caller is in a block that has none
    with torch.inference_mode(False), torch.enable_grad():
        state = Snapshot(inner)
        plain = {n: t for n, t in state.tensors.items() if id(t) not in others}
        allowed = _allowed(plain, besides)
        extra = {n: plain[n] for names in allowed.values() for n in names}
        parameters = {n: p for n, p in plain.items() if isinstance(p, nn.Parameter)}
        training = {n: p for n, p in parameters.items() if p.requires_grad}
        try:
            first, second = (_base_loss(model, loss, adapter, state) for _ in range(2))
            state.restore()
            trained = [p for p in (*factors.values(), *extra.values()) if p.requires_grad]
            losses, missing = _train(model, loss, steps, lr, trained, factors, state)
            changed = state.changed()
            third = _base_loss(model, loss, adapter, state, keep=factors)
        finally:
            state.restore()
        return Trial(
            trainable=sum(p.numel() for p in (*factors.values(), *training.values())),
            base=sum(p.numel() for p in parameters.values()),
            factors=tuple(factors),
            without_gradient={n: _why(n, missing[n], factors[n], off) for n in missing},
            unfrozen=tuple(n for n in training if n not in extra),
            idle=tuple(
                pattern
                for pattern, names in allowed.items()
                if any(n in parameters for n in names)
                and not any(n in training or n in changed for n in names)
            ),
            losses=tuple(losses),
            compared=len(state.tensors) - len(factors) - len(extra),
            changed=tuple(n for n in changed if n not in factors and n not in extra),
            base_losses=(first, second, third),
        )


def _allowed(tensors: dict[str, Tensor], besides: Patterns) -> dict[str, list[str]]:
    """Pattern → the parameters and buffers that it names."""
    known = {n: Weight(n, tuple(t.shape)) for n, t in tensors.items()}
    patterns = [besides] if isinstance(besides, str) else list(besides)
    return {pattern: match_targets(known, [pattern]) for pattern in patterns}


def _base_loss(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    adapter: str | None,
    state: Snapshot,
    keep: Iterable[str] = (),
) -> float:
    state.restore(keep)
    with disabled(model, adapter=adapter):
        return _value(loss(model)).item()


def _train(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    steps: int,
    lr: float,
    trained: list[Tensor],
    factors: dict[str, nn.Parameter],
    state: Snapshot,
) -> tuple[list[float], dict[str, str]]:
    """The losses, and of each factor that never got a finite gradient what came instead."""
    optimizer = torch.optim.Adam(trained, lr=lr) if trained else None
    losses: list[float] = []
    missing = dict.fromkeys(factors, "no gradient")
    broken: set[str] = set()
    for _ in range(steps):
        state.restore_random()
        state.forget_gradients()
        value = _value(loss(model))
        losses.append(value.item())
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        for name, factor in factors.items():
            gradient = factor.grad
            if gradient is not None and not gradient.isfinite().all():
                broken.add(name)
            elif gradient is not None and gradient.any():
                missing.pop(name, None)
        if optimizer is not None:
            optimizer.step()
    state.restore_random()
    losses.append(_value(loss(model)).item())
    return losses, missing | dict.fromkeys(broken, "NaN or infinity")


def _value(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise OptionError("the loss", value, "a tensor with one element")
    if value.numel() != 1:
        raise OptionError("the loss's shape", tuple(value.shape), "that of a scalar")
    return value


def _why(name: str, problem: str, factor: nn.Parameter, off: set[str]) -> str:
    if name.rpartition(".")[0] in off:
        return "disabled"
    return problem if factor.requires_grad else "frozen"
