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
from kvconnect_bench.counters import EXTERNAL, counted
from kvconnect_bench.cpu import Threads, only_on, spinning, threads_of, used, yield_cores
from kvconnect_bench.lmcache import check_unpacked, lmcache_config, start_lmcache
from kvconnect_bench.others import ALONE, BESIDE, IN_TREE, OTHERS, Other
from kvconnect_bench.plugins import plugged

WHERE = ("remote_engine_id", "remote_host", "remote_port")
SHAPE = ("tp_size", "pp_size")  # of prefill, which in-tree's push has a router tell as well
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
SETTLED_S = 2.0  # after which vLLM's own workers wait without spinning
LOOK_S = 1.0
NIXL = "Nixl"  # how in-tree's connectors that need it begin
NO_PROGRESS = "kvconnect_bench.no_progress:install"


class Asked(NamedTuple):
    """Seconds that a prompt took, whose first token came from the decode engine."""

    prefill_s: float
    """Prefill's own time: from its request to its answer. 0 where it was not asked."""
    first_s: float
    """From the first request that was sent, to either engine, to the first token."""
    gaps_s: Sequence[float] = ()
    """Between the tokens of decode's answer."""

    @property
    def hand_over_s(self) -> float:
        """What the first token took beyond prefill's own time."""
        return self.first_s - self.prefill_s


class MeasuredPair:
    """A prefill and a decode engine with one connector, or a decode engine alone."""

    def __init__(
        self, name: str, servers: Mapping[str, Server], model: str, answered: int = 2
    ) -> None:
        """``servers`` by role; ``answered``: tokens of each answer of decode's."""
        self.name = name
        self.servers = servers
        self._other, self._answered = OTHERS.get(name), answered
        self._body = {"model": model, "temperature": 0, "max_tokens": 1, "ignore_eos": True}
        self._names = itertools.count()
        self._where: dict[str, Any] | None = None

    def pull(self, prompt: Sequence[int]) -> Asked:
        """Ask prefill, and decode once it has answered."""
        prefill_s, params = self._prefilled(prompt)
        times_s = self._answer_s(prompt, params)
        return Asked(prefill_s, prefill_s + times_s[0], _gaps(*times_s))

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
            times_s = self._answer_s(prompt, params, name)
            return Asked(prefilled.result(), times_s[0], _gaps(*times_s))

    def decoded(self, prompt: Sequence[int]) -> Asked:
        """Ask decode only: of a prompt that it has, the floor of a hand-over."""
        times_s = self._answer_s(prompt, None)
        return Asked(0.0, times_s[0], _gaps(*times_s))

    def tokens_at(self, prompt: Sequence[int], tokens: int) -> Iterator[float]:
        """When each token of an answer of decode's came; who stops asking hangs up."""
        return _tokens_at(self.servers["decode"].url, self._body | {"prompt": list(prompt)}, tokens)

    @property
    def pushes(self) -> bool:
        """Whether its engines must be asked at once, and meet under their request's id."""
        return self._other is not None and self._other.pushes

    @property
    def stores(self) -> bool:
        """Whether prefill stores at a server, from which decode loads."""
        return self._other is not None and self._other.stores

    @property
    def streams(self) -> bool:
        """Whether both engines may be asked at once; says prefill, by repeating a transfer's id."""
        if self._where is None:
            name = "bench-asks"
            _, said = self._prefilled(range(1000, 1010), name)
            self._answer_s(range(1000, 1010), said, name)  # else its blocks stay leased
            names = WHERE if "transfer_id" in said else (*WHERE, *SHAPE) if self.pushes else ()
            self._where = {name: said[name] for name in names}
        return bool(self._where)

    def threads(self) -> dict[str, Threads]:
        """CPU seconds so far of its engines' threads, by role."""
        return {role: threads_of(server.pid) for role, server in self.servers.items()}

    def used_since(self, before: Mapping[str, Threads], asks: int) -> dict[str, dict[str, float]]:
        """CPU seconds an ask since `threads` said ``before``, by role, process and thread."""
        return {
            role: {name: s / asks for name, s in used(before[role], now).items() if s}
            for role, now in self.threads().items()
        }

    def handed_over(self) -> float:
        """Tokens of prompts so far that decode took from elsewhere, by its own counter."""
        return counted(self.servers["decode"], EXTERNAL)

    def _prefilled(self, prompt: Sequence[int], name: str = "") -> tuple[float, dict[str, Any]]:
        more = {"transfer_id": name} if name and not self.pushes else {}
        body = self._body | {"prompt": list(prompt)}
        if not self.stores:
            body["kv_transfer_params"] = PREFILL | more
        started = time.perf_counter()
        with _post(self.servers["prefill"].url, body, name) as answer:
            said = json.load(answer)
        params: dict[str, Any] = {} if self.stores else said["kv_transfer_params"]
        return time.perf_counter() - started, params

    def _answer_s(
        self, prompt: Sequence[int], params: dict[str, Any] | None, name: str = ""
    ) -> list[float]:
        body = self._body | {"prompt": list(prompt)}
        if params:
            body["kv_transfer_params"] = params
        return token_times_s(self.servers["decode"].url, body, self._answered, name)


def _gaps(*times_s: float) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times_s)]


def first_token_s(url: str, body: Mapping[str, Any]) -> float:
    """Seconds from the request ``body``, which asks for two tokens here, to its first one."""
    return token_times_s(url, body, 2)[0]


def token_times_s(url: str, body: Mapping[str, Any], tokens: int, name: str = "") -> list[float]:
    """Seconds from the request ``body`` to each of the tokens of its answer.

    ``name``: the request's id; empty: the engine chooses it. Raises RuntimeError without a token.
    """
    started = time.perf_counter()
    return [at_s - started for at_s in _tokens_at(url, body, tokens, name)]


def _tokens_at(url: str, body: Mapping[str, Any], tokens: int, name: str = "") -> Iterator[float]:
    said, some = b"", False
    with _post(url, {**body, "stream": True, "max_tokens": tokens}, name) as answer:
        for line in answer:
            said = said or line
            if line.startswith(b"data: {"):
                some = True
                yield time.perf_counter()
    if not some or b'"error"' in said:
        raise RuntimeError(f"{url}: no token but {said!r}")


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


def beside_pairs(names: str) -> list[str]:
    """What rows call those of BESIDE, given with commas; raises ConfigError."""
    chosen = [name for name in names.split(",") if name]
    if unknown := [name for name in chosen if name not in BESIDE]:
        raise ConfigError(f"--beside {unknown[0]!r} is none of {', '.join(BESIDE)}")
    return [BESIDE[name] for name in chosen]


def compared(connectors: str, beside: Sequence[str] = (IN_TREE,)) -> tuple[str, ...]:
    """Names of the pairs to compare, ours by connector and others; raises ConfigError."""
    ours = tuple(connectors.split(","))
    if unknown := [name for name in ours if name not in CONNECTORS]:
        raise ConfigError(f"connector {unknown[0]!r} is none of {', '.join(CONNECTORS)}")
    theirs = [OTHERS[name] for name in beside]
    for name in {*ours, *("nixl" for other in theirs if other.kv_connector.startswith(NIXL))}:
        check_installed(name)
    if any(other.stores for other in theirs):
        check_unpacked()
    return *ours, *beside


@contextlib.contextmanager
def pair_alone(
    name: str,
    model: Path,
    dtype: str,
    options: Mapping[str, Sequence[str]] | None = None,
    traced: Path | None = None,
    cores: Mapping[str, Collection[int]] | None = None,
    answered: int = 2,
) -> Iterator[MeasuredPair]:
    """A pair (see `compared`) that is up; afterwards it is gone, and the next has the machine.

    ``options``: more of ``vllm serve``, by role; one engine alone has prefill's.
    ``traced``: where its engines write their `marks`.
    ``cores``: on which each engine may run, by role, with a thread for each that computes; this
    thread then runs on decode's. One engine alone has them all.
    ``answered``: tokens of each answer.
    The engines' logs are kept only if something failed, and then named.
    """
    logs, failed = Path(tempfile.mkdtemp(prefix="kvconnect-bench-")), False
    cores = cores or {}
    try:
        with only_on(cores.get("decode", ())), Fleet(logs) as fleet:
            servers = _start_pair(fleet, name, model, dtype, options or {}, traced, cores)
            pair = MeasuredPair(name, servers, VllmServe(model).model_name, answered)
            if name in OTHERS and OTHERS[name].yields:
                _let_yield(pair)
            yield pair
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
    dtype: str,
    options: Mapping[str, Sequence[str]],
    traced: Path | None,
    cores: Mapping[str, Collection[int]],
) -> dict[str, Server]:
    other = OTHERS.get(name)
    store = start_lmcache(fleet) if other and other.stores else None
    every = {}
    if other and other.no_progress:
        every = plugged(fleet.logs, "kvconnect-bench-no-progress", NO_PROGRESS)

    def start(role: str) -> Server:
        more = every | (marks.environment(traced, role) if traced else {})
        if other and other.kv_connector.startswith(NIXL):
            more["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(_free_port())  # they would share one
        config = _config(other, role, store) if other else transfer_config(name, role)
        own = options.get("prefill" if name == ALONE else role, ())
        arguments = ["--dtype", dtype, "--max-model-len", "8192", *own]
        engine = VllmServe(model, config, arguments)
        where = set().union(*cores.values()) if name == ALONE else set(cores.get(role, ()))
        if where:
            more["OMP_NUM_THREADS"] = str(len(where))
        with only_on(where):
            return fleet.start(f"{name} {role}", engine.command, engine_env(**more))

    servers = {role: start(role) for role in ROLES if name != ALONE or role == "decode"}
    fleet.wait_up(list(servers.values()), START_TIMEOUT_S)
    return servers


def _config(other: Other, role: str, store: int | None) -> dict[str, Any] | None:
    """``--kv-transfer-config`` of an engine; ``store``: the port of LMCache's server."""
    if store is not None:
        return lmcache_config(store) | {"kv_role": ROLES[role]}
    if not other.kv_connector:
        return None
    config: dict[str, Any] = {"kv_connector": other.kv_connector, "kv_role": ROLES[role]}
    # nor the pool of threads that in-tree asks NIXL for unless it is told otherwise
    return config | ({"kv_connector_extra_config": {"num_threads": 0}} if other.no_progress else {})


def _let_yield(pair: MeasuredPair) -> None:
    """Raises RuntimeError if no thread spins: then the pair is no other than one that does not."""
    time.sleep(SETTLED_S)
    for role, server in pair.servers.items():
        if not (threads := spinning(server.pid, LOOK_S)):
            raise RuntimeError(
                f"{pair.name}: no thread of {role} spins while it is idle; measure {IN_TREE} alone"
            )
        yield_cores(threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
