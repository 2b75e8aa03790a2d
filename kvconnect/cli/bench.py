"""``kvconnect bench``: our connectors beside a peer, in the same run, as ratios.

``bench pd``: time to first token at the decode engine, ours beside the in-tree NixlConnector.
Both pairs of engines stay up for the whole run and take turns prompt by prompt; the pair whose
turn it is not is stopped (SIGSTOP), so that neither pays for the other's idle threads.
"""

import contextlib
import http.client
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from kvconnect.cli.engines import (
    CONNECTORS,
    START_TIMEOUT_S,
    Engine,
    check_installed,
    check_model,
    engine_env,
    transfer_config,
)
from kvconnect.cli.processes import Fleet, Server

bench = typer.Typer(help="Measure connectors beside a peer in the same run.", no_args_is_help=True)

IN_TREE = "in-tree NixlConnector"
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
VOCABULARY = (1000, 40_000)  # token ids that are plain words in every tokenizer we ship


@dataclass(frozen=True)
class Row:
    """Time to first token at the decode engine, for one connector and prompt length."""

    connector: str
    prompt_tokens: int
    prompts: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_mean_ms: float
    ratio_p50: float
    """To the in-tree connector's p50 at this length; below 1 is faster."""
    ratio_mean: float


class Pair:
    """A prefill and a decode engine with one connector."""

    def __init__(self, name: str, prefill: Server, decode: Server, model: str) -> None:
        self.name = name
        self._servers = (prefill, decode)
        self._prefill, self._decode, self._model = prefill.url, decode.url, model

    def freeze(self) -> None:
        """Take no CPU time until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for server in self._servers:
            os.killpg(server.pid, number)

    def first_token_s(self, prompt: Sequence[int]) -> float:
        """Prefill ``prompt``, hand it over, and time decode's first token from its request on."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "temperature": 0,
            "max_tokens": 1,
            "ignore_eos": True,
        }
        with _post(self._prefill, body | {"kv_transfer_params": PREFILL}) as answer:
            params = json.load(answer)["kv_transfer_params"]
        wanted = body | {"kv_transfer_params": params, "stream": True, "max_tokens": 2}
        started = time.perf_counter()
        with _post(self._decode, wanted) as answer:
            first = answer.readline()
            seconds = time.perf_counter() - started
            answer.read()
        if not first.startswith(b"data: {") or b'"error"' in first:
            raise RuntimeError(f"{self.name}: no token but {first!r}")
        return seconds


@contextlib.contextmanager
def _post(url: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    try:
        text = json.dumps(body)
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}: {answer.read()[:300]!r}")
        yield answer
    finally:
        connection.close()


@bench.command()
def pd(
    model: Annotated[Path | None, typer.Option(envvar="KVCONNECT_MODEL")] = None,
    connector: Annotated[str, typer.Option(help=f"One of {', '.join(CONNECTORS)}.")] = "nixl",
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "230,970,1900,3800",
    prompts: Annotated[int, typer.Option(help="Prompts per length and connector.")] = 20,
    dtype: Annotated[str, typer.Option(help="As vllm serve's.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Time to first token at decode, beside the in-tree NixlConnector."""
    from rich.console import Console

    check_installed(connector)
    path = check_model(model)
    console = Console()
    ours = CONNECTORS[connector].kv_connector
    with tempfile.TemporaryDirectory() as logs, Fleet(Path(logs)) as fleet:
        pairs = []
        for name in (ours, IN_TREE):
            with console.status(f"starting {name}"):
                pairs.append(_start(fleet, name, connector, path, dtype))
            pairs[-1].freeze()
        try:
            times = _measure(pairs, [int(n) for n in lengths.split(",")], prompts, console)
        finally:
            for pair in pairs:
                pair.thaw()
    rows = _rows(times)
    console.print(_table(rows))
    if out is not None:
        result = {"machine": _machine(dtype), "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(result, indent=2) + "\n")


def _start(fleet: Fleet, name: str, connector: str, model: Path, dtype: str) -> Pair:
    servers = []
    for number, role in enumerate(("prefill", "decode")):
        config = transfer_config(connector, role)
        more = {}
        if name == IN_TREE:
            config["kv_connector"] = "NixlConnector"
            more["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port() + number)
        engine = Engine(model, config, ["--dtype", dtype, "--max-model-len", "8192"])
        servers.append(fleet.start(f"{name} {role}", engine.command, engine_env(**more)))
    fleet.wait_up(servers, START_TIMEOUT_S)
    return Pair(name, *servers, engine.model_name)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _measure(
    pairs: Sequence[Pair], lengths: Sequence[int], prompts: int, console: Any
) -> dict[int, dict[str, list[float]]]:
    seed = random.Random(0)
    times: dict[int, dict[str, list[float]]] = {}
    for length in lengths:
        times[length] = {pair.name: [] for pair in pairs}
        with console.status(f"{length} tokens"):
            for turn in range(prompts + 1):  # the first, which connects and warms up, is left out
                order = pairs if turn % 2 else pairs[::-1]
                for pair in order:
                    prompt = [seed.randrange(*VOCABULARY) for _ in range(length)]
                    pair.thaw()
                    seconds = pair.first_token_s(prompt)
                    pair.freeze()
                    if turn:
                        times[length][pair.name].append(seconds)
    return times


def _rows(times: dict[int, dict[str, list[float]]]) -> list[Row]:
    rows = []
    for length, by_name in times.items():
        base = by_name[IN_TREE]
        for name, seconds in by_name.items():
            rows.append(
                Row(
                    connector=name,
                    prompt_tokens=length,
                    prompts=len(seconds),
                    ttft_p50_ms=round(statistics.median(seconds) * 1e3, 2),
                    ttft_p90_ms=round(statistics.quantiles(seconds, n=10)[-1] * 1e3, 2),
                    ttft_mean_ms=round(statistics.mean(seconds) * 1e3, 2),
                    ratio_p50=round(statistics.median(seconds) / statistics.median(base), 3),
                    ratio_mean=round(statistics.mean(seconds) / statistics.mean(base), 3),
                )
            )
    return rows


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    table = Table(title="time to first token at the decode engine")
    for heading in ("connector", "tokens", "n", "p50 ms", "p90 ms", "mean ms", "p50 ÷ in-tree"):
        table.add_column(heading, justify="left" if heading == "connector" else "right")
    for row in rows:
        values = (row.prompt_tokens, row.prompts, row.ttft_p50_ms, row.ttft_p90_ms)
        shown = (*values, row.ttft_mean_ms, row.ratio_p50)
        table.add_row(row.connector, *map(str, shown))
    return table


def _machine(dtype: str) -> dict[str, Any]:
    """Where and with what this was measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    versions = {}
    for name in ("kvconnect", "vllm", "torch", "nixl"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "dtype": dtype,
        "env": {k: os.environ[k] for k in ("UCX_TLS", "OMP_NUM_THREADS") if k in os.environ},
        "date": time.strftime("%Y-%m-%d"),
    }
