"""The README's table of commands, made from the command line itself.

Run it to bring the README up to date; a test fails while it is not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from lora_param.cli.commands import app

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- commands: [^\n]*-->\n)(.*?)(<!-- /commands -->)", re.DOTALL)


def commands() -> str:
    """Usage, purpose and options of every command, as Markdown."""
    group: Any = typer.main.get_command(app)
    return "\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    metavars = " ".join(a.metavar or a.name or "" for a in arguments)
    text = (command.help or "").strip()
    purpose, _, example = text.partition("Example: ")
    lines = [f"**`lora-param {name} {metavars}`**".replace(" `", "`"), ""]
    lines += [" ".join(purpose.split()), ""]
    if example:
        lines += [f"    {' '.join(example.split())}", ""]
    lines += ["| option | |", "|---|---|"]
    for option in options:
        spelled = ", ".join(f"`{o}`" for o in (*option.opts, *option.secondary_opts))
        default = option.default
        shown = (
            f" Default: {default}."
            if isinstance(default, (int, float, str, Path))
            and not isinstance(default, bool)
            and default != ""
            else ""
        )
        lines.append(f"| {spelled} | {option.help}{shown} |")
    return "\n".join([*lines, ""])


def updated(readme: str) -> str:
    """The README with its commands brought up to date."""
    return _BLOCK.sub(lambda m: f"{m[1]}\n{commands()}\n{m[3]}", readme)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
