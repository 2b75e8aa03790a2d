"""``kvconnect bench idle``: CPU time of engines that have handed over KV and now do nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
from kvconnect_bench.cpu import threads_of
from kvconnect_bench.pair import MeasuredPair, compared, pair_alone
from kvconnect_bench.results import save

DTYPE = "bfloat16"
THREAD_NAME = "kvconnect-mover"  # kvconnect.mover.THREAD_NAME, whose import would bring numpy
SETTLE_S = 10.0  # after the last transfer, until everything is at rest


@dataclass(frozen=True)
class IdleRow:
    """CPU time of one idle engine, as parts of a core."""

    connector: str
    role: str
    engine_percent: float
    """All processes of the engine: API server, scheduler, workers."""
    worker_percent: float
    """The busiest of its processes."""
    mover_percent: float
    """Its thread that moves KV (named kvconnect-mover; 0 where there is none)."""


def idle(
    model: options.Model = None,
    connectors: options.Connectors = "nixl",
    seconds: Annotated[float, typer.Option(help="How long to watch.")] = 30,
    out: options.Json = None,
) -> None:
    """CPU time of idle engines, beside the in-tree NixlConnector, one pair after the other."""
    from rich.console import Console

    path, names = check_model(model), compared(connectors)
    console = Console()
    rows: list[IdleRow] = []
    for name in names:
        with console.status(name), pair_alone(name, path, DTYPE) as pair:
            pair.pull(range(1000, 1300))
            time.sleep(SETTLE_S)
            rows += _watch(pair, seconds)
    console.print(_table(rows))
    if out is not None:
        save(out, "idle", rows, dtype=DTYPE, seconds=seconds)


def _watch(pair: MeasuredPair, seconds: float) -> list[IdleRow]:
    leaders = {role: server.pid for role, server in pair.servers.items()}
    before = {role: threads_of(pid) for role, pid in leaders.items()}
    time.sleep(seconds)
    rows = []
    for role, pid in leaders.items():
        used = {key: s - before[role].get(key, 0.0) for key, s in threads_of(pid).items()}
        by_process: dict[int, float] = {}
        for (process, _, _), cpu_s in used.items():
            by_process[process] = by_process.get(process, 0.0) + cpu_s
        movers = [cpu_s for (_, _, thread), cpu_s in used.items() if thread == THREAD_NAME]
        percents = (sum(by_process.values()), max(by_process.values()), sum(movers))
        rows.append(IdleRow(pair.name, role, *(round(100 * p / seconds, 2) for p in percents)))
    return rows


def _table(rows: Sequence[IdleRow]) -> Any:
    from rich.table import Table

    table = Table(title="idle engines, % of one core")
    for heading in ("connector", "role", "engine", "busiest process", "mover thread"):
        table.add_column(heading)
    for row in rows:
        shown = (row.engine_percent, row.worker_percent, row.mover_percent)
        table.add_row(row.connector, row.role, *map(str, shown))
    return table
