"""The weights of a live model, as planning sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lora_param.errors import OptionError
from lora_param.targets.weights import Weight, canonical_name

if TYPE_CHECKING:
    import torch

__all__ = ["as_module", "buffers_of", "config_of", "weights_of"]


def as_module(model: object) -> torch.nn.Module:
    """The model, where it is one.

    Raises:
        OptionError: it is not a module.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise OptionError("model", model, "a torch.nn.Module")
    return model


def config_of(model: torch.nn.Module) -> Mapping[str, Any]:
    """What the config of a model of transformers says; empty for others."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    found = to_dict() if callable(to_dict) else {}
    return found if isinstance(found, Mapping) else {}


def weights_of(model: torch.nn.Module) -> dict[str, Weight]:
    """The parameters of a live model under their original names, parametrized ones included."""
    from lora_param.weight.base import logical_dtype

    names: dict[int, list[str]] = {}
    found: dict[str, tuple[torch.Tensor, torch.nn.Module]] = {}
    for name, tensor, owner in _parameters(model):
        if name not in found:
            names.setdefault(id(tensor), []).append(name)
            found[name] = (tensor, owner)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        name: Weight(
            name,
            _shape(tensor),
            str(logical_dtype(tensor)).removeprefix("torch."),
            tuple(
                c.__name__ for c in type(owner).__mro__ if c.__name__ not in ("Module", "object")
            ),
            tuple(n for n in names[id(tensor)] if n != name),
            head=owner is head,
            packed=_packed(tensor),
            in_first=_in_first(owner, tensor),
        )
        for name, (tensor, owner) in found.items()
    }


def buffers_of(model: torch.nn.Module) -> Iterator[Weight]:
    """The buffers of a live model, as planning sees them: it can say that they are no weights."""
    for name, tensor in model.named_buffers(remove_duplicate=False):
        if "parametrizations" not in name.split("."):
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield Weight(canonical_name(name), _shape(tensor), dtype)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of its numbers; of a lazy module's tensor, which has no shape yet, that of none at all."""
    from torch.nn.parameter import is_lazy

    from lora_param.weight.base import logical_shape

    return (0,) if is_lazy(tensor) else logical_shape(tensor)


def _in_first(owner: torch.nn.Module, tensor: torch.Tensor) -> bool | None:
    """The module's class tells how it stores W; a stack of experts has an attribute for it."""
    if len(_shape(tensor)) == 3 and not hasattr(owner, "kernel_size"):
        return bool(getattr(owner, "is_transposed", False))
    classes = {c.__name__ for c in type(owner).__mro__}
    if classes & {"Conv1D", "Embedding"}:
        return True
    return False if "Linear" in classes else None


def _packed(tensor: torch.Tensor) -> str:
    """Why it has no values to adapt: it is of a class that nothing reads, or of no class yet."""
    from lora_param.weight.base import storage_of

    kind = type(tensor).__name__
    if storage_of(tensor) is not None:
        return ""
    if kind in ("Parameter", "Tensor", "UninitializedParameter", "DTensor", "FakeTensor"):
        return "not yet initialised" if kind == "UninitializedParameter" else ""
    is_quantized = hasattr(tensor, "dequantize") and type(tensor).__module__.startswith(
        ("torchao", "bitsandbytes", "optimum", "hqq")
    )
    return f"quantized, a {kind}" if is_quantized else ""


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.nn.Module]]:
    """Name, tensor and owner of each parameter; of a parametrized one, the original tensor."""
    for path, module in as_module(model).named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        own: dict[str, torch.Tensor] = {
            name: p for name, p in module._parameters.items() if p is not None
        }
        lists = module._modules.get("parametrizations")
        if lists is not None:
            for name, chain in lists.named_children():
                original = chain._parameters.get("original")
                if original is not None:
                    own[name] = original
                elif "original0" in chain._parameters:
                    own[name] = getattr(module, name)
        for name, tensor in own.items():
            yield canonical_name(f"{path}.{name}" if path else name), tensor, module
