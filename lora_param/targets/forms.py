"""The form of a variant: which of its tensors there are, and the sizes that rank and W leave open.

Some variants come in several forms: the two matrices of LoKr are whole or of two factors each, the
kernel of a convolution has factors of its own (Tucker's form), lengths of rows or of columns come
on top (DoRA). A form is text, words and sizes joined by `+`, such as `full+left8x4`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

__all__ = ["FORMS", "Form", "parse_form", "sizes_of"]

_LENGTHS = {"rows": {"magnitude": "out"}, "columns": {"magnitude": "channels"}}

FORMS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "dora_columns": {"kernel": {}},
    "tucker": {"kernel": {}, **_LENGTHS},
    "loha": {
        "kernel": {},
        "tucker": {
            "hada_w1_a": "rank out",
            "hada_w1_b": "rank channels",
            "hada_w2_a": "rank out",
            "hada_w2_b": "rank channels",
            "hada_t1": "rank rank kernel",
            "hada_t2": "rank rank kernel",
        },
        **_LENGTHS,
    },
    "lokr": {
        "left": {},
        "kernel": {},
        "both": {"lokr_w1": "", "lokr_w1_a": "left_out rank", "lokr_w1_b": "rank left_in"},
        "full": {"lokr_w2_a": "", "lokr_w2_b": "", "lokr_w2": "right_out right_in"},
        "tucker": {
            "lokr_w2_a": "rank right_out",
            "lokr_w2_b": "rank right_channels",
            "lokr_t2": "rank rank kernel",
        },
        **_LENGTHS,
    },
    "oft": {"constrained": {}, "rescale": {"rescale": "out"}},
    "boft": {"stages": {}, "constrained": {}, "rescale": {"rescale": "out"}},
    "oft_columns": {"terms": {}, "shared": {"oft_R": "one pairs"}},
}
"""Variant → the words and the sizes that its form may have; a word adds to the variant's tensors,
takes away those without axes, or gives them other ones."""

_SIZES = ("kernel", "left", "stages", "terms")
_ITEM = re.compile(r"([a-z]+)((?:[0-9]+(?:x[0-9]+)*)?)")  # a word, or a size with its numbers


@dataclass(frozen=True)
class Form:
    """A form, read.

    Attributes:
        words: such as "tucker".
        sizes: name → numbers; two of "left", the rows and columns of LoKr's first matrix.
    """

    words: frozenset[str] = frozenset()
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def size(self, name: str, default: int) -> int:
        """A size of one number."""
        return self.sizes.get(name, (default,))[0]

    def tensors(self, variant: str, plain: Mapping[str, str]) -> dict[str, str]:
        """Tensor → axes: the variant's own ones with what the words make of them."""
        found = dict(plain)
        for word, changed in FORMS.get(variant, {}).items():
            if word in self.words or word in self.sizes:
                found |= changed
        return {name: axes for name, axes in found.items() if axes}


@cache
def parse_form(variant: str, text: str) -> Form | None:
    """Read a form; None where the variant has none such.

    >>> parse_form("lokr", "full+left8x4").sizes["left"]
    (8, 4)
    """
    known = FORMS.get(variant, {})
    words: set[str] = set()
    sizes: dict[str, tuple[int, ...]] = {}
    for item in text.split("+") if text else ():
        found = _ITEM.fullmatch(item)
        if found is None or found[1] not in known or (found[1] in sizes):
            return None
        name, values = found[1], tuple(int(n) for n in found[2].split("x") if n)
        wanted = 0 if name not in _SIZES else 2 if name == "left" else 1
        if len(values) != wanted or 0 in values:
            return None
        if values:
            sizes[name] = values
        else:
            words.add(name)
    if {"rows", "columns"} <= words or {"full", "tucker"} <= words:
        return None
    return Form(frozenset(words), sizes)


def sizes_of(form: Form, rank: int, rows: int, columns: int) -> dict[str, int] | None:
    """Axis → size, on a matrix (rows, columns); None where the form does not divide it.

    `channels` are the columns of a convolution's inputs, `kernel` times fewer than all.
    """
    kernel = form.size("kernel", 1)
    channels = columns // kernel
    left_out, left_in = form.sizes.get("left", (_divisor(rows), _divisor(channels)))
    if columns % kernel or rows % left_out or channels % left_in:
        return None
    return {
        "rank": rank,
        "out": rows,
        "in": columns,
        "kernel": kernel,
        "channels": channels,
        "left_out": left_out,
        "left_in": left_in,
        "right_out": rows // left_out,
        "right_in": columns // left_in,
        "right_channels": channels // left_in,
        "one": 1,
        "pairs": rank * (rank - 1) // 2,  # of a block's columns
        "row_blocks": rows // rank,
        "column_blocks": columns // rank,
        "stages": form.size("stages", 1),
    }


@cache
def _divisor(number: int) -> int:
    """The largest divisor that is at most the root."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)
