"""`python:package.module:callable`: the weights of a model that a call builds."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.pickle import data_of, describe_tensors
from lora_param.errors import UnknownFileError
from lora_param.model.weights import config_of, weights_of
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import torch

__all__ = ["PREFIX", "ModuleCheckpoint"]

PREFIX = "python:"
_ACCEPTED = "python:package.module:callable, a call without arguments that returns an nn.Module"


class ModuleCheckpoint(Checkpoint):
    """The state dict of the model that a call returns. It runs the code that it names.

    Attributes:
        module: the model.
        state_dict: its state dict.

    Raises:
        UnknownFileError: the text cannot be read, the import or the call fails, or what it returns
            is no nn.Module.
    """

    def __init__(self, spec: str) -> None:
        self.path = spec
        self.module = _build(spec)
        self.state_dict: Mapping[str, Any] = self.module.state_dict()

    def _describe(self) -> dict[str, Weight]:
        parameters = weights_of(self.module)
        return {
            name: parameters.get(name, weight)
            for name, weight in describe_tensors(self.state_dict).items()
        }

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's own, where it is one of transformers."""
        return config_of(self.module)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise KeyError(name)
        return data_of(self.state_dict[name], name, self.path)


def _build(spec: str) -> torch.nn.Module:
    module_name, colon, attribute = spec.removeprefix(PREFIX).partition(":")
    if not (colon and module_name and attribute):
        raise UnknownFileError(spec, "incomplete", _ACCEPTED)
    from torch import nn

    here = os.getcwd()  # noqa: PTH109 - sys.path holds text
    sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
        model = value() if not isinstance(value, nn.Module) else value
    except (Exception, SystemExit) as error:
        raise UnknownFileError(
            spec, f"not usable, it fails with {type(error).__name__}: {error}", _ACCEPTED
        ) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise UnknownFileError(spec, f"a call that returns a {type(model).__name__}", _ACCEPTED)
    return model
