"""Pairs of real engines that a benchmark compares, one at a time, and where it ran."""

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import typer

from kvconnect.cli.engines import (
    CONNECTORS,
    ROLES,
    START_TIMEOUT_S,
    VllmServe,
    check_installed,
    engine_env,
    transfer_config,
)
from kvconnect.cli.processes import HOST, Fleet, Server
from kvconnect.errors import ConfigError
from kvconnect_bench import marks

IN_TREE = "in-tree NixlConnector"
ALONE = "one engine"
WHERE = ("remote_engine_id", "remote_host", "remote_port")
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class Asked(NamedTuple):
    """Seconds that a prompt took, whose first token came from the decode engine."""

    prefill_s: float
    """Prefill's own time: from its request to its answer. 0 where it was not asked."""
    first_s: float
    """From the first request that was sent, to either engine, to the first token."""

    @property
    def hand_over_s(self) -> float:
        """What the first token took beyond prefill's own time."""
        return self.first_s - self.prefill_s


class MeasuredPair:
    """A prefill and a decode engine with one connector, or a decode engine alone."""

    def __init__(self, name: str, servers: Mapping[str, Server], model: str) -> None:
        """``servers`` by role."""
        self.name = name
        self.servers = servers
        self._body = {"model": model, "temperature": 0, "max_tokens": 1, "ignore_eos": True}
        self._names = itertools.count()
        self._where: dict[str, Any] | None = None

    def pull(self, prompt: Sequence[int]) -> Asked:
        """Ask prefill, and decode once it has answered."""
        prefill_s, params = self._prefilled(prompt)
        return Asked(prefill_s, prefill_s + self._first_token_s(prompt, params))

    def streaming(self, prompt: Sequence[int]) -> Asked:
        """Ask both at once."""
        assert self.streams
        name = f"bench {next(self._names)}"
        params = {"do_remote_prefill": True, "transfer_id": name, **(self._where or {})}
        started = time.perf_counter()

        def prefilled_s() -> float:  # from here: on a busy machine the thread begins later
            self._prefilled(prompt, transfer_id=name)
            return time.perf_counter() - started

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            prefilled = pool.submit(prefilled_s)
            first_s = self._first_token_s(prompt, params)
            return Asked(prefilled.result(), first_s)

    def decoded(self, prompt: Sequence[int]) -> Asked:
        """Ask decode only: of a prompt that it has, the floor of a hand-over."""
        return Asked(0.0, self._first_token_s(prompt, None))

    def gaps_s(self, prompt: Sequence[int], tokens: int) -> list[float]:
        """Seconds between the tokens of an answer of decode's."""
        body = self._body | {"prompt": list(prompt), "stream": True, "max_tokens": tokens}
        with _post(self.servers["decode"].url, body) as answer:
            times = [time.perf_counter() for line in answer if line.startswith(b"data: {")]
        return [after - before for before, after in itertools.pairwise(times)]

    @property
    def streams(self) -> bool:
        """Whether both engines may be asked at once; says prefill, by repeating a transfer's id."""
        if self._where is None:
            _, said = self._prefilled(range(1000, 1010), transfer_id="bench asks")
            self._first_token_s(range(1000, 1010), said)  # else its blocks stay leased
            names = WHERE if "transfer_id" in said else ()
            self._where = {name: said[name] for name in names}
        return bool(self._where)

    def _prefilled(self, prompt: Sequence[int], **more: str) -> tuple[float, dict[str, Any]]:
        body = self._body | {"prompt": list(prompt), "kv_transfer_params": PREFILL | more}
        started = time.perf_counter()
        with _post(self.servers["prefill"].url, body) as answer:
            params: dict[str, Any] = json.load(answer)["kv_transfer_params"]
        return time.perf_counter() - started, params

    def _first_token_s(self, prompt: Sequence[int], params: dict[str, Any] | None) -> float:
        body = self._body | {"prompt": list(prompt)}
        if params is not None:
            body["kv_transfer_params"] = params
        return first_token_s(self.servers["decode"].url, body)


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


def compared(connectors: str, beside: Sequence[str] = (IN_TREE,)) -> tuple[str, ...]:
    """Names of the pairs to compare, ours by connector and others; raises ConfigError."""
    ours = tuple(connectors.split(","))
    if unknown := [name for name in ours if name not in CONNECTORS]:
        raise ConfigError(f"connector {unknown[0]!r} is none of {', '.join(CONNECTORS)}")
    for name in {*ours, *("nixl" for other in beside if other == IN_TREE)}:
        check_installed(name)
    return *ours, *beside


@contextlib.contextmanager
def pair_alone(
    name: str,
    model: Path,
    dtype: str,
    options: Mapping[str, Sequence[str]] | None = None,
    traced: Path | None = None,
) -> Iterator[MeasuredPair]:
    """A pair (see `compared`) that is up; afterwards it is gone, and the next has the machine.

    ``options``: more of ``vllm serve``, by role; one engine alone has prefill's.
    ``traced``: where its engines write their `marks`.
    The engines' logs are kept only if something failed, and then named.
    """
    logs, failed = Path(tempfile.mkdtemp(prefix="kvconnect-bench-")), False
    try:
        with Fleet(logs) as fleet:
            yield _start_pair(fleet, name, model, ["--dtype", dtype], options or {}, traced)
    except Exception:
        failed = True
        typer.echo(f"{name} failed; its engines' logs: {logs}", err=True)
        raise
    finally:
        if not failed:
            shutil.rmtree(logs, ignore_errors=True)


def _start_pair(
    fleet: Fleet,
    name: str,
    model: Path,
    both: Sequence[str],
    options: Mapping[str, Sequence[str]],
    traced: Path | None,
) -> MeasuredPair:
    def start(role: str) -> Server:
        config = transfer_config("nixl" if name in (IN_TREE, ALONE) else name, role)
        more = marks.environment(traced, role) if traced else {}
        if name == IN_TREE:
            config["kv_connector"] = "NixlConnector"
            more["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port())
        own = options.get("prefill" if name == ALONE else role, ())
        arguments = [*both, "--max-model-len", "8192", *own]
        engine = VllmServe(model, None if name == ALONE else config, arguments)
        return fleet.start(f"{name} {role}", engine.command, engine_env(**more))

    servers = {role: start(role) for role in ROLES if name != ALONE or role == "decode"}
    fleet.wait_up(list(servers.values()), START_TIMEOUT_S)
    return MeasuredPair(name, servers, VllmServe(model).model_name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
