"""A real prefill and a real decode engine, and what tests ask of them."""

import concurrent.futures
import http.client
import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kvconnect.cli.engines import (
    START_TIMEOUT_S,
    VllmServe,
    engine_env,
    proxy_command,
    transfer_config,
)
from kvconnect.cli.processes import Fleet, Server

PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
SPOIL_FILE = "KVCONNECT_TEST_SPOIL_FILE"
"""Variable that names a file: what it holds, the prefill engine's `spoiling` does to chunks."""

PREFER_FILE = "KVCONNECT_TEST_PREFER_FILE"
"""The same for what engines of `preferring` prefer: peers, stores, or a child."""


@dataclass(frozen=True)
class Setup:
    """What differs between the pairs of the tests."""

    model: Path
    prefill: Sequence[str] = ()
    decode: Sequence[str] = ()
    both: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    policy: str = "fail"
    connector: str = "nixl"
    """Of `kvconnect.cli.engines.CONNECTORS`."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Overrides of kv_connector and kv_connector_module_path."""
    prefill_names: Mapping[str, str] = field(default_factory=dict)
    """The same, of the prefill engine alone."""
    prefill_model: Path | None = None
    """Of the prefill engine, where it is another or elsewhere; of one name."""
    prefill_extra: Mapping[str, Any] = field(default_factory=dict)
    """More of ``extra``, of the prefill engine alone."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More of the environment of both engines."""

    def start(self, fleet: Fleet) -> "Pair":
        return Pair(fleet, self)

    def transfer(self, role: str) -> dict[str, Any]:
        """``--kv-transfer-config`` of the engine of a role."""
        config = transfer_config(self.connector, role) | dict(self.names)
        extra = {**config.get("kv_connector_extra_config", {}), **self.extra}
        if role == "prefill":
            config |= self.prefill_names
            extra |= self.prefill_extra
        config["kv_connector_extra_config"] = extra
        config["kv_load_failure_policy"] = self.policy
        return config


class Client:
    """One engine, as an HTTP client sees it."""

    def __init__(self, server: Server, model: str) -> None:
        self.server = server
        self.netloc = urlsplit(server.url).netloc
        self.model = model

    def post(
        self, prompt: Any, headers: Mapping[str, str] | None = None, **options: Any
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer of a greedy completion."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return self.request("POST", "/v1/completions", body | options, headers)

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.netloc, timeout=300)
        try:
            text = None if body is None else json.dumps(body)
            sent = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, text, sent)
            answer = connection.getresponse()
            raw = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(raw) if raw[:1] in b"{[" else raw.decode()

    def tokens(self, prompt: Any, max_tokens: int = 12, **options: Any) -> list[int]:
        """Token ids of the answer."""
        status, answer = self.post(prompt, max_tokens=max_tokens, **options)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        _, text = self.request("GET", "/metrics")
        total = 0.0
        for line in text.splitlines():
            named = re.match(rf"{re.escape(name)}(\{{|\s)", line)
            if named and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


class Pair:
    """Prefill and decode engine of one Setup."""

    def __init__(self, fleet: Fleet, setup: Setup) -> None:
        self.fleet = fleet
        self.setup = setup
        servers = [self.start("prefill"), self.start("decode")]
        fleet.wait_up(servers, START_TIMEOUT_S)
        self.prefill, self.decode = (Client(s, setup.model.name) for s in servers)

    def start(self, role: str, model: Path | None = None) -> Server:
        """Another engine of a role, of another ``model`` than the setup's; not waited for."""
        setup = self.setup
        if model is None:
            model = (setup.prefill_model or setup.model) if role == "prefill" else setup.model
        options = [*setup.both, *(setup.prefill if role == "prefill" else setup.decode)]
        name = f"{role} {len(self.fleet.servers)}"
        command = VllmServe(model, setup.transfer(role), options).command
        return self.fleet.start(name, command, engine_env(**setup.env))

    def prefilled(
        self, prompt: Any, prefill: Client | None = None, **options: Any
    ) -> dict[str, Any]:
        """Params that hand the prompt over."""
        params = {"kv_transfer_params": PREFILL}
        status, answer = (prefill or self.prefill).post(prompt, max_tokens=1, **params, **options)
        assert status == 200, answer
        return answer["kv_transfer_params"]

    def tokens(self, prompt: Any, max_tokens: int = 12) -> list[int]:
        """Prefill here, decode there."""
        params = self.prefilled(prompt)
        return self.decode.tokens(prompt, max_tokens, kv_transfer_params=params)

    def spoil(self, kind: str) -> None:
        """Have chunks spoiled on their way from prefill; "" ends it."""
        Path(self.setup.env[SPOIL_FILE]).write_text(kind)

    def computed_at_decode(self) -> float:
        """Prompt tokens that the decode engine computed itself, since it was started.

        vLLM counts the last token of a full hit, which is computed again, as external.
        """
        return self.decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute")

    def transferred(self) -> float:
        """Bytes that the decode engine read."""
        return self.decode.metric("vllm:nixl_bytes_transferred_sum")


@contextmanager
def proxied(pair: Pair, *options: str) -> Iterator[Client]:
    """A client of our own proxy, before both engines."""
    engines = [pair.prefill.server.url], [pair.decode.server.url]
    server = pair.fleet.start("proxy", proxy_command(*engines, options), engine_env())
    try:
        pair.fleet.wait_up([server], 60)
        yield Client(server, pair.prefill.model)
    finally:
        server.kill()
        pair.fleet.servers.remove(server)


IPV6 = "::1"


def has_ipv6() -> bool:
    """Whether this host has an IPv6 loopback address."""
    try:
        with socket.create_server((IPV6, 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def words(length: int, seed: int) -> list[int]:
    """A prompt of ``length`` token ids, another for every seed."""
    chosen = random.Random(seed)
    return [chosen.randrange(1000, 40_000) for _ in range(length)]


def in_parallel(work: Callable[[Any], Any], items: Sequence[Any], workers: int = 4) -> list[Any]:
    """``work`` of every item, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, items))


def eventually(holds: Callable[[], bool], within_s: float, what: str) -> None:
    """Returns once ``holds``; fails after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.2)
