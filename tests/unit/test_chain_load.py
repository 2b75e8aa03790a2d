"""ChainLoader loads over real movers: leases, bytes, and what happens to both when a peer fails."""

import logging

import pytest
from kit.engines import Engine, World
from kit.log_lines import failed_loads

from kvconnect.chain.load import CancelLoad, ChainedLoad, ChainLoader, LoadDone, LoadUnit
from kvconnect.chain.plan import Rates
from kvconnect.offload.cache import CacheTier
from kvconnect.offload.eviction import make
from kvconnect.offload.jobs import Fill, Forget
from kvconnect.offload.tiers import KeyedChunk, OffloadTier
from kvconnect.orders import Cancel, Fetch, Offer, RenewLease, Source
from kvconnect.planner import Planner
from kvconnect.testing.faulty import Fault

SEED, SPARE = 7, 15


class Decode:
    """One rank: its mover, a store that is as good as its ``broken`` says, and the chain."""

    def __init__(self, world, prefill, rates=None):
        self.engine = Engine(world, num_blocks=16)
        self.world, self.prefill = world, prefill
        self.broken: set[int] = set()  # numbers of fills that fail
        self.waiting: list[Fill] = []
        self.declined: list[int] = []
        self.orders: list = []
        self.ended: list[LoadDone] = []
        self.hold = False  # the store answers nothing
        self.chained = ChainLoader(self, ["peer"], [64], world.clock, rates)

    def ask(self, peer, order):
        assert peer == "peer"
        self.orders.append(order)
        self.engine.put(order)

    def fill(self, fills):
        self.waiting += fills

    def decline(self, fills):
        self.declined += [fill.number for fill in fills]

    def load(self, lease, stored, blocks, request="d"):
        """Unit ``i`` is block ``i`` of the prompt; ``stored`` has some, the lease its first."""
        units = tuple(
            LoadUnit(
                0,
                ((i, block),),
                i + 1,
                1,
                Fill(100 + i, bytes([i]), 0, (block,)) if i in stored else None,
                "host" if i in stored else "",
            )
            for i, block in enumerate(blocks)
        )
        source = self.prefill.source(lease)
        self.engine.put(RenewLease(request, source))
        offer = Offer(source, lease.tokens, lease.digest)
        self.chained.load(ChainedLoad(request, units, (("peer", offer),)))

    def go_on(self, rounds=12, seconds=0.0):
        mover = self.engine.movers[0]
        for _ in range(rounds):
            for one in self.world.engines:
                if one is self.engine:
                    mover.step()
                else:
                    one.step()
                self.world.network.flush()
            outcome = mover.take()
            for name in outcome.received:
                assert self.chained.fetched(name, outcome.failed.get(name), outcome.ended_s[name])
            fills, self.waiting = ([], self.waiting) if self.hold else (self.waiting, [])
            for fill in fills:
                if fill.number not in self.broken:
                    self.kept(fill.number - 100, fill.blocks[0])
                error = "damaged" if fill.number in self.broken else ""
                self.chained.filled(fill.number, error, self.world.clock())
            self.ended += self.chained.take()
            self.world.clock.advance(seconds)

    def kept(self, place, block):
        """What a store does to fill a block: places before it go to a block that nobody wants."""
        self.engine.caches[0].fill([SPARE] * place + [block], SEED)

    def holds(self, blocks):
        return self.engine.caches[0].holds_fill(list(enumerate(blocks)), SEED)


@pytest.fixture
def world():
    return World()


@pytest.fixture
def prefill(world):
    return Engine(world, num_blocks=16)


BLOCKS = [9, 4, 7, 2]


def test_both_give_their_part_and_the_lease_is_let_go(world, prefill):
    decode = Decode(world, prefill)
    lease = prefill.lend("p", [3, 5, 8], SEED)
    decode.load(lease, {3}, BLOCKS)
    decode.go_on()
    assert decode.ended == [LoadDone("d")]
    assert decode.holds(BLOCKS)
    assert prefill.sent == ["p"]
    assert decode.chained.counts == {
        "tokens_from_peers": 3,
        "tokens_from_host": 1,
        "fallbacks": 0,
        "pieces_failed": 0,
        "tokens_lost": 0,
    }


def test_what_only_the_store_gives_lets_the_lease_go_unread(world, prefill):
    decode = Decode(world, prefill)
    lease = prefill.lend("p", [3, 5, 8, 1], SEED)
    decode.load(lease, {0, 1, 2, 3}, BLOCKS)
    decode.go_on()
    assert decode.ended == [LoadDone("d")]
    assert decode.chained.counts["tokens_from_host"] == 4
    assert decode.holds(BLOCKS)
    assert prefill.sent == ["p"]
    assert decode.engine.transports[0].submitted == []


def test_the_lease_stays_open_for_what_the_store_turns_out_not_to_have(world, prefill, caplog):
    """A fetch has ended by then, and another follows under the same lease."""
    decode = Decode(world, prefill)
    lease = prefill.lend("p", [3, 5, 8, 1], SEED)
    decode.hold, decode.broken = True, {101, 102}
    decode.load(lease, {1, 2}, BLOCKS)
    decode.go_on(20, seconds=0.5)  # longer than the lease's ttl, which is renewed
    assert len(decode.engine.transports[0].submitted) == 1
    assert prefill.sent == []
    assert decode.ended == []
    decode.hold = False
    with caplog.at_level(logging.WARNING, "vllm.kvconnect.chain.load"):
        decode.go_on()
    assert decode.ended == [LoadDone("d")]
    assert decode.holds(BLOCKS)
    assert prefill.sent == ["p"]
    assert [r.getMessage() for r in caplog.records] == [
        "request d: of 4 chunks 2 from peer that host failed (host: damaged)"
    ]
    assert decode.declined == []


def test_a_peer_that_dies_amid_its_fetch_is_made_up_for_by_the_store(world, prefill, caplog):
    """What the store was not asked for at first, it is asked for then; the rest is lost.

    The peer's fetch used to say that KV was not loaded, and the load then once more, elsewise.
    """
    decode = Decode(world, prefill, Rates({"host": 1.0, "peer": 0.0}))
    decode.engine.transports[0].plan(Fault.HANGS)
    lease = prefill.lend("p", [3, 5, 8, 1], SEED)
    decode.load(lease, {0, 1}, BLOCKS)
    decode.go_on()
    assert decode.ended == [] and decode.waiting == []
    prefill.stop()
    world.engines.remove(prefill)
    decode.go_on(60, seconds=0.5)
    assert decode.ended == [LoadDone("d", frozenset({7, 2}))]
    assert decode.engine.caches[0].holds_fill([(0, 9), (1, 4)], SEED)
    assert decode.chained.counts["fallbacks"] == 1
    assert decode.chained.counts["pieces_failed"] == 2
    assert decode.chained.counts["tokens_lost"] == 2
    (line,) = failed_loads(caplog)
    assert (line["request"], line["path"], line["cause"]) == ("d", "chain", "sources")
    assert line["peer"] == str(prefill.movers[0].address)
    assert "2 that nobody could give" in line["error"] and "peer: " in line["error"]


def test_what_nobody_needed_of_the_store_is_declined(world, prefill):
    decode = Decode(world, prefill, Rates({"host": 1.0, "peer": 0.0}))
    lease = prefill.lend("p", [3, 5, 8, 1], SEED)
    decode.load(lease, {0, 2}, BLOCKS)
    decode.go_on()
    assert decode.ended == [LoadDone("d")]
    assert sorted(decode.declined) == [100, 102]
    assert decode.holds(BLOCKS)


def test_an_aborted_load_ends_without_another_source_and_frees_the_lease(world, prefill, caplog):
    decode = Decode(world, prefill)
    decode.hold, decode.broken = True, {101}
    lease = prefill.lend("p", [3, 5, 8, 1], SEED)
    decode.engine.transports[0].plan(Fault.HANGS)
    decode.load(lease, {1}, BLOCKS)
    decode.go_on()
    decode.chained.cancel(CancelLoad("d"))
    decode.chained.cancel(CancelLoad("d"))
    decode.chained.cancel(CancelLoad("another"))
    assert [o.request_id for o in decode.orders if isinstance(o, Cancel)] == ["d#1"]
    decode.go_on(40, seconds=0.5)
    assert decode.ended == [], "the store still writes there"
    decode.hold = False
    decode.go_on(40, seconds=0.5)
    assert [one.request_id for one in decode.ended] == ["d"]
    assert not failed_loads(caplog), "nobody wants it any more"
    assert sum(isinstance(o, Cancel) for o in decode.orders) == 1
    assert len(decode.engine.transports[0].submitted) == 1


def test_what_waits_for_a_peer_is_not_started_once_the_load_is_aborted(world, prefill):
    decode = Decode(world, prefill)
    decode.broken = {101}
    lease = prefill.lend("p", [3, 5, 8, 1], SEED)
    decode.engine.transports[0].plan(Fault.HANGS)
    decode.load(lease, {1}, BLOCKS)
    decode.go_on()
    assert sum(isinstance(o, Fetch) for o in decode.orders) == 1, "the other waits for it"
    decode.chained.cancel(CancelLoad("d"))
    decode.go_on(40, seconds=0.5)
    assert [one.request_id for one in decode.ended] == ["d"]
    assert sum(isinstance(o, Fetch) for o in decode.orders) == 1


def test_rates_are_measured_where_bytes_are_moved():
    """Not where vLLM asks for results, which may be a long step later."""
    clock = [0.0]

    class Nobody:
        def ask(self, peer, order): ...
        def fill(self, fills): ...
        def decline(self, fills): ...

    rates = Rates({"disk": 1.0})
    chained = ChainLoader(Nobody(), [], [1 << 20], lambda: clock[0], rates)
    for number in range(3):
        fill = Fill(number, b"", 0, (1,))
        unit = LoadUnit(0, ((0, 1),), 1, 1, fill, "disk")
        chained.load(ChainedLoad(f"r{number}", (unit,)))
        began, clock[0] = clock[0], clock[0] + 100.0
        assert chained.filled(number, "", began + 2.0)
        assert not chained.filled(number, "", began + 2.0)
    fill = Fill(3, b"", 0, (1,))
    chained.load(ChainedLoad("cut short", (LoadUnit(0, ((0, 1),), 1, 1, fill, "disk"),)))
    chained.cancel(CancelLoad("cut short"))
    assert chained.filled(3, "", clock[0] + 50.0)
    more = tuple(Fill(n, b"", 0, (n,)) for n in (4, 5))
    units = tuple(LoadUnit(0, ((0, fill.number),), 1, 1, fill, "disk") for fill in more)
    chained.load(ChainedLoad("half of it", units))
    assert chained.filled(4, "", clock[0] + 70.0) and chained.filled(5, "damaged", clock[0] + 70.0)
    assert rates.start_s("disk") + rates.seconds("disk", 1 << 20) == pytest.approx(2.0)


def test_a_prompt_that_was_computed_meanwhile_says_nothing_of_the_way_to_its_engine():
    """Used to: after one prompt that was asked for early, a disk was taken for the faster."""
    clock, asked = [0.0], []

    class Nobody:
        def ask(self, peer, order):
            asked.append(order)

        def fill(self, fills): ...
        def decline(self, fills): ...

    rates = Rates({"peer": 1.0})
    chained = ChainLoader(Nobody(), ["peer"], [1 << 20], lambda: clock[0], rates)
    for number, wait_s in enumerate((0.0, 30.0, 0.0)):
        offer = Offer(Source((), f"p{number}", None, 5.0, wait_s), 1, b"")
        unit = LoadUnit(0, ((0, 1),), 1, 1)
        chained.load(ChainedLoad(f"r{number}", (unit,), (("peer", offer),)))
        (fetch,) = (order for order in asked if isinstance(order, Fetch))
        clock[0] += 20.0 if wait_s else 2.0
        assert chained.fetched(fetch.request_id, None, clock[0])
        asked.clear()
    assert rates.start_s("peer") + rates.seconds("peer", 1 << 20) == pytest.approx(2.0)


def test_a_fetch_asks_for_no_more_than_is_needed_of_its_peer(world, prefill):
    decode = Decode(world, prefill)
    source, unit = Source((), "p", "g", 1.0), LoadUnit(0, ((1, 4),), 2, 1)
    offer = Offer(source, 2, b"")
    for needed_from in ((), (("other", (3,)),), (("peer", (1,)),)):
        decode.chained.load(ChainedLoad("d", (unit,), (("peer", offer),), needed_from=needed_from))
        fetch = decode.orders.pop()
        assert fetch.needed_from == dict(needed_from).get("peer", ())


def test_a_chunk_from_disk_that_some_rank_declined_is_not_in_memory():
    """It would be promoted by being filled, and that rank has not got it there."""
    host, disk = (CacheTier(name, make("lru", 2)) for name in ("host", "disk"))
    tier = OffloadTier(host, disk, ranks=2)
    tier.recovered([], [b"k"])
    (fill,) = tier.load("r", [KeyedChunk(b"k", 0, (1,))]).jobs
    assert isinstance(fill, Fill)
    result = tier.declined(fill.number)
    assert result.jobs == [Forget(b"k", False)]
    assert result.loaded == {"r": []}, "nothing has failed"
    assert (tier.source_of(b"k"), tier.busy) == ("disk", False)
    assert "chunks_failed" not in tier.counts


def test_an_offer_that_was_taken_is_its_new_owners_to_release():
    planner = Planner()
    offer = Offer(Source((), "p", "g", 1.0), 5, b"")
    planner.renew("r", offer)
    assert planner.take_offer("r") is offer
    assert (planner.match("r", 0), planner.take_offer("r")) == (0, None)
    planner.end("r")
    planner.renew("loading", offer)
    planner.fetch("loading", ())
    assert planner.take_offer("loading") is None
    planner.end("loading")
    assert [type(order) for order in planner.take_orders()] == [
        RenewLease,
        RenewLease,
        Fetch,
        Cancel,
    ]
