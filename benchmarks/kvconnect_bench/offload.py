"""``kvconnect bench offload``: rates of the tiers, hits beside computing, cost without hits."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_installed, check_model
from kvconnect_bench import options
from kvconnect_bench.results import save

DTYPE = "bfloat16"
COST_TOKENS = 512, 32
PARTS = ("tiers", "restarts", "eviction", "hits", "cost")


@dataclass(frozen=True)
class Measured:
    """A row of one part's own kind."""

    part: str
    row: Any


def offload(
    model: options.Model = None,
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}.")] = ",".join(PARTS),
    folder: Annotated[Path | None, typer.Option(help="Where the disk tier is to lie.")] = None,
    mb: Annotated[int, typer.Option(help="MiB of KV that the tiers move at a time.")] = 256,
    lengths: Annotated[str, typer.Option(help="Prompt tokens of the hits.")] = "500,2000,4000",
    prompts: Annotated[int, typer.Option(help="Per length and source.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Of the tiers, and of the cost.")] = 8,
    requests: Annotated[int, typer.Option(help="Per round and engine of the cost.")] = 24,
    together: Annotated[
        bool, typer.Option(help="Load both engines of the cost at once, not one at a time.")
    ] = False,
    out: options.Json = None,
) -> None:
    """Rates of memory and disk, hits beside computing, cost at 0 % hits, eviction policies."""
    from rich.console import Console

    chosen = parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"no parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    path = check_model(model) if {"hits", "cost"} & set(chosen) else Path()
    console = Console()
    rows: list[Measured] = []
    for part in chosen:
        with console.status(part):
            found = _measure(part, path, folder, mb, lengths, prompts, rounds, requests, together)
        console.print(_table(part, found))
        rows += [Measured(part, row) for row in found]
    if out is not None:
        save(out, "offload", rows, dtype=DTYPE)


def _measure(
    part: str,
    model: Path,
    folder: Path | None,
    mb: int,
    lengths: str,
    prompts: int,
    rounds: int,
    requests: int,
    together: bool,
) -> Sequence[Any]:
    from kvconnect_bench import offload_engines, offload_eviction, offload_tiers

    if part == "tiers":
        return offload_tiers.tiers(folder, mb, rounds)
    if part == "restarts":
        return list(offload_tiers.restarts(folder, rounds))
    if part == "eviction":
        return list(offload_eviction.eviction())
    check_installed("offloading")
    if part == "hits":
        return offload_engines.hits(model, [int(n) for n in lengths.split(",")], prompts, folder)
    return [offload_engines.cost(model, rounds, requests, COST_TOKENS, together)]


def _table(part: str, rows: Sequence[Any]) -> Any:
    from rich.table import Table

    names = [field.name for field in fields(rows[0])]
    if len(rows) == 1:  # many figures of one thing: one a line
        table = Table("", "", title=part, show_header=False)
        for name in names:
            table.add_row(name, str(getattr(rows[0], name)))
        return table
    table = Table(*names, title=part)
    for row in rows:
        table.add_row(*(str(getattr(row, name)) for name in names))
    return table
