"""`verify`: does an adapter on a model train as LoRA should? The checks, and what they found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_param.errors import OptionError, VerificationError
from lora_param.printing import Printed
from lora_param.report import figures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_param.model.sites import Patterns
    from lora_param.model.trial import Trial

__all__ = ["Check", "Verification", "verify"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: "share", "frozen", "gradients", "loss", "unchanged" or "disabled".
        found: what was seen, in words.
        expected: what should have been.
        passed: they agree.
        failed: name of what failed → why, where it can be named.
    """

    name: str
    found: str
    expected: str
    passed: bool
    failed: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """The check as plain data, for JSON."""
        return {
            "name": self.name,
            "found": self.found,
            "expected": self.expected,
            "passed": self.passed,
            "failed": dict(self.failed),
        }


@dataclass(frozen=True)
class Verification(Printed):
    """What `verify` found. Prints itself; `to_dict` gives it as data.

    Attributes:
        checks: each of them, passed or not.
        losses: before the first step of the trial, and after each.
        percent: elements that train, in percent of the base parameters.
        source: what was looked at, to show above.

    Example:
        >>> share = Check("share", "12 %", "at most 10 %", False, {})
        >>> verification = Verification((share,), (2.0, 1.5), 12.0)
        >>> verification.passed, [check.name for check in verification.failures]
        (False, ['share'])
    """

    checks: tuple[Check, ...]
    losses: tuple[float, ...] = ()
    percent: float = 0.0
    source: str = ""
    view: ClassVar[str] = "verification_view"

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """All of them passed."""
        return not self.failures

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def raise_for_failure(self) -> None:
        """Nothing where all passed.

        Raises:
            VerificationError: one did not; its message names what failed.
        """
        if not self.passed:
            failures = {c.name: (c.found, c.expected, tuple(c.failed)) for c in self.failures}
            raise VerificationError(failures, len(self.checks))

    def to_dict(self) -> dict[str, object]:
        """All of it as plain data, for JSON, which has no NaN: such a loss is null."""
        return {
            "source": self.source,
            "passed": self.passed,
            "percent": self.percent,
            "losses": [v if math.isfinite(v) else None for v in self.losses],
            "checks": [check.to_dict() for check in self.checks],
        }


def verify(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    steps: int = 10,
    lr: float = 1e-3,
    adapter: str | None = None,
    besides: Patterns = (),
    max_percent: float = 10.0,
) -> Verification:
    """Train an adapter for a few steps, look whether it does what LoRA should, and undo it all.

    The checks: the *share* of parameters that train is small; everything else is *frozen*; every
    factor receives finite, non-zero *gradients* within the steps (with B = 0, A receives its first
    at the second step); the *loss* falls; all other parameters and buffers are *unchanged* bit for
    bit; with the adapter *disabled* the loss is, bit for bit, what it was before the steps.

    Afterwards factors, base, buffers, gradients, flags, attributes of the modules and the random
    states of torch, Python and NumPy are as they were, bit for bit, also when the loss raises.

    Args:
        model: an adapted model; it is tried in the mode it is in, `train` or `eval`.
        loss: takes the model and returns a scalar: the loss over one fixed batch. It is called
            steps + 4 times, each time from the same random states, so dropout is the same.
        steps: how many steps of Adam, at least 2.
        lr: their learning rate.
        adapter: which adapter trains, or all where None.
        besides: patterns over the names of parameters and buffers that are meant to change as
            well: a classification head, BatchNorm's statistics. They train along.
        max_percent: the most that may train, in percent of the base parameters.

    Memory: a copy of every parameter and buffer, while it runs.

    Raises:
        NoAdapterError: no such adapter.
        NoMatchError: a pattern of `besides` matches nothing.
        OptionError: steps, lr or max_percent out of range, or a loss that is no scalar.
        ModelError: the model is on the meta device.

    Example:
        >>> import torch, lora_param as lp
        >>> from torch import nn
        >>> x = torch.randn(16, 64)
        >>> model = lp.apply(nn.Linear(64, 64), ["weight"], rank=1)
        >>> found = verify(model, lambda m: m(x).square().mean())
        >>> found.passed, found["gradients"].found
        (True, '2 of 2 factors')
    """
    if steps < 2:
        raise OptionError("steps", steps, "2 or more: with B = 0, A has no gradient at the first")
    if not (math.isfinite(lr) and lr > 0):
        raise OptionError("lr", lr, "a number above 0")
    if not max_percent > 0:
        raise OptionError("max_percent", max_percent, "a number above 0")
    from lora_param.model.trial import try_out

    besides = (besides,) if isinstance(besides, str) else tuple(besides)
    trial = try_out(model, loss, steps=steps, lr=lr, adapter=adapter, besides=besides)
    percent = 100 * trial.trainable / trial.base if trial.base else math.inf
    checks = (
        _share(trial, percent, max_percent),
        *_checks(trial, besides),
    )
    source = type(model).__name__.removeprefix("Parametrized")
    return Verification(checks, trial.losses, percent, source)


def _share(trial: Trial, percent: float, limit: float) -> Check:
    found = f"{figures.count(trial.trainable)} of {figures.count(trial.base)}"
    return Check(
        "share",
        f"{found} ({figures.percent(percent)})",
        f"at most {limit:g} %",
        percent <= limit,
        {},
    )


def _checks(trial: Trial, besides: tuple[str, ...]) -> Iterator[Check]:
    wrong = dict.fromkeys(trial.unfrozen, "trains too") | dict.fromkeys(
        trial.idle, "nothing it names trains or changes"
    )
    others = f"{figures.plural(len(trial.unfrozen), 'other')} train"
    yield Check(
        "frozen",
        f"{figures.plural(len(trial.idle), 'pattern')} idle"
        if trial.idle and not trial.unfrozen
        else others + "s" * (len(trial.unfrozen) == 1),
        f"{', '.join(besides) or 'nothing'} besides the factors",
        not wrong,
        wrong,
    )
    total, without = len(trial.factors), trial.without_gradient
    yield Check(
        "gradients",
        f"{total - len(without)} of {figures.plural(total, 'factor')}",
        "all factors",
        not without,
        dict(without),
    )
    first, last = trial.losses[0], trial.losses[-1]
    steps = figures.plural(len(trial.losses) - 1, "step")
    falls = f"{figures.number(first, 5)} to {figures.number(last, 5)} in {steps}"
    yield Check("loss", falls, "a lower one", last < first, {})
    kept = trial.compared - len(trial.changed)
    yield Check(
        "unchanged",
        f"{figures.count(kept)} of {figures.plural(trial.compared, 'tensor')}",
        "all, bit for bit",
        not trial.changed,
        dict.fromkeys(trial.changed, "changed"),
    )
    yield _disabled(*trial.base_losses)


def _disabled(first: float, second: float, after: float) -> Check:
    """The same loss before and after, where the loss is the same twice at all."""
    repeated, same = _same(first, second), _same(first, after)
    found = f"loss {figures.number(after, 5)}"
    if not repeated:
        found = f"{figures.number(first, 5)}, then {figures.number(second, 5)}"
    return Check(
        "disabled",
        found,
        f"{figures.number(first, 5)} as before" if repeated else "the same twice",
        repeated and same,
        {},
    )


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
