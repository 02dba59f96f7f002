"""`Verification`: checks of an adapter. Needs neither torch nor, until it is printed, Rich."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.errors import VerificationError
from lora_param.report.data import Check

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Check", "Verification"]


@dataclass(frozen=True)
class Verification:
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from lora_param.report.verified import verification_view

        yield verification_view(self.checks, self.source)

    def __str__(self) -> str:
        from lora_param.report.verified import plain_text, verification_view

        return plain_text(verification_view(self.checks, self.source))
