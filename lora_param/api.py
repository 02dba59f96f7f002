"""Functions over live models and files alike: `plan`, `stats`, `enable` and `disable` take a live
model or a path, `save` and `load` stand between an adapter on a model and its file.

What works on a live model alone is in `model/`, what works on files alone in `checkpoint/` and
`formats/`. Nothing here imports torch: only a live model brings it, and then it is imported.

It is one file, however long: the list of its functions is the contract, and half of its lines say
what their arguments are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from lora_param.adapter import Adapter, AdapterTarget, Host, check_name
from lora_param.arithmetic.approximate import approximate
from lora_param.arithmetic.combine import Compressed
from lora_param.checkpoint.fit import check_checkpoint
from lora_param.checkpoint.fit import host_of as checkpoint_host
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import NoAdapterError, NoFormError, OptionError, OutputError, worded
from lora_param.formats import (
    format_named,
    is_adapter,
    read_adapter,
    toggle_file,
    write_adapter,
)
from lora_param.formats.base import Format
from lora_param.formats.peft.kinds import kinds_of
from lora_param.model.weights import buffers_of, weights_of
from lora_param.report.collect import Progress, as_array, collect
from lora_param.report.stats import Stats
from lora_param.targets.lora_config import LoraConfig, chosen_by
from lora_param.targets.options import takes_settings
from lora_param.targets.plan import Plan, Tied, make_plan
from lora_param.targets.settings import SettingsOptions
from lora_param.targets.weights import Weight, weights_from

if TYPE_CHECKING:
    from torch import nn

    Model = TypeVar("Model", bound=nn.Module)

__all__ = ["convert", "disable", "enable", "load", "plan", "save", "save_pretrained", "stats"]

PathLike = str | os.PathLike[str]
Patterns = str | Iterable[str]


@takes_settings
def plan(
    model_or_shapes: nn.Module | PathLike | Mapping[str, Sequence[int] | Weight],
    targets: Patterns | LoraConfig = "all-linear",
    *,
    exclude: Patterns = (),
    tied: Tied = "error",
    key: str | None = None,
    **options: Unpack[SettingsOptions],
) -> Plan:
    """What `apply` would do, without doing it: targets, ranks, scales, counts per pattern, cost.

    Args:
        model_or_shapes: a live model, a checkpoint's path, or names and shapes.
        key: which nested state dict of a pickled checkpoint.
        targets, exclude, tied: as for `apply`.
        **options: the settings of what the patterns do not set.

    Raises:
        TargetError, OptionError, UnknownOptionError: as for `apply`.

    Example:
        >>> p = plan({"fc1.weight": (1000, 784), "fc2.weight": (10, 1000)}, ["fc1"], rank=1)
        >>> p.trainable, [c.matched for c in p.counts]
        (1784, [1])
    """
    weights: Mapping[str, Weight]
    buffers: Iterable[Weight] = ()
    if isinstance(model_or_shapes, Mapping):
        weights = weights_from(model_or_shapes)
    elif isinstance(model_or_shapes, (str, os.PathLike)):
        with open_checkpoint(model_or_shapes, key) as checkpoint:
            weights = checkpoint.weights
    else:
        weights, buffers = weights_of(model_or_shapes), buffers_of(model_or_shapes)
    targets, settings = chosen_by(plan, targets, exclude, options, weights)
    return make_plan(
        weights, targets, exclude=exclude, settings=settings, tied=tied, buffers=buffers
    )


def stats(
    model_or_path: nn.Module | PathLike,
    adapter: str | os.PathLike[str] | Adapter | None = None,
    *,
    norms: bool = True,
    key: str | None = None,
    check_fingerprint: bool = True,
    layout: str | None = None,
    alpha: float | None = None,
    progress: Progress | None = None,
) -> Stats:
    """What is adapted, what trains, how strong the updates are, what is disabled or still zero.

    Args:
        model_or_path: a live model, a checkpoint, or an adapter file.
        adapter: with a live model, the name of one adapter (all where None); with a checkpoint,
            an adapter file or record to look at on it.
        norms: measure ‖ΔW‖, effective rank, and ‖W‖ where the base is at hand.
        key: which nested state dict of a pickled checkpoint.
        check_fingerprint: refuse a base that the adapter was not made on.
        layout, alpha: as for `read_adapter`.
        progress: called with targets done, targets in all and the target's name.

    Returns:
        Rows and totals; prints itself, and `to_dict` gives it as data.

    Raises:
        NoAdapterError, FileError, MismatchError, FingerprintError: what is given does not fit.

    Example:
        >>> import lora_param as lp
        >>> from torch import nn
        >>> s = stats(lp.apply(nn.Linear(1000, 10), ["weight"], rank=1))
        >>> s.trainable, s.base, round(s.percent, 2), len(s.dead)
        (1010, 10010, 10.09, 1)
    """
    if not isinstance(model_or_path, (str, os.PathLike)):
        return _live_stats(model_or_path, adapter, norms, progress)
    path = model_or_path
    if adapter is None and is_adapter(path):
        record = read_adapter(path, layout=layout, alpha=alpha)
        notes = _notes(record)
        return collect(
            None,
            [record],
            source=str(path),
            name=_name(path),
            notes=notes,
            measured=norms,
            progress=progress,
        )
    if isinstance(adapter, str | os.PathLike) and not is_adapter(adapter) and is_adapter(path):
        accepted = f"the model first: {adapter} {path}"
        raise OptionError("the order of model and adapter", f"{path} {adapter}", accepted)
    with open_checkpoint(path, key) as checkpoint:
        if adapter is None:
            return collect(checkpoint.weights, [], source=str(path), name=_name(path))
        if isinstance(adapter, Adapter):
            record = adapter
        else:
            record = read_adapter(adapter, layout=layout, alpha=alpha)
        record = check_checkpoint(record, checkpoint, check_fingerprint=check_fingerprint)
        return collect(
            checkpoint.weights,
            [record],
            checkpoint.array if norms else None,
            checkpoint.flat_blocks,
            source=f"{path} with {record.source}",
            name=_name(path),
            notes=_notes(record),
            measured=norms,
            progress=progress,
        )


_SAY_NOTHING = ("model", "pytorch_model", "adapter", "adapter_model", "checkpoint", "weights")


def _name(path: PathLike) -> str:
    """What to call a file or directory: its name, with the directory's before one like `model`."""
    last = Path(path).absolute()
    if str(path).startswith("python:"):
        return str(path)
    return "/".join(last.parts[-2:]) if last.stem in _SAY_NOTHING else last.name


def _notes(record: Adapter) -> list[str]:
    named = [f"adapter {record.name!r}"] if record.name != "default" else []
    return [*named, *record.notes]


def _live_stats(model: nn.Module, adapter: object, norms: bool, progress: Progress | None) -> Stats:
    from lora_param.model.adapters import parameters
    from lora_param.model.record import get_adapter
    from lora_param.model.sites import adapter_names, unwrapped

    model = unwrapped(model)
    names = adapter_names(model) if adapter is None else [check_name(adapter)]
    records = [get_adapter(model, name) for name in names]
    on_meta = any(p.is_meta for p in model.parameters())
    factors = {id(p) for p in parameters(model)} if names else set()
    tensors = dict(model.named_parameters())
    kind = type(model).__name__.removeprefix("Parametrized")
    return collect(
        weights_of(model),
        records,
        _live_array(model) if norms and not on_meta else None,
        source=kind,
        name=kind,
        unfrozen=sum(
            p.numel() for p in tensors.values() if p.requires_grad and id(p) not in factors
        ),
        measured=norms and not on_meta,
        progress=progress,
    )


def _live_array(model: nn.Module) -> Any:
    from lora_param.model.sites import base_tensors
    from lora_param.weight.base import dense

    tensors = base_tensors(model)
    return lambda name: as_array(dense(tensors[name]))


def enable(
    model_or_path: nn.Module | PathLike,
    targets: Patterns | None = None,
    *,
    adapter: str | None = None,
) -> None:
    """Let updates take part in their weights; W is never written to.

    Args:
        model_or_path: an adapted model, or an adapter file, which is changed in place, atomically;
            every later command and `load` honours it.
        targets: patterns that choose among its targets, or all where None.
        adapter: the name of one adapter on the model, or all where None.

    Raises:
        NoAdapterError: no such adapter.
        TargetError: a pattern matches none of its targets.
        OptionError: `adapter` is not a name, or `targets` is one.
        FileError: the file is no adapter, or cannot be written.

    Example:
        >>> import lora_param as lp
        >>> from torch import nn
        >>> model = lp.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), rank=2)
        >>> disable(model)
        >>> enable(model, ["1"])
        >>> [row.enabled for row in lp.stats(model).rows]
        [False, True]
    """
    _switch(model_or_path, targets, adapter, True)


def disable(
    model_or_path: nn.Module | PathLike,
    targets: Patterns | None = None,
    *,
    adapter: str | None = None,
) -> None:
    """Leave updates out: the weights read as W again, bit for bit. Takes what `enable` takes."""
    _switch(model_or_path, targets, adapter, False)


def _switch(
    model_or_path: nn.Module | PathLike,
    targets: Patterns | None,
    adapter: str | None,
    enabled: bool,
) -> None:
    if isinstance(model_or_path, (str, os.PathLike)):
        if adapter is not None:
            raise OptionError("adapter", adapter, "None for a file, which holds one adapter")
        toggle_file(model_or_path, enabled, targets)
        return
    from lora_param.model.switching import switch

    switch(model_or_path, enabled, targets, adapter=adapter)


def save(
    model: nn.Module, path: PathLike, adapter: str = "default", format: str | None = None
) -> Path:
    """Write an adapter of the model to a file, atomically; its bytes depend on its content alone.

    Args:
        model: an adapted model.
        path: the file to write, for "peft" the directory; an adapter that is there is replaced.
        adapter: which adapter.
        format: "native" (None as well) or "peft".

    Raises:
        NoAdapterError: no such adapter.
        NoFormError: the format has no form for something in it; the message names it.
        NonFiniteError: a factor is NaN or infinite.
        OutputError: the file cannot be written.
    """
    from lora_param.model.record import record_to_save

    write_adapter(record_to_save(model, adapter), path, format)
    return Path(path)


def save_pretrained(
    model: nn.Module, directory: PathLike, merged: bool = True, **more: Any
) -> Path:
    """Write what transformers' `from_pretrained(directory)` loads as a plain model.

    Names on disk, configs and tied weights are those that the model's own `save_pretrained`
    writes. It is called with the state dict of the choice:

    - merged: W + ΔW of all enabled updates.
    - not merged: the base, and beside it `adapter.safetensors`, or `adapter-NAME.safetensors` for
      each where the model has several. `lp.load(type(model).from_pretrained(directory),
      directory / "adapter.safetensors")` gives the adapted model again.

    Args:
        model: an adapted transformers model.
        directory: where to write; what is there under the same names is replaced.
        merged: write W + ΔW, or base and adapters.
        more: for the model's own `save_pretrained`, such as `max_shard_size`.

    Raises:
        NoAdapterError: nothing is adapted.
        NotPretrainedError: the model has no such `save_pretrained`.
        NonFiniteError: a factor, or a merged weight, is NaN or infinite; nothing is written.
        ModelError: another parametrization stands on an adapted weight.
        OutputError: the directory is a file, or cannot be written.
    """
    from lora_param.model.baking import check_finite
    from lora_param.model.pretrained import check_pretrained, untied_as_saved
    from lora_param.model.record import record_to_save
    from lora_param.model.sites import adapter_names, by_weight, sites, unwrapped
    from lora_param.model.state import base_state_dict, check_chains, merged_state_dict

    inner, directory = unwrapped(model), Path(directory)
    check_pretrained(inner)
    names = adapter_names(inner)
    if not names:
        raise NoAdapterError(None, [])
    if directory.exists() and not directory.is_dir():
        raise OutputError(directory, "it is a file, not a directory")
    check_chains(sites(inner), chain=False)
    check_finite(by_weight(sites(inner)))
    state = merged_state_dict(inner) if merged else base_state_dict(inner)
    files = {} if merged else {_adapter_file(name, len(names)): name for name in names}
    records = {file: record_to_save(inner, name) for file, name in files.items()}
    try:
        with untied_as_saved(inner) if merged else nullcontext():
            cast(Any, inner).save_pretrained(directory, state_dict=state, **more)
    except OSError as error:
        raise OutputError(directory, str(error)) from error
    for file, record in records.items():
        write_adapter(record, directory / file)
    return directory


def _adapter_file(name: str, of: int) -> str:
    if of > 1 and os.path.basename(name) != name:  # noqa: PTH119  nothing but the text is looked at
        raise OptionError("adapter", name, "a name that can be part of a file's, where several are")
    return "adapter.safetensors" if of == 1 else f"adapter-{name}.safetensors"


def load(
    model: Model,
    path: PathLike,
    adapter: str = "default",
    strict: bool = True,
    *,
    freeze: bool = True,
    check_fingerprint: bool = True,
    layout: str | None = None,
    alpha: float | None = None,
) -> Model:
    """Load an adapter file onto a model.

    Where the model has an adapter of this name, its factors, scales and toggles are overwritten,
    and its targets and ranks must be the file's. Otherwise it is attached as the file says.

    Args:
        model: a plain or an adapted model.
        path: the adapter's file or directory, of any format that `read_adapter` takes.
        adapter: the name to load it under.
        strict: every tensor of the file is used and every target of the model filled. False loads
            what both sides have into an existing adapter, with a warning that counts the rest.
        freeze: set requires_grad to False on everything but the factors.
        check_fingerprint: refuse a base with other dtypes or values than it was made on. A file of
            another tool does not say what that was: names and shapes alone are compared then, and
            the logger "lora_param" says so.
        layout, alpha: as for `read_adapter`.

    Returns:
        The model.

    Raises:
        MismatchError: names or shapes differ; both sides are listed.
        FingerprintError: same names and shapes, another base.
        FileError: the file is missing, broken, or no adapter.
        UnsettledError: the file and the model leave open how a square weight is stored.
    """
    from lora_param.model.adapters import attach
    from lora_param.model.record import load_into
    from lora_param.model.sites import adapter_names

    record = read_adapter(path, layout=layout, alpha=alpha)
    if adapter in adapter_names(model):
        load_into(model, record, adapter, strict=strict, check_fingerprint=check_fingerprint)
    else:
        attach(model, record, adapter, freeze=freeze, check_fingerprint=check_fingerprint)
    if not any(b.hash for b in record.base.values()):
        told = "%s does not say what base it was made on: names and shapes alone were compared."
        logging.getLogger("lora_param").warning(told, record.source)
    return model


def convert(
    adapter: PathLike | Adapter,
    to: str,
    out: PathLike,
    *,
    base: nn.Module | PathLike | None = None,
    layout: str | None = None,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    key: str | None = None,
    lossy: bool = False,
    rank: int | None = None,
    report: Callable[[Compressed], None] | None = None,
    check_fingerprint: bool = True,
    force: bool = False,
    sync: bool = True,
) -> Adapter:
    """Write an adapter in another format, without loss unless that is asked for.

    Args:
        adapter: a record, or the path of one in any format that `read_adapter` takes.
        to: a name of `FORMATS`: "native", "peft", "portable" (what every server takes), "kohya",
            "lycoris" (kohya's form, with what LyCORIS has beside LoRA), "diffusers", "loralib",
            "minlora", "torchtune", "mlx", "gguf".
        out: the file to write, for "peft", "portable" and "mlx" the directory.
        base: the model or the checkpoint that it is for. A file of another tool leaves open what
            only the base tells, such as how it stores its weights; PEFT's depends on its layers.
        layout, alpha, enable_lora: as for `read_adapter`.
        key: which nested state dict of a pickled checkpoint.
        lossy: where the format has no form for something, write the nearest that it has: other
            variants as plain LoRA of their rank, copies and layers without a form left out.
        rank: with `lossy`, of all targets.
        report: with `lossy`, called with what became of each target that lost something.
        check_fingerprint: refuse a base that the adapter was not made on.
        force: replace an adapter that exists.
        sync: have the data on the disk before the name shows them.

    Returns:
        The record that was written; its `notes` say what could not be checked.

    Raises:
        NoFormError: the format has no form for something in it; the message names it.
        UnsettledError: something is left open; the message says what to give.
        MismatchError, FingerprintError: the adapter does not fit the base.
        NonFiniteError: a tensor holds NaN or infinity.
        FileError: something cannot be read, or the output not be written.

    >>> convert("peft-directory", "native", "adapter.safetensors", base="model")  # doctest: +SKIP
    """
    if rank is not None and not lossy:
        raise OptionError("rank", rank, f"nothing without {worded('lossy=True', '--lossy')}")
    written_as = format_named(to)
    if isinstance(adapter, Adapter):
        record = adapter
    else:
        record = read_adapter(adapter, layout=layout, alpha=alpha, enable_lora=enable_lora)

    def written(record: Adapter, host: Host | None) -> Adapter:
        record.check_finite()
        if lossy:
            kept = _nearest(record, written_as, host, rank, report)
            if not kept.targets:
                raise NoFormError(
                    record.source,
                    f"{len(record.targets)} targets",
                    f"of which {to} has a form for none, not even an approximate one",
                    "bake it (lora-param bake)",
                )
            record = kept
        write_adapter(record, out, to, force=force, sync=sync)
        unsaid = written_as.unsaid(record)
        return replace(record, notes=(*record.notes, unsaid)) if unsaid else record

    if isinstance(base, (str, os.PathLike)):
        with open_checkpoint(base, key) as checkpoint:
            given = {t.target.name for t in record.targets.values()}
            record = check_checkpoint(record, checkpoint, check_fingerprint=check_fingerprint)
            other = [n for t in record.targets.values() if (n := t.target.name) not in given]
            if other and record.format == to == "peft":
                raise NoFormError(
                    record.source,
                    "the names of a live model",
                    f"which {base} stores under others ({other[0]}) that PEFT would not find",
                    f"give the live model ({worded('base=model', '--base python:...')})",
                )
            return written(_at_hand(record, host := checkpoint_host(checkpoint)), host)
    if base is not None:
        from lora_param.model.record import check_base, host_of
        from lora_param.model.sites import unwrapped

        model = unwrapped(base)
        record = check_base(model, record, check_fingerprint)
        host = host_of(model)
        return written(_at_hand(record, host), host)
    return written(record, None)


def _at_hand(record: Adapter, host: Host) -> Adapter:
    return replace(record, weights_at_hand=host.weights, config_at_hand=host.config)


def _nearest(
    record: Adapter,
    to: Format,
    host: Host | None,
    rank: int | None,
    report: Callable[[Compressed], None] | None,
) -> Adapter:
    """What a format has a form for; all of it where nothing is lost."""
    if rank is None and to.layers is None:
        return record
    kinds = {} if to.layers is None else kinds_of(record)

    def has_form(t: AdapterTarget) -> bool:
        return to.layers is None or kinds.get(t.target.name) in to.layers

    return approximate(record, host, has_form, exact=to.exact, rank=rank, report=report)
