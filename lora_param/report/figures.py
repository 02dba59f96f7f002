"""Numbers and shapes as text, the same everywhere they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "Write",
    "aligned",
    "count",
    "most",
    "number",
    "percent",
    "plural",
    "shape",
    "size",
    "span",
]

Write = Callable[[float | None], str]


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


def aligned(values: Iterable[float | None]) -> Write:
    """What writes the numbers of one column, all with the same decimals; None as nothing.

    The greatest has three significant digits, the least two where that takes no more than two
    further decimals; numbers that no such decimals can show are all written as powers of ten.

    >>> write = aligned([0.0123, 0.4, None])
    >>> write(0.0123), write(0.4), write(0), write(None), write(float("nan"))
    ('0.012', '0.400', '0.000', '', 'NaN')
    >>> [aligned([8, 16])(8), aligned([1e-9, 2])(2)]
    ['8', '2.00e+00']
    """
    known = [abs(v) for v in values if v and math.isfinite(v)]
    least, greatest = min(known, default=1.0), max(known, default=1.0)
    first = 2 - math.floor(math.log10(greatest))
    decimals = max(0, min(max(first, 1 - math.floor(math.log10(least))), first + 2))
    form = f",.{decimals}f"
    if greatest < 1e6 and all(v == int(v) for v in known):
        form = ",.0f"
    elif greatest >= 1e6 or decimals > 6 or least < 0.5 * 10.0**-decimals:
        form = ".2e"

    def write(value: float | None) -> str:
        if value is None or math.isnan(value):
            return "" if value is None else "NaN"
        if not math.isfinite(value):
            return "∞" if value > 0 else "-∞"
        return "0" if value == 0 and form.endswith("e") else f"{value:{form}}"

    return write


def span(values: Iterable[float | None], write: Callable[[float], str] = number) -> str:
    """Measured numbers as one, or as least–greatest where they differ; "" for none at all.

    >>> span([0.01, None, 0.02]), span([2, 2]), span([None])
    ('0.01–0.02', '2', '')
    """
    known = [v for v in values if v is not None]
    if not known:
        return ""
    if bad := [v for v in known if not math.isfinite(v)]:
        return write(bad[0])
    least, greatest = write(min(known)), write(max(known))
    return least if least == greatest else f"{least}–{greatest}"


def most(values: Iterable[float | None], write: Callable[[float], str] = number) -> str:
    """The greatest of measured numbers, said to be that where they differ.

    >>> most([1e-4, 3e-4]), most([2e-4]), most([])
    ('≤ 0.0003', '0.0002', '')
    """
    known = [v for v in values if v is not None]
    text = span(known, write)
    return f"≤ {write(max(known))}" if "–" in text else text


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
