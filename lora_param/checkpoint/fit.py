"""Does an adapter fit a checkpoint? Asked before a bake, and before looking at both together."""

from __future__ import annotations

import difflib

from lora_param.adapter import Adapter, Host, check_fit
from lora_param.checkpoint.base import Checkpoint
from lora_param.errors import MismatchError, UnsuitableWeightError
from lora_param.names.fit import fitted
from lora_param.names.table import Names

__all__ = ["check_checkpoint", "host_of"]

_SHOWN = 5  # names for which the nearest is looked up, as many as a message lists


def host_of(base: Checkpoint, names: Names | None = None) -> Host:
    """The checkpoint, as an adapter of another tool is settled for it."""
    kind, config = base.model_type, base.config
    return Host(str(base.path), base.weights, base.__getitem__, kind, names, config)


def check_checkpoint(
    adapter: Adapter, base: Checkpoint, *, check_fingerprint: bool = True
) -> Adapter:
    """Check that every target has its weight in the checkpoint; reads sampled elements alone.

    Returns:
        The adapter as it is written for this base, with all settled that its file leaves open.

    Raises:
        UnsuitableWeightError: a weight that LoRA cannot adapt: complex, integer, sparse, quantized.
        MismatchError: a name that the base lacks, or a shape that differs; both sides are named.
        FingerprintError: the base holds other values than the one the adapter was made on.
    """
    try:
        host = host_of(base, adapter.names)
        adapter = fitted(adapter if adapter.settle is None else adapter.on(host), host)
        names = [n for t in adapter.targets.values() for n in (t.target.name, *t.also, *t.apart)]
        for name in names:
            if name in base and (reason := base.weights[name].unmergeable):
                raise UnsuitableWeightError(name, reason)
        known = [t for t in adapter.targets.values() if adapter.base[t.target.name].hash]
        hashed = {n for t in known for n in (t.target.name, *t.also)} if check_fingerprint else ()
        check_fit(
            adapter,
            base.fingerprint(names, hashed),
            str(base.path),
            check_fingerprint=check_fingerprint,
        )
    except MismatchError as error:
        if not error.unexpected:
            raise
        raise error.beside(_nearest(adapter, base, error.unexpected[:_SHOWN])) from None
    return adapter


def _nearest(adapter: Adapter, base: Checkpoint, keys: tuple[str, ...]) -> list[str]:
    """For each target without a weight, the name in the base most like it, of its shape if any."""
    used = {t.target.name for t in adapter.targets.values()}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, weight in base.weights.items():
        if name not in used and not weight.unsuitable:
            by_shape.setdefault(weight.shape, []).append(name)
    every = [name for names in by_shape.values() for name in names]
    found: dict[str, None] = {}
    for key in keys:
        target = adapter.targets.get(key)  # none where a format names what it could not place
        name = key if target is None else target.target.name
        known = adapter.base.get(name)
        alike = (known and by_shape.get(known.shape)) or every
        # The longest common end first: what differs is mostly what wraps the model.
        end = max((_common_end(name, n) for n in alike), default=0)
        if end:
            alike = [n for n in alike if _common_end(name, n) == end]
        found.update(dict.fromkeys(difflib.get_close_matches(name, alike[:1000], 1, 0.0)))
    return list(found)


def _common_end(a: str, b: str) -> int:
    """How many dotted segments two names have in common at their ends, `weight` not counted."""
    count = 0
    first = (x.removesuffix(".weight").split(".") for x in (a, b))
    for x, y in zip(*(reversed(segments) for segments in first), strict=False):
        if x != y:
            break
        count += 1
    return count
