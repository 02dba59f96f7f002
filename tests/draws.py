"""How often a property is drawn. Draws are the same in every run; for other and more of them:

LORA_PARAM_DRAWS=2000 python -m pytest tests/weight --hypothesis-seed=7
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

LONG_RUN = int(os.environ.get("LORA_PARAM_DRAWS", "0"))


def draws(count: int) -> Any:
    """Decorates a property that is drawn `count` times."""
    return settings(
        max_examples=LONG_RUN or count,
        derandomize=not LONG_RUN,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
