"""Commands that calculate with adapters: `extract`, `combine`, `resize`, `diff`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import lora_param as lp
from lora_param.arithmetic.combine import check_options
from lora_param.cli.options import (
    AdapterFile,
    AnyBase,
    Force,
    Html,
    Json,
    Key,
    NoSync,
    Targets,
    weighted,
)
from lora_param.cli.terminal import progress_bar, show, show_json
from lora_param.files.writer import check_output
from lora_param.report.page.rendering import check_page

__all__ = ["COMMANDS"]

Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="ADAPTER", help="The adapter file to write.")
]
Energy = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Keep the lowest rank with this share of ‖ΔW‖²."),
]
Error = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Keep the lowest rank that loses this share of ‖ΔW‖."),
]
Rank = Annotated[int | None, typer.Option("-r", "--rank", help="The most that a target keeps.")]


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint.", show_default=False)],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="What became of it.", show_default=False)
    ],
    output: Output,
    target: Targets = None,
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Decompose in full: slow, and hardly better.")
    ] = False,
    name: Annotated[str, typer.Option(help="The adapter's name.")] = "default",
    seed: Annotated[int, typer.Option(help="Of the random projections.")] = 0,
    key: Key = None,
    force: Force = False,
    no_sync: NoSync = False,
    json: Json = False,
) -> None:
    """Write the adapter that leads from one checkpoint to another: their low-rank difference.

    Rank 32 unless -r, --energy or --error says otherwise. What moved and is no matrix is listed.

    Example: lora-param extract base tuned -r 32 -o adapter.safetensors
    """
    check_output(output, force=force)
    with progress_bar("Comparing", quiet=json) as progress:
        found = lp.extract(
            base,
            tuned,
            target,
            rank=rank,
            energy=energy,
            error=error,
            exact=exact,
            seed=seed,
            adapter=name,
            key=key,
            progress=progress,
        )
    lp.write_adapter(found.adapter, output, force=force, sync=not no_sync)
    if json:
        show_json({**found.to_dict(), "output": str(output)})
    else:
        show(found, f"Wrote {output}.")


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...", help="Adapters and their weights.", show_default=False
        ),
    ],
    output: Output,
    method: Annotated[
        str,
        typer.Option(
            help="cat (exact, ranks add up), svd (the best of --rank), linear, ties, dare or "
            "core-space."
        ),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option("-r", "--rank", help="Compress the result to this rank.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Of ties, dare and core-space: the share that stays. Default: 0.5."),
    ] = None,
    name: Annotated[str, typer.Option(help="The adapter's name.")] = "default",
    seed: Annotated[int, typer.Option(help="Of dare's draws.")] = 0,
    force: Force = False,
    no_sync: NoSync = False,
    json: Json = False,
) -> None:
    """Write the weighted sum of adapters, whatever their targets and ranks, as one adapter.

    Example: lora-param combine a.safetensors=0.7 b.safetensors=0.3 -o c.safetensors
    """
    check_options(method, rank, density)
    check_output(output, force=force)
    pairs = [weighted(text) for text in adapters]
    rows: list[Any] = []
    total = lp.combine(
        [lp.read_adapter(path) for path, _ in pairs],
        [weight for _, weight in pairs],
        method=method,
        rank=rank,
        density=density,
        seed=seed,
        adapter=name,
        report=rows.append,
    )
    lp.write_adapter(total, output, force=force, sync=not no_sync)
    _show_compressed(rows, output, json)


def resize(
    adapter: AdapterFile,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    force: Force = False,
    no_sync: NoSync = False,
    json: Json = False,
) -> None:
    """Write an adapter of lower rank, the best there is for each product B @ A.

    Example: lora-param resize adapter.safetensors -r 16 -o small.safetensors
    """
    check_output(output, force=force)
    rows: list[Any] = []
    small = lp.resize(
        lp.read_adapter(adapter), rank=rank, energy=energy, error=error, report=rows.append
    )
    lp.write_adapter(small, output, force=force, sync=not no_sync)
    _show_compressed(rows, output, json)


def _show_compressed(rows: list[Any], output: Path, json: bool) -> None:
    if json:
        show_json({"output": str(output), "targets": [asdict(row) for row in rows]})
        return
    from lora_param.report.terminal import compressed_view

    if rows:
        show(compressed_view(rows))
    show(f"Wrote {output}.")


def diff(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="An adapter or a checkpoint.", show_default=False),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The same kind of thing.", show_default=False)
    ],
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ADAPTER]", help="Is A what baking ADAPTER into B gives?", show_default=False
        ),
    ] = None,
    html: Html = None,
    key: Key = None,
    ignore_fingerprint: AnyBase = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Say what differs between two adapters, two checkpoints, or a merged file and its parts.

    Exits with 0 if nothing differs, and with 3 if something does.

    Example: lora-param diff merged.safetensors base.safetensors adapter.safetensors
    """
    if html is not None:
        check_page(html, force=force)
    with progress_bar("Comparing", quiet=json) as progress:
        found = lp.diff(
            a, b, adapter, key=key, check_fingerprint=not ignore_fingerprint, progress=progress
        )
    if html is not None:
        found.write_html(html, force=force)
    written = {} if html is None else {"html": str(html)}
    if json:
        show_json({**found.to_dict(), **written})
    else:
        show(found, *(f"Wrote {page}." for page in written.values()))
    if not found.same:
        raise typer.Exit(3)


COMMANDS = (extract, combine, resize, diff)
