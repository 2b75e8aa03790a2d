"""Real engines behind `kvconnect proxy`, and what the scripts ask of both."""

import json
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from pair import Client, eventually

from kvconnect.cli.engines import START_TIMEOUT_S, VllmServe, engine_env, proxy_command
from kvconnect.cli.processes import Fleet, Server

KEY = "operator"
SERVED = "vllm:request_success_total"


class Engines:
    """Engines of one model by name, and proxies before some of them."""

    def __init__(self, fleet: Fleet, model: Any, env: Mapping[str, str]) -> None:
        self.fleet = fleet
        self.model = model
        self.env = engine_env(**env)
        self.clients: dict[str, Client] = {}

    def start(self, configs: Mapping[str, Mapping[str, Any]], options: Sequence[str]) -> None:
        """One for each of these ``--kv-transfer-config``; returns when all are up."""
        servers = {}
        for name, config in configs.items():
            command = VllmServe(self.model, config, options).command
            servers[name] = self.fleet.start(name, command, self.env)
        self.fleet.wait_up([*servers.values()], START_TIMEOUT_S)
        for name, server in servers.items():
            self.clients[name] = Client(server, self.model.name)

    def __getitem__(self, name: str) -> Client:
        return self.clients[name]

    def proxy(self, prefill: Sequence[str], decode: Sequence[str], *options: str) -> "Proxy":
        """Another proxy before engines of these names."""
        urls = ([self[name].server.url for name in names] for names in (prefill, decode))
        command = proxy_command(*urls, [f"--admin-key={KEY}", *options])
        server = self.fleet.start(f"proxy {len(self.fleet.servers)}", command, self.env)
        self.fleet.wait_up([server], START_TIMEOUT_S)
        return Proxy(server, self.model.name)


class Proxy(Client):
    """A proxy as its clients and its operator see it."""

    def __init__(self, server: Server, model: str) -> None:
        super().__init__(server, model)
        self._operator = {"Authorization": f"Bearer {KEY}"}

    def order(self, role: str, engine: Client, drain: bool = False) -> None:
        """Add an engine, or drain it."""
        body = {"role": role, "url": engine.server.url, "drain": drain}
        status, answer = self.request("POST", "/admin/engines", body, self._operator)
        assert status == 200, answer

    def remove(self, role: str, engine: Client) -> None:
        query = f"role={role}&url={quote(engine.server.url, safe='')}"
        status, answer = self.request("DELETE", f"/admin/engines?{query}", None, self._operator)
        assert status == 200, answer

    def state(self, role: str, engine: Client) -> dict[str, Any] | None:
        """What the proxy says of an engine; None if it has no such engine."""
        _, roles = self.request("GET", "/admin/engines", None, self._operator)
        return next((one for one in roles[role] if one["url"] == engine.server.url), None)

    def counters(self) -> dict[str, int]:
        return self.request("GET", "/health")[1]["counters"]

    def looks(self) -> dict[str, Any]:
        """What `/ui` shows first."""
        asked = urllib.request.Request(f"{self.server.url}/ui/events", headers=self._operator)
        with urllib.request.urlopen(asked, timeout=10) as events:
            return json.loads(events.readline().removeprefix(b"data: "))


class Load:
    """Clients who ask without pause, from `start` to `stop`."""

    def __init__(self, proxy: Proxy, prompts: Sequence[Any], max_tokens: int, workers: int) -> None:
        self.proxy, self.prompts, self.max_tokens = proxy, prompts, max_tokens
        self.answers: list[tuple[int, int, Any]] = []
        """Which prompt, the status, and the answer."""
        self._workers, self._running = workers, threading.Event()
        self._pool = ThreadPoolExecutor(workers)
        self._asking: list[Any] = []

    def __enter__(self) -> "Load":
        self._running.set()
        self._asking = [self._pool.submit(self._ask, n) for n in range(self._workers)]
        return self

    def __exit__(self, *_: object) -> None:
        self._running.clear()
        self._pool.shutdown()
        for asking in self._asking:
            asking.result()

    def _ask(self, number: int) -> None:
        while self._running.is_set():
            at = number % len(self.prompts)
            number += self._workers
            status, answer = self.proxy.post(self.prompts[at], max_tokens=self.max_tokens)
            self.answers.append((at, status, answer))

    def until_served(self, engine: Client, requests: int) -> None:
        """Until an engine has ended so many more."""
        until = engine.metric(SERVED) + requests
        eventually(lambda: engine.metric(SERVED) >= until, 60, "the engine serves")


def timed(work: Any, *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Seconds it took, and what it returned."""
    began = time.monotonic()
    returned = work(*arguments, **options)
    return time.monotonic() - began, returned
