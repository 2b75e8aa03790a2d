"""A million transfers between engines in one process, with faults: none wrong, nothing left.

    python tests/soak.py --transfers 1000000

Two engines lend and three fetch (directly, staged, and by what is faster), by steps, with a clock
that a round moves on. Some prompts are fetched while they are computed, which may begin anew or be
aborted. Frames are lost, repeated and held up; the transports' transfers are lost,
late, fail though they arrived, or hang; requests are aborted, released unread, or forgotten;
engines end and start again at their addresses, and whole rounds take seconds. Every fetch must end
once; whatever is said to have arrived is compared byte for byte. At the end no lease, slot, ticket,
renewal or remote may be left. Prints one line of JSON, with the seed; exits with 1 if anything was
wrong. `WORLDS` of them run side by side, each in a process of its own.

That no memory leaks is seen in what is in use, to the byte (`kit.memory`), in two parts:

* For most transfers no engine is restarted, since its end would give back what its mover leaked.
  The tables that are bounded fill in the first half of that; `BOUNDS` are small here, lest they
  fill all day. Through what is in use in the second half, whenever nothing has been under way for
  a while, a line is drawn: it may rise by `LEAK` bytes for each transfer.
* For the others engines are restarted ten times as often. Now and then all are at once: then what
  is in use must be what it was at the first such time, but for `LEAK_OF_RESTART` for each restart.

Resident memory may grow by `KEPT` over either, which is what the allocators keep.
"""

import functools
import itertools
import logging
import multiprocessing
import random
import time
from collections import Counter, deque

import numpy as np
from kit.command import main
from kit.engines import Engine, World
from kit.memory import held, slope
from kit.prefill import Prefill, fetch_early

from kvconnect import lease, stats
from kvconnect.consumer.remote import IDLE_S
from kvconnect.control import dialer, listener
from kvconnect.lease import Terms
from kvconnect.orders import Cancel, Fetch, Grant, Release, RenewLease
from kvconnect.producer import leases, stage
from kvconnect.testing import Fault, faulty
from kvconnect_bench.caches import GUARD_BYTES, Model

MODEL = Model(layers=2, heads=2, block_tokens=4, content=8, itemsize=2)
ROW = 2 * 4 * 8 * 2  # bytes of a block in a layer
BLOCKS, LONGEST = 256, 6
PATTERNS = np.random.default_rng(0).integers(0, 256, (256, MODEL.layers, LONGEST, ROW), np.uint8)
UNDER_WAY = 24  # of each engine that fetches
ROUND_S, TTL_S = 0.02, 5.0
LOST, REPEATED, HELD_UP = 0.002, 0.004, 0.01  # of frames
SPOILED, ABORTED, RELEASED, FORGOTTEN = 0.01, 0.02, 0.02, 0.005  # of transfers; of requests
STREAMED = 0.2  # of requests
COMPUTED, PREEMPTED, GIVEN_UP, HUNG_UP = 0.3, 0.02, 0.01, 0.01  # of rounds, for each of those
WAIT_S = 8.0  # for a prompt to be computed
RESTART, PAUSE = 1 / 400, 1 / 1000  # of rounds
WORLDS = 2
STEADY = 0.7  # of the transfers: nobody is restarted
LOOKS, RESTARTED_LOOKS = 200, 20
FATES = [(Fault.NONE, 3), (Fault.LOST, 3), (Fault.UNREPORTED, 3), (Fault.HANGS, 1)]
MIB = 1 << 20
LEAK, LEAK_OF_RESTART = 4, 512  # bytes
KEPT = 8 * MIB
BOUNDS = {
    (stage, "REMEMBERED"): 256,
    (leases, "REMEMBERED_CLOSES"): 256,
    (lease, "REMEMBERED_NAMES"): 256,
    (dialer, "MAX_GONE"): 32,
    (listener, "MAX_WELCOME"): 32,
    (stats, "KEPT"): 256,
    (faulty, "KEPT"): 64,
}
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
        self.held = {}  # request → blocks; of a fetch also what looks at them, None once aborted
        self.computing = {}  # request that is fetched meanwhile → what computes it

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
        if rng.random() < STREAMED:
            self.begin_early(reader, lender)
            return
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
        right = functools.partial(self.holds_pattern, reader, filled, pattern)
        reader.held[name] = filled, None if aborted else right
        reader.rows[:, filled] = 0
        blocks = (tuple(enumerate(filled)),)
        reader.engine.put(Fetch(name, source, blocks, tokens, terms.digest))
        if aborted:
            self.seen["aborted"] += 1
            reader.engine.put(Cancel(name))

    def begin_early(self, reader, lender):
        """One that both are asked for at once: it is computed in the rounds that follow."""
        count = self.rng.randint(1, LONGEST)
        if (lent := lender.take(count)) is None:
            return
        self.number += 1
        tokens, seed = count * MODEL.block_tokens - self.rng.randrange(4), self.number % 1000
        prefill = Prefill(lender.engine, tokens, seed, free=list(lent))
        lender.held[prefill.request_id], lender.computing[prefill.request_id] = lent, prefill
        if (filled := reader.take(count)) is None:
            return
        name = f"r{self.number}"
        reader.rows[:, filled] = 0
        right = functools.partial(self.holds_prompt, reader, filled, seed, tokens)
        reader.held[name] = filled, right
        fetch_early(reader.engine, name, prefill, filled, WAIT_S)
        self.seen["streamed"] += 1

    def compute(self, lender):
        """Some prompts get on, some are computed anew, and some end without KV."""
        for name, prefill in list(lender.computing.items()):
            drawn = self.rng.random()
            if drawn < GIVEN_UP:
                prefill.abort()
                lender.free += lender.held.pop(name)
                del lender.computing[name]
            elif drawn < GIVEN_UP + PREEMPTED:
                prefill.preempt()
            elif drawn < GIVEN_UP + PREEMPTED + COMPUTED:
                computed = (prefill.told + 1) * MODEL.block_tokens
                if computed < prefill.tokens:
                    prefill.compute(computed)
                else:
                    prefill.finish()
                    del lender.computing[name]

    def hang_up(self, reader):
        """A request that loads, perhaps what is still computed, is aborted."""
        for name, (filled, right) in list(reader.held.items()):
            if right is not None and self.rng.random() < HUNG_UP:
                reader.held[name] = filled, None
                reader.engine.put(Cancel(name))
                self.seen["aborted"] += 1

    def holds_pattern(self, reader, filled, pattern):
        return np.array_equal(reader.rows[:, filled], PATTERNS[pattern][:, : len(filled)])

    def holds_prompt(self, reader, filled, seed, tokens):
        return reader.engine.caches[0].holds_fill(tuple(enumerate(filled)), seed, tokens)

    def round(self, begin=True):
        """Requests, a step of every engine, and most of the frames on their way."""
        for reader in self.readers:
            while begin and len(reader.held) < UNDER_WAY and self.number >= 0:
                before = self.number
                self.begin(reader)
                if self.number == before:
                    break  # nobody has blocks to lend
        for lender in self.lenders:
            self.compute(lender)
        for reader in self.readers:
            self.hang_up(reader)
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
            filled, right = side.held.pop(name)
            if right is None:
                self.seen["aborted and ended"] += 1
            elif ended[0] is None:
                self.seen["right"] += 1
                if not right():
                    self.seen["wrong"] += 1
                    self.problems.append(f"{name} is said to have arrived, and has not")
            else:
                self.seen["failed"] += 1
            side.free += filled
        engine.ended.clear()

    def restart(self, side):
        self.transfers += done_by(side)
        side.restart()
        self.seen["restarts"] += 1

    def restart_all(self):
        """Nothing is under way any more, and nobody knows anybody."""
        for side in (*self.lenders, *self.readers):
            self.restart(side)
        while self.world.network.pending:
            self.world.network.flush()

    def disturb(self, restarts):
        if restarts and self.rng.random() < RESTART:
            self.restart(self.rng.choice([*self.lenders, *self.readers]))
        if self.rng.random() < PAUSE:
            self.world.clock.advance(self.rng.uniform(0.5, 4.0))
            self.seen["pauses"] += 1

    def done(self):
        return self.transfers + sum(done_by(s) for s in (*self.lenders, *self.readers))

    def wait(self, *slower):
        """Nothing new begins for a while, in rounds that take ever longer."""
        for seconds in slower:
            for _ in range(40):
                self.round(begin=False)
                self.world.clock.advance(seconds)

    def settle(self):
        """Nothing more is asked for: what is held after all timeouts have passed."""
        for side in (*self.lenders, *self.readers):
            side.engine.transports[0].forget_plans()
        self.wait(0.1, 1.0, IDLE_S / 10)
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


def run_world(transfers, seed):
    """What one world saw, which problems, and what it held: steadily, and between restarts."""
    logging.disable()
    for (module, name), bound in BOUNDS.items():
        assert bound < getattr(module, name)
        setattr(module, name, bound)
    soak, steady, restarted = Soak(seed), [], []
    while (done := soak.done()) < transfers and not soak.problems:
        restarts = done >= STEADY * transfers
        if not restarts and done >= len(steady) * STEADY * transfers / LOOKS:
            soak.wait(0.1, 0.5)
            steady.append((done, held()))
        share = (1 - STEADY) * transfers / RESTARTED_LOOKS
        if restarts and done - STEADY * transfers >= len(restarted) * share:
            soak.restart_all()
            restarted.append((soak.seen["restarts"], held()))
        for _ in range(20):
            soak.round()
            soak.disturb(restarts)
    if left := soak.settle():
        soak.problems.append(f"left: {left}")
    memory = {
        "steady": grown(soak, steady[len(steady) // 2 :], LEAK, "transfer"),
        "restarted": grown(soak, restarted[1:], LEAK_OF_RESTART, "restart"),
    }
    numbers = {"transfers": soak.done(), "requests": soak.number, **soak.seen}
    return numbers, soak.problems, memory


def grown(soak, looks, allowed, unit):
    """By how much memory grew for each ``unit``, and what was held first and last."""
    if len(looks) < 3:
        return None
    each, error = slope([(count, seen.in_use) for count, seen in looks])
    first, last = looks[0][1], looks[-1][1]
    if each > allowed:
        soak.problems.append(f"{each:.1f} ± {error:.1f} bytes are leaked by each {unit}")
    if last.resident - first.resident > KEPT or last.files > first.files:
        soak.problems.append(f"more is held at the end: {first} at first, {last} at last")
    return {
        f"bytes_a_{unit}": (round(each, 2), round(error, 2)),
        "in_use_mib": [round(seen.in_use / MIB, 2) for seen in (first, last)],
        "resident_mib": [round(seen.resident / MIB, 1) for seen in (first, last)],
        "files": [seen.files for seen in (first, last)],
    }


def run(transfers, seed):
    """A report."""
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(WORLDS) as pool:
        given = [(transfers // WORLDS, seed + number) for number in range(WORLDS)]
        seen, problems, memory = zip(*pool.starmap(run_world, given, 1), strict=True)
    numbers = sum(map(Counter, seen), Counter())
    return {
        "seed": seed,
        **numbers,
        "wrong": numbers["wrong"],
        "memory": memory,
        "seconds": round(time.monotonic() - began),
        "problems": [*itertools.chain(*problems)][:10],
    }


if __name__ == "__main__":
    main(__doc__, "transfers", run)
