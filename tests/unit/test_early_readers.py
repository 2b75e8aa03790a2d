"""Readers that come before the request whose lease they want: they wait, and not for ever."""

from dataclasses import replace

import msgspec
import pytest
from kit.engines import Engine, World

from kvconnect.control import wire
from kvconnect.control.channel import Link
from kvconnect.control.listener import Incoming
from kvconnect.lease import Terms
from kvconnect.orders import (
    Cancel,
    Fetch,
    Grant,
    Progress,
    Promise,
    Release,
    RenewLease,
    Source,
    Withdraw,
)
from kvconnect.producer import waiting
from kvconnect.producer.leases import LeaseServer
from kvconnect.producer.waiting import MAX_WAIT_S, SILENT_S, EarlyReaders
from kvconnect.testing import FakeClock, Fault

NEAR, FAR = Link(False, b"engine 1"), Link(False, b"engine 2")
TERMS = Terms("r", "g", ((4, 2),), 30, b"digest", 10.0, "transfer")
PLACES = ((0, 5), (1, 2))


def ask(seq=1, early_ms=30_000, **changed):
    message = wire.Open(
        seq=seq,
        lease_id=None,
        request_id="transfer",
        reader=0,
        tokens=30,
        digest=b"digest",
        early_ms=early_ms,
    )
    return msgspec.structs.replace(message, **changed)


class Answers:
    def __init__(self):
        self.sent = []

    def answer(self, link, message):
        self.sent.append((link, message))

    def known(self, *names):
        """Nobody waits to be welcome."""

    def take(self):
        taken, self.sent = self.sent, []
        return taken


class Rig:
    def __init__(self):
        self.clock, self.answers = FakeClock(), Answers()
        self.server = LeaseServer(self.answers, self.clock, 60.0)

    def send(self, message, link=NEAR):
        self.server.receive(Incoming(link, message))
        return self.answers.take()

    def repeat_for(self, seconds, message, link=NEAR):
        """As a dialer does; returns what was answered, and after how many seconds."""
        for second in range(seconds):
            self.server.tick()
            if answers := self.answers.take() or self.send(message, link):
                return second, answers
            self.clock.advance(1.0)
        return seconds, []


@pytest.fixture
def rig():
    return Rig()


def test_a_reader_may_come_before_the_request(rig):
    assert rig.send(ask()) == []
    rig.server.promise("transfer", "g")
    assert rig.send(ask()) == []
    rig.server.grant(TERMS)
    ((link, opened),) = rig.answers.take()
    assert (link, opened.seq, opened.tables) == (NEAR, 1, TERMS.tables)


def test_a_request_that_was_never_expected_is_found_as_well(rig):
    rig.send(ask())
    rig.server.grant(TERMS)
    ((_, opened),) = rig.answers.take()
    assert opened.lease_id == "g"


def test_who_does_not_ask_to_wait_is_refused(rig):
    ((_, refused),) = rig.send(ask(early_ms=0))
    assert refused.cause == "gone"
    ((_, refused),) = rig.send(ask(lease_id="g"))
    assert refused.cause == "gone"


def test_the_wait_ends_when_the_reader_said(rig):
    after, ((_, refused),) = rig.repeat_for(100, ask(early_ms=8_000))
    assert (after, refused.cause, refused.seq) == (8, "gone", 1)


def test_nobody_waits_longer_than_the_server_allows(rig):
    after, ((_, refused),) = rig.repeat_for(100, ask(early_ms=1 << 40))
    assert (after, refused.cause) == (MAX_WAIT_S, "gone")


def test_who_falls_silent_is_forgotten_without_an_answer(rig):
    rig.send(ask())
    assert rig.server.next_deadline() == rig.clock() + SILENT_S
    rig.clock.advance(SILENT_S)
    rig.server.tick()
    assert rig.server.next_deadline() is None
    rig.server.grant(TERMS)
    assert rig.answers.take() == []
    assert not rig.server.reading


def test_who_gives_up_is_not_opened_later(rig):
    rig.send(ask(), NEAR)
    rig.send(ask(), FAR)
    ((_, closed),) = rig.send(
        wire.Close(seq=9, lease_id=None, request_id="transfer", reader=0, readers=1)
    )
    assert not closed.stood
    rig.server.grant(TERMS)
    assert [link for link, _ in rig.answers.take()] == [FAR]


def test_a_request_that_ended_without_kv_is_not_waited_for(rig):
    """Used to be thought of as one that is still to come."""
    rig.server.promise("transfer", "g")
    rig.server.withdraw("g")
    ((_, refused),) = rig.send(ask())
    assert refused.cause == "gone"
    rig.server.promise("transfer", "again")
    assert rig.send(ask()) == [], "the same name, asked for once more"


def test_a_lease_that_is_over_is_not_waited_for(rig):
    rig.server.grant(TERMS)
    rig.clock.advance(10.0)
    rig.server.tick()
    ((_, refused),) = rig.send(ask())
    assert refused.cause == "gone"


def test_waiting_readers_are_bounded(rig, monkeypatch):
    monkeypatch.setattr(waiting, "MAX_EARLY", 2)
    rig.send(ask(1)), rig.send(ask(2, request_id="another"))
    ((_, refused),) = rig.send(ask(3))
    assert refused.cause == "gone"
    assert rig.send(ask(2, request_id="another")) == [], "who waits already goes on waiting"


def test_a_name_that_ended_may_come_again_with_another_prompt(rig):
    """A client sends its X-Request-Id twice."""
    rig.server.promise("transfer", "g")
    rig.server.grant(TERMS)
    rig.server.revoke(["g"])
    ((_, refused),) = rig.send(ask())
    assert refused.cause == "gone"
    ((_, refused),) = rig.send(ask(2, digest=b"", tokens=0))
    assert refused.cause == "gone", "who releases it need not wait"
    assert rig.send(ask(3, digest=b"another")) == []
    rig.server.promise("transfer", "h")
    rig.server.grant(replace(TERMS, lease_id="h", digest=b"another"))
    ((_, opened),) = rig.answers.take()
    assert (opened.seq, opened.lease_id) == (3, "h")


def test_who_waits_for_a_lease_gets_it_though_another_took_its_name(rig):
    rig.server.promise("transfer", "g")
    assert rig.send(ask(stream=True)) == []
    rig.server.promise("transfer", "h")
    assert rig.send(ask(2, digest=b"another", stream=True), FAR) == []
    for lease_id, digest, link in (("g", b"digest", NEAR), ("h", b"another", FAR)):
        rig.server.progress(Progress(lease_id, ((4,), ()), 30, digest))
        ((at, opened),) = rig.answers.take()
        assert (at, opened.lease_id, opened.tables) == (link, lease_id, ((4,), ()))


def test_nothing_is_kept_of_who_left():
    clock = FakeClock()
    readers = EarlyReaders(clock)
    for seq in range(4):
        assert readers.admit(NEAR, ask(seq, reader=seq))
    readers.forget("transfer", NEAR, 1)
    readers.forget("transfer", FAR, 0)
    assert len(readers) == 3
    assert [m.seq for _, m in readers.take("transfer")] == [0, 2, 3]
    assert readers.admit(NEAR, ask(7))
    clock.advance(SILENT_S)
    assert readers.tick() == []
    assert len(readers) == 0 and readers.next_deadline() is None


# -- through whole movers ------------------------------------------------------------------


class Pair:
    def __init__(self, p=1, d=1, wait_s=30.0):
        self.world = World()
        self.p, self.d = Engine(self.world, tp_size=p), Engine(self.world, tp_size=d)
        terms = self.p.terms("r", [3, 1], seed=7)
        self.terms = Terms(**{**vars(terms), "name": "transfer"})
        known = self.p.source(self.terms, ticket=False)
        self.source = Source(known.shards, "transfer", None, known.ttl_s, wait_s)
        self.world.go_on(1)
        self.d.put(RenewLease("d", self.source))
        self.world.go_on(6)

    def fetch(self):
        self.d.put(Fetch("d", self.source, (PLACES,), self.terms.tokens, self.terms.digest))

    def promise(self):
        self.p.put(Promise("r", self.terms.lease_id, "transfer"))

    def grant(self):
        for cache in self.p.caches:
            cache.fill([3, 1], 7)
        self.p.put(Grant(self.terms))

    def is_right(self):
        ranks = len(self.d.caches)
        return self.d.ended.get("d") == [None] * ranks and all(
            cache.holds_fill(PLACES, 7) for cache in self.d.caches
        )


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
def test_the_decode_leg_may_come_first(p, d):
    pair = Pair(p, d)
    pair.fetch()
    pair.world.go_on(20, seconds=1.0)
    assert pair.d.ended == {}
    pair.promise()
    pair.world.go_on(5, seconds=1.0)
    assert pair.d.ended == {}
    pair.grant()
    pair.world.go_on()
    assert pair.is_right()
    assert pair.p.sent == ["r"] * p


def test_prefill_may_take_longer_than_a_load_may():
    """12 s here: the time to load counts from when there is something to load."""
    pair = Pair(wait_s=100.0)
    pair.promise()
    pair.fetch()
    pair.world.go_on(80, seconds=1.0)
    assert pair.d.ended == {}
    pair.d.transports[0].plan(late_polls=5)
    pair.grant()
    pair.world.go_on(30)
    assert pair.is_right()


def test_a_load_takes_no_longer_than_ever_once_it_is_opened():
    pair = Pair(wait_s=100.0)
    pair.grant()
    pair.d.transports[0].plan(Fault.HANGS)
    pair.fetch()
    pair.world.go_on(16, seconds=1.0)
    (error,) = pair.d.ended["d"]
    assert "not loaded within 12 s" in error


def test_a_prefill_leg_that_never_comes_fails_the_load():
    pair = Pair(wait_s=8.0)
    pair.fetch()
    pair.world.go_on(7, seconds=1.0)
    assert pair.d.ended == {}
    pair.world.go_on(4, seconds=1.0)
    (error,) = pair.d.ended["d"]
    assert "never arrived" in error


def test_a_prefill_leg_that_takes_for_ever_fails_the_load():
    pair = Pair(wait_s=8.0)
    pair.promise()
    pair.fetch()
    pair.world.go_on(19, seconds=1.0)
    assert pair.d.ended == {}
    pair.world.go_on(4, seconds=1.0)
    assert pair.d.ended["d"] != [None]


def test_a_prefill_leg_that_is_aborted_fails_the_load():
    pair = Pair()
    pair.fetch()
    pair.promise()
    pair.world.go_on(4)
    pair.p.put(Withdraw(pair.terms.lease_id))
    pair.world.go_on(4)
    (error,) = pair.d.ended["d"]
    assert "without KV" in error


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("is_expected", [False, True])
def test_a_decode_leg_that_is_aborted_keeps_no_blocks(at, p, d, is_expected):
    """Used to: a Close before the request was lost, and its lease stood until it expired."""
    pair = Pair(p, d)
    if is_expected:
        pair.promise()
    pair.fetch()
    pair.world.go_on(at)
    pair.d.put(Cancel("d"))
    pair.world.go_on(4)
    assert pair.d.ended["d"] == [None] * d
    pair.grant()
    pair.world.go_on(4)
    assert pair.p.sent == ["r"] * p
    assert all(mover.take_stats() is None for mover in pair.p.movers), "it was not in time"
    assert all(mover.wait_s() > 0.5 for mover in (*pair.p.movers, *pair.d.movers))


@pytest.mark.parametrize("is_expected", [False, True])
def test_a_release_waits_for_the_lease_that_it_is_of(is_expected):
    """Used to be lost: prefill kept the blocks of a prompt that decode had until they expired."""
    pair = Pair()
    if is_expected:
        pair.promise()
    pair.d.put(Release("d", pair.source))
    pair.world.go_on(4, seconds=1.0)
    pair.grant()
    pair.world.go_on(4)
    assert pair.p.sent == ["r"]
    assert pair.p.movers[0].take_stats() is None, "nothing expired, nothing was late"
    assert pair.d.ended == {}
    assert pair.d.movers[0].take_stats() is None
    assert pair.d.movers[0].wait_s() > 0.5


def test_a_release_does_not_wait_for_ever():
    pair = Pair(wait_s=8.0)
    pair.d.put(Release("d", pair.source))
    pair.world.go_on(20, seconds=1.0)
    pair.grant()
    pair.world.go_on(4)
    assert pair.p.sent == [], "nobody waits any more"
    pair.world.go_on(8, seconds=1.0)
    assert pair.p.sent == ["r"]


def test_a_release_that_is_opened_reads_nothing():
    """No engine of ours would: the release names no prompt."""
    pair = Pair()
    pair.terms = Terms(**{**vars(pair.terms), "tokens": 0, "digest": b""})
    pair.grant()
    pair.d.put(Release("d", pair.source))
    pair.world.go_on(8)
    assert pair.p.sent == ["r"]
    assert pair.d.transports[0].submitted == []


# -- who waits without blocks, and is told when they are worth having -----------------------


class Waiting(Pair):
    """Decode asked for a report, and has nothing to read into yet."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ask()

    def ask(self):
        self.d.put(RenewLease("d", self.source, reports=True))
        self.world.go_on(6)

    @property
    def nothing_is_held(self):
        held = [mover.held() for engine in (self.p, self.d) for mover in engine.movers]
        return not any(any(one.values()) for one in held)


@pytest.mark.parametrize(("p", "d"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("promised", [False, True])
def test_a_request_that_waits_is_reported_once_it_is_computed(p, d, promised):
    pair = Waiting(p=p, d=d)
    if promised:
        pair.promise()
    pair.world.go_on(10, seconds=1.0)
    assert pair.d.computed == []
    pair.grant()
    pair.world.go_on()
    assert pair.d.computed == ["d"] * d, "once a rank"
    assert pair.p.sent == [], "nobody has read it"
    pair.fetch()
    pair.world.go_on()
    assert pair.is_right() and pair.nothing_is_held


def test_a_request_that_was_computed_before_is_reported_at_once():
    pair = Pair()
    pair.promise()
    pair.grant()
    pair.world.go_on()
    pair.d.put(RenewLease("d", pair.source, reports=True))
    pair.world.go_on()
    assert pair.d.computed == ["d"]


def test_one_that_is_computed_anew_is_not_reported_before_that():
    pair = Waiting()
    pair.promise()
    pair.world.go_on()
    pair.p.put(Promise("r", "another", "transfer"), Withdraw(pair.terms.lease_id, "another"))
    pair.world.go_on(10, seconds=1.0)
    assert pair.d.computed == []
    pair.p.put(Withdraw("another"))
    pair.world.go_on()
    assert pair.d.computed == ["d"], "there will be none: it need not wait any more"


@pytest.mark.parametrize("how", ["ended", "never arrived"])
def test_a_request_whose_source_will_never_compute_it_is_reported(how):
    pair = Waiting(wait_s=8.0)
    if how == "ended":
        pair.p.stop()
    pair.world.go_on(60, seconds=1.0)
    assert pair.d.computed == ["d"]


def test_who_was_admitted_meanwhile_or_ended_is_not_reported():
    pair = Waiting()
    pair.promise()
    pair.world.go_on()
    pair.d.put(Release("d", pair.source))
    pair.world.go_on()
    pair.grant()
    pair.world.go_on(10, seconds=1.0)
    assert pair.d.computed == [] and pair.p.sent == ["r"] and pair.nothing_is_held


def test_one_whose_source_is_not_there_is_reported_and_fails_as_every_load_does():
    """Else it would wait for blocks for ever."""
    pair = Pair()
    pair.p.stop()
    pair.world.go_on(60, seconds=1.0)
    pair.d.put(RenewLease("d", pair.source, reports=True))
    pair.world.go_on(60, seconds=1.0)
    assert pair.d.computed == ["d"]


def test_a_source_is_not_asked_any_more_about_a_request_that_has_ended():
    pair = Waiting(wait_s=3600.0)
    pair.promise()
    first, terms = ((3,),), pair.terms
    pair.p.put(Progress(terms.lease_id, first, terms.tokens, terms.digest))
    pair.fetch()
    pair.world.go_on()
    (mover,) = pair.d.movers
    peer = mover.dialer.greet(pair.source.shards[0])  # it is greeted already
    assert mover.dialer.calls.waits_for(peer)
    pair.d.put(Cancel("d"))
    pair.world.go_on(10, seconds=1.0)
    assert not mover.dialer.calls.waits_for(peer)


def test_a_report_is_worth_waking_up_for():
    """A worker waits for what there is to tell; without this until the end of its wait."""
    pair = Waiting()
    pair.grant()
    (mover,) = pair.d.movers
    for _ in range(100):
        if (outcome := mover.take()).computed:
            break
        pair.world.clock.advance(1)
        for each in (*pair.p.movers, mover):
            each.step()
    assert outcome and outcome.computed == {"d"}
