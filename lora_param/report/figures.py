"""Numbers and shapes as text, the same everywhere they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["count", "most", "number", "percent", "plural", "shape", "size", "span"]


def count(value: int) -> str:
    """A whole number with thousands separators.

    >>> count(22713216)
    '22,713,216'
    """
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "target"), plural(12, "target")
    ('1 target', '12 targets')
    """
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def percent(value: float) -> str:
    """A share in percent: two decimals, more where two would round a non-zero share to zero.

    >>> percent(0.3246), percent(0.00042), percent(0)
    ('0.32 %', '0.00042 %', '0.00 %')
    """
    decimals = 2
    if value and math.isfinite(value) and abs(value) < 0.005:
        decimals = 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{decimals}f} %"


def number(value: float, digits: int = 3) -> str:
    """A measured number, to so many significant digits.

    >>> number(0.01234), number(12.0), number(3.2e-7), number(2e9), number(float("nan"))
    ('0.0123', '12', '3.2e-07', '2e+09', 'nan')
    """
    if not 10**digits <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:,.0f}"


def span(values: Iterable[float | None], digits: int = 3) -> str:
    """Measured numbers as one, or as least–greatest where they differ; "" for none at all.

    >>> span([0.01, None, 0.02]), span([2, 2]), span([None])
    ('0.01–0.02', '2', '')
    """
    known = [v for v in values if v is not None]
    if not known:
        return ""
    if bad := [v for v in known if not math.isfinite(v)]:
        return number(bad[0])
    least, greatest = number(min(known), digits), number(max(known), digits)
    return least if least == greatest else f"{least}–{greatest}"


def most(values: Iterable[float | None], digits: int = 3) -> str:
    """The greatest of measured numbers, said to be that where they differ.

    >>> most([1e-4, 3e-4]), most([2e-4]), most([])
    ('≤ 0.0003', '0.0002', '')
    """
    known = [v for v in values if v is not None]
    text = span(known, digits)
    return f"≤ {number(max(known), digits)}" if "–" in text else text


def shape(sizes: Sequence[int]) -> str:
    """A shape as its sizes.

    >>> shape((384, 1536)), shape(())
    ('384×1536', 'scalar')
    """
    return "×".join(str(s) for s in sizes) if sizes else "scalar"


def size(octets: int) -> str:
    """A number of bytes in binary units.

    >>> size(27176), size(512), size(3 * 2**30)
    ('26.5 KiB', '512 bytes', '3.0 GiB')
    """
    if octets < 1024:
        return plural(octets, "byte")
    value = float(octets)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:,.1f} TiB"
