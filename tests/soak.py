"""A million transfers between engines in one process, with faults: none wrong, nothing left.

    python tests/soak.py --transfers 1000000

Two engines lend and three fetch (directly, staged, and by what is faster), by steps, with a clock
that a round moves on. Frames are lost, repeated and held up; the transports' transfers are lost,
late, fail though they arrived, or hang; requests are aborted, released unread, or forgotten;
engines end and start again at their addresses, and whole rounds take seconds. Every fetch must end
once; whatever is said to have arrived is compared byte for byte. At the end no lease, slot, ticket,
renewal or remote may be left, and memory and open files must be what they were after the first
tenth. Prints one line of JSON, with the seed; exits with 1 if anything was wrong.
"""

import gc
import os
import random
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
from kit.command import main
from kit.engines import Engine, World

from kvconnect.consumer.remote import IDLE_S
from kvconnect.lease import Terms
from kvconnect.orders import Cancel, Fetch, Grant, Release, RenewLease
from kvconnect.testing import Fault
from kvconnect_bench.caches import GUARD_BYTES, Model

MODEL = Model(layers=2, heads=2, block_tokens=4, content=8, itemsize=2)
ROW = 2 * 4 * 8 * 2  # bytes of a block in a layer
BLOCKS, LONGEST = 256, 6
PATTERNS = np.random.default_rng(0).integers(0, 256, (256, MODEL.layers, LONGEST, ROW), np.uint8)
UNDER_WAY = 24  # of each engine that fetches
ROUND_S, TTL_S = 0.02, 5.0
LOST, REPEATED, HELD_UP = 0.002, 0.004, 0.01  # of frames
SPOILED, ABORTED, RELEASED, FORGOTTEN = 0.01, 0.02, 0.02, 0.005  # of transfers; of requests
RESTART, PAUSE = 1 / 4000, 1 / 1000  # of rounds
FATES = [(Fault.NONE, 3), (Fault.LOST, 3), (Fault.UNREPORTED, 3), (Fault.HANGS, 1)]
MIB = 1 << 20
GROWTH = 2 * MIB  # of memory, that is no leak
REPEATED_FETCH = "an outcome was reported twice, or of nobody's fetch"


class Side:
    """An engine, its memory as rows of blocks, and which of these are free."""

    def __init__(self, world, mode):
        options = {"load_timeout_s": 6.0, "lease_max_s": 15.0, "handshake_timeout_s": 3.0}
        self.engine = Engine(world, MODEL, BLOCKS, staging=(16, 1), mode=mode, **options)
        memory = self.engine.caches[0].memory
        self.rows = memory[GUARD_BYTES:-GUARD_BYTES].reshape(MODEL.layers, BLOCKS, ROW)
        self.forget()

    def forget(self):
        self.free = deque(range(BLOCKS))
        self.held = {}  # request → blocks; for a fetch also its pattern, None once aborted

    def take(self, count):
        return [self.free.popleft() for _ in range(count)] if len(self.free) >= count else None

    def restart(self):
        self.engine.stop()
        self.engine.start()
        self.forget()


class Soak:
    """All engines, what is under way, and what was seen."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.world = World(held=True)
        self.lenders = [Side(self.world, "auto") for _ in range(2)]
        self.readers = [Side(self.world, mode) for mode in ("direct", "staged", "auto")]
        self.number, self.transfers = 0, 0
        self.seen = Counter()
        self.problems = []

    def begin(self, reader):
        """One request: lent by some engine, and fetched, released or forgotten."""
        rng, lender = self.rng, self.rng.choice(self.lenders)
        count = rng.randint(1, LONGEST)
        if (lent := lender.take(count)) is None:
            return
        self.number += 1
        name, pattern = f"r{self.number}", rng.randrange(len(PATTERNS))
        lender.held[name] = lent
        lender.rows[:, lent] = PATTERNS[pattern][:, :count]
        tokens = count * MODEL.block_tokens
        terms = Terms(name, f"lease of {name}", (tuple(lent),), tokens, b"%d" % pattern, TTL_S)
        lender.engine.put(Grant(terms))
        if rng.random() < FORGOTTEN or (filled := reader.take(count)) is None:
            self.seen["forgotten"] += 1
            return
        source = lender.engine.source(terms, ticket=rng.random() < 0.9)
        reader.engine.put(RenewLease(name, source))
        if rng.random() < RELEASED:
            self.seen["released"] += 1
            reader.free += filled
            reader.engine.put(Release(name, source))
            return
        aborted = rng.random() < ABORTED
        reader.held[name] = filled, None if aborted else pattern
        reader.rows[:, filled] = 0
        blocks = (tuple(enumerate(filled)),)
        reader.engine.put(Fetch(name, source, blocks, tokens, terms.digest))
        if aborted:
            self.seen["aborted"] += 1
            reader.engine.put(Cancel(name))

    def round(self, begin=True):
        """Requests, a step of every engine, and most of the frames on their way."""
        for reader in self.readers:
            while begin and len(reader.held) < UNDER_WAY and self.number >= 0:
                before = self.number
                self.begin(reader)
                if self.number == before:
                    break  # nobody has blocks to lend
        for side in (*self.lenders, *self.readers):
            if begin and self.rng.random() < SPOILED * len(self.readers):
                (fault,) = self.rng.choices(*zip(*FATES, strict=True))
                self.seen[f"transfer {fault.value}"] += 1
                side.engine.transports[0].plan(fault, self.rng.randrange(5), self.rng.randrange(5))
            side.engine.step()
            self.take(side)
        self.deliver(faults=begin)
        self.world.clock.advance(ROUND_S)

    def deliver(self, faults):
        """Frames, but for the lost ones; some arrive twice, and some only in a later round."""
        network, rng = self.world.network, self.rng
        waiting = []
        while network.pending:
            drawn = rng.random() if faults else 1.0
            if drawn < LOST:
                network.drop()
                self.seen["frames lost"] += 1
            elif drawn < REPEATED:
                network.repeat()
                network.deliver()
                self.seen["frames repeated"] += 1
            elif drawn < HELD_UP:
                waiting.append(network.pending.pop(0))
                self.seen["frames held up"] += 1
            else:
                network.deliver()
        network.pending[:0] = waiting

    def take(self, side):
        """What ended."""
        engine = side.engine
        for name in engine.sent:
            side.free += side.held.pop(name)
        engine.sent.clear()
        for name, ended in engine.ended.items():
            if len(ended) != 1 or name not in side.held:
                self.problems.append(f"{name}: {REPEATED_FETCH}: {ended}")
                continue
            filled, pattern = side.held.pop(name)
            if pattern is None:
                self.seen["aborted and ended"] += 1
            elif ended[0] is None:
                self.seen["right"] += 1
                count = len(filled)
                if not np.array_equal(side.rows[:, filled], PATTERNS[pattern][:, :count]):
                    self.seen["wrong"] += 1
                    self.problems.append(f"{name} is said to have arrived, and has not")
            else:
                self.seen["failed"] += 1
            side.free += filled
        engine.ended.clear()

    def disturb(self):
        if self.rng.random() < RESTART:
            side = self.rng.choice([*self.lenders, *self.readers])
            self.transfers += done_by(side)
            side.restart()
            self.seen["restarts"] += 1
        if self.rng.random() < PAUSE:
            self.world.clock.advance(self.rng.uniform(0.5, 4.0))
            self.seen["pauses"] += 1

    def done(self):
        return self.transfers + sum(done_by(s) for s in (*self.lenders, *self.readers))

    def settle(self):
        """Nothing more is asked for: what is held after all timeouts have passed."""
        for side in (*self.lenders, *self.readers):
            side.engine.transports[0].forget_plans()
        for seconds in (0.1, 1.0, IDLE_S / 10):
            for _ in range(40):
                self.round(begin=False)
                self.world.clock.advance(seconds)
        left = Counter()
        for side in (*self.lenders, *self.readers):
            mover = side.engine.movers[0]
            left.update({k: v for k, v in mover.held().items() if k != "staged_readers"})
            left["remotes"] += len(mover.paths())
            left["tickets"] += side.engine.transports[0].running
            left["blocks"] += BLOCKS - len(side.free)
        return {what: count for what, count in left.items() if count}


def done_by(side):
    """Transfers that an engine's transport was given since it was started."""
    return side.engine.transports[0].submitted_ever


def memory_and_files():
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd"))


def run(transfers, seed):
    """A report."""
    soak, began, looked = Soak(seed), time.monotonic(), []
    while (done := soak.done()) < transfers and not soak.problems:
        if done >= (len(looked) + 1) * transfers / 10:
            looked.append(memory_and_files())
        for _ in range(100):
            soak.round()
            soak.disturb()
    left = soak.settle()
    looked.append(memory_and_files())
    grown, files = looked[-1][0] - looked[0][0], looked[-1][1] - looked[0][1]
    if left:
        soak.problems.append(f"left: {left}")
    if grown > GROWTH or files > 0:
        soak.problems.append(f"{grown / MIB:.1f} MiB of memory and {files} files more than before")
    return {
        "seed": seed,
        "transfers": soak.done(),
        "requests": soak.number,
        **soak.seen,
        "wrong": soak.seen["wrong"],
        "memory_mib": [round(resident / MIB, 1) for resident, _ in looked],
        "files": [count for _, count in looked],
        "seconds": round(time.monotonic() - began),
        "problems": soak.problems[:10],
    }


if __name__ == "__main__":
    main(__doc__, "transfers", run)
