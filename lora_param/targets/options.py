"""The settings as keyword arguments of a function."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lora_param.errors import UnknownOptionError
from lora_param.targets.settings import SETTINGS, Settings, SettingsOptions

__all__ = ["read_options", "takes_settings"]

Function = TypeVar("Function", bound=Callable[..., Any])

_ENTRY = re.compile(r"^( *)\*\*options: .*$", re.MULTILINE)


def takes_settings(function: Function) -> Function:
    """Show a function's `**options` as the settings that they are, in its signature and its help.

    >>> @takes_settings
    ... def apply(model, *, exclude=(), **options): ...
    >>> list(inspect.signature(apply).parameters)[:4]
    ['model', 'rank', 'alpha', 'scaling']
    """
    signature = inspect.signature(function)
    *own, _ = signature.parameters.values()
    first = [p for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default,
            annotation=setting.kind.__name__,
        )
        for name, setting in SETTINGS.items()
    ]
    shown = signature.replace(parameters=[*first, *settings, *own[len(first) :]])
    function.__signature__ = shown  # type: ignore[attr-defined]
    entries = [f"{name}: {setting.help}" for name, setting in SETTINGS.items()]
    function.__doc__ = _ENTRY.sub(
        lambda found: "\n".join(found[1] + entry for entry in entries), function.__doc__ or ""
    )
    return function


def read_options(function: Callable[..., Any], options: SettingsOptions) -> Settings:
    """The settings that a function was given as `**options`.

    Raises:
        UnknownOptionError: one of them is no setting.
        OptionError: a value outside what is accepted.
    """
    for name in cast(dict[str, object], options):
        if name not in SETTINGS:
            known = list(inspect.signature(function).parameters)
            nearest = difflib.get_close_matches(name, known, 1)
            raise UnknownOptionError(function.__name__, name, nearest, known)
    return Settings(**options)
