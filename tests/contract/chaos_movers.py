"""Two ranks under load, each killed -9 at random moments and restarted at its old address.

    python tests/contract/chaos_movers.py ucx --times 20

Both are real movers with a real transport and control channel, without vLLM: a supplier that lends
blocks, and a reader that fetches them, directly and staged. Every outcome is timed; every fetch
that is said to have succeeded is compared byte for byte. Prints one line of JSON; exits with 1 if
anything was wrong. The same with real engines: tests/e2e/chaos_engines.py.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field

import numpy as np

from kvconnect.config import Settings
from kvconnect.control.channel import ZmqChannel
from kvconnect.geometry.blocks import Region
from kvconnect.lease import Terms
from kvconnect.mover import Mover
from kvconnect.ops import load
from kvconnect.orders import EngineAddresses, Fetch, Grant, Source
from kvconnect.staging import GRANULE_BYTES, Staging
from kvconnect.transport import nixl
from kvconnect.transport.mooncake import transport as mooncake
from kvconnect.transport.registry import make_transport
from kvconnect_bench.caches import GUARD_BYTES, Cache, Model

HOST = "127.0.0.1"
LIBRARY = {"nixl": "nixl", "mooncake": "mooncake.engine", "ucx": "ucxx"}
MODEL = Model(layers=4, heads=2, block_tokens=16, content=128)  # rows of 8 KiB
ROW = 2 * 16 * 128 * 2
BLOCKS, PROMPT = 1024, 96  # of a cache; of a prompt, 3 MiB
SLOTS = 256  # half to receive; those of a killed supplier's chunks are out of use for seconds
UNDER_WAY = 4
TTL_S, LOAD_TIMEOUT_S, HANDSHAKE_S = 3.0, 4.0, 2.0
LATE_S = 5.0  # beyond the timeout: what a busy machine is granted
RECOVERY_S = 40.0  # what it may take until fetches go well again, on a busy machine
OPTIONS = {"mooncake": {"mooncake_protocol": "tcp"}}
FENCE_S = {"nixl": nixl.FENCE_S, "mooncake": mooncake.FENCE_S, "ucx": 0.0}
"""Beyond that: until what a stopped peer could still touch is out of its reach."""
MODES = ("auto", "staged")  # auto: one after the other, until it knows which is faster
PATTERNS = [
    np.random.default_rng(seed).integers(0, 256, (MODEL.layers, PROMPT, ROW), dtype=np.uint8)
    for seed in range(8)
]


@dataclass
class Report:
    """What was seen, over all kills."""

    transport: str
    kills: dict[str, int] = field(default_factory=lambda: {"supplier": 0, "reader": 0})
    kills_amid_fetches: int = 0
    fetched: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    failed: int = 0
    stale: int = 0
    """Fetches of leases of a supplier that was killed before; all must fail."""
    wrong: int = 0
    longest_s: float = 0.0
    frozen_s: float = 0.0
    """Until the last fetch from a supplier that was stopped (SIGSTOP), not killed, had ended."""
    held: int = -1
    """Leases that had not ended at the end."""
    problems: list[str] = field(default_factory=list)


class _Rank:
    """In the child: a cache, and what runs over it."""

    def __init__(self, name, pipe, port, modes):
        self.pipe = pipe
        self.cache = Cache(MODEL, BLOCKS)
        live = self.cache.memory[GUARD_BYTES:-GUARD_BYTES]
        self.rows = live.reshape(MODEL.layers, BLOCKS, ROW)
        self.free = deque(np.random.default_rng().permutation(BLOCKS).tolist())
        self.movers = {mode: self._mover(name, mode, port) for mode in modes}
        first = next(iter(self.movers.values()))
        pipe.send(first.address)

    def _mover(self, name, mode, port):
        arena = np.zeros(SLOTS * GRANULE_BYTES, np.uint8)
        self.cache.arenas = [*getattr(self.cache, "arenas", ()), arena]
        region = Region(int(arena.ctypes.data), arena.nbytes)
        channel = ZmqChannel(HOST, port)
        mover = Mover(
            Settings(
                0,
                1,
                {"model": "chaos"},
                name,
                handshake_timeout_s=HANDSHAKE_S,
                load_timeout_s=LOAD_TIMEOUT_S,
                mode=mode,
            ),
            self.cache.shard,
            make_transport(name, [*self.cache.shard.regions, region], HOST, OPTIONS.get(name, {})),
            channel,
            staging=Staging(region, GRANULE_BYTES),
            kernels=load("cpu"),
        )
        mover.put([EngineAddresses((mover.address,))])
        mover.start()
        return mover

    def take_blocks(self):
        if len(self.free) < PROMPT:
            return None
        return [self.free.popleft() for _ in range(PROMPT)]


def supply(name, pipe, port):
    """Lend what is asked for; say which leases are not over."""
    rank, held = _Rank(name, pipe, port, ["auto"]), {}
    mover = rank.movers["auto"]
    while True:
        for request_id in mover.take().sent:
            rank.free += held.pop(request_id)
        if not pipe.poll(0.001):
            continue
        command, *given = pipe.recv()
        if command == "held":
            pipe.send(len(held))
            continue
        request_id, seed = given
        if (blocks := rank.take_blocks()) is None:
            pipe.send(None)
            continue
        held[request_id] = blocks
        rank.rows[:, blocks] = PATTERNS[seed]
        tokens = PROMPT * MODEL.block_tokens
        lease_id = f"{request_id} {random.random()}"
        terms = Terms(request_id, lease_id, (tuple(blocks),), tokens, b"%d" % seed, TTL_S)
        mover.put([Grant(terms)])
        shard = mover.address
        pipe.send((Source((shard,), request_id, lease_id, TTL_S), terms))


def read(name, pipe, port):
    """Fetch what is asked for; say how each ended, and whether it is what was lent."""
    rank, running = _Rank(name, pipe, 0, MODES), {}
    while True:
        for mode, mover in rank.movers.items():
            outcome = mover.take()
            for request_id in outcome.received:
                seed, blocks = running.pop((mode, request_id))  # KeyError: it was told twice
                error = outcome.failed.get(request_id)
                right = np.array_equal(rank.rows[:, blocks], PATTERNS[seed])
                rank.free += blocks
                pipe.send((request_id, error, right))
        if pipe.poll(0.001):
            mode, request_id, source, terms, seed = pipe.recv()
            blocks = rank.take_blocks()
            rank.rows[:, blocks] = 0
            running[mode, request_id] = seed, blocks
            table = (tuple(enumerate(blocks)),)
            order = Fetch(request_id, source, table, terms.tokens, terms.digest)
            rank.movers[mode].put([order])


class Side:
    """A rank as the parent sees it."""

    def __init__(self, target, name, port=0):
        context = multiprocessing.get_context("fork")  # of a process that has the library loaded
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(target, name, theirs, port))
        self.process.daemon = True
        self.process.start()
        theirs.close()
        self.address = None

    def answer(self, timeout_s=30.0):
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return self.pipe.recv()

    def ready(self):
        """Wait until it is up."""
        if self.address is None:
            self.address = self.answer()

    def ask(self, *command):
        self.pipe.send(command)
        return self.answer()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.pipe.close()


def _child(target, name, pipe, port):
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # the libraries' chatter
    target(name, pipe, port)


class Run:
    """The parent: load, kills, and what comes of them."""

    def __init__(self, name, rng):
        self.name, self.rng = name, rng
        self.report = Report(name)
        self.sides = {"supplier": Side(supply, name), "reader": Side(read, name)}
        self.under_way = {}  # request id → (mode, asked at, whether its lease is a killed one's)
        self.leases = deque(maxlen=4)  # (source, terms, seed) of the last ones
        self.number = 0
        self.since_restart = 0
        self.fence_s = 0.0

    def go(self, times):
        for side in self.sides.values():
            side.ready()
        victims = ["supplier", "reader"] * times
        self.rng.shuffle(victims)
        for victim in victims:
            self.load(until=lambda: self.since_restart >= 2 * len(MODES), seconds=RECOVERY_S)
            if self.since_restart < 2 * len(MODES):
                self.report.problems.append(f"no recovery before kill {self.report.kills}")
                return
            self.load(until=lambda: False, seconds=self.rng.random() * 0.05)
            # a killed reader's leases may have all blocks until they run out
            self.load(until=lambda: bool(self.under_way), seconds=RECOVERY_S)
            self.kill(victim)
        self.freeze()
        self.load(until=lambda: self.since_restart >= 2 * len(MODES), seconds=RECOVERY_S)
        self.load(until=lambda: not self.under_way, seconds=RECOVERY_S, more=False)
        if self.since_restart < 2 * len(MODES):
            self.report.problems.append("no recovery at the end")
        self.wait_for_leases()

    def kill(self, victim):
        side, report = self.sides[victim], self.report
        report.kills[victim] += 1
        report.kills_amid_fetches += bool(self.under_way)
        side.kill()
        if victim == "supplier":
            stale = [(*lease, True) for lease in self.leases]
            self.leases.clear()
            self.sides[victim] = Side(supply, self.name, side.address.port)
            self.sides[victim].ready()
            for lease in stale[:2]:
                self.fetch(*lease)
            # what becomes of them is known before the reader may be killed
            self.load(
                until=lambda: not any(s for *_, s in self.under_way.values()), seconds=RECOVERY_S
            )
        else:
            self.under_way.clear()
            self.sides[victim] = Side(read, self.name)
            self.sides[victim].ready()
        self.since_restart = 0

    def freeze(self):
        """Stop the supplier amid fetches, which must end in time; then let it go on."""
        self.load(until=lambda: len(self.under_way) == UNDER_WAY, seconds=RECOVERY_S)
        self.fence_s = FENCE_S[self.name]
        began, pid = time.monotonic(), self.sides["supplier"].process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            self.load(until=lambda: not self.under_way, seconds=40.0, more=False)
        finally:
            os.kill(pid, signal.SIGCONT)
            self.fence_s = 0.0
        self.report.frozen_s = round(time.monotonic() - began, 2)
        self.since_restart = 0

    def load(self, until, seconds, more=True):
        """Keep fetches under way, for so long."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            while more and len(self.under_way) < UNDER_WAY:
                self.number += 1
                seed = self.rng.randrange(len(PATTERNS))
                lent = self.sides["supplier"].ask("lend", f"r{self.number}", seed)
                if lent is None:
                    break  # it waits for leases of readers that were killed
                self.leases.append((*lent, seed))
                self.fetch(*lent, seed)
            self.take(0.005)

    def fetch(self, source, terms, seed, stale=False):
        mode, request_id = self.rng.choice(MODES), f"{terms.request_id}{' stale' * stale}"
        self.under_way[request_id] = mode, time.monotonic(), stale
        self.sides["reader"].pipe.send((mode, request_id, source, terms, seed))

    def take(self, wait_s):
        pipe, report = self.sides["reader"].pipe, self.report
        while pipe.poll(wait_s):
            request_id, error, right = pipe.recv()
            mode, asked, stale = self.under_way.pop(request_id)
            report.longest_s = max(report.longest_s, round(time.monotonic() - asked, 2))
            report.stale += stale
            if error:
                report.failed += not stale
                continue
            report.fetched[mode] += 1
            self.since_restart += 1
            if not right or stale:
                report.wrong += 1
                report.problems.append(f"{request_id}, {mode}: {right=} {stale=}")
        late = time.monotonic() - LOAD_TIMEOUT_S - LATE_S - self.fence_s
        for request_id, (mode, asked, _) in self.under_way.items():
            if asked < late:
                raise TimeoutError(f"{request_id}, {mode}, hangs")

    def wait_for_leases(self):
        end = time.monotonic() + TTL_S + LATE_S
        while (held := self.sides["supplier"].ask("held")) and time.monotonic() < end:
            time.sleep(0.05)
        self.report.held = held


def run(name, times, seed):
    """A Report."""
    if name == "ucx":
        importlib.import_module("libucx").load_library()
    importlib.import_module(LIBRARY[name])  # once, here: children are forked in milliseconds
    load("cpu")
    chaos = Run(name, random.Random(seed))
    try:
        chaos.go(times)
    except (TimeoutError, EOFError, OSError) as e:
        ended = {name: side.process.exitcode for name, side in chaos.sides.items()}
        chaos.report.problems.append(f"{type(e).__name__}: {e}; exit codes: {ended}")
    finally:
        for side in chaos.sides.values():
            side.kill()
    return chaos.report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("transport", choices=LIBRARY)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args()
    shown = run(given.transport, given.times, given.seed)
    print(json.dumps({"seed": given.seed, **asdict(shown)}), flush=True)
    sys.exit(bool(shown.wrong or shown.problems or shown.held))
