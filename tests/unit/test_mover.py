"""The mover's own business: fences, its thread, faults, stats, waiting."""

import os
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from kit.engines import Engine, World
from kit.memory import held

from kvconnect.control.channel import ZmqChannel
from kvconnect.mover import IDLE_WAIT_S, MOVED_S, THREAD_NAME, Mover
from kvconnect.orders import (
    Cancel,
    Fetch,
    Grant,
    Promise,
    Release,
    RenewLease,
    Revoke,
    Withdraw,
)
from kvconnect.stats import KEPT, Stats
from kvconnect.testing import Faulty
from kvconnect.testing.network import Network
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect_bench.caches import Cache, Model

PATIENCE_S = 60.0


def test_a_fetch_waits_for_its_fence_and_all_else_is_carried_out_at_once():
    """A Grant used to wait for an unrelated step: one more prefill to the first token."""
    world = World()
    p, d = Engine(world), Engine(world)
    lifted = []
    fetched, kept = p.terms("r1", [3], seed=7), p.terms("r3", [5], seed=9)
    p.caches[0].fill([3], 7)
    p.movers[0].put([Promise("r1", fetched.lease_id)], fence=lambda: bool(lifted))
    p.movers[0].put([Grant(fetched), Grant(kept)], fence=lambda: bool(lifted))
    released = p.lend("r2", [4], seed=8)
    fetch = Fetch("d1", p.source(fetched), (((0, 1),),), 1, fetched.digest)
    orders = [
        RenewLease("d3", p.source(kept)),
        fetch,
        Release("d2", p.source(released)),
    ]
    d.movers[0].put(orders, fence=lambda: bool(lifted))
    world.go_on()
    assert d.ended == {} and p.sent == ["r2"]
    assert d.movers[0].wait_s() <= 0.001, "a fence has no deadline: look again soon"
    lifted.append(True)
    world.go_on()
    assert d.ended == {"d1": [None]}
    assert sorted(p.sent) == ["r1", "r2"]


def test_fetches_keep_their_sequence_and_what_else_is_fenced_too():
    world = World()
    p, d = Engine(world), Engine(world)
    terms, lifted = [p.terms(f"r{i}", [3 + i], seed=i) for i in range(2)], []
    p.caches[0].fill([3, 4], 0)
    p.movers[0].put([Grant(t) for t in terms], lambda: bool(lifted), (Fetch, Grant))
    d.movers[0].put([Release("d", p.source(terms[0]))])
    world.go_on()
    assert p.sent == []
    lifted.append(True)
    world.go_on()
    d.movers[0].put([Release("d", p.source(terms[1]))])
    world.go_on()
    assert p.sent == ["r1"], "the first release came before there was a lease"


def test_a_fetch_that_is_cancelled_before_its_fence_is_reported_and_reads_nothing():
    world = World()
    p, d = Engine(world), Engine(world)
    terms, lifted = p.lend("r", [3], seed=7), []
    d.movers[0].put(
        [Fetch("d", p.source(terms), (((0, 1),),), 1, terms.digest)], lambda: bool(lifted)
    )
    world.go_on()
    d.movers[0].put([Cancel("d")], lambda: bool(lifted))
    world.go_on()
    assert d.ended == {"d": [None]}, "ended, and is no failure"
    assert p.sent == ["r"], "its lease is let go"
    lifted.append(True)
    world.go_on()
    assert d.ended == {"d": [None]}
    assert d.transports[0].submitted == []


@pytest.mark.parametrize("mode", ["direct", "staged"])
def test_who_reads_a_revoked_lease_is_late(mode):
    world = World()
    p, d = (Engine(world, staging=(4, 1), mode=mode) for _ in range(2))
    lease = p.lend("r", [3, 1], seed=7)
    d.put(Fetch("d", p.source(lease), (((0, 5), (1, 2)),), 2, lease.digest))
    while p.movers[0].wait_s():
        world.go_on(1)
    assert p.sent == [] and d.ended == {}, "it is being read"
    p.put(Revoke((lease.lease_id,)))
    p.step()
    p.caches[0].fill([3, 1], 8)
    world.go_on(40)
    assert p.sent == ["r"], "its blocks are free, though it was being read"
    ((error,),) = d.ended.values()
    assert error, "what was read may be the next owner's"
    p.put(Revoke((lease.lease_id,)))
    world.go_on(2)
    assert p.sent == ["r"], "once"


@pytest.mark.parametrize("block_tokens", [4, 16])
def test_a_mover_that_is_read_polls_only_for_who_reads_by_itself(block_tokens):
    """Used to poll for who has all written to it, too: some twenty times a step of a prompt."""
    world = World()
    small = Model(block_tokens=4)
    p, d = (
        Engine(world, model, num_blocks=8, staging=(4, 1))
        for model in (small, replace(small, block_tokens=block_tokens))
    )
    p.caches[0].fill([3, 1, 4, 2], 7)
    lease = replace(p.terms("r", [3, 1, 4, 2], seed=7), tokens=16)
    p.put(Grant(lease))
    table = tuple(enumerate(range(16 // block_tokens)))
    d.put(Fetch("d", p.source(lease), (table,), 16, lease.digest))
    polls = 0
    while not d.ended:
        world.go_on(1)
        counts = p.movers[0].held()
        sends = counts["chunks_wanted"] or counts["chunks_sending"]
        polls += not sends and not p.movers[0].wait_s()
    assert d.ended == {"d": [None]} and d.caches[0].holds_fill(table, seed=7)
    assert bool(polls) == (block_tokens == 4), "of equal blocks, which are read directly"


def test_a_lease_is_revoked_that_waits_for_the_device_to_be_granted():
    """Granted later, it would lend blocks that have another owner."""
    world = World()
    p = Engine(world)
    terms, lifted = p.terms("r", [3], seed=7), []
    p.movers[0].put([Grant(terms)], lambda: bool(lifted), (Grant,))
    p.put(Revoke((terms.lease_id,)))
    world.go_on(1)
    assert p.sent == ["r"]
    lifted.append(True)
    world.go_on(1)
    assert p.movers[0].held()["leases"] == 0


def test_the_engine_can_wait_until_its_orders_are_carried_out():
    world = World()
    p = Engine(world)
    (mover,) = p.movers
    lease = p.lend("r", [3], seed=7)
    mover.start()
    try:
        mover.put([Revoke((lease.lease_id,))])
        mover.wait_carried_out()
        assert mover.held()["leases"] == 0
    finally:
        mover.close()
    mover.wait_carried_out()  # and is not kept waiting by a thread that has ended


def test_a_peer_that_ended_is_not_asked_by_orders_of_the_same_step():
    world = World()
    p, d = Engine(world), Engine(world)
    lease = p.lend("r1", [3], seed=7)
    d.put(Fetch("d1", p.source(lease), (((0, 1),),), 1, lease.digest))
    world.go_on()
    p.stop()
    p.start()  # the broken connection waits in d's channel
    lease = p.lend("r2", [4], seed=8)
    d.put(Fetch("d2", p.source(lease), (((0, 2),),), 1, lease.digest))
    world.go_on()
    assert d.ended == {"d1": [None], "d2": [None]}
    assert d.caches[0].holds_fill([(0, 2)], seed=8)


def test_no_orders_are_no_work():
    world = World()
    engine = Engine(world)
    engine.movers[0].put([], fence=lambda: pytest.fail("asked without need"))
    world.go_on(1)
    assert engine.movers[0].wait_s() == IDLE_WAIT_S


def test_an_outcome_is_told_once_and_is_false_when_empty():
    world = World()
    p = Engine(world)
    p.lend("r", [3], seed=7, ttl_s=1)
    p.movers[0].step()
    world.clock.advance(1)
    p.movers[0].step()
    first, second = p.movers[0].take(), p.movers[0].take()
    assert first and first.sent == {"r"}
    assert not second


def test_what_was_measured_is_told_once():
    world = World()
    p, d = Engine(world), Engine(world)
    terms = p.lend("r", [3], seed=7)
    d.put(Fetch("d", p.source(terms), (((0, 1),),), 1, terms.digest))
    world.go_on()
    stats = d.movers[0].take_stats()
    assert stats["bytes_transferred"] == [8]
    assert len(stats["transfer_duration"]) == 1
    assert d.movers[0].take_stats() is None


def test_what_nobody_asks_for_is_kept_to_a_bound():
    """An engine without steps asks for nothing, whatever its mover measures."""
    reported, measured = Stats(), Stats()
    for number in range(KEPT + 2):
        measured.observe("descriptor_seconds", number)
        measured.count("num_fallbacks")
        reported.add(measured.take())
    stats = reported.take()
    assert stats == {
        "descriptor_seconds": list(range(2, KEPT + 2)),  # the latest
        "num_fallbacks": KEPT + 2,
    }


def test_expiries_are_counted():
    world = World()
    p = Engine(world)
    p.lend("r", [3], seed=7, ttl_s=1)
    world.go_on(3, seconds=1.0)
    assert p.movers[0].take_stats()["num_kv_expired_reqs"] == 1


def test_a_fault_of_ours_in_the_thread_is_raised_in_the_engine():
    world = World()
    engine = Engine(world)
    mover = engine.movers[0]
    mover.start()
    mover.put([Promise("r", "g")], lambda: 1 / 0, (Promise,))
    end = threading.Event()
    for _ in range(1000):
        try:
            mover.take()
        except ZeroDivisionError:
            break
        end.wait(0.005)
    else:
        pytest.fail("the fault was not raised")
    with pytest.raises(ZeroDivisionError):
        mover.take()
    mover.close()


def test_its_thread_begins_with_what_it_is_told():
    """As to make its device the current one, before any call makes a context on another."""
    mover = Engine(World()).movers[0]
    did, stepped, step = [], threading.Event(), mover.step

    def looked(wait_s):
        did.append("step")
        stepped.set()
        return step(0.0)

    mover.step = looked
    mover.start(lambda: did.append(threading.current_thread().name))
    try:
        assert stepped.wait(10)
        assert did[:2] == [THREAD_NAME, "step"]
    finally:
        mover.close()


def test_close_is_idempotent_and_gives_up_the_address():
    world = World()
    engine = Engine(world)
    engine.movers[0].start()
    engine.stop()
    engine.stop()
    assert world.network.listening == {}


def test_orders_after_close_are_harmless():
    engine = Engine(World())
    engine.stop()
    engine.put(Promise("r", "g"))


def make_threaded(channel, fabric, engine):
    cache = engine.caches[0]
    transport = Faulty(LoopbackTransport(cache.shard.regions, fabric))
    mover = Mover(engine.settings, cache.shard, transport, channel)
    mover.start()
    return mover


def test_movers_that_ended_leave_no_thread_file_or_memory():
    """A process may start its engine anew; a ZMQ context has two threads and several files."""
    looks = []
    for number in range(15):
        world = World()
        p, d = Engine(world), Engine(world)
        movers = [make_threaded(ZmqChannel("127.0.0.1", 0), world.fabric, one) for one in (p, d)]
        p.movers, p.addresses = movers[:1], [movers[0].address]
        terms = p.lend("r", [1], seed=1, ttl_s=300)
        movers[1].put([Fetch("d", p.source(terms), (((0, 1),),), 1, terms.digest)])
        until = time.monotonic() + PATIENCE_S
        while "d" not in (ended := movers[1].take()).received and time.monotonic() < until:
            time.sleep(0.001)
        assert ended.received == {"d"} and not ended.failed
        for mover in movers:
            mover.close()
        if number >= 5:  # what is made once is there
            looks.append((held(), len(os.listdir("/proc/self/task"))))
    (first, threads_first), (last, threads_last) = looks[0], looks[-1]
    assert (last.files, threads_last) == (first.files, threads_first)
    assert last.in_use - first.in_use < 18 * 20_000  # of 18 movers, each several times as large


def test_the_engines_thread_sees_a_fetch_end_without_asking_again_and_again():
    network, fabric, world = Network(), Fabric(), World()
    p, d = Engine(world), Engine(world)
    producer, consumer = (make_threaded(network.channel(), fabric, one) for one in (p, d))
    p.movers, p.addresses = [producer], [producer.address]
    try:
        for number in range(2):
            terms = p.lend(f"r{number}", [1], seed=1, ttl_s=300)
            order = Fetch(f"d{number}", p.source(terms), (((0, 1),),), 1, terms.digest)
            consumer.put([order])
            consumer.wait_carried_out()
            while not (ended := consumer.take()).received:
                assert consumer.wait_for_outcome(3600)
            assert ended.received == {f"d{number}"}
            assert not consumer.wait_for_outcome(0), "that was taken"
    finally:
        consumer.close()
        producer.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in memory", "zmq"])
def test_threads_and_real_time_serve_many_requests(kind):
    """The one test with threads: the same fetches, over either control channel."""
    network, fabric = Network(), Fabric()
    make = network.channel if kind == "in memory" else lambda: ZmqChannel("127.0.0.1", 0)
    world = World()
    p, d = Engine(world), Engine(world)
    producer, consumer = make_threaded(make(), fabric, p), make_threaded(make(), fabric, d)
    p.movers, p.addresses = [producer], [producer.address]
    ended, sent, pause = {}, set(), threading.Event()
    try:
        for number in range(20):
            terms = p.lend(f"r{number}", [number % 8], seed=number, ttl_s=30)
            source = p.source(terms)
            consumer.put([RenewLease(f"d{number}", source)])
            blocks = (((0, number % 8),),)
            consumer.put([Fetch(f"d{number}", source, blocks, 1, terms.digest)])
            for _ in range(4000):
                outcome = consumer.take()
                ended |= {r: outcome.failed.get(r) for r in outcome.received}
                sent |= producer.take().sent
                if len(ended) > number and len(sent) > number:
                    break
                pause.wait(0.001)
            assert ended[f"d{number}"] is None
            assert d.caches[0].holds_fill([(0, number % 8)], seed=number)
        assert len(sent) == 20
    finally:
        consumer.close()
        producer.close()


def test_a_cache_outlives_what_points_to_it():
    engine = Engine(World())
    (cache,) = engine.caches
    assert isinstance(cache, Cache)
    assert cache.shard.memory is cache.memory


def test_a_mover_says_what_it_holds_and_in_the_end_it_is_nothing():
    world = World()
    p, d = (Engine(world, staging=(4, 1), mode="staged") for _ in range(2))
    lease, unread = p.lend("r", [3, 1], seed=7), p.lend("unread", [2], seed=8)
    p.put(Promise("later", "g"))
    d.put(RenewLease("d", p.source(lease)), RenewLease("u", p.source(unread)))
    world.network.held = True
    p.step()
    d.step()
    assert (p.movers[0].held()["leases"], p.movers[0].held()["promises"]) == (2, 1)
    d.put(Fetch("d", p.source(lease), (((0, 5), (1, 2)),), 2, lease.digest))
    d.put(Release("u", p.source(unread)))
    seen = Counter()
    for _ in range(20):
        world.go_on(1)
        for mover in (*p.movers, *d.movers):
            seen |= Counter(mover.held())
    assert set(+seen) >= {"fetches", "staged_reads", "releases", "renewals", "receive_slots"}
    assert set(+seen) >= {"leases", "staged_readers", "gather_slots", "chunks_sending"}
    p.put(Withdraw("g"))
    world.go_on(2)
    assert d.ended == {"d": [None]}
    for mover in (*p.movers, *d.movers):
        assert {n for n, count in mover.held().items() if count} <= {"staged_readers"}


def test_what_takes_long_to_post_is_posted_on_without_a_pause(monkeypatch):
    """A pause after every slice cost direct reads a tenth, and half once they took a second."""
    world = World()
    engine = Engine(world)
    (mover,), (transport,) = engine.movers, engine.transports
    assert not mover.step()
    poll = transport.poll

    def posts():
        world.clock.advance(2 * MOVED_S)
        return poll()

    monkeypatch.setattr(transport, "poll", posts)
    assert mover.step()
