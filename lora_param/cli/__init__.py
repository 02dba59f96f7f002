"""The command line, outermost: parse, one library call, translate errors.

Nothing here imports torch: a library call does, where it needs it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of `lora-param` and `python -m lora_param`."""
    try:  # the imports are most of a short command's time, and Ctrl-C may come in them
        from lora_param.cli.commands import app
        from lora_param.cli.terminal import run
    except KeyboardInterrupt:
        sys.stderr.write("Error: interrupted.\n")
        sys.exit(130)
    sys.exit(run(app))
