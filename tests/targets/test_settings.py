from __future__ import annotations

import pytest

from lora_param.errors import OptionError
from lora_param.targets.settings import Settings, parse_init, scale_of


def test_scale() -> None:
    assert scale_of(16, 4, "standard") == Settings(rank=4).scale == 4
    assert scale_of(16, 4, "rslora") == 8
    assert scale_of(16, 4, "constant") == 16


def test_inits() -> None:
    assert parse_init("pissa") == ("pissa", None)
    assert parse_init("normal") == ("normal", None)
    assert parse_init("normal:0.02") == ("normal", 0.02)


@pytest.mark.parametrize("init", ["kayming", "", "pissa:3", "normal:x", "normal:0", "normal:inf"])
def test_unknown_inits_list_the_known_ones(init: str) -> None:
    with pytest.raises(OptionError, match=r"init is .* normal:STD"):
        parse_init(init)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 0),
        ("rank", True),
        ("rank", 2.5),
        ("alpha", 0.0),
        ("alpha", float("inf")),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("scaling", "odd"),
        ("variant", "odd"),
    ],
)
def test_what_is_refused(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{option} is {value!r}; accepted: "):
        Settings(**{option: value})  # type: ignore[arg-type]
