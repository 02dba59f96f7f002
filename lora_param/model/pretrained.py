"""Models with a `save_pretrained`: what transformers' own methods do while they are adapted.

transformers writes `model.state_dict()`, ties and resizes embeddings by assigning their weights,
and its Trainer saves and resumes through these methods. While a model carries LoRA, its class is
replaced by one of the same name in which

- `save_pretrained` writes a directory that loads twice: `from_pretrained` finds W + ΔW under the
  plain names, and `load_state_dict` of an adapted model, with which the Trainer resumes, finds the
  factors beside them, and a fingerprint of W instead of W, which is frozen and there;
- `tie_weights` leaves weights tied that share base and factors;
- `resize_token_embeddings` refuses adapted embeddings before it changes anything.

transformers itself is neither imported nor changed. Hooks on state dicts are no way to do this:
torch.distributed.checkpoint asks for a model's own names.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_param.errors import NotPretrainedError, ResizeError, RetieError
from lora_param.model.attach import Site, sites_of
from lora_param.model.chains import chain_of, is_adapted, same_weight
from lora_param.model.loading import FINGERPRINT, fingerprint_tensor
from lora_param.model.lora import LoRA
from lora_param.model.sites import by_weight
from lora_param.model.state import check_chains, merge_identity, renamed_state_dict
from lora_param.weight.update import merge

__all__ = ["check_pretrained", "dress", "resumable_state_dict", "undress", "untied_as_saved"]


_MARK = "lora_param."  # names in the file begin with it; a hash of 16 digits and a dot follow


def check_pretrained(model: nn.Module) -> None:
    """Refuse a model that has no `save_pretrained(directory, state_dict=...)`.

    Raises:
        NotPretrainedError: it has none.
    """
    if not _takes_state_dict(type(model)):
        raise NotPretrainedError(type(model).__name__)


def _takes_state_dict(cls: type) -> bool:
    method = getattr(cls, "save_pretrained", None)
    return callable(method) and "state_dict" in inspect.signature(method).parameters


# --- the state dict that loads twice ----------------------------------------------------------


@torch.no_grad()
def resumable_state_dict(
    model: nn.Module, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """W + ΔW under the plain names, and what an adapted model needs to go on training from it.

    Beside each merged weight stand its factors, once where names share them, and either W, where
    it trains, or its fingerprint. They are called `lora_param.HASH.NAME`, with a hash of the
    weight's name, since transformers renames what it writes: Mixtral's `mlp` is another on disk.

    Args:
        model: an adapted model.
        state: its state dict, where it was gathered elsewhere.

    Raises:
        ModelError: another parametrization stands on an adapted weight.
    """
    given = model.state_dict() if state is None else dict(state)
    found = list(sites_of(model))
    check_chains(found, chain=False)
    merged: dict[tuple[int, ...], Tensor] = {}
    values: dict[str, Tensor] = {}
    beside: dict[str, dict[str, Tensor]] = {}
    for group in by_weight(found):
        key = merge_identity(group)
        if key not in merged:
            merged[key] = _merged(group, given)
            beside[group[0].name] = _beside(group[0], given)
        values |= dict.fromkeys((s.name for s in group), merged[key])
    result: dict[str, Tensor] = {}
    for name, value in renamed_state_dict(model, values, given).items():
        result[name] = value
        result |= beside.get(name, {})  # after it: a file that ends between them is an error
    return result


def _merged(group: list[Site], state: Mapping[str, Tensor]) -> Tensor:
    first = group[0]
    updates = [
        lora.update_of({n: state[f"{first.inner}{i}.{n}"] for n in lora.state_dict()})
        for i, lora in enumerate(chain_of(first.owner, first.tensor).children())
        if isinstance(lora, LoRA) and lora.enabled
    ]
    return merge(state[f"{first.inner}original"].detach(), updates)


def _beside(site: Site, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    chain = chain_of(site.owner, site.tensor)
    found = {n: state[site.inner + n] for n in chain.state_dict()}
    if not site.original.requires_grad:
        found[FINGERPRINT] = fingerprint_tensor(found.pop("original"))
    return {_on_disk(site) + n: tensor for n, tensor in found.items()}


def _on_disk(site: Site) -> str:
    return f"{_MARK}{hashlib.sha256(site.name.encode()).hexdigest()[:16]}."


def _live_names(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict with what stands beside the weights under the model's own names."""
    if not any(name.startswith(_MARK) for name in state):
        return state
    inner = {_on_disk(site): site.inner for site in sites_of(model)}
    ends = len(_MARK) + 17
    return {inner.get(n[:ends], n[:ends]) + n[ends:]: value for n, value in state.items()}


# --- the class --------------------------------------------------------------------------------


class _Dressed(type):
    """The class of the classes made here: making an instance of one makes a plain one."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.__base__(*args, **kwargs)  # type: ignore[misc]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def dress(model: nn.Module) -> None:
    """Give the modules that have a `save_pretrained` the class described above."""
    for module in model.modules():
        cls = type(module)
        plain = type(cls) is type and "parametrizations" not in module._modules
        if plain and callable(getattr(cls, "save_pretrained", None)):
            module.__class__ = _class_of(cls)


def undress(model: nn.Module) -> None:
    """Give those modules their own class back below which no LoRA is left."""
    for module in model.modules():
        if isinstance(type(module), _Dressed) and next(sites_of(module), None) is None:
            module.__class__ = cast(type[nn.Module], type(module).__base__)


def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    known = _classes.get(base)
    if known is None:
        known = _classes[base] = _make_class(base)
    return known


copyreg.pickle(_Dressed, cast(Any, lambda cls: (_class_of, (cls.__base__,))))


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    own: Any = base
    signature = inspect.signature(own.save_pretrained)

    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_pretrained(self)
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("state_dict")
        if given is None or any(f"{s.inner}original" in given for s in sites_of(self)):
            bound.arguments["state_dict"] = resumable_state_dict(self, given)
            with untied_as_saved(self):
                return own.save_pretrained(*bound.args, **bound.kwargs)
        return own.save_pretrained(*bound.args, **bound.kwargs)

    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return own.load_state_dict(self, _live_names(self, state_dict), *args, **kwargs)

    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        for target, source in self.get_expanded_tied_weights_keys(all_submodels=True).items():
            one, other = (_find(self, name) for name in (target, source))
            if not same_weight(one, other) and (is_adapted(*one) or is_adapted(*other)):
                raise RetieError(target, source)
        return own.tie_weights(self, *args, **kwargs)

    def get_parameter_or_buffer(self: nn.Module, target: str) -> Any:
        where = _find(self, target)
        return getattr(*where) if is_adapted(*where) else own.get_parameter_or_buffer(self, target)

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _refuse_resizing(self, new_num_tokens, pad_to_multiple_of)
        return own.resize_token_embeddings(
            self, new_num_tokens, pad_to_multiple_of, *args, **kwargs
        )

    namespace: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    methods: tuple[Any, ...] = (save_pretrained, load_state_dict, tie_weights)
    for method in (*methods, get_parameter_or_buffer, resize_token_embeddings):
        name = method.__name__
        if hasattr(base, name):
            namespace[name] = functools.wraps(getattr(base, name))(method)
    # transformers writes the class's name into the config
    return cast(type[nn.Module], _Dressed(base.__name__, (base,), namespace))


def _find(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, tensor = name.rpartition(".")
    return model.get_submodule(path), tensor


def _refuse_resizing(model: Any, rows: int | None, multiple: int | None) -> None:
    found = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    names = {id(m): name for name, m in model.named_modules()}
    adapted = [m for m in found.values() if m is not None and is_adapted(m, "weight")]
    if not adapted:
        return
    now = adapted[0].weight.shape[0]
    wanted = now if rows is None else rows
    if multiple is not None:
        wanted = -(-wanted // multiple) * multiple
    if wanted != now:
        raise ResizeError([f"{names[id(m)]}.weight" for m in adapted], now, wanted)


@contextmanager
def untied_as_saved(model: Any) -> Iterator[None]:
    """The config says that embeddings are not tied where they were adapted apart."""
    keys: Iterable[tuple[str, str]] = ()
    if hasattr(model, "get_expanded_tied_weights_keys"):
        keys = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    config = model.config.get_text_config() if keys else None
    apart = any(not same_weight(_find(model, a), _find(model, b)) for a, b in keys)
    tied = getattr(config, "tie_word_embeddings", None)
    if not (apart and tied):
        yield
        return
    assert config is not None
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        config.tie_word_embeddings = tied
