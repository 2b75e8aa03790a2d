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
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
from kvconnect_bench.cpu import Threads, only_on, threads_of, used

IN_TREE = "in-tree NixlConnector"
IN_TREE_PUSH = "in-tree NixlPushConnector"
IN_TREES = (IN_TREE, IN_TREE_PUSH)
ALONE = "one engine"
WHERE = ("remote_engine_id", "remote_host", "remote_port")
SHAPE = ("tp_size", "pp_size")  # of prefill, which in-tree's push has a router tell as well
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class Asked(NamedTuple):
    """Seconds that a prompt took, whose first token came from the decode engine."""

    prefill_s: float
    """Prefill's own time: from its request to its answer. 0 where it was not asked."""
    first_s: float
    """From the first request that was sent, to either engine, to the first token."""
    cpu_s: Mapping[str, Mapping[str, float]] = MappingProxyType({})
    """CPU seconds that the engines used meanwhile: by role, and by name of process and thread."""

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
        name = f"bench-{next(self._names)}"
        meet = {"remote_request_id": name} if self.pushes else {"transfer_id": name}
        params = {"do_remote_prefill": True, **meet, **(self._where or {})}
        started = time.perf_counter()

        def prefilled_s() -> float:  # from here: on a busy machine the thread begins later
            self._prefilled(prompt, name)
            return time.perf_counter() - started

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            prefilled = pool.submit(prefilled_s)
            first_s = self._first_token_s(prompt, params, name)
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
    def pushes(self) -> bool:
        """Whether its engines must be asked at once, and meet under their request's id."""
        return self.name == IN_TREE_PUSH

    @property
    def streams(self) -> bool:
        """Whether both engines may be asked at once; says prefill, by repeating a transfer's id."""
        if self._where is None:
            name = "bench-asks"
            _, said = self._prefilled(range(1000, 1010), name)
            self._first_token_s(range(1000, 1010), said, name)  # else its blocks stay leased
            names = WHERE if "transfer_id" in said else (*WHERE, *SHAPE) if self.pushes else ()
            self._where = {name: said[name] for name in names}
        return bool(self._where)

    def threads(self) -> dict[str, Threads]:
        """CPU seconds so far of its engines' threads, by role."""
        return {role: threads_of(server.pid) for role, server in self.servers.items()}

    def used_since(self, before: Mapping[str, Threads], asks: int) -> dict[str, dict[str, float]]:
        """As `Asked.cpu_s`, an ask, since `threads` said ``before``."""
        return {
            role: {name: s / asks for name, s in used(before[role], now).items() if s}
            for role, now in self.threads().items()
        }

    def _prefilled(self, prompt: Sequence[int], name: str = "") -> tuple[float, dict[str, Any]]:
        more = {"transfer_id": name} if name and not self.pushes else {}
        body = self._body | {"prompt": list(prompt), "kv_transfer_params": PREFILL | more}
        started = time.perf_counter()
        with _post(self.servers["prefill"].url, body, name) as answer:
            params: dict[str, Any] = json.load(answer)["kv_transfer_params"]
        return time.perf_counter() - started, params

    def _first_token_s(
        self, prompt: Sequence[int], params: dict[str, Any] | None, name: str = ""
    ) -> float:
        body = self._body | {"prompt": list(prompt)}
        if params is not None:
            body["kv_transfer_params"] = params
        return first_token_s(self.servers["decode"].url, body, name)


def first_token_s(url: str, body: Mapping[str, Any], name: str = "") -> float:
    """Seconds from the request ``body``, which asks for two tokens here, to its first one.

    ``name``: the request's id; empty: the engine chooses it.
    """
    started = time.perf_counter()
    with _post(url, {**body, "stream": True, "max_tokens": 2}, name) as answer:
        first = answer.readline()
        seconds = time.perf_counter() - started
        answer.read()
    if not first.startswith(b"data: {") or b'"error"' in first:
        raise RuntimeError(f"{url}: no token but {first!r}")
    return seconds


@contextlib.contextmanager
def _post(url: str, body: Mapping[str, Any], name: str = "") -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)
    headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
    try:
        text = json.dumps(body)
        connection.request("POST", "/v1/completions", text, headers)
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
    for name in {*ours, *("nixl" for other in beside if other in IN_TREES)}:
        check_installed(name)
    return *ours, *beside


@contextlib.contextmanager
def pair_alone(
    name: str,
    model: Path,
    dtype: str,
    options: Mapping[str, Sequence[str]] | None = None,
    traced: Path | None = None,
    cores: Mapping[str, Collection[int]] | None = None,
) -> Iterator[MeasuredPair]:
    """A pair (see `compared`) that is up; afterwards it is gone, and the next has the machine.

    ``options``: more of ``vllm serve``, by role; one engine alone has prefill's.
    ``traced``: where its engines write their `marks`.
    ``cores``: on which each engine may run, by role; this thread then runs on decode's.
    The engines' logs are kept only if something failed, and then named.
    """
    logs, failed = Path(tempfile.mkdtemp(prefix="kvconnect-bench-")), False
    cores = cores or {}
    try:
        with only_on(cores.get("decode", ())), Fleet(logs) as fleet:
            yield _start_pair(fleet, name, model, ["--dtype", dtype], options or {}, traced, cores)
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
    cores: Mapping[str, Collection[int]],
) -> MeasuredPair:
    def start(role: str) -> Server:
        config = transfer_config("nixl" if name in (*IN_TREES, ALONE) else name, role)
        more = marks.environment(traced, role) if traced else {}
        if name in IN_TREES:
            config["kv_connector"] = name.removeprefix("in-tree ")
            more["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port())
        own = options.get("prefill" if name == ALONE else role, ())
        arguments = [*both, "--max-model-len", "8192", *own]
        engine = VllmServe(model, None if name == ALONE else config, arguments)
        with only_on(cores.get(role, ())):
            return fleet.start(f"{name} {role}", engine.command, engine_env(**more))

    servers = {role: start(role) for role in ROLES if name != ALONE or role == "decode"}
    fleet.wait_up(list(servers.values()), START_TIMEOUT_S)
    return MeasuredPair(name, servers, VllmServe(model).model_name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
