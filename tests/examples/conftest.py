"""Each example is run as a module, by its file."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The `main` of the example that the test file is named after."""
    name = request.path.stem.removeprefix("test_")
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["main"]
    return main
