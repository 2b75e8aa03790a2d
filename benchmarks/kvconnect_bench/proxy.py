"""``kvconnect bench proxy``: what a proxy adds to a request, beside vLLM's Rust router."""

import contextlib
import importlib.util
import os
import socket
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer

from kvconnect.cli.processes import HOST, Fleet, Server
from kvconnect_bench import http_load, options
from kvconnect_bench.cpu import threads_of
from kvconnect_bench.http_load import PARAMS, HttpLoad, request
from kvconnect_bench.results import save

FLOOR, OURS, RUST = "no proxy", "kvconnect proxy", "vllm-router"
NEW_CLIENTS, NEW_ENGINES = f"{OURS}, clients anew", f"{OURS}, engines anew"
"""Clients, or engines, that keep no connection."""
BODY = {"model": "m", "prompt": "word " * 800, "max_tokens": 1}


class Figures(NamedTuple):
    """Of one turn: requests a second, latencies, the router's CPU time a request, failures."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    failed: float


@dataclass(frozen=True)
class ProxyRow:
    """One router, or none, at one number of connections; the median of the turns."""

    router: str
    connections: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    added_p50_ms: float
    """Over a client that asks prefill and decode itself."""
    added_p99_ms: float
    cpu_us: float
    """The router's CPU time for a request, of all its threads: hardly depends on who else works."""
    of_rust: float | None
    """Requests a second beside vllm-router's."""
    failed: float


def proxy(
    connections: Annotated[str, typer.Option(help="How many at once; several with commas.")] = (
        "1,64,512"
    ),
    seconds: Annotated[float, typer.Option(help="How long each is measured.")] = 5,
    turns: Annotated[int, typer.Option(min=1, help="How often; medians are shown.")] = 3,
    processes: Annotated[
        int, typer.Option(min=1, help="Of kvconnect proxy, that share a port (`--reuse-port`).")
    ] = 1,
    anew: Annotated[
        bool, typer.Option(help="Also with clients, and engines, that keep no connection.")
    ] = False,
    out: options.Json = None,
) -> None:
    """Latency that a proxy adds and its requests a second, over engines that do nothing."""
    from rich.console import Console

    counts = [int(count) for count in connections.split(",")]
    console = Console()
    with contextlib.ExitStack() as stack:
        routers = stack.enter_context(_routers(processes, anew))
        measured: dict[tuple[str, int], list[Figures]] = {}
        for turn in range(turns):
            for count in counts:
                for name, servers in routers.items():
                    with console.status(f"turn {turn + 1} of {turns}: {name}, {count}"):
                        figures = _measure(name, servers, count, seconds)
                    measured.setdefault((name, count), []).append(figures)
    rows = rows_of(measured)
    console.print(_table(rows))
    if out is not None:
        save(out, "proxy", rows)


@contextlib.contextmanager
def _routers(processes: int, anew: bool) -> Iterator[dict[str, list[Server]]]:
    """By name, the engines themselves among them; all of a name share a port."""
    with TemporaryDirectory() as logs, Fleet(Path(logs)) as fleet:
        env = dict(os.environ)
        engines = fleet.start("engines", _engine, env)
        fleet.wait_up([engines], 60)
        urls = _urls(engines)
        command = _ours([*urls, "--reuse-port"])
        ours = [fleet.start("ours", command, env)]
        port = _port_of(ours[0])
        for number in range(1, processes):
            log = Path(logs) / f"ours-{number}.log"
            ours.append(Server("ours", command(port), port=port, log=log, env=env))
        fleet.servers += ours[1:]
        started = {OURS: ours}
        if anew:
            closing = fleet.start("engines that close", lambda port: [*_engine(port), "close"], env)
            fleet.wait_up([closing], 60)
            started[NEW_CLIENTS] = ours
            started[NEW_ENGINES] = [fleet.start("anew", _ours(_urls(closing)), env)]
        if importlib.util.find_spec("vllm_router"):
            started[RUST] = [fleet.start("rust", _rust(urls), env)]
        fleet.wait_up([server for servers in started.values() for server in servers], 60)
        yield {FLOOR: [engines]} | started


def _urls(engines: Server) -> list[str]:
    """Two names of one process: a core is left to the router."""
    return [f"--prefill={engines.url}", f"--decode={engines.url.replace(HOST, 'localhost')}"]


def _engine(port: int) -> list[str]:
    return [sys.executable, http_load.__file__, str(port)]


def _ours(urls: list[str]) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-m", "kvconnect.cli", "proxy", *urls, f"--port={port}"]


def _rust(urls: list[str]) -> Callable[[int], list[str]]:
    mode = ["--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"]
    start = [sys.executable, "-P", "-m", "vllm_router.launch_router", *mode, "--host", HOST]
    with socket.create_server((HOST, 0)) as free:
        start += ["--log-level", "warning", "--prometheus-port", str(free.getsockname()[1])]
    return lambda port: [
        *start,
        *(part for url in urls for part in url.split("=", 1)),
        "--port",
        str(port),
    ]


def _port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def _cpu_s(servers: list[Server]) -> float:
    return sum(sum(threads_of(server.pid).values()) for server in servers)


def _measure(name: str, servers: list[Server], connections: int, seconds: float) -> Figures:
    port = _port_of(servers[0])
    asked = [request(port, BODY)]
    if name == FLOOR:
        asked = [
            request(port, BODY | {"kv_transfer_params": params})
            for params in ({"do_remote_decode": True}, PARAMS)
        ]
    load = HttpLoad(port, asked, kept=name != NEW_CLIENTS)
    before = _cpu_s(servers)
    rate = load.run(connections, seconds)
    used_s = _cpu_s(servers) - before
    cuts = statistics.quantiles(load.latencies_s, n=100) if len(load.latencies_s) > 1 else [0] * 99
    return Figures(
        rate, cuts[49] * 1e3, cuts[98] * 1e3, used_s / max(load.answered, 1) * 1e6, load.failed
    )


def rows_of(
    measured: dict[tuple[str, int], list[Figures]],
) -> list[ProxyRow]:
    """Medians over turns, beside the floor and the Rust router at the same connections."""
    middle = {
        key: Figures(*(statistics.median(column) for column in zip(*turns, strict=True)))
        for key, turns in measured.items()
    }
    rows = []
    for (name, count), found in middle.items():
        floor, rust = middle[FLOOR, count], middle.get((RUST, count))
        rows.append(
            ProxyRow(
                name,
                count,
                round(found.rate, 1),
                round(found.p50_ms, 3),
                round(found.p99_ms, 3),
                round(found.p50_ms - floor.p50_ms, 3),
                round(found.p99_ms - floor.p99_ms, 3),
                round(found.cpu_us, 1),
                round(found.rate / rust.rate, 3) if rust and rust.rate else None,
                sum(turn.failed for turn in measured[name, count]),
            )
        )
    return sorted(rows, key=lambda row: row.connections)


def _table(rows: list[ProxyRow]) -> object:
    from rich.table import Table

    table = Table(title="Over engines that do nothing; two legs a request")
    columns = ("", "at once", "per s", "p50 ms", "p99 ms", "added p50", "added p99", "CPU µs")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("of Rust", justify="right")
    table.add_column("failed", justify="right")
    for row in rows:
        table.add_row(
            row.router,
            str(row.connections),
            f"{row.requests_per_s:,.0f}",
            *(f"{x:.2f}" for x in (row.p50_ms, row.p99_ms, row.added_p50_ms, row.added_p99_ms)),
            f"{row.cpu_us:.0f}",
            "" if row.of_rust is None else f"{row.of_rust:.2f}",
            str(row.failed),
        )
    return table
