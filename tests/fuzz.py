"""Mutated frames and Welcome bodies, a million of them, at movers that work: none ends, none errs.

    python tests/fuzz.py --frames 1000000

What is mutated is recorded first, from transfers between engines of each kind. It is sent by a peer
that knows the secret (in place of what its own `wire.encode` says), both as requests to an engine
that lends and as answers to one that fetches; one in ten is a Welcome's body, and one that still
decodes is greeted and read from. No step may raise, nothing but the blocks of a fetch may be
written, and every few thousand frames honest engines fetch from each of the two and are right.
Prints one line of JSON, with the seed; exits with 1 if anything was wrong.
"""

import contextlib
import gc
import os
import random
import time
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
from kit.command import main
from kit.engines import Engine, World
from kit.prefill import Prefill, fetch_early

from kvconnect.control import wire
from kvconnect.control.dialer import Dialer
from kvconnect.control.peer import PeerState
from kvconnect.errors import WireError
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant
from kvconnect_bench.caches import Model

MODEL = Model(layers=2, heads=2, block_tokens=4, content=8, itemsize=2)
TABLE, MINE, TOKENS = (7, 8, 9), (1, 2, 3), 10
AT_ONCE = 64  # frames between two steps
WAIT_S = 4.0  # for a prompt to be computed
HONEST_EVERY = 5000
GREETED = 0.05  # of the bodies that decode
MIB = 1 << 20
GROWTH = 8 * MIB
INTERESTING = [b"\x00", b"\x01", b"\x7f", b"\xff", b"\xc0", b"\xc4\xff", b"\xdd\xff\xff\xff\xff"]
INTERESTING += [b"\xcf" + n.to_bytes(8, "big") for n in (1 << 63, (1 << 63) - 1, 1 << 40, 1 << 31)]
ASKED = (wire.Open, wire.Follow, wire.Close, wire.Renew, wire.Stage, wire.Want)
REAL = wire.encode


class LineMessage:
    """What was encoded in honest transfers, and a way to have something else encoded instead."""

    def __init__(self):
        self.asked, self.answered, self.bodies = set(), set(), set()
        self.instead = self.body = None

    def encode(self, message):
        if self.instead is not None:
            return self.instead
        if self.body is not None and isinstance(message, wire.Body):
            return self.body
        data = REAL(message)
        kind = self.bodies if isinstance(message, wire.Body) else self.answered
        (self.asked if isinstance(message, ASKED) else kind).add(data)
        return data

    @contextlib.contextmanager
    def saying(self, data):
        self.instead = data
        try:
            yield
        finally:
            self.instead = None


NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, 1 << 63)


def replaced(value, rng):
    """``value``, of plain types, with one thing in it replaced."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return value | {key: replaced(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        more = rng.choice(([], [value[at]], [replaced(value[at], rng)], [replaced(value[at], rng)]))
        return [*value[:at], *more, *value[at + 1 :]]
    if isinstance(value, bytes):
        return rng.choice((b"", value[:-1], value + b"x", bytes(len(value)), value * 9, None))
    if isinstance(value, str):
        return rng.choice(("", value + "x", "v", "kv", "float32", "x" * 300, "\0", None))
    return rng.choice((*NUMBERS, 0.37, 1e300, None, [], {}, "1", b"1", not value))


def mutated(data, rng, others):
    """``data`` with one thing in what it says replaced, or with a few of its bytes changed."""
    if rng.random() < 0.5:
        return msgspec.msgpack.encode(replaced(msgspec.msgpack.decode(data), rng))
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.choice((1, 2, 4, 8, 64))]
            case 3:
                chosen = rng.choice(INTERESTING)
                data[at : at + rng.choice((0, 1, len(chosen)))] = chosen
            case 4:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at : at + rng.choice((0, 8, 1 << 20))] = other[start : start + 64]
            case 5:
                data[at:at] = data[at : at + rng.choice((1, 8, 64))]
            case 6:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
    return bytes(data)


class Fuzz:
    """An engine that lends, one that fetches, and hostile peers of both."""

    def __init__(self, seed):
        self.rng, self.seen, self.problems = random.Random(seed), Counter(), []
        self.world, self.said, self.number = World(), LineMessage(), 0
        wire.encode = self.said.encode
        self.lender, self.reader = self.engine("auto"), self.engine("auto")
        self.liar = self.engine("auto")  # whom the reader fetches from
        for mode in ("direct", "staged"):
            one, other = self.engine(mode), self.engine(mode)
            self.honest(one, other)
            for engine in (one, other):
                self.leave(engine)
        self.honest(self.lender, self.reader)
        self.honest(self.liar, self.reader)
        sides = (self.said.asked, self.said.answered, self.said.bodies)
        self.asked, self.answered, self.bodies = (sorted(side) for side in sides)
        self.channel = self.world.network.channel()
        self.stranger = None

    def engine(self, mode):
        return Engine(self.world, MODEL, num_blocks=12, staging=(4, 1), mode=mode)

    def leave(self, engine):
        engine.stop()
        self.world.engines.remove(engine)

    def fetch(self, lender, reader):
        """A fetch that has begun; its name, the seed of what is lent, and what is to be called."""
        self.number += 1
        name, seed = f"r{self.number}", self.number % 1000
        lender.caches[0].fill(TABLE, seed)
        terms = Terms(name, f"lease of {name}", (TABLE,), TOKENS, b"d", 60.0)
        lender.put(Grant(terms))
        reader.put(Fetch(name, lender.source(terms), (tuple(enumerate(MINE)),), TOKENS, b"d"))
        return name, seed, lambda: True

    def stream(self, lender, reader):
        """Likewise, of a prompt whose first block is computed; what computes the rest, too."""
        self.number += 1
        name, seed = f"r{self.number}", self.number % 1000
        prefill = Prefill(lender, TOKENS, seed, free=list(reversed(TABLE)))
        fetch_early(reader, name, prefill, MINE, WAIT_S)
        prefill.compute(MODEL.block_tokens)
        return name, seed, prefill.finish

    def begin(self, lender, reader):
        """A fetch of either kind."""
        return self.rng.choice((self.fetch, self.stream))(lender, reader)

    def honest(self, lender, reader):
        """Fetches between two that say what they should must be right, in the end."""
        for begin in (self.fetch, self.stream):
            self.right(begin, lender, reader)

    def right(self, begin, lender, reader):
        """One of them, tried until it is."""
        for _ in range(6):
            name, seed, finish = begin(lender, reader)
            self.world.go_on(5, seconds=0.2)
            finish()
            for _ in range(20):
                self.world.go_on(5, seconds=0.2)
                if name in reader.ended:
                    break
            ended = reader.ended.pop(name, "nothing")
            if ended == [None]:
                self.seen["honest fetches"] += 1
                if not reader.caches[0].holds_fill(tuple(enumerate(MINE)), seed, TOKENS):
                    self.problems.append(f"{name} is wrong")
                return
            self.world.go_on(10, seconds=2.0)  # slots leave quarantine, backoffs end
        self.problems.append(f"no honest fetch goes well any more: {ended}")

    def guarded(self, engines):
        """What of their memory nobody may change."""
        kept = []
        for engine in engines:
            cache = engine.caches[0]
            if engine is self.reader:
                for layer in cache.layers:
                    for part in range(cache.parts):
                        cache.cells(layer, part)[list(MINE)] = 0
            kept.append(cache.memory.copy())
        return kept

    def ask(self, count):
        """Requests to the engine that lends, of which some leases stand."""
        if self.stranger is None or self.peer.state is not PeerState.READY:
            settings = self.lender.settings
            self.stranger = Dialer(
                self.channel, self.world.clock, settings.fingerprint, settings.secret, 30.0
            )
            self.peer = self.stranger.greet(self.lender.addresses[0])
            while self.peer.state is PeerState.GREETING:
                self.turn()
            self.seen["greetings"] += 1
        for _ in range(count):
            if self.peer.state is PeerState.READY:
                with self.said.saying(self.mutant(self.asked)):
                    self.stranger.calls.tell(self.peer, wire.Gone(lease_ids=[]))
        self.turn()

    def turn(self):
        self.lender.step()
        for frame in self.channel.poll(0):
            with contextlib.suppress(WireError):
                self.stranger.receive(frame)
        self.stranger.tick()

    def answer(self, count):
        """Answers to the engine that fetches, in place of right ones and besides them."""
        name, _, finish = self.begin(self.liar, self.reader)
        listener, links = self.liar.movers[0].listener, set()
        honest = listener.answer

        def answer(link, message):
            links.add(link)
            seq = getattr(message, "seq", None)
            for _ in range(self.rng.randrange(3)):
                data = self.mutant(self.answered)
                if seq is not None and self.rng.random() < 0.5:
                    data = mutated(REAL(message), self.rng, self.answered)
                with self.said.saying(data):
                    honest(link, message)
            if self.rng.random() < 0.7:
                honest(link, message)

        listener.answer = answer
        self.world.go_on(4)
        finish()
        self.world.go_on(4)
        for link in links:
            for _ in range(count // len(links)):
                with self.said.saying(self.mutant(self.answered)):
                    honest(link, wire.Gone(lease_ids=[]))
        self.world.go_on(8, seconds=0.1)
        if name not in self.reader.ended:
            self.world.go_on(10, seconds=2.0)
        listener.answer = honest
        if self.reader.ended.pop(name, None) is None:
            self.problems.append(f"the fetch {name} never ended")

    def describe(self, count):
        """Welcome bodies; one that decodes is greeted by the engine that fetches."""
        for _ in range(count):
            body = self.mutant(self.bodies)
            try:
                wire.decode_body(body)
            except WireError:
                continue
            self.seen["bodies that decode"] += 1
            if self.rng.random() > GREETED:
                continue
            liar, self.said.body = self.engine("auto"), body
            name, _, finish = self.begin(liar, self.reader)
            self.world.go_on(8)
            finish()
            self.world.go_on(8, seconds=2.0)
            self.said.body = None
            self.seen["bodies greeted"] += 1
            if self.reader.ended.pop(name, None) is None:
                self.problems.append(f"the fetch {name} never ended")
            self.leave(liar)

    def mutant(self, side):
        self.seen["frames"] += 1
        data = mutated(self.rng.choice(side), self.rng, side)
        if side is not self.bodies:
            with contextlib.suppress(WireError):
                wire.decode(data)
                self.seen["frames that decode"] += 1
        return data

    def go(self, frames):
        looked, honest_at = [], 0
        while self.seen["frames"] < frames and not self.problems:
            kept = self.guarded((self.lender, self.reader, self.liar))
            lent = self.lender.caches[0].memory.copy()
            drawn = self.rng.random()
            if drawn < 0.1:
                self.describe(AT_ONCE)
            elif drawn < 0.3:
                self.answer(4 * AT_ONCE)
            else:
                for _ in range(10):
                    self.ask(AT_ONCE)
            if not np.array_equal(self.lender.caches[0].memory, lent):
                self.problems.append("the lender's memory changed")
            if not np.array_equal(self.guarded((self.reader,))[0], kept[1]):
                self.problems.append("memory was written that no fetch was of")
            self.world.clock.advance(0.05)
            if self.seen["frames"] >= honest_at:
                honest_at += HONEST_EVERY
                self.honest(self.lender, self.reader)
                self.honest(self.liar, self.reader)
                self.count_unexpected()
            if self.seen["frames"] >= (len(looked) + 1) * frames / 10:
                looked.append(resident())
        if len(looked) > 1 and looked[-1] - looked[0] > GROWTH:
            self.problems.append(f"{(looked[-1] - looked[0]) / MIB:.1f} MiB more than at first")
        return looked

    def count_unexpected(self):
        for engine in (self.lender, self.reader, self.liar):
            stats = engine.movers[0].take_stats() or {}
            self.seen["unexpected errors"] += stats.get("num_unexpected_errors", 0)


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(frames, seed):
    """A report."""
    began = time.monotonic()
    try:
        fuzz = Fuzz(seed)
        looked = fuzz.go(frames)
    finally:
        wire.encode = REAL
    return {
        "seed": seed,
        **fuzz.seen,
        "memory_mib": [round(one / MIB, 1) for one in looked],
        "seconds": round(time.monotonic() - began),
        "problems": fuzz.problems[:10],
    }


if __name__ == "__main__":
    main(__doc__, "frames", run)
