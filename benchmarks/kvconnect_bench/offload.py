"""``kvconnect bench offload``: rates of the tiers, hits beside computing, cost without hits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_installed, check_model
from kvconnect_bench import options
from kvconnect_bench.lmcache import check_unpacked
from kvconnect_bench.results import save

DTYPE = "bfloat16"
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
    prompts: Annotated[int, typer.Option(min=3, help="Per length and source.")] = 8,
    beside: Annotated[str, typer.Option(help="lmcache or none, beside the hits.")] = "none",
    rounds: Annotated[int, typer.Option(min=2, help="Of tiers and restarts.")] = 8,
    cost_rounds: Annotated[int, typer.Option(min=6, help="Of the cost.")] = 48,
    requests: Annotated[int, typer.Option(help="Per turn of the cost, at once.")] = 4,
    out: options.Json = None,
) -> None:
    """Rates of memory and disk, hits beside computing, cost at 0 % hits, eviction policies."""
    from rich.console import Console

    from kvconnect_bench import offload_cost, offload_engines, offload_eviction, offload_tiers

    chosen = parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise typer.BadParameter(f"no parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    if beside not in ("lmcache", "none"):
        raise typer.BadParameter(f"{beside!r} is neither lmcache nor none", param_hint="--beside")
    path = Path()
    if {"hits", "cost"} & set(chosen):
        path = check_model(model)
        check_installed("offloading")
    if "hits" in chosen and beside == "lmcache":
        check_unpacked()
    measure: dict[str, Callable[[], Sequence[Any]]] = {
        "tiers": lambda: offload_tiers.tiers(folder, mb, rounds),
        "restarts": lambda: list(offload_tiers.restarts(folder, rounds)),
        "eviction": lambda: list(offload_eviction.eviction()),
        "hits": lambda: offload_engines.hits(
            *(path, [int(n) for n in lengths.split(",")], prompts, folder, beside == "lmcache")
        ),
        "cost": lambda: offload_cost.cost(path, cost_rounds, requests),
    }
    console = Console()
    rows: list[Measured] = []
    for part in chosen:
        with console.status(part):
            found = measure[part]()
        console.print(_table(part, found))
        rows += [Measured(part, row) for row in found]
    if out is not None:
        save(out, "offload", rows, dtype=DTYPE)


def _table(part: str, rows: Sequence[Any]) -> Any:
    from rich.table import Table

    names = [field.name for field in fields(rows[0])]
    if len(rows) <= 2:  # many figures of few things: one a line
        table = Table(*[""] * (len(rows) + 1), title=part, show_header=False)
        for name in names:
            table.add_row(name, *(str(getattr(row, name)) for row in rows))
        return table
    differ = [name for name in names if len({str(getattr(row, name)) for row in rows}) > 1]
    same = [f"{name} {getattr(rows[0], name)}" for name in names if name not in differ]
    table = Table(*differ, title=part, caption=", ".join(same))
    for row in rows:
        table.add_row(*(str(getattr(row, name)) for name in differ))
    return table
