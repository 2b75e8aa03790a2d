"""Prefill and decode engines under loss, delay, restarts and abuse: never wrong KV, always an end.

One producer engine and two consumer engines, of one or two ranks each, as movers that the test
steps; real bytes move. The producer scribbles over blocks the moment its mover says that they
are sent, and the consumers over theirs the moment a fetch is reported.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit import engines

from kvconnect.control.wire import Address
from kvconnect.lease import Terms
from kvconnect.orders import (
    Cancel,
    Fetch,
    Grant,
    Promise,
    Release,
    RenewLease,
    Source,
    Withdraw,
)
from kvconnect.testing import Fault
from kvconnect.testing.faulty import Plan

MODEL = engines.TINY
BLOCKS = 8
TTL_S, LOAD_S, WAIT_S = 5.0, 12.0, 8.0
QUIET_S = 60

picks = st.integers(0, 1 << 16)
rounds = st.sampled_from([0, 0, 1, 1, 2, 3, 6])  # a warm fetch takes 4, greeting 3 more


@dataclass
class Lease:
    """What the producer's scheduler knows of a request."""

    request_id: str
    lease_id: str
    seed: int
    shards: tuple[Address, ...]
    blocks: list[int] = field(default_factory=list)
    state: str = "promised"
    held_by: set[int] = field(default_factory=set)  # ranks that have not reported it as sent

    @property
    def digest(self):
        return self.seed.to_bytes(8, "big")


@dataclass
class Request:
    """What a consumer's scheduler knows of a request."""

    request_id: str
    lease: Lease
    source: Source
    prompt_is_another: bool
    blocks: tuple = ()
    state: str = "watching"
    awaited: set[int] = field(default_factory=set)  # ranks that have not reported it
    cancelled: bool = False
    outcomes: dict = field(default_factory=dict)


class Engine(engines.Engine):
    """An engine and its scheduler's free blocks."""

    def start(self):
        for cache in self.caches:
            scribble(cache, range(BLOCKS))
        self.free = set(range(BLOCKS))
        super().start()
        for transport in self.transports:
            transport.usual = self.world.usual

    def allocate(self, count):
        """Ids of ``count`` free blocks, or None."""
        if len(self.free) < count:
            return None
        return [self.free.pop() for _ in range(count)]


def scribble(cache, blocks):
    """Somebody else's KV, other bytes at every place."""
    for layer, part in itertools.product(MODEL.names, range(cache.parts)):
        cache.cells(layer, part)[list(blocks)] += 101


class MoverMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.world = engines.World(held=True)
        self.clock, self.network = self.world.clock, self.world.network
        self.numbers = itertools.count()
        self.leases = []
        self.requests = []
        self.succeeded = 0

    @initialize(
        p=st.integers(1, 2),
        d=st.integers(1, 2),
        layouts=st.tuples(*[st.sampled_from(["LBHNC", "LBNHC"])] * 3),
        warm=st.booleans(),
        polls=st.tuples(st.integers(0, 3), st.integers(0, 2)),
    )
    def engines_start(self, p, d, layouts, warm, polls):
        self.world.usual = Plan(late_polls=polls[0], done_polls=polls[1])
        timeouts = {"handshake_timeout_s": 3.0, "load_timeout_s": LOAD_S, "lease_max_s": 20.0}
        self.producer, *self.consumers = (
            Engine(self.world, MODEL, BLOCKS, layout, tp_size, **timeouts)
            for layout, tp_size in zip(layouts, (p, d, 1), strict=True)
        )
        self.shadows = {id(c): self.copy_of(c) for e in self.consumers for c in e.caches}
        if warm:
            self.all_is_well_again()

    # -- the producer's scheduler --------------------------------------------------------

    @rule(reuse=st.booleans())
    def promise(self, reuse):
        self.promise_lease(reuse)

    def promise_lease(self, reuse=False):
        number = next(self.numbers)
        live = {x.request_id for x in self.leases if x.state in ("promised", "granted")}
        over = [x.request_id for x in self.leases if x.request_id not in live]
        request_id = over[-1] if reuse and over else f"p{number}"
        shards = tuple(self.producer.addresses)
        lease = Lease(request_id, f"g{number}", number + 1, shards)
        self.leases.append(lease)
        self.producer.put(Promise(lease.request_id, lease.lease_id))
        return lease

    @rule(number=picks, count=st.integers(1, 2), on=rounds)
    def grant(self, number, count, on):
        waiting = [x for x in self.leases if x.state == "promised"]
        if waiting:
            self.grant_lease(waiting[number % len(waiting)], count)
            self.go_on(on)

    @rule(
        count=st.integers(1, 2),
        consumer=st.integers(0, 1),
        ticket=st.booleans(),
        early=st.booleans(),
        on=rounds,
    )
    def a_request_comes(self, count, consumer, ticket, early, on):
        lease = self.promise_lease()
        if not early:
            self.grant_lease(lease, count)
        self.fetch_request(self.watch_lease(lease, consumer, ticket))
        self.go_on(on)

    def grant_lease(self, lease, count):
        blocks = self.producer.allocate(count)
        if blocks is None:
            return
        lease.blocks, lease.state = blocks, "granted"
        lease.held_by = set(range(len(self.producer.caches)))
        for cache in self.producer.caches:
            cache.fill(blocks, lease.seed)
        table = (tuple(blocks),)
        self.producer.put(
            Grant(Terms(lease.request_id, lease.lease_id, table, count, lease.digest, TTL_S))
        )

    def some_lease(self, number):
        """Of all leases in one case of eight, else one that lives if there is any."""
        live = [x for x in self.leases if x.state in ("promised", "granted")]
        chosen = live if live and number % 8 else self.leases
        return chosen[number // 8 % len(chosen)]

    @rule(number=picks)
    def withdraw(self, number):
        waiting = [x for x in self.leases if x.state == "promised"]
        if waiting:
            self.withdraw_lease(waiting[number % len(waiting)])

    def withdraw_lease(self, lease):
        lease.state = "withdrawn"
        self.producer.put(Withdraw(lease.lease_id))

    @rule(chance=st.integers(0, 3), consumer=st.integers(0, 1))
    def an_engine_restarts(self, chance, consumer):
        if chance == 0:
            self.the_producer_restarts()
        elif chance == 1:
            self.a_consumer_restarts(consumer)

    def the_producer_restarts(self):
        self.producer.stop()
        self.producer.start()
        for lease in self.leases:
            if lease.state in ("promised", "granted"):
                lease.state = "lost"

    # -- the consumers' schedulers -------------------------------------------------------

    @precondition(lambda self: self.leases)
    @rule(number=picks, consumer=st.integers(0, 1), ticket=st.booleans(), another=picks)
    def watch(self, number, consumer, ticket, another):
        lease = self.some_lease(number)
        self.watch_lease(lease, consumer, ticket, prompt_is_another=another % 8 == 0)

    def watch_lease(self, lease, consumer, ticket=True, prompt_is_another=False):
        if ticket:
            source = Source(lease.shards, lease.request_id, lease.lease_id, TTL_S)
        else:
            shards = (self.producer.key_addresses[0],)
            wait_s = WAIT_S * (lease.seed % 2)  # some are asked for while they are computed
            source = Source(shards, lease.request_id, None, TTL_S, wait_s)
        request = Request(f"d{next(self.numbers)}", lease, source, prompt_is_another)
        request.engine = self.consumers[consumer]
        self.requests.append(request)
        request.engine.put(RenewLease(request.request_id, source))
        return request

    @rule(number=picks, places=st.sets(st.integers(0, 1), min_size=1), on=rounds)
    def fetch(self, number, places, on):
        watching = [r for r in self.requests if r.state == "watching"]
        if watching:
            self.fetch_request(watching[number % len(watching)], places)
            self.go_on(on)

    def fetch_request(self, request, places=(0, 1)):
        lease = request.lease
        places = sorted(p for p in places if p < max(1, len(lease.blocks)))
        blocks = request.engine.allocate(len(places))
        if blocks is None:
            return
        request.state, request.blocks = "fetching", tuple(zip(places, blocks, strict=True))
        request.awaited = set(range(len(request.engine.movers)))
        tokens = max(1, len(lease.blocks))
        digest = b"another" if request.prompt_is_another else lease.digest
        request.engine.put(
            Fetch(request.request_id, request.source, (request.blocks,), tokens, digest)
        )

    @precondition(lambda self: self.leases)
    @rule(number=picks, consumer=st.integers(0, 1), ticket=st.booleans(), another=picks, on=rounds)
    def a_ticket_is_used_again(self, number, consumer, ticket, another, on):
        lease = self.some_lease(number)
        self.fetch_request(self.watch_lease(lease, consumer, ticket, another % 4 == 0))
        self.go_on(on)

    @rule(number=picks)
    def release(self, number):
        watching = [r for r in self.requests if r.state == "watching"]
        if watching:
            self.release_request(watching[number % len(watching)])

    def release_request(self, request):
        request.state = "released"
        request.engine.put(Release(request.request_id, request.source))

    @rule(number=picks, on=rounds)
    def cancel(self, number, on):
        fetching = [r for r in self.requests if r.state == "fetching"]
        if fetching:
            request = fetching[number % len(fetching)]
            request.cancelled = True
            request.engine.put(Cancel(request.request_id))
            self.go_on(on)

    def a_consumer_restarts(self, consumer):
        engine = self.consumers[consumer]
        engine.stop()
        engine.start()
        for cache in engine.caches:
            self.shadows[id(cache)] = self.copy_of(cache)
        for request in self.requests:
            if request.engine is engine and request.state in ("watching", "fetching"):
                request.state, request.awaited = "lost", set()

    # -- the world -----------------------------------------------------------------------

    @rule(which=picks)
    def step(self, which):
        places = [(e, r) for e in self.engines for r in range(len(e.movers))]
        self.step_rank(*places[which % len(places)])

    @rule(times=st.integers(1, 6))
    def go_on(self, times):
        """Everybody steps and every frame arrives."""
        for _ in range(times):
            for engine in self.engines:
                for rank in range(len(engine.movers)):
                    self.step_rank(engine, rank)
                self.network.flush()

    @rule(seconds=st.sampled_from([0.3, 0.3, 1.0, 1.0, TTL_S / 2, TTL_S, LOAD_S]), on=rounds)
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

    @rule(
        which=picks,
        fault=st.sampled_from(Fault),
        late_polls=st.integers(0, 3),
        done_polls=st.integers(0, 3),
    )
    def a_read_will_go_wrong(self, which, fault, late_polls, done_polls):
        transports = [t for e in self.consumers for t in e.transports]
        transports[which % len(transports)].plan(fault, late_polls, done_polls)

    @property
    def engines(self):
        return self.world.engines

    def step_rank(self, engine, rank):
        outcome = engine.step_rank(rank)
        assert outcome.failed.keys() <= outcome.received
        for request_id in outcome.sent:
            self.sent(engine, rank, request_id)
        for request_id in outcome.received:
            self.received(engine, rank, request_id, outcome.failed.get(request_id))

    def sent(self, engine, rank, request_id):
        assert engine is self.producer
        (lease,) = [x for x in self.leases if x.request_id == request_id and x.state == "granted"]
        assert rank in lease.held_by, f"rank {rank} freed {request_id} twice"
        lease.held_by.remove(rank)
        scribble(engine.caches[rank], lease.blocks)
        if not lease.held_by:
            lease.state = "freed"
            engine.free |= set(lease.blocks)

    def received(self, engine, rank, request_id, error):
        (request,) = [r for r in self.requests if r.request_id == request_id]
        assert request.state == "fetching", f"{request_id} is {request.state}, yet reported"
        assert rank in request.awaited, f"rank {rank} reported {request_id} twice"
        request.awaited.remove(rank)
        request.outcomes[rank] = error
        note(f"rank {rank}: {request_id} ended: {error}")
        cache = engine.caches[rank]
        if error is None and not request.cancelled:
            assert not request.prompt_is_another, "another prompt's KV was handed over"
            assert cache.holds_fill(request.blocks, request.lease.seed), "WRONG KV"
            self.succeeded += 1
        ids = [block for _, block in request.blocks]
        scribble(cache, ids)
        self.shadows[id(cache)] = self.copy_of(cache)
        if not request.awaited:
            request.state = "ended"
            engine.free |= set(ids)

    # -- what must hold ------------------------------------------------------------------

    def copy_of(self, cache):
        return {(n, p): cache.cells(n, p).copy() for n in MODEL.names for p in range(cache.parts)}

    @invariant()
    def only_blocks_that_are_being_fetched_change(self):
        for engine in getattr(self, "consumers", ()):
            for rank, cache in enumerate(engine.caches):
                busy = {
                    block
                    for r in self.requests
                    if r.engine is engine and rank in r.awaited
                    for _, block in r.blocks
                }
                idle = sorted(set(range(BLOCKS)) - busy)
                for (name, part), cells in self.shadows[id(cache)].items():
                    live = cache.cells(name, part)
                    assert np.array_equal(live[idle], cells[idle]), "a block changed after its end"

    def teardown(self):
        if not hasattr(self, "producer"):
            return
        self.quiet_down()
        for request in self.requests:
            assert request.state in ("ended", "released", "lost"), f"{request} never ended"
        for lease in self.leases:
            assert lease.state != "granted", f"{lease} was never freed"
        for engine in self.engines:
            for mover, transport in zip(engine.movers, engine.transports, strict=True):
                assert transport.running == 0
                assert mover.wait_s() > 0.5, "an idle mover spins"
        self.all_is_well_again()
        for engine in self.engines:
            engine.stop()

    def quiet_down(self):
        """All scheduled work is ended as a scheduler would; then time passes without faults."""
        for request in self.requests:
            if request.state == "watching":
                self.release_request(request)
        for lease in self.leases:
            if lease.state == "promised":
                self.withdraw_lease(lease)
        for transport in (t for e in self.engines for t in e.transports):
            transport.forget_plans()
        for _ in range(QUIET_S):
            self.go_on(1)
            self.clock.advance(1.0)
            self.only_blocks_that_are_being_fetched_change()

    def all_is_well_again(self):
        """Whatever happened, a new request is served at once."""
        for ticket, consumer in itertools.product((True, False), (0, 1)):
            lease = self.promise_lease()
            self.grant_lease(lease, 2)
            request = self.watch_lease(lease, consumer, ticket)
            self.fetch_request(request)
            self.go_on(16)
            errors = set(request.outcomes.values())
            assert request.state == "ended" and errors == {None}, f"{request} after {errors}"


MoverMachine.TestCase.settings = settings(
    stateful_step_count=30, max_examples=settings().max_examples // 2
)
TestMovers = pytest.mark.slow(MoverMachine.TestCase)
