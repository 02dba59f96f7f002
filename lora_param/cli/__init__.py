"""The command line, outermost: parse, one library call, translate errors.

Nothing here imports torch: a library call does, where it needs it.
"""

from __future__ import annotations

import sys

from lora_param.cli.terminal import run

__all__ = ["main"]


def main() -> None:
    """Entry point of `lora-param` and `python -m lora_param`."""
    from lora_param.cli.commands import app

    sys.exit(run(app))
