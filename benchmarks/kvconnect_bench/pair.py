"""Pairs of real engines that a benchmark compares, one at a time, and where it ran."""

import contextlib
import http.client
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from kvconnect.cli.engines import (
    CONNECTORS,
    START_TIMEOUT_S,
    VllmServe,
    check_installed,
    engine_env,
    transfer_config,
)
from kvconnect.cli.processes import HOST, Fleet, Server
from kvconnect.errors import ConfigError

IN_TREE = "in-tree NixlConnector"
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class MeasuredPair:
    """A prefill and a decode engine with one connector."""

    def __init__(self, name: str, prefill: Server, decode: Server, model: str) -> None:
        self.name = name
        self.servers = {"prefill": prefill, "decode": decode}
        self._model = model

    def first_token_s(self, prompt: Sequence[int]) -> float:
        """Prefill ``prompt``, hand it over, and time decode's first token from its request on."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "temperature": 0,
            "max_tokens": 1,
            "ignore_eos": True,
        }
        with _post(self.servers["prefill"].url, body | {"kv_transfer_params": PREFILL}) as answer:
            params = json.load(answer)["kv_transfer_params"]
        return first_token_s(self.servers["decode"].url, body | {"kv_transfer_params": params})


def first_token_s(url: str, body: Mapping[str, Any]) -> float:
    """Seconds from the request ``body``, which asks for two tokens here, to its first one."""
    started = time.perf_counter()
    with _post(url, {**body, "stream": True, "max_tokens": 2}) as answer:
        first = answer.readline()
        seconds = time.perf_counter() - started
        answer.read()
    if not first.startswith(b"data: {") or b'"error"' in first:
        raise RuntimeError(f"{url}: no token but {first!r}")
    return seconds


@contextlib.contextmanager
def _post(url: str, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
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


def compared(connectors: str) -> tuple[str, ...]:
    """Names of the pairs to compare, ours by connector and in-tree's; raises ConfigError."""
    ours = tuple(connectors.split(","))
    if unknown := [name for name in ours if name not in CONNECTORS]:
        raise ConfigError(f"connector {unknown[0]!r} is none of {', '.join(CONNECTORS)}")
    for name in {*ours, "nixl"}:
        check_installed(name)
    return *ours, IN_TREE


@contextlib.contextmanager
def pair_alone(name: str, model: Path, dtype: str) -> Iterator[MeasuredPair]:
    """A pair (see `compared`) that is up; afterwards it is gone, and the next has the machine.

    The engines' logs are kept only if something failed, and then named.
    """
    logs, failed = Path(tempfile.mkdtemp(prefix="kvconnect-bench-")), False
    try:
        with Fleet(logs) as fleet:
            yield _start_pair(fleet, name, model, dtype)
    except Exception:
        failed = True
        typer.echo(f"{name} failed; its engines' logs: {logs}", err=True)
        raise
    finally:
        if not failed:
            shutil.rmtree(logs, ignore_errors=True)


def _start_pair(fleet: Fleet, name: str, model: Path, dtype: str) -> MeasuredPair:
    def start(role: str) -> Server:
        config = transfer_config("nixl" if name == IN_TREE else name, role)
        more = {}
        if name == IN_TREE:
            config["kv_connector"] = "NixlConnector"
            more["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port())
        engine = VllmServe(model, config, ["--dtype", dtype, "--max-model-len", "8192"])
        return fleet.start(f"{name} {role}", engine.command, engine_env(**more))

    pair = MeasuredPair(name, start("prefill"), start("decode"), VllmServe(model).model_name)
    fleet.wait_up(list(pair.servers.values()), START_TIMEOUT_S)
    return pair


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def save(out: Path, dtype: str, rows: Sequence[Any]) -> None:
    """The rows, which are dataclasses, and where they were measured, as JSON."""
    result = {"machine": _machine(dtype), "rows": [asdict(row) for row in rows]}
    out.write_text(json.dumps(result, indent=2) + "\n")


def _machine(dtype: str) -> dict[str, Any]:
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
