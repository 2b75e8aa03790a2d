"""Two prefill and two decode engines behind `kvconnect proxy`, and what can happen to them.

    python tests/e2e/chaos_engines.py ucx --seconds 480
    python tests/e2e/chaos_engines.py nixl --seconds 200 --at-once

Clients ask without pause. Engines are killed -9 and restarted at once at their old address, or
stopped and let go on; a TCP proxy before each prefill engine's control channel cuts, delays, blocks
one way and flips bits. One such blow after the other, in an order that the seed decides. Whatever
is answered must be what an engine answers that computes everything itself; a request may fail, but
ends by its deadline; an engine that nobody killed lives on; what is held at the end is free within
one lease. Prints one line of JSON; exits with 1 if anything was wrong. Without vLLM:
tests/contract/chaos_movers.py.

With --at-once the proxy always asks both sides at once, and KV is streamed: prompts are computed
in many steps, engines have so few blocks that they preempt requests, and clients hang up at any
moment.
"""

import argparse
import contextlib
import http.client
import json
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from conftest import model
from nursery import ADVERTISED, Nursery, kill, send
from pair import Client, words

from kvconnect.cli.engines import (
    CONNECTORS,
    VllmServe,
    engine_env,
    multi_config,
    proxy_command,
    transfer_config,
)
from kvconnect.cli.processes import HOST, Fleet
from kvconnect.testing import TcpFaults

CLIENTS, PROMPTS, ANSWER = 4, 16, 8  # ANSWER: tokens
LOAD_TIMEOUT_S, LEASE_S = 8, 10
PATIENCE_S = 20.0  # beyond the load timeout: computing again, on two busy cores
START_S, RECOVER_S = 180.0, 60.0
BETWEEN = 4  # right answers between two blows
HELD_S = 6.0  # the longest blow: beyond the handshake's timeout and a silent peer's, not the lease
DEADLINE_S = LOAD_TIMEOUT_S + HELD_S + PATIENCE_S
LATE_S = 3.0  # beyond a lease: metrics are looked at, on two busy cores
EXTRA = {
    "load_timeout": LOAD_TIMEOUT_S,
    "handshake_timeout": 4,
    "kv_lease_duration": LEASE_S,
    "kv_lease_max_duration": 60,
}
OPTIONS = ["--max-model-len", "2048", "--no-enable-prefix-caching", "--num-gpu-blocks-override=64"]
HELD, RUNNING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running"
AT_ONCE = (
    "--max-model-len=1536",
    "--no-enable-prefix-caching",
    "--max-num-batched-tokens=128",  # a prompt is three to ten steps
    "--no-scheduler-reserve-full-isl",  # so that prefill preempts prompts that it has begun
)
FEW = {"prefill": 60, "decode": 131}
"""Blocks of 32 tokens: prefill has hardly more than one longest prompt takes."""
AT_ONCE_CLIENTS, AT_ONCE_ANSWER = 10, 32
PREFILL_S = 12
HANGS_UP, HANG_UP_S = 0.2, 4.0
"""Which part of clients does not wait for the answer, and how long these wait at most."""
FAULTS = {
    "delay": {"delay_s": 0.2},
    "block there": {"blocked": frozenset({"there"})},
    "block back": {"blocked": frozenset({"back"})},
    "flips": {"flip_every": 1000},
    "cut": {},
    "no way": {"refuses": True},
}
"""What befalls one side channel; of "cut" and "no way", connections are broken, too."""
BLOWS = ("kill prefill", "kill decode", "stop prefill", "stop decode", *FAULTS)


@dataclass
class Report:
    """What was seen, over all blows."""

    connector: str
    blows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BLOWS, 0))
    requests: int = 0
    answers: int = 0
    transferred_tokens: float = 0
    """Of prompts, as the decode engines that lived to tell counted them."""
    streamed: float = 0
    """Likewise: requests of which blocks crossed before prefill had ended."""
    failed_transfers: float = 0
    """Likewise; their requests were computed again."""
    preemptions: dict[str, float] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    """Likewise, of both roles."""
    hung_up: int = 0
    """Requests whose client did not wait."""
    errors: int = 0
    """Requests that got none: their engine was killed, or no decode engine was left."""
    bits_flipped: int = 0
    side_channel_bytes: int = 0
    wrong: int = 0
    longest_s: float = 0.0
    held: dict[str, float] = field(default_factory=dict)
    """Part of each engine's blocks, and its requests, one lease after the load."""
    free_after_s: float = 0.0
    """After the load, until nothing was held."""
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


def config_of(connector, role, kv_port, more):
    """``--kv-transfer-config``, with short leases; ``more`` overrides it."""
    if connector == "multi":
        config = multi_config(cpu_bytes_to_use=32 << 20)
        config["kv_connector_extra_config"]["connectors"][0]["kv_connector_extra_config"] = EXTRA
        return config
    config = transfer_config(connector, role) | {"kv_load_failure_policy": "recompute"}
    if kv_port and "kv_port" in config:
        config["kv_port"] = kv_port
    extra = config.get("kv_connector_extra_config", {}) | EXTRA
    extra |= more.get("kv_connector_extra_config", {})
    return config | more | {"kv_connector_extra_config": extra}


class Killable:
    """One engine, always at the same address; peers reach a spoiled one through ``faults``."""

    def __init__(
        self,
        nursery,
        role,
        number,
        connector,
        path,
        folder,
        *,
        more=None,
        env=None,
        spoiled_by=None,
        options=OPTIONS,
    ):
        """``more``: overrides of the transfer config; ``env``: more of the environment;
        ``spoiled_by``: seed of what a proxy before its control channel does; ``options``: of
        `vllm serve`."""
        self.nursery, self.role, self.name = nursery, role, f"{role}-{number}"
        self.port = lasting_port()
        self.url = f"http://{HOST}:{self.port}"
        self.faults, env, side_port = None, dict(env or {}), 0
        if spoiled_by is not None:
            side_port, proxy_port = lasting_port(), lasting_port()
            env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(side_port)
            env[ADVERTISED] = str(proxy_port)
            self.faults = TcpFaults((HOST, side_port), spoiled_by, port=proxy_port)
        engine = VllmServe(path, config_of(connector, role, side_port, more or {}), options)
        self.command = engine.command(self.port)
        self.env, self.log = engine_env(**env), folder / f"{self.name}.log"
        self.client = Client(self, engine.model_name)
        self.start()

    def start(self):
        end = time.monotonic() + RECOVER_S
        while not is_free(self.port) and time.monotonic() < end:
            time.sleep(0.05)  # the last thread of who was killed has not closed it yet
        self.process = self.nursery.launch(self.command, self.env, self.log)
        self.started = time.monotonic()  # the nursery takes its time to come up

    def check_alive(self):
        """Raise if it ended without being killed."""
        status = self.process.poll()
        assert status is None, f"{self.name} ended by itself ({status}); its log: {self.log}"

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
            self.check_alive()
            if time.monotonic() > self.started + START_S:
                raise TimeoutError(f"{self.name} is not up; its log: {self.log}")
            time.sleep(0.1)

    def kill(self):
        kill(self.process.pid)
        self.process.wait()


class Run:
    """Clients, blows, and what comes of them."""

    def __init__(self, connector, engines, proxy, rng, at_once=False):
        self.engines, self.proxy, self.rng, self.at_once = engines, proxy, rng, at_once
        self.clients, self.answer = CLIENTS, ANSWER
        self.deadline_s, self.held_s = DEADLINE_S, LEASE_S + LATE_S
        if at_once:
            self.clients, self.answer = AT_ONCE_CLIENTS, AT_ONCE_ANSWER
            self.deadline_s += PREFILL_S
            self.held_s += PREFILL_S  # a promise whose reader died, and its lease after it
        self.report = Report(connector)
        self.lock = threading.Lock()
        self.stop, self.begun = threading.Event(), time.monotonic()
        shortest = 300 if at_once else 100
        lengths = [rng.randrange(shortest, 1200) for _ in range(PROMPTS)]
        self.prompts = [words(n, seed=n) for n in lengths]

    def go(self, seconds):
        for engine in self.engines:
            engine.wait_up()
        decode = next(e for e in self.engines if e.role == "decode").client
        self.expected = [decode.tokens(prompt, self.answer) for prompt in self.prompts]
        clients = [threading.Thread(target=self.ask, args=(n,)) for n in range(self.clients)]
        for client in clients:
            client.start()
        try:
            self.begun, blows = time.monotonic(), []
            while time.monotonic() < self.begun + seconds:
                blows = blows or self.rng.sample(BLOWS, len(BLOWS))
                self.strike(blows.pop())
                self.recover()
        finally:
            self.stop.set()
            for client in clients:
                client.join()
        self.settle()

    def recover(self):
        """Until all is up, and there were right answers since."""
        deadline = time.monotonic() + START_S + RECOVER_S
        while not all(engine.is_up() for engine in self.engines):
            for engine in self.engines:
                engine.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError("killed engines did not come up")
            time.sleep(0.2)
        before, deadline = self.report.answers, time.monotonic() + RECOVER_S
        while self.report.answers < before + BETWEEN:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {BETWEEN} answers in {RECOVER_S:g} s")
            time.sleep(0.05)

    def strike(self, blow):
        """One blow, and its end."""
        time.sleep(self.rng.random())
        what, _, role = blow.partition(" ")
        victims = [
            e for e in self.engines if e.role == (role if what in ("kill", "stop") else "prefill")
        ]
        victim, seconds = self.rng.choice(victims), self.rng.uniform(1.0, HELD_S)
        self.report.blows[blow] += 1
        if what == "kill":
            self.count(victim)
            victim.kill()
            victim.start()
        elif what == "stop":
            send(victim.process.pid, signal.SIGSTOP)
            time.sleep(seconds)
            send(victim.process.pid, signal.SIGCONT)
        else:
            for name, value in FAULTS[blow].items():
                setattr(victim.faults, name, value)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if blow in ("cut", "no way"):
                    victim.faults.cut()
                time.sleep(self.rng.random())
            victim.faults.heal()

    def count(self, engine):
        """What an engine has counted, which is lost when it is killed."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            preempted = engine.client.metric("vllm:num_preemptions_total")
            self.report.preemptions[engine.role] += preempted
            if engine.role == "decode":
                by_source = "vllm:prompt_tokens_by_source_total"
                found = engine.client.metric(by_source, source="external_kv_transfer")
                failed = engine.client.metric("vllm:nixl_num_failed_transfers_total")
                streamed = engine.client.metric("vllm:kvconnect_num_streamed_transfers_total")
                self.report.transferred_tokens += found
                self.report.failed_transfers += failed
                self.report.streamed += streamed

    def ask(self, number):
        rng = random.Random(number)
        while not self.stop.is_set():
            at, started = rng.randrange(PROMPTS), time.monotonic()
            if self.at_once and rng.random() < HANGS_UP:
                self.hang_up(self.prompts[at], rng.uniform(0, HANG_UP_S))
                continue
            try:
                status, answer = self.proxy.post(self.prompts[at], max_tokens=self.answer)
            except (OSError, http.client.HTTPException, ValueError):
                status = 0  # broken off
            taken = time.monotonic() - started
            with self.lock:
                self.took(at, status, answer if status == 200 else None, taken)
            if status != 200:
                time.sleep(0.2)

    def hang_up(self, prompt, after_s):
        """Ask, and close the connection without having waited for the answer."""
        connection = http.client.HTTPConnection(self.proxy.netloc, timeout=HANG_UP_S)
        body = {"model": self.proxy.model, "prompt": prompt, "max_tokens": self.answer}
        with contextlib.suppress(OSError):
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
        self.stop.wait(after_s)
        connection.close()
        with self.lock:
            self.report.hung_up += 1

    def took(self, at, status, answer, seconds):
        report = self.report
        report.requests += 1
        report.longest_s = max(report.longest_s, round(seconds, 2))
        if seconds > self.deadline_s:
            report.problems.append(f"a request took {seconds:.1f} s")
        if status != 200:
            report.errors += 1
        elif answer["choices"][0]["token_ids"] == self.expected[at]:
            report.answers += 1
        else:
            report.wrong += 1
            choice, when = answer["choices"][0], time.monotonic() - self.begun
            seen = f"{choice['token_ids']} ({choice['finish_reason']}), not {self.expected[at]}"
            report.problems.append(f"prompt {at} got another answer after {when:.1f} s: {seen}")

    def settle(self):
        """What is held once nobody asks any more."""
        began = time.monotonic()
        while time.monotonic() < began + self.held_s:
            self.report.held = {
                f"{engine.name} {metric.removeprefix('vllm:')}": engine.client.metric(metric)
                for engine in self.engines
                for metric in (HELD, RUNNING)
            }
            self.report.free_after_s = round(time.monotonic() - began, 1)
            if not any(self.report.held.values()):
                break
            time.sleep(0.2)
        for engine in self.engines:
            engine.check_alive()
            self.count(engine)
            if engine.faults:
                self.report.bits_flipped += engine.faults.flipped
                self.report.side_channel_bytes += sum(engine.faults.carried.values())
        _, health = self.proxy.request("GET", "/health")
        self.report.proxy = health["counters"]


def run(connector, seconds, seed, folder, at_once=False):
    """A Report."""
    rng, path = random.Random(seed), model("KVCONNECT_TP_MODEL")
    more = {"kv_connector_extra_config": {"prefill_timeout": PREFILL_S}} if at_once else None
    with Nursery() as nursery, Fleet(folder) as fleet, contextlib.ExitStack() as proxies:
        engines = [
            Killable(
                nursery,
                role,
                number,
                connector,
                path,
                folder,
                more=more,
                spoiled_by=spoiled_by,
                options=options_of(role, number) if at_once else OPTIONS,
            )
            for role, spoiled_by in (("prefill", seed), ("decode", None))
            for number in (0, 1)
        ]
        for engine in engines[:2]:
            proxies.enter_context(engine.faults)
        urls = {role: [e.url for e in engines if e.role == role] for role in ("prefill", "decode")}
        options = ["--at-once=always"] if at_once else []
        command = proxy_command(urls["prefill"], urls["decode"], options)
        server = fleet.start("proxy", command, engine_env())
        chaos = Run(connector, engines, Client(server, path.name), rng, at_once)
        try:
            chaos.go(seconds)
        except (TimeoutError, AssertionError, OSError) as e:
            chaos.report.problems.append(f"{type(e).__name__}: {e}")
    chaos.report.seconds = round(time.monotonic() - chaos.begun)
    return chaos.report


def options_of(role, number):
    """Of `vllm serve`, where KV is streamed: one decode engine reads it directly, one staged."""
    size = 128 if (role, number) == ("decode", 1) else 32
    blocks = -(-FEW[role] * 32 // size)
    return [*AT_ONCE, f"--block-size={size}", f"--num-gpu-blocks-override={blocks}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("connector", choices=[*CONNECTORS, "multi"])
    parser.add_argument("--seconds", type=float, default=480, help="of blows")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--at-once", action="store_true", help="KV is streamed")
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvconnect-chaos-"))
    shown = run(given.connector, given.seconds, given.seed, logs, given.at_once)
    print(json.dumps({"seed": given.seed, **asdict(shown), "logs": str(logs)}), flush=True)
    sys.exit(bool(shown.wrong or shown.problems or any(shown.held.values())))
