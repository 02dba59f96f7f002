"""`target_parameters`: parameters of any module, stacks of experts among them.

A is (rank·E, in) with the expert as the slower index of its rows, B is (out, rank·E) with the
expert as the faster index of its columns. Which dimension of the stack is `in` depends on the PEFT
that wrote it: before 0.19.1 always the middle one, since then the last one unless the module says
`is_transposed`. The shape tells where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from lora_param.adapter import Layer
from lora_param.errors import BrokenFileError, UnsettledError, worded
from lora_param.formats.peft.config import FLIPPED, ends_in
from lora_param.formats.peft.keys import LayerKeys
from lora_param.formats.peft.reading import IN_FIRST, Placed, Reading, by_layout
from lora_param.targets.regions import Region
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["parameters_of", "place_parameters", "stacked_A", "stacked_B"]


def place_parameters(reading: Reading, module: str, layers: Sequence[LayerKeys]) -> list[Placed]:
    """The targets of the layers around one module, of which each adapts one parameter.

    The key does not say which: the first in the module's own order is innermost.

    Raises:
        BrokenFileError: there are more or fewer layers than parameters.
        UnsettledError: several orders fit the shapes.
    """
    path = reading.source.path
    named = parameters_of(reading, module, layers)
    inside_first = sorted(layers, key=lambda layer: -layer.depth)
    if [layer.depth for layer in inside_first] != list(range(len(named)))[::-1]:
        raise BrokenFileError(
            path,
            f"it has {len(layers)} layers around {module}, of which target_parameters names "
            f"{len(named)} parameters ({', '.join(named)})",
        )
    for layer in layers:
        A, B = reading.factor_shapes(layer)
        if layer.is_embedding or len(A) != 2 or A[0] != B[1] or set(layer.parts) != {"A", "B"}:
            raise BrokenFileError(
                path, f"the tensors of {module} are {A} and {B}, which are none of a parameter"
            )
    if reading.host is None:
        if len(named) > 1:
            named = _of_their_ranks(reading, module, named, inside_first)
            reading.notes.append(
                f"Which layer of {module} is of which parameter is told by the base."
            )
        return [_unsettled(reading, f"{module}.{n}", x) for n, x in _zip(named, inside_first)]
    order = _order(reading, module, named, inside_first)
    return [] if order is None else [_place(reading, *pair) for pair in _zip(order, inside_first)]


def parameters_of(reading: Reading, module: str, layers: Sequence[LayerKeys]) -> list[str]:
    """Names of the module's parameters that `target_parameters` names and the base has.

    Without a base, a name without its module may be of any: it is of those with several layers.
    """
    config = reading.source.config
    named = config.parameters(module)
    if reading.host is not None:
        there = [n for n in named if f"{module}.{n}" in reading.host.weights]
        return there or (named if f"{module}.weight" not in reading.host.weights else [])
    full = any(
        "." in t for t in config.target_parameters if ends_in(t, f"{module}.{t.rpartition('.')[2]}")
    )
    return named if full or len(layers) > 1 else []


def _of_their_ranks(
    reading: Reading, module: str, named: list[str], layers: Sequence[LayerKeys]
) -> list[str]:
    """Some order in which the config's ranks divide the rows of the layers."""

    def divides(name: str, layer: LayerKeys) -> bool:
        rank = reading.source.config.ranks(f"{module}.{name}")[0]
        return reading.factor_shapes(layer)[0][0] % rank == 0

    orders = (list(p) for p in permutations(named))
    fitting = (p for p in orders if all(divides(n, x) for n, x in _zip(p, layers)))
    return next(fitting, named)


def _zip(names: Sequence[str], layers: Sequence[LayerKeys]) -> list[tuple[str, LayerKeys]]:
    return list(zip(names, layers, strict=True))


def _order(
    reading: Reading, module: str, named: Sequence[str], layers: Sequence[LayerKeys]
) -> list[str] | None:
    """The parameters' full names, in the order of the layers; None where no order fits."""
    assert reading.host is not None
    weights = reading.host.weights
    lacking = [f"{module}.{n}" for n in named if f"{module}.{n}" not in weights]
    if lacking:
        reading.missing += lacking
        return None
    full = [f"{module}.{n}" for n in named]
    if all(weights[n].classes for n in full):  # a live model lists them as they were registered
        position = {name: i for i, name in enumerate(weights)}
        orders = [sorted(full, key=position.__getitem__)]
    else:
        orders = [list(p) for p in permutations(full)]
    fitting = [
        order
        for order in orders
        if all(_fits(reading, weights[n], x) for n, x in _zip(order, layers))
    ]
    if not fitting:
        for n, x in _zip(orders[0], layers):
            if not _fits(reading, weights[n], x):
                A, B = reading.factor_shapes(x)
                reading.differ(n, weights[n], f"A {A} and B {B}")
        return None
    if len(fitting) > 1:  # all stacks of a module are stored alike
        fitting = [p for p in fitting if _alike(reading, _zip(p, layers))]
    if len(fitting) != 1:
        raise UnsettledError(
            str(reading.source.path),
            full,
            "which of its layers belongs to which weight, since their shapes are alike",
            f"give the live model ({worded('base=model', 'python:...')}), which has them in order, "
            f"or where they are not square {by_layout()}",
        )
    return fitting[0]


def _alike(reading: Reading, pairs: Sequence[tuple[str, LayerKeys]]) -> bool:
    """Of stacks whose shape tells: all are stored in one way, and in the way that is known."""
    assert reading.host is not None
    version, ways = reading.source.config.version, set()
    if version is not None and version < FLIPPED:
        ways.add(True)
    elif reading.layout is not None:
        ways.add(reading.layout == IN_FIRST)
    for name, layer in pairs:
        A, B = reading.factor_shapes(layer)
        if A[1] != B[0]:
            ways.add(reading.host.weights[name].shape[-2:] != (B[0], A[1]))
    return len(ways) < 2


def _fits(reading: Reading, W: Weight, layer: LayerKeys) -> bool:
    A, B = reading.factor_shapes(layer)
    sides = (B[0], A[1])
    if len(W.shape) == 2:
        return W.shape == sides
    if len(W.shape) != 3 or A[0] % W.shape[0]:
        return False
    alone = W.shape[0] == 1  # PEFT does not turn a single matrix around
    return W.shape[1:] == sides or (W.shape[1:] == sides[::-1] and not alone)


def _place(reading: Reading, name: str, layer: LayerKeys) -> Placed:
    assert reading.host is not None
    W = reading.host.weights[name]
    A, B = reading.factor_shapes(layer)
    count = W.shape[0] if len(W.shape) == 3 else 1
    in_first = len(W.shape) == 3 and _in_first(reading, W, (B[0], A[1]))
    version = reading.source.config.version
    told: Layer = "in_first" if in_first else "parameter"
    if len(W.shape) == 3 and (version is None or version < FLIPPED):
        told = "" if W.in_first is None else "in_first" if W.in_first else "parameter"
    return _placed(reading, name, layer, W.shape, count, in_first, told)


def _in_first(reading: Reading, W: Weight, sides: tuple[int, int]) -> bool:
    """The stack is (E, in, out): by its shape where that tells, else by who wrote the adapter."""
    if sides[0] != sides[1]:
        return W.shape[1:] != sides
    if W.shape[0] == 1:
        return False
    version = reading.source.config.version
    if version is not None and version < FLIPPED:
        return True
    if version is not None and W.in_first is not None:
        return W.in_first
    if reading.layout is None:
        reading.open.append(W.name)
    return reading.layout == IN_FIRST


def _unsettled(reading: Reading, name: str, layer: LayerKeys) -> Placed:
    """Without a base: as many experts as the config's rank leaves, (E, out, in)."""
    A, B = reading.factor_shapes(layer)
    rank = reading.source.config.ranks(name)[0]
    if A[0] % rank:
        raise BrokenFileError(
            reading.source.path, f"lora_A of {name} has {A[0]} rows, no multiple of the rank {rank}"
        )
    count = A[0] // rank
    shape = (count, B[0], A[1]) if count > 1 else (B[0], A[1])
    return _placed(reading, name, layer, shape, count, False, "")


def _placed(
    reading: Reading,
    name: str,
    layer: LayerKeys,
    shape: tuple[int, ...],
    count: int,
    in_first: bool,
    told: Layer,
) -> Placed:
    rank = reading.factor_shapes(layer)[0][0] // count
    settings, strength = reading.settings(name, rank)
    if reading.source.config.init != "kaiming":
        raise BrokenFileError(
            reading.source.path,
            f"its config says {reading.source.config.init}, which {name} has not",
        )
    down, up = reading.tensor(layer.parts["A"]), reading.tensor(layer.parts["B"])
    if len(shape) == 2:
        makers: dict[str, Callable[[], Tensor]] = {"lora_A": down, "lora_B": up}
        return Placed(name, settings, shape, makers, told, strength=strength)
    if in_first:
        makers = {
            "lora_A": lambda: stacked_B(up(), count).mT.contiguous(),
            "lora_B": lambda: stacked_A(down(), count).mT.contiguous(),
        }
    else:
        makers = {
            "lora_A": lambda: stacked_A(down(), count),
            "lora_B": lambda: stacked_B(up(), count),
        }
    return Placed(name, settings, shape, makers, told, Region(stacked=True), strength)


def stacked_A(A: Tensor, count: int) -> Tensor:
    """(E·r, in) → (E, r, in)."""
    return A.reshape(count, -1, A.shape[-1]).contiguous()


def stacked_B(B: Tensor, count: int) -> Tensor:
    """(out, r·E) → (E, out, r)."""
    return B.reshape(B.shape[0], -1, count).permute(2, 0, 1).contiguous()
