"""A setting is one field: one more line in a copy of the package, and everything takes it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.errors import OptionError, UnknownFileError, UnknownOptionError
from lora_param.targets.settings import SETTINGS, Settings, SettingsOptions
from lora_param.weight.init import METHODS
from lora_param.weight.variants import variant_named

TAKERS = (lp.apply, lp.plan, lp.apply_checkpoint, create_adapter)
FIELD = """
    warmth: float = _setting(
        0.5, "How warm it is.", "a number of at least 0", lambda w: w >= 0, flag="-w"
    )
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, one field richer, and a base to work on."""
    folder = tmp_path_factory.mktemp("copy")
    source = Path(lp.__file__).parent
    shutil.copytree(source, folder / "lora_param", ignore=shutil.ignore_patterns("__pycache__"))
    place = folder / "lora_param" / "targets" / "settings.py"
    before, after, rest = place.read_text().partition("\n    def __post_init__")
    assert "class Settings:" in before
    place.write_text(before.rstrip("\n") + FIELD + after + rest)
    save_file({"a.weight": torch.ones(6, 4), "b.weight": torch.ones(6, 4)}, folder / "base.st")
    return folder


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_the_patterns_the_plan_and_the_file_take_it(copy: Path) -> None:
    shown = python(copy, "-m", "lora_param", "apply", "--help")
    assert "--warmth" in shown
    assert "How warm it is." in shown
    made = ["apply", "base.st", "-t", "a", "-t", "b:warmth=2", "-w", "3", "-r", "2", "--json"]
    plan = json.loads(python(copy, "-m", "lora_param", *made, "-o", "warm.safetensors"))
    printed = python(copy, "-m", "lora_param", *made[:-1], "--dry-run")
    assert "warmth" in printed, "the table of the plan has it"
    assert [t["warmth"] for t in plan["targets"]] == [3.0, 2.0]
    with safe_open(copy / "warm.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert [t["warmth"] for t in config["targets"].values()] == [3.0, 2.0]
    code = "import lora_param as lp; a = lp.read_adapter('warm.safetensors'); "
    code += "print([t.settings.warmth for t in a.targets.values()])"
    assert python(copy, "-c", code) == "[3.0, 2.0]\n"
    with pytest.raises(UnknownFileError, match=r"'warmth' in .* is not known"):
        lp.read_adapter(copy / "warm.safetensors")  # it changes what the adapter means


def test_a_file_in_which_it_is_at_its_default_is_as_before(copy: Path) -> None:
    made = ["apply", "base.st", "-t", "a", "-r", "2", "--seed", "1", "-o", "plain.safetensors"]
    python(copy, "-m", "lora_param", *made)
    lp.apply_checkpoint(copy / "base.st", "a", copy / "own.safetensors", rank=2, seed=1)
    assert (copy / "plain.safetensors").read_bytes() == (copy / "own.safetensors").read_bytes()


def test_the_functions_take_it_and_show_it(copy: Path) -> None:
    code = """
import inspect, lora_param as lp, torch
from lora_param.checkpoint.create import create_adapter
for f in (lp.apply, lp.plan, lp.apply_checkpoint, create_adapter):
    assert inspect.signature(f).parameters["warmth"].default == 0.5
    assert "warmth: How warm it is." in f.__doc__
net = lp.apply(torch.nn.Linear(4, 4), warmth=7)
lp.save(net, "live.safetensors")
assert lp.read_adapter("live.safetensors").targets["weight"].settings.warmth == 7
try:
    lp.apply(torch.nn.Linear(4, 4), warmth=-1)
except lp.UserError as error:
    print(error)
"""
    assert python(copy, "-c", code) == "warmth is -1.0; accepted: a number of at least 0.\n"


def test_type_checkers_read_the_same_names_and_types() -> None:
    assert get_type_hints(SettingsOptions) == get_type_hints(Settings)
    assert list(SettingsOptions.__annotations__) == list(SETTINGS)


@pytest.mark.parametrize("function", TAKERS, ids=lambda f: f.__name__)
def test_the_signature_and_the_help_say_every_setting(function) -> None:  # type: ignore[no-untyped-def]
    parameters = inspect.signature(function).parameters
    for name, setting in SETTINGS.items():
        assert parameters[name].default == setting.default
        assert f"{name}: {setting.help}" in function.__doc__


def test_a_wrong_name_is_one_sentence_that_names_the_nearest() -> None:
    shapes = {"a.weight": (4, 4)}
    with pytest.raises(
        UnknownOptionError, match=r"^plan has no option 'rnk'; did you mean rank\?$"
    ):
        lp.plan(shapes, rnk=3)  # type: ignore[call-arg]
    with pytest.raises(UnknownOptionError, match="did you mean exclude"):
        lp.plan(shapes, exlcude=["a"])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="apply has no option 'zzz'; it has model, targets, rank"):
        lp.apply(torch.nn.Linear(2, 2), zzz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", ["much", None, [1], True])
def test_a_number_that_is_none_is_refused_with_what_is_accepted(value: object) -> None:
    with pytest.raises(OptionError, match=r"alpha is .*; accepted: a finite number above 0"):
        lp.plan({"a.weight": (4, 4)}, alpha=value)  # type: ignore[arg-type]


def test_numbers_of_other_kinds_are_numbers() -> None:
    plan = lp.plan({"a.weight": (4, 4)}, rank=2, alpha=torch.tensor(3))  # type: ignore[arg-type]
    assert plan.targets[0].settings.alpha == 3.0
    assert type(Settings(alpha=16).alpha) is float


def test_help_names_what_the_registries_hold() -> None:
    from lora_param.targets.settings import INITS, MADE, SCALINGS, VARIANTS

    for setting, names in (("variant", MADE), ("init", INITS), ("scaling", SCALINGS)):
        for name in names:
            assert name in SETTINGS[setting].help
            assert name in SETTINGS[setting].accepted
    assert set(INITS) == set(METHODS)
    assert all(variant_named(name) for name in VARIANTS)
