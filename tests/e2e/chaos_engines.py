"""Two prefill and two decode engines behind a proxy, killed -9 at random moments under load.

    python tests/e2e/chaos_engines.py ucx --times 20

Clients ask without pause. What they are answered must be what an engine that computes everything
itself answers; a request may fail while engines are gone. A killed engine is restarted at once, at
its old address. Prints one line of JSON; exits with 1 if anything was wrong. Without vLLM, and in
the test suite: tests/contract/chaos_movers.py.
"""

import argparse
import contextlib
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from conftest import model
from nursery import Nursery, kill
from pair import Client, words

from kvconnect.cli.engines import CONNECTORS, VllmServe, engine_env, proxy_command, transfer_config
from kvconnect.cli.processes import HOST, Fleet

CLIENTS, PROMPTS, ANSWER = 4, 16, 8  # ANSWER: tokens
LOAD_TIMEOUT_S, LEASE_S = 8, 10
PATIENCE_S = 20.0  # beyond the load timeout: computing again, on two busy cores
START_S, RECOVER_S = 90.0, 60.0
BETWEEN = 4  # right answers between two kills
EXTRA = {
    "load_timeout": LOAD_TIMEOUT_S,
    "handshake_timeout": 4,
    "kv_lease_duration": LEASE_S,
    "kv_lease_max_duration": 60,
}
OPTIONS = ["--max-model-len", "2048", "--no-enable-prefix-caching", "--num-gpu-blocks-override=64"]
HELD, RUNNING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running"


@dataclass
class Report:
    """What was seen, over all kills."""

    connector: str
    kills: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    answers: int = 0
    transferred_tokens: float = 0
    """Of prompts, as the decode engines that lived to tell counted them."""
    failed_transfers: float = 0
    """Likewise; their requests were computed again."""
    errors: int = 0
    """Requests that got none: their engine was killed, or no decode engine was left."""
    wrong: int = 0
    longest_s: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    """Part of each engine's blocks, and its requests, some seconds after the load."""
    proxy: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def lasting_port():
    """A free port that no connection takes for its own end while the engine is gone."""
    while not is_free(port := random.SystemRandom().randrange(20_000, 32_000)):
        pass  # above, Linux gives them to connections
    return port


def is_free(port):
    """Whether a server may listen there."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return True
    return False


class Killable:
    """One engine, always at the same address."""

    def __init__(self, nursery, role, number, connector, path, folder, *, more=None, env=None):
        """``more``: overrides of the transfer config; ``env``: more of the environment."""
        self.nursery, self.role, self.name = nursery, role, f"{role}-{number}"
        self.port = lasting_port()
        self.url = f"http://{HOST}:{self.port}"
        config = transfer_config(connector, role) | {"kv_load_failure_policy": "recompute"}
        more = dict(more or {})
        config["kv_connector_extra_config"] = {
            **config.get("kv_connector_extra_config", {}),
            **EXTRA,
            **more.pop("kv_connector_extra_config", {}),
        }
        config |= more
        engine = VllmServe(path, config, OPTIONS)
        self.command = engine.command(self.port)
        self.env, self.log = engine_env(**(env or {})), folder / f"{self.name}.log"
        self.client = Client(self, engine.model_name)
        self.start()

    def start(self):
        self.started = time.monotonic()
        while not is_free(self.port) and time.monotonic() < self.started + RECOVER_S:
            time.sleep(0.05)  # the last thread of who was killed has not closed it yet
        self.process = self.nursery.launch(self.command, self.env, self.log)

    def is_up(self):
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_up(self):
        while not self.is_up():
            if time.monotonic() > self.started + START_S:
                raise TimeoutError(f"{self.name} is not up; its log: {self.log}")
            time.sleep(0.1)

    def kill(self):
        kill(self.process.pid)
        self.process.wait()


class Run:
    """Clients, kills, and what comes of them."""

    def __init__(self, connector, engines, proxy, rng):
        self.engines, self.proxy, self.rng = engines, proxy, rng
        self.report = Report(connector)
        self.lock = threading.Lock()
        self.stop, self.begun = threading.Event(), time.monotonic()
        lengths = [rng.randrange(100, 1200) for _ in range(PROMPTS)]
        self.prompts = [words(n, seed=n) for n in lengths]

    def go(self, times, seconds):
        for engine in self.engines:
            engine.wait_up()
        decode = next(e for e in self.engines if e.role == "decode").client
        self.expected = [decode.tokens(prompt, ANSWER) for prompt in self.prompts]
        clients = [threading.Thread(target=self.ask, args=(n,)) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            victims = ["prefill", "decode"] * times
            self.rng.shuffle(victims)
            for role in victims:
                self.recover()
                if time.monotonic() > self.begun + seconds:
                    break
                self.kill(role)
            self.recover()
        finally:
            self.stop.set()
            for client in clients:
                client.join()
        self.settle()

    def recover(self):
        """Until all is up but one, and there were right answers since."""
        deadline = time.monotonic() + START_S + RECOVER_S
        while sum(not engine.is_up() for engine in self.engines) > 1:
            if time.monotonic() > deadline:
                raise TimeoutError("killed engines did not come up")
            time.sleep(0.2)
        before, deadline = self.report.answers, time.monotonic() + RECOVER_S
        while self.report.answers < before + BETWEEN:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {BETWEEN} answers in {RECOVER_S:g} s")
            time.sleep(0.05)

    def kill(self, role):
        time.sleep(self.rng.random())
        victim = self.rng.choice([e for e in self.engines if e.role == role and e.is_up()])
        self.count(victim)
        victim.kill()
        self.report.kills[role] += 1
        victim.start()

    def count(self, engine):
        """What an engine has counted, which is lost when it is killed."""
        if engine.role == "decode":
            with contextlib.suppress(OSError, http.client.HTTPException):
                by_source = "vllm:prompt_tokens_by_source_total"
                found = engine.client.metric(by_source, source="external_kv_transfer")
                failed = engine.client.metric("vllm:nixl_num_failed_transfers_total")
                self.report.transferred_tokens += found
                self.report.failed_transfers += failed

    def ask(self, number):
        rng = random.Random(number)
        while not self.stop.is_set():
            at, started = rng.randrange(PROMPTS), time.monotonic()
            try:
                status, answer = self.proxy.post(self.prompts[at], max_tokens=ANSWER)
            except (OSError, http.client.HTTPException, ValueError):
                status = 0  # broken off
            taken = time.monotonic() - started
            with self.lock:
                self.took(at, status, answer if status == 200 else None, taken)
            if status != 200:
                time.sleep(0.2)

    def took(self, at, status, answer, seconds):
        report = self.report
        report.longest_s = max(report.longest_s, round(seconds, 2))
        if seconds > LOAD_TIMEOUT_S + PATIENCE_S:
            report.problems.append(f"a request took {seconds:.1f} s")
        if status != 200:
            report.errors += 1
        elif answer["choices"][0]["token_ids"] == self.expected[at]:
            report.answers += 1
        else:
            report.wrong += 1
            report.problems.append(f"prompt {at} got another answer")

    def settle(self):
        """What is held once nobody asks any more."""
        for engine in self.engines:
            engine.wait_up()
        deadline = time.monotonic() + LEASE_S + PATIENCE_S
        while time.monotonic() < deadline:
            self.report.held = {
                f"{engine.name} {metric.removeprefix('vllm:')}": engine.client.metric(metric)
                for engine in self.engines
                for metric in (HELD, RUNNING)
            }
            if not any(self.report.held.values()):
                break
            time.sleep(0.5)
        for engine in self.engines:
            self.count(engine)
        _, health = self.proxy.request("GET", "/health")
        self.report.proxy = health["counters"]


def run(connector, times, seconds, seed, folder):
    """A Report."""
    rng, path = random.Random(seed), model("KVCONNECT_TP_MODEL")
    with Nursery() as nursery, Fleet(folder) as fleet:
        engines = [
            Killable(nursery, role, number, connector, path, folder)
            for role in ("prefill", "decode")
            for number in (0, 1)
        ]
        urls = {role: [e.url for e in engines if e.role == role] for role in ("prefill", "decode")}
        server = fleet.start("proxy", proxy_command(urls["prefill"], urls["decode"]), engine_env())
        chaos = Run(connector, engines, Client(server, path.name), rng)
        try:
            chaos.go(times, seconds)
        except (TimeoutError, AssertionError, OSError) as e:
            chaos.report.problems.append(f"{type(e).__name__}: {e}")
    chaos.report.seconds = round(time.monotonic() - chaos.begun)
    return chaos.report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("connector", choices=CONNECTORS)
    parser.add_argument("--times", type=int, default=20, help="kills of either side")
    parser.add_argument("--seconds", type=float, default=3600, help="no more kills after these")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvconnect-chaos-"))
    shown = run(given.connector, given.times, given.seconds, given.seed, logs)
    print(json.dumps({"seed": given.seed, **asdict(shown), "logs": str(logs)}), flush=True)
    sys.exit(bool(shown.wrong or shown.problems or any(shown.held.values())))
