"""``kvconnect bench idle``: CPU time of engines that have handed over KV and now do nothing."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvconnect.cli.engines import check_model
from kvconnect_bench import options
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
    before = {role: thread_cpu_s(pid) for role, pid in leaders.items()}
    time.sleep(seconds)
    rows = []
    for role, pid in leaders.items():
        used = {key: s - before[role].get(key, 0.0) for key, s in thread_cpu_s(pid).items()}
        by_process: dict[int, float] = {}
        for (process, _, _), cpu_s in used.items():
            by_process[process] = by_process.get(process, 0.0) + cpu_s
        movers = [cpu_s for (_, _, thread), cpu_s in used.items() if thread == THREAD_NAME]
        percents = (sum(by_process.values()), max(by_process.values()), sum(movers))
        rows.append(IdleRow(pair.name, role, *(round(100 * p / seconds, 2) for p in percents)))
    return rows


def thread_cpu_s(leader: int) -> dict[tuple[int, int, str], float]:
    """CPU seconds so far by (process, thread, thread's name), of a session."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        name, fields = text[text.index("(") + 1 : text.rindex(")")], text.rpartition(")")[2].split()
        if int(fields[3]) == leader:
            key = (int(stat.parts[2]), int(stat.parts[4]), name)
            found[key] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def session_cpu_s(leader: int) -> float:
    """CPU seconds so far of a session's processes, of threads that have ended too."""
    ticks, found = os.sysconf("SC_CLK_TCK"), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            found += (int(fields[3]) == leader) * (int(fields[11]) + int(fields[12]))
    return found / ticks


def _table(rows: Sequence[IdleRow]) -> Any:
    from rich.table import Table

    table = Table(title="idle engines, % of one core")
    for heading in ("connector", "role", "engine", "busiest process", "mover thread"):
        table.add_column(heading)
    for row in rows:
        shown = (row.engine_percent, row.worker_percent, row.mover_percent)
        table.add_row(row.connector, row.role, *map(str, shown))
    return table
