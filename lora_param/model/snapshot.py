"""All that a training step can change on a model, taken down and put back bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_param.model.attach import sites_of
from lora_param.targets.weights import canonical_name
from lora_param.weight.base import dense

__all__ = ["Snapshot", "state_tensors"]

_LIST = "parametrizations."


class Snapshot:
    """Parameters, buffers, gradients, flags and attributes of a model, and all random states.

    Attributes:
        tensors: name → parameter or buffer, as they stood.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.tensors = state_tensors(model)
        self._copies = {name: t.detach().clone() for name, t in self.tensors.items()}
        self._flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        # Shallow copies of each module's attributes and of the dicts among them: so a buffer that
        # is assigned anew, a counter, a toggle of an adapter or a hook goes back as well.
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in model.modules():
            own = vars(module)
            inner = [v for v in own.values() if isinstance(v, dict)]
            self._attributes += [(live, live.copy()) for live in (own, *inner)]
        self._random = _random_states(self.tensors.values())

    def changed(self) -> list[str]:
        """Names of the tensors whose bits are not those taken down, or that came or went."""
        now = state_tensors(self._model)
        return [
            n
            for n in {**self.tensors, **now}
            if n not in now or n not in self._copies or not _same_bits(now[n], self._copies[n])
        ]

    def restore_random(self) -> None:
        """Set the random states back."""
        for restore in self._random:
            restore()

    @torch.no_grad()
    def restore(self, keep: Iterable[str] = ()) -> None:
        """Put back everything, gradients included, but the values of the tensors to keep."""
        self.restore_random()
        for live, before in self._attributes:
            if not _same_items(live, before):
                live.clear()
                live.update(before)
        for name in set(self.changed()).difference(keep):
            self.tensors[name].detach().copy_(self._copies[name])
        for parameter, requires_grad, gradient in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    def forget_gradients(self) -> None:
        """Leave every parameter without a gradient; `restore` brings back those there were."""
        for parameter, _, _ in self._flags:
            parameter.grad = None


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: factors by their target's key, others as without LoRA."""
    factors = {
        id(p): f"{site.key}.{name}"
        for site in reversed(list(sites_of(model)))
        for name, p in site.lora.named_parameters()
    }
    found: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[factors.get(id(tensor)) or _plain_name(name)] = tensor
    return found


def _plain_name(name: str) -> str:
    """`a.parametrizations.weight.original` → `a.weight`; anything else below keeps its place."""
    name = canonical_name(name)
    head, found, tail = name.rpartition(_LIST)
    return f"{head}{tail.removesuffix('.original')}" if found and "." in tail else name


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN is itself, and -0 is not 0."""
    a, b = dense(a), dense(b)
    if a.shape != b.shape or a.layout != torch.strided:
        return a.shape == b.shape and torch.equal(a, b)
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def _same_items(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return list(a) == list(b) and all(a[key] is b[key] for key in b)


def _random_states(tensors: Iterable[Tensor]) -> list[Callable[[], None]]:
    """What sets each random state back: Python's, NumPy's, torch's, and the devices' in use."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    restore: list[Callable[[], None]] = [
        lambda: torch.set_rng_state(cpu),
        lambda: random.setstate(python),
        lambda: np.random.set_state(numpy),
    ]
    for device in {t.device for t in tensors if t.device.type not in ("cpu", "meta")}:
        module = torch.get_device_module(device)
        restore.append(_device_state(module, device, module.get_rng_state(device)))
    return restore


def _device_state(module: Any, device: torch.device, state: Tensor) -> Callable[[], None]:
    return lambda: module.set_rng_state(state, device)
