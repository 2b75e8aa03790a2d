"""Prompts that are read while they are computed: never wrong KV, always an end, nothing left.

One producer engine computes prompts step by step, and two consumer engines, of other block sizes,
dtypes and ranks, read what is complete. Preemption, abort, another end than was said, lost and
repeated frames, failing reads, and the death of either side come between any two steps. Whoever
owns a block scribbles over it the moment it gives it away.
"""

import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kit.engines import Engine, World
from kit.prefill import Prefill, fetch_early, scribble

from kvconnect.orders import Cancel
from kvconnect.testing import Fault
from kvconnect.testing.faulty import Plan
from kvconnect_bench.caches import Model

MODEL = Model(layers=2, heads=2, block_tokens=2, content=4, dtype="bfloat16")
BLOCKS = 12
LOAD_S, WAIT_S = 12.0, 20.0
QUIET_S = 80

picks = st.integers(0, 1 << 16)
rounds = st.sampled_from([0, 0, 1, 1, 2, 3, 6])
# of a consumer: dtype, tokens of a block, ranks, mode; bf16 in blocks of 2 may be read directly
shapes = st.sampled_from(
    [
        ("bfloat16", 2, 1, "auto"),
        ("bfloat16", 2, 2, "direct"),
        ("bfloat16", 2, 2, "staged"),
        ("bfloat16", 4, 1, "auto"),
        ("bfloat16", 3, 2, "auto"),
        ("fp8_e4m3", 4, 1, "auto"),
        ("fp8_e4m3", 2, 2, "auto"),
    ]
)


@dataclass
class Request:
    """What a consumer's scheduler knows of a request."""

    request_id: str
    engine: Engine
    prefill: Prefill
    pairs: tuple
    awaited: set[int]
    cancelled: bool = False
    outcomes: dict = field(default_factory=dict)


class StreamMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.world = World(held=True)
        self.clock, self.network = self.world.clock, self.world.network
        self.numbers = itertools.count()
        self.prefills, self.requests = [], []
        self.received_well = 0

    @initialize(
        p=st.integers(1, 2),
        layout=st.sampled_from(["LBHNC", "LBNHC"]),
        consumers=st.tuples(shapes, shapes),
        polls=st.tuples(st.integers(0, 3), st.integers(0, 2)),
        slots=st.integers(3, 8),
    )
    def engines_start(self, p, layout, consumers, polls, slots):
        self.usual = Plan(late_polls=polls[0], done_polls=polls[1])
        timeouts = {"handshake_timeout_s": 3.0, "load_timeout_s": LOAD_S, "lease_max_s": 20.0}
        common = timeouts | {"staging": (slots, 1)}
        self.producer = Engine(self.world, MODEL, BLOCKS, layout, p, **common)
        self.consumers = [
            Engine(
                self.world,
                replace(MODEL, dtype=dtype, block_tokens=size),
                BLOCKS,
                "LBHNC",
                ranks,
                mode=mode,
                **common,
            )
            for dtype, size, ranks, mode in consumers
        ]
        for engine in self.world.engines:
            self.begin(engine)
        self.all_is_well()

    def begin(self, engine):
        engine.free = list(range(BLOCKS))
        for cache in engine.caches:
            scribble(cache, engine.free)
        for transport in engine.transports:
            transport.usual = self.usual

    # -- the producer's scheduler --------------------------------------------------------

    @rule(
        tokens=st.integers(1, 11),
        consumer=st.integers(0, 1),
        early=st.booleans(),
        skipped=st.integers(0, 2),
        on=rounds,
    )
    def a_request_comes(self, tokens, consumer, early, skipped, on):
        prefill = self.prefill(tokens)
        self.go_on(0 if early else on)
        self.fetch(prefill, consumer, skipped)
        self.go_on(on)

    @rule(
        tokens=st.integers(4, 11),
        done=st.integers(2, 8),
        consumer=st.integers(0, 1),
        skipped=st.integers(0, 2),
        on=st.sampled_from([0, 1, 2, 3, 4, 6, 9]),
    )
    def a_request_is_half_computed(self, tokens, done, consumer, skipped, on):
        prefill = self.prefill(tokens)
        self.fetch(prefill, consumer, skipped)
        self.go_on(10)
        if prefill.compute(min(done, tokens)):
            prefill.done = min(done, tokens)
        self.go_on(on)

    def prefill(self, tokens):
        seed = next(self.numbers) + 1
        prefill = Prefill(self.producer, tokens, seed, self.producer.free)
        prefill.held_by = set(range(len(self.producer.caches)))
        prefill.done = 0
        self.prefills.append(prefill)
        return prefill

    def computing(self, number):
        """One of the requests that are computed, if there is any."""
        running = [x for x in self.prefills if x.state == "promised"]
        return running[number % len(running)] if running else None

    @rule(number=picks, tokens=st.integers(1, 6), on=rounds)
    def a_step(self, number, tokens, on):
        if prefill := self.computing(number):
            done = min(prefill.done + tokens, prefill.tokens)
            if prefill.compute(done):
                prefill.done = done
            self.go_on(on)

    @rule(number=picks, on=rounds)
    def preempted(self, number, on):
        if prefill := self.computing(number):
            prefill.preempt()
            prefill.done = 0
            self.go_on(on)

    @rule(number=picks, other=picks, on=rounds)
    def finished(self, number, other, on):
        if prefill := self.computing(number):
            fewer = prefill.tokens - (other % 8 == 0)
            if fewer >= max(prefill.done, 1):
                prefill.finish(fewer)
            self.go_on(on)

    @rule(number=picks, chance=st.integers(0, 2), on=rounds)
    def aborted(self, number, chance, on):
        if chance == 0 and (prefill := self.computing(number)):
            prefill.abort()
            self.go_on(on)

    @rule(chance=st.integers(0, 15), consumer=st.integers(0, 1), on=rounds)
    def an_engine_restarts(self, chance, consumer, on):
        if chance == 0:
            self.restart(self.producer)
            for prefill in self.prefills:
                if prefill.state in ("promised", "granted"):
                    prefill.state = "lost"
        elif chance == 1:
            engine = self.consumers[consumer]
            self.restart(engine)
            for request in self.requests:
                if request.engine is engine:
                    request.awaited = set()
        self.go_on(on)

    def restart(self, engine):
        engine.stop()
        engine.start()
        self.begin(engine)

    # -- the consumers' schedulers -------------------------------------------------------

    @precondition(lambda self: self.prefills)
    @rule(number=picks, consumer=st.integers(0, 1), skipped=st.integers(0, 2), on=rounds)
    def another_reader(self, number, consumer, skipped, on):
        self.fetch(self.prefills[number % len(self.prefills)], consumer, skipped)
        self.go_on(on)

    def fetch(self, prefill, consumer, skipped=0):
        """``skipped``: blocks of our own prefix cache."""
        engine = self.consumers[consumer]
        count = -(-prefill.tokens // engine.caches[0].model.block_tokens)
        places = range(min(skipped, count - 1), count)
        if len(engine.free) < len(places):
            return None
        pairs = tuple((place, engine.free.pop()) for place in places)
        ranks = set(range(len(engine.movers)))
        request = Request(f"d{next(self.numbers)}", engine, prefill, pairs, ranks)
        self.requests.append(request)
        fetch_early(engine, request.request_id, prefill, pairs, WAIT_S)
        return request

    @rule(number=picks, on=rounds)
    def cancel(self, number, on):
        fetching = [r for r in self.requests if r.awaited and not r.cancelled]
        if fetching:
            request = fetching[number % len(fetching)]
            request.cancelled = True
            request.engine.put(Cancel(request.request_id))
            self.go_on(on)

    # -- the world -----------------------------------------------------------------------

    @rule(times=st.integers(1, 8))
    def go_on(self, times):
        """Everybody steps and every frame arrives."""
        for _ in range(times):
            for engine in self.world.engines:
                for rank in range(len(engine.movers)):
                    self.step_rank(engine, rank)
                self.network.flush()

    @rule(which=picks)
    def step(self, which):
        places = [(e, r) for e in self.world.engines for r in range(len(e.movers))]
        self.step_rank(*places[which % len(places)])

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.5, 5.0, LOAD_S]), on=rounds)
    def time_passes(self, seconds, on):
        self.clock.advance(seconds)
        self.go_on(on)

    @precondition(lambda self: self.network.pending)
    @rule(number=picks, act=st.sampled_from(["deliver", "deliver", "drop", "repeat"]))
    def the_network(self, number, act):
        index = number % len(self.network.pending)
        if self.network.pending[index].data is None:
            act = "deliver"  # a broken connection is told sooner or later
        getattr(self.network, act)(index)

    @rule(which=picks, fault=st.sampled_from(Fault), late=st.integers(0, 3), done=st.integers(0, 3))
    def a_transfer_will_go_wrong(self, which, fault, late, done):
        transports = [t for e in self.world.engines for t in e.transports]
        transports[which % len(transports)].plan(fault, late, done)

    def step_rank(self, engine, rank):
        outcome = engine.step_rank(rank)
        for request_id in outcome.sent:
            (prefill,) = [x for x in self.prefills if x.request_id == request_id]
            assert engine is self.producer and prefill.state == "granted"
            assert rank in prefill.held_by, f"rank {rank} freed {request_id} twice"
            prefill.held_by.remove(rank)
            if not prefill.held_by:
                prefill.freed()
        for request_id in outcome.received:
            self.received(engine, rank, request_id, outcome.failed.get(request_id))

    def received(self, engine, rank, request_id, error):
        (request,) = [r for r in self.requests if r.request_id == request_id]
        assert rank in request.awaited, f"rank {rank} reported {request_id} twice, or after all"
        request.awaited.remove(rank)
        request.outcomes[rank] = error
        note(f"rank {rank}: {request_id} ended: {error}")
        cache, prefill = engine.caches[rank], request.prefill
        if error is None and not request.cancelled:
            assert cache.holds_fill(request.pairs, prefill.seed, prefill.tokens), "WRONG KV"
            assert prefill.state != "promised", "it was received before it was leased"
            self.received_well += 1
        scribble(cache, [block for _, block in request.pairs])
        if not request.awaited:
            engine.free += [block for _, block in request.pairs]

    # -- the end -------------------------------------------------------------------------

    def teardown(self):
        if not hasattr(self, "producer"):
            return
        for prefill in self.prefills:
            if prefill.state == "promised":
                prefill.abort()
        for transport in (t for e in self.world.engines for t in e.transports):
            transport.forget_plans()
        for _ in range(QUIET_S):
            self.go_on(1)
            self.clock.advance(1.0)
        assert not [r for r in self.requests if r.awaited], "a fetch never ended"
        assert not [x for x in self.prefills if x.state == "granted"], "blocks were never freed"
        for engine in self.world.engines:
            for mover, transport in zip(engine.movers, engine.transports, strict=True):
                held = mover.held()
                held.pop("staged_readers", None)
                assert not any(held.values()), held
                assert transport.running == 0
                assert mover.wait_s() > 0.5, "an idle mover spins"
        self.all_is_well()
        for engine in self.world.engines:
            engine.stop()

    def all_is_well(self):
        """Whatever happened, a new prompt is streamed to both."""
        for consumer in (0, 1):
            prefill = self.prefill(9)
            request = self.fetch(prefill, consumer)
            self.go_on(24)
            assert prefill.compute(6)
            self.go_on(24)
            assert request.awaited and not request.outcomes, f"{request} ended early"
            size = request.engine.caches[0].model.block_tokens
            first = request.pairs[: 6 // size]
            for cache in request.engine.caches:
                assert cache.holds_fill(first, prefill.seed, 6), "nothing crossed meanwhile"
            assert prefill.finish()
            self.go_on(24)
            assert set(request.outcomes.values()) == {None}, f"{request.outcomes}"
            assert not request.awaited and prefill.state == "freed"


StreamMachine.TestCase.settings = settings(
    stateful_step_count=40, max_examples=settings().max_examples // 2
)
TestStreams = pytest.mark.slow(StreamMachine.TestCase)
