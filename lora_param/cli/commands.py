"""The commands. Each is one library call; what it takes and prints is decided here.

It is one file, however long: most of a command is its options, and the list of commands is the
contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import lora_param as lp
from lora_param.cli.arithmetic import COMMANDS
from lora_param.cli.options import (
    MODEL,
    AdapterFile,
    Alpha,
    AnyBase,
    Force,
    Html,
    Json,
    Key,
    Layout,
    Model,
    Names,
    NoSync,
    Targets,
    switches,
    weighted,
)
from lora_param.cli.terminal import Command, Group, progress_bar, show, show_json
from lora_param.report.page.rendering import check_page
from lora_param.targets.settings import SETTINGS

__all__ = ["app"]

_FORMATS = (
    "native, peft, portable, kohya, lycoris, diffusers, loralib, minlora, torchtune, mlx or gguf."
)

app = typer.Typer(
    name="lora-param",
    help="LoRA for any weight of any PyTorch model or checkpoint.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Targets, formats and the library: see the README.",
)


def _version(value: bool) -> None:
    if value:
        show(f"lora-param {lp.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """LoRA for any weight of any PyTorch model or checkpoint."""


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting, where it takes `**options`."""
    signature = inspect.signature(command, eval_str=True)
    *own, _ = signature.parameters.values()
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=setting.default,
            annotation=Annotated[
                setting.kind,
                typer.Option(*filter(None, [setting.flag, f"--{name}"]), help=setting.help),
            ],
        )
        for name, setting in SETTINGS.items()
    ]
    after = next(i for i, p in enumerate(own) if p.name == "exclude") + 1
    parameters = [*own[:after], *settings, *own[after:]]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@app.command(cls=Command)
@_with_settings
def apply(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="ADAPTER", help="The adapter file to write."),
    ] = None,
    target: Targets = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Weights to leave out; repeatable."),
    ] = None,
    tied: Annotated[
        str, typer.Option(help="One side of a tied pair: error, together or apart.")
    ] = "error",
    name: Annotated[str, typer.Option(help="The adapter's name.")] = "default",
    seed: Annotated[
        int | None, typer.Option(help="Makes the factors, and so the file, repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    key: Key = None,
    force: Force = False,
    no_sync: NoSync = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Register LoRA on chosen weights: print the plan, write the adapter.

    Example: lora-param apply model.safetensors -t q_proj -t v_proj -r 8 -o adapter.safetensors
    """
    if output is None and not dry_run:
        raise typer.BadParameter("needed, unless --dry-run is given", param_hint="'-o'")
    options |= {"exclude": exclude or (), "tied": tied, "key": key}
    targets = target or "all-linear"
    if dry_run or output is None:
        plan = lp.plan(model, targets, **options)
    else:
        plan = lp.apply_checkpoint(
            model,
            targets,
            output,
            adapter=name,
            seed=seed,
            force=force,
            sync=not no_sync,
            **options,
        )
    if json:
        show_json({**plan.to_dict(), "output": None if dry_run else str(output)})
        return
    show(plan)
    if not dry_run:
        show(f"Wrote {output}.")


@app.command(cls=Command)
def stats(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ADAPTER",
            help=f"{MODEL} Or an adapter file or a PEFT directory.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        Path | None,
        typer.Argument(metavar="[ADAPTER]", help="An adapter to look at on MODEL."),
    ] = None,
    fail_on_dead: Annotated[
        bool,
        typer.Option("--fail-on-dead", help="Exit with status 1 if a target is still zero."),
    ] = False,
    norms: Annotated[
        bool, typer.Option("--norms/--no-norms", help="Measure the updates; reads the weights.")
    ] = True,
    html: Html = None,
    key: Key = None,
    layout: Layout = None,
    alpha: Alpha = None,
    names: Names = None,
    ignore_fingerprint: AnyBase = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show what is in a model, an adapter, or an adapter on a model.

    Example: lora-param stats model.safetensors adapter.safetensors
    """
    if html is not None:
        check_page(html, force=force)
    with progress_bar("Measuring", quiet=json) as progress:
        found = lp.stats(
            model,
            _read(adapter, layout, names, alpha),
            norms=norms,
            key=key,
            check_fingerprint=not ignore_fingerprint,
            layout=layout,
            alpha=alpha,
            progress=progress,
        )
    if html is not None:
        found.write_html(html, force=force)
    if json:
        show_json(found.to_dict() if html is None else {**found.to_dict(), "html": str(html)})
    else:
        show(found, *([] if html is None else [f"Wrote {html}."]))
    if fail_on_dead and found.dead:
        raise typer.Exit(1)


@app.command(cls=Command)
def enable(adapter: AdapterFile, target: Targets = None, json: Json = False) -> None:
    """Enable targets of an adapter file, in place; all of them without -t.

    Example: lora-param enable adapter.safetensors -t q_proj
    """
    _toggle(adapter, target, True, json)


@app.command(cls=Command)
def disable(adapter: AdapterFile, target: Targets = None, json: Json = False) -> None:
    """Disable targets of an adapter file, in place; all of them without -t.

    The factors stay as they are; stats, bake and load leave the updates out.

    Example: lora-param disable adapter.safetensors
    """
    _toggle(adapter, target, False, json)


def _toggle(adapter: Path, target: list[str] | None, enabled: bool, json: bool) -> None:
    (lp.enable if enabled else lp.disable)(adapter, targets=target)
    targets = lp.read_adapter(adapter).targets
    on = sum(t.enabled for t in targets.values())
    if json:
        show_json(
            {
                "adapter": str(adapter),
                "enabled": [k for k, t in targets.items() if t.enabled],
                "disabled": [k for k, t in targets.items() if not t.enabled],
            }
        )
    else:
        show(f"{adapter}: {on} of {len(targets)} targets enabled, {len(targets) - on} disabled.")


@app.command(cls=Command)
def bake(
    model: Model,
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...",
            help="Adapter files or PEFT directories; WEIGHT multiplies the update.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="The merged checkpoint to write."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Write floating weights as e.g. bfloat16.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace MODEL itself, atomically.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the output again and compare every tensor.")
    ] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Divide the weights anew, into files of e.g. 5GB."),
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links for whole files that do not change.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Finish a bake to the same output that was killed.")
    ] = False,
    quantized: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="FORM",
            help="Of a quantized MODEL: dense, all weights plain (the default), or same, "
            "quantized again.",
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="What a quantized MODEL was made of: measure how far it is."
        ),
    ] = None,
    key: Key = None,
    layout: Layout = None,
    alpha: Alpha = None,
    names: Names = None,
    ignore_fingerprint: AnyBase = False,
    force: Force = False,
    no_sync: NoSync = False,
    json: Json = False,
) -> None:
    """Write the merged checkpoint: same names, shapes, dtypes, shards and side files as MODEL.

    Example: lora-param bake model.safetensors adapter.safetensors -o merged.safetensors
    """
    if (output is None) == (not in_place):
        raise typer.BadParameter("give either -o OUT or --in-place", param_hint="'-o'")
    with progress_bar("Baking", quiet=json) as progress:
        report = lp.bake_checkpoint(
            model,
            [(_read(path, layout, names, alpha), w) for path, w in map(weighted, adapters)],
            output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            link=link,
            resume=resume,
            quantized=cast(Any, quantized),
            original=original,
            key=key,
            check_fingerprint=not ignore_fingerprint,
            in_place=in_place,
            force=force,
            sync=not no_sync,
            verify=verify,
            require_change=True,
            layout=layout,
            alpha=alpha,
            progress=progress,
        )
    if json:
        show_json(report.to_dict())
        return
    show(report)


def _read(adapter: Any, layout: str | None, names: Path | None, alpha: float | None) -> Any:
    """The adapter, read where rules come with it; else its path, which the call reads."""
    if names is None:
        return adapter
    return lp.read_adapter(adapter, layout=layout, names=names, alpha=alpha)


@app.command(cls=Command)
def convert(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="An adapter, of any format.", show_default=False),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=_FORMATS)],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="OUT", help="A file; for peft, portable and mlx a directory."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What the adapter is for; as MODEL elsewhere."),
    ] = None,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy", help="Write the nearest that the format has, and say what it loses."
        ),
    ] = False,
    rank: Annotated[
        int | None, typer.Option("-r", "--rank", help="With --lossy: the rank of all targets.")
    ] = None,
    key: Key = None,
    layout: Layout = None,
    alpha: Alpha = None,
    enable_lora: Annotated[
        str | None,
        typer.Option(
            "--enable-lora",
            metavar="1,0,1",
            help="Which blocks of rows loralib's MergedLinear adapts.",
        ),
    ] = None,
    names: Names = None,
    ignore_fingerprint: AnyBase = False,
    force: Force = False,
    no_sync: NoSync = False,
    json: Json = False,
) -> None:
    """Write an adapter in another format, without loss unless --lossy is given.

    portable is a PEFT directory that every server takes: one rank and alpha, plain A and B.

    Example: lora-param convert peft-directory --to native --base model -o adapter.safetensors
    """
    rows: list[Any] = []
    record = lp.convert(
        _read(adapter, layout, names, alpha),
        to,
        output,
        base=base,
        layout=layout,
        alpha=alpha,
        enable_lora=None if enable_lora is None else switches(enable_lora),
        key=key,
        lossy=lossy,
        rank=rank,
        report=rows.append,
        check_fingerprint=not ignore_fingerprint,
        force=force,
        sync=not no_sync,
    )
    if json:
        found: dict[str, Any] = {"format": to, "targets": list(record.targets)}
        found["notes"] = list(record.notes)
        if lossy:
            found["lossy"] = [asdict(row) for row in rows]
        show_json({"output": str(output), **found})
        return
    if rows:
        from lora_param.report.terminal import compressed_view

        show(compressed_view(rows))
    show(*record.notes, f"Wrote {output}: {len(record.targets)} targets as {to}.")


@app.command(cls=Command)
def check(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="An adapter of any tool.", show_default=False),
    ],
    base: Annotated[
        str | None,
        typer.Argument(metavar="[BASE]", help="The checkpoint that it is for.", show_default=False),
    ] = None,
    consumer: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="CONSUMER",
            help="vllm, sglang, llama.cpp, ollama, peft, transformers, diffusers, comfyui or all; "
            "with a version, vllm==0.11. Repeatable.",
        ),
    ] = None,
    names: Names = None,
    key: Key = None,
    json: Json = False,
) -> None:
    """Say what is wrong with an adapter, and what each server will do with it.

    Exits with 0 if it is accepted, with 1 if a server refuses it, and with 3 if one loads it and
    computes something else.

    Example: lora-param check adapter model --for vllm
    """
    found = lp.check(adapter, base, consumer or (), names=names, key=key)
    if json:
        show_json(found.to_dict())
    else:
        show(found)
    if found.worst != "accepted":
        raise typer.Exit(1 if found.worst == "refused" else 3)


for _command in COMMANDS:
    app.command(cls=Command)(_command)


@app.command(cls=Command)
def demo(
    folder: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where to leave its files.")
    ] = Path("lora-param-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    json: Json = False,
) -> None:
    """Tell the whole story in half a minute, on an embedded net and real digits."""
    from lora_param.demo.story import run

    if not json:
        run(folder, seed=seed)
        return
    from rich.console import Console

    show_json(run(folder, seed=seed, console=Console(quiet=True)).to_dict())
