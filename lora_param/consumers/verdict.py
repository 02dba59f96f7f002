"""`Verdict`: what is wrong with an adapter, and what each consumer will do with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from lora_param.consumers.judge import Answer, Finding
from lora_param.printing import Printed

__all__ = ["Verdict"]


@dataclass(frozen=True, repr=False)
class Verdict(Printed):
    """What `check` found. It prints itself.

    Attributes:
        source: the adapter.
        about: what it is, in a few words.
        findings: in the order of the consumers.
        consumers: who was asked about, as asked; "itself" first.
    """

    view: ClassVar[str] = "verdict_view"

    source: str
    about: str
    findings: tuple[Finding, ...]
    consumers: tuple[str, ...]

    def answer(self, consumer: str) -> Answer:
        """What one consumer does: "accepted", "differs" or "refused"; "itself" is the adapter.

        >>> Verdict("a", "", (), ("itself", "vllm==0.11")).answer("vllm==0.11")
        'accepted'
        """
        name = consumer.partition("==")[0]
        answers = {f.verdict for f in self.findings if f.consumer == name}
        return "refused" if "refused" in answers else "differs" if answers else "accepted"

    @property
    def worst(self) -> Answer:
        """The worst of all answers."""
        answers = {self.answer(c) for c in self.consumers}
        return (
            "refused" if "refused" in answers else "differs" if "differs" in answers else "accepted"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "adapter": self.source,
            "about": self.about,
            "verdict": self.worst,
            "consumers": {c: self.answer(c) for c in self.consumers},
            "findings": [asdict(f) for f in self.findings],
        }

    def __repr__(self) -> str:
        answers = ", ".join(f"{c}: {self.answer(c)}" for c in self.consumers)
        return f"<Verdict of {self.source}: {answers}>"
