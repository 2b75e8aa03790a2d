"""The producer's half: who is answered, parked or refused, and when blocks are freed."""

from dataclasses import replace

import pytest

from kvconnect.control import wire
from kvconnect.control.channel import Link
from kvconnect.control.listener import Incoming
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.lease import Terms
from kvconnect.orders import Progress
from kvconnect.producer import leases as leases_module
from kvconnect.producer import waiting
from kvconnect.producer.leases import LeaseServer
from kvconnect.producer.promises import OpenPromises
from kvconnect.producer.waiting import SILENT_S
from kvconnect.testing import FakeClock

BEGINNINGS = {10: b"first ten", 20: b"first twenty"}
NEAR, FAR = Link(False, b"engine 1"), Link(False, b"engine 2")
TERMS = Terms("r", "g", ((4, 2, NO_BLOCK),), 30, b"digest", 10.0)
MAX_S = 25.0


class Answers:
    """Stands for the listener: notes what is sent to whom."""

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
        self.clock = FakeClock()
        self.answers = Answers()
        self.server = LeaseServer(self.answers, self.clock, MAX_S)
        self.seq = 0

    def send(self, message, link=NEAR):
        """Hand in a message; returns what was answered on its link."""
        self.server.receive(Incoming(link, message))
        return [m for at, m in self.answers.take() if at == link]

    def open(self, link=NEAR, reader=0, seq=None, **changed):
        self.seq += 1
        fields = {"lease_id": "g", "request_id": None, "tokens": 30, "digest": b"digest"}
        return self.send(
            wire.Open(seq=seq or self.seq, reader=reader, **{**fields, **changed}), link
        )

    def close(self, link=NEAR, reader=0, readers=1, seq=None, **changed):
        self.seq += 1
        fields = {"lease_id": "g", "request_id": None, **changed}
        (closed,) = self.send(
            wire.Close(seq=seq or self.seq, reader=reader, readers=readers, **fields), link
        )
        return closed.stood


@pytest.fixture
def rig():
    return Rig()


def test_an_open_lease_tells_its_blocks(rig):
    rig.server.grant(TERMS)
    assert rig.open(seq=7) == [wire.Opened(seq=7, lease_id="g", tables=TERMS.tables)]
    assert rig.server.reading


def test_without_a_ticket_the_request_id_will_do(rig):
    rig.server.grant(TERMS)
    (opened,) = rig.open(lease_id=None, request_id="r")
    assert opened.lease_id == "g"


@pytest.mark.parametrize(
    "asked", [{"lease_id": "x"}, {"lease_id": None, "request_id": "x"}, {"lease_id": None}]
)
def test_an_unknown_lease_is_refused(rig, asked):
    rig.server.grant(TERMS)
    (refused,) = rig.open(**asked)
    assert refused.cause == "gone"
    assert not rig.server.reading


@pytest.mark.parametrize("prompt", [{"digest": b"other"}, {"digest": b""}, {"tokens": 29}])
def test_another_prompt_is_refused(rig, prompt):
    rig.server.grant(TERMS)
    (refused,) = rig.open(**prompt)
    assert refused.cause == "another prompt"
    assert not rig.server.reading


def test_who_knows_only_how_a_prompt_begins_may_open_it(rig):
    rig.server.grant(replace(TERMS, prefixes=BEGINNINGS))
    for tokens, digest in BEGINNINGS.items():
        (opened,) = rig.open(tokens=tokens, digest=digest)
        assert opened.tables == ((4, 2, NO_BLOCK),)


@pytest.mark.parametrize(
    ("tokens", "digest"),
    [(10, b"first twenty"), (20, b"digest"), (15, b""), (0, b""), (31, b"digest"), (10, b"first")],
)
def test_who_knows_another_beginning_is_refused(rig, tokens, digest):
    rig.server.grant(replace(TERMS, prefixes=BEGINNINGS))
    (refused,) = rig.open(tokens=tokens, digest=digest)
    assert refused.cause == "another prompt"


def stream(rig, **changed):
    """Open what is promised, of which some is told."""
    rig.server.progress(Progress("g", ((4,),), 30, b"digest"))
    return rig.open(stream=True, **changed)


def test_only_who_reads_by_itself_needs_our_transport(rig):
    rig.server.grant(TERMS)
    rig.open(link=FAR, direct=False)
    assert not rig.server.reading
    rig.open(link=NEAR)
    rig.open(link=NEAR, reader=1)
    rig.close(link=NEAR, readers=3)
    assert rig.server.reading
    rig.close(link=NEAR, reader=1, readers=3)
    assert not rig.server.reading


@pytest.mark.parametrize("direct", [True, False])
def test_of_a_promise_only_what_was_told_is_read(rig, direct):
    rig.server.promise("r", "g")
    stream(rig, direct=direct)
    assert rig.server.reading == direct
    follow = wire.Follow(seq=9, lease_id="g", reader=0, have=(1,))
    assert rig.send(follow) == [], "it waits"
    assert not rig.server.reading
    rig.server.progress(Progress("g", ((2,),), 30, b"digest"))
    assert [type(message) for _, message in rig.answers.take()] == [wire.Computed]
    assert rig.server.reading == direct
    rig.server.grant(TERMS)
    assert rig.server.reading == direct, "by who began before"
    assert rig.close()
    assert not rig.server.reading


@pytest.mark.parametrize("how", ["expires", "is revoked", "is withdrawn", "is computed anew"])
def test_nobody_reads_a_lease_that_is_over(rig, how):
    if how in ("expires", "is revoked"):
        rig.server.grant(TERMS)
        rig.open()
    else:
        rig.server.promise("r", "g")
        stream(rig)
    assert rig.server.reading
    if how == "expires":
        rig.clock.advance(TERMS.ttl_s)
        rig.server.tick()
    elif how == "is revoked":
        rig.server.revoke(["g"])
    else:
        rig.server.promise("r", "h")
        rig.server.withdraw("g", "h" if how == "is computed anew" else "")
    assert not rig.server.reading


@pytest.mark.parametrize("asked", ["nothing", "waits", "streams"])
def test_who_is_done_with_a_promise_is_not_waited_for_when_it_is_granted(rig, asked):
    """A Close may come before the Grant: of who gave up, and of ranks that are not read at all."""
    rig.server.promise("r", "g")
    if asked != "nothing":
        (stream if asked == "streams" else Rig.open)(rig)
    assert not rig.close()
    rig.server.grant(TERMS)
    assert rig.server.take_freed() == {"r"}
    assert rig.server.late == 0, "it was early"
    assert not rig.server.reading


@pytest.mark.parametrize("asked", ["waits", "streams"])
def test_who_was_done_with_a_promise_and_comes_again_is_waited_for(rig, asked):
    rig.server.promise("r", "g")
    ask = stream if asked == "streams" else Rig.open
    ask(rig)
    rig.close()
    ask(rig)
    rig.server.grant(TERMS)
    rig.answers.take()
    assert rig.server.take_freed() == set()
    assert rig.close()
    assert rig.server.take_freed() == {"r"}


def test_who_is_done_with_a_promise_is_so_when_it_is_computed_anew(rig):
    rig.server.promise("r", "g")
    stream(rig)
    rig.close()
    rig.server.promise("r", "g2")
    rig.server.withdraw("g", "g2")
    rig.server.grant(replace(TERMS, lease_id="g2"))
    assert rig.server.take_freed() == {"r"}


def test_a_reader_that_opens_and_closes_a_promise_for_ever_costs_no_memory():
    promises = OpenPromises()
    promises.progress(Progress("g", ((4,),), 30, b"digest"))
    for _ in range(9):
        promises.open("g", (NEAR, 0))
        promises.close("g", (NEAR, 0), 0, 1)
    assert promises.end("g") == (set(), [((NEAR, 0), 0, 1)])


@pytest.mark.parametrize("have", [(), (1, 0)], ids=str)
def test_a_reader_that_follows_other_groups_is_refused(rig, have):
    rig.server.promise("r", "g")
    stream(rig)
    (refused,) = rig.send(wire.Follow(seq=9, lease_id="g", reader=0, have=have))
    assert refused.cause == "unusable"
    assert rig.server.held()["parked_readers"] == 0


def test_an_early_reader_is_answered_when_the_lease_is_granted(rig):
    rig.server.promise("r", "g")
    assert rig.open(seq=3) == []
    assert rig.open(seq=3) == [], "repeated while it waits"
    rig.server.grant(TERMS)
    ((link, opened),) = rig.answers.take()
    assert link == NEAR and opened.seq == 3 and opened.tables == TERMS.tables


def test_an_early_reader_of_another_prompt_is_refused_when_the_lease_is_granted(rig):
    rig.server.promise("r", "g")
    rig.open(digest=b"other")
    rig.server.grant(TERMS)
    ((_, refused),) = rig.answers.take()
    assert refused.cause == "another prompt"


def test_early_readers_are_refused_when_the_request_ends_without_kv(rig):
    rig.server.promise("r", "g")
    rig.open(link=NEAR)
    rig.open(link=FAR)
    rig.server.withdraw("g")
    assert [(link, m.cause) for link, m in rig.answers.take()] == [
        (NEAR, "withdrawn"),
        (FAR, "withdrawn"),
    ]
    (late,) = rig.open()
    assert late.cause == "gone"
    assert rig.server.take_freed() == set()


def test_samples_of_one_prompt_may_all_be_early(rig):
    """Used to be: a rank's second early Open took the place of its first."""
    rig.server.promise("r", "g")
    rig.open(seq=1)
    rig.open(seq=2)
    rig.server.grant(TERMS)
    assert [m.seq for _, m in rig.answers.take()] == [1, 2]


def test_an_early_reader_that_gave_up_is_not_opened(rig):
    """Used to be: it was opened when granted, never closed, and the mover spun until expiry."""
    rig.server.promise("r", "g")
    rig.open(link=NEAR)
    rig.open(link=FAR)
    assert rig.close(link=NEAR) is False
    rig.server.grant(TERMS)
    assert [link for link, _ in rig.answers.take()] == [FAR]
    rig.close(link=FAR)
    assert not rig.server.reading


def test_parked_readers_are_bounded(rig, monkeypatch):
    monkeypatch.setattr(waiting, "MAX_PARKED", 2)
    rig.server.promise("r", "g")
    rig.open(seq=1), rig.open(seq=2)
    (refused,) = rig.open(seq=3)
    assert refused.cause == "busy"
    assert rig.open(seq=1) == [], "one that waits repeats itself"
    assert rig.open(link=FAR) == [], "and another link's readers have their own bound"
    rig.close(link=NEAR)
    assert rig.open(seq=9) == [], "those that gave up do not count"


def test_10_000_requests_may_wait_with_8_decode_ranks_each(rig):
    """Used to be: 600 of 600 failed at once, "4096 readers already wait here"."""
    links = [Link(False, f"rank {rank}".encode()) for rank in range(8)]
    for number in range(10_000):
        rig.server.promise(f"r{number}", f"g{number}")
    for _ in range(2):  # each repeats itself
        for number in range(10_000):
            for rank, link in enumerate(links):
                assert rig.open(link, rank, seq=number + 1, lease_id=f"g{number}") == []
    rig.server.grant(replace(TERMS, request_id="r7", lease_id="g7"))
    assert [link for link, _ in rig.answers.take()] == links


def test_a_parked_reader_that_died_is_not_opened(rig):
    """Used to be: it kept the lease until its ttl, although all others had closed."""
    rig.server.promise("r", "g")
    rig.open(NEAR, seq=1)
    rig.open(FAR, seq=1)
    rig.clock.advance(SILENT_S - 1)
    rig.open(FAR, seq=1)
    rig.clock.advance(1)
    rig.server.grant(TERMS)
    assert [link for link, _ in rig.answers.take()] == [FAR]
    assert rig.close(FAR)
    assert rig.server.take_freed() == {"r"}


def test_blocks_are_freed_when_the_last_reader_closes(rig):
    rig.server.grant(TERMS)
    rig.open(reader=0), rig.open(reader=1)
    assert rig.close(reader=0, readers=2)
    assert rig.server.take_freed() == set()
    assert rig.close(reader=1, readers=2)
    assert rig.server.take_freed() == {"r"}
    assert rig.server.take_freed() == set()


def test_a_reader_that_closes_twice_counts_once(rig):
    rig.server.grant(TERMS)
    assert rig.close(reader=0, readers=2)
    assert rig.close(reader=0, readers=2)
    assert rig.server.take_freed() == set()


def test_a_repeated_close_gets_the_answer_of_the_first(rig):
    rig.server.grant(TERMS)
    rig.open()
    assert rig.close(seq=9)
    assert rig.close(seq=9), "the lease has ended by this very Close"
    assert rig.server.late == 0


@pytest.mark.parametrize("link", [NEAR, FAR], ids=["same link", "another engine"])
def test_a_second_reader_of_an_ended_lease_hears_that_it_is_late(rig, link):
    """Used to be told that it stood, if it had the first reader's rank: wrong KV was served."""
    rig.server.grant(TERMS)
    rig.open(link=NEAR)
    assert rig.close(link=NEAR)
    assert rig.server.take_freed() == {"r"}
    assert rig.close(link=link) is False
    assert rig.server.late == 1


def test_blocks_are_not_freed_under_another_engines_reader(rig):
    """Used to be: an engine that was given the same ticket ended the lease for all."""
    rig.server.grant(TERMS)
    rig.open(link=NEAR), rig.open(link=FAR)
    assert rig.close(link=FAR)
    assert rig.server.take_freed() == set()
    assert rig.close(link=NEAR)
    assert rig.server.take_freed() == {"r"}


def test_a_close_that_is_not_final_only_asks(rig):
    rig.server.grant(TERMS)
    rig.open()
    assert rig.close(final=False)
    assert rig.server.take_freed() == set()
    assert rig.server.reading
    assert rig.close()
    assert rig.server.take_freed() == {"r"}


def test_a_close_that_is_not_final_hears_when_it_is_late(rig):
    rig.server.grant(TERMS)
    rig.open()
    rig.clock.advance(10)
    assert rig.close(final=False) is False


def test_a_close_after_expiry_is_late(rig):
    rig.server.grant(TERMS)
    rig.open()
    rig.clock.advance(10)
    assert rig.close() is False, "before the server noticed the expiry itself"
    rig.server.tick()
    assert rig.server.take_freed() == {"r"}
    assert (rig.server.expired, rig.server.late) == (1, 1)
    assert rig.close() is False
    assert rig.server.take_freed() == set()


def test_remembered_closes_are_bounded(rig, monkeypatch):
    monkeypatch.setattr(leases_module, "REMEMBERED_CLOSES", 2)
    rig.server.grant(TERMS)
    assert rig.close(seq=1)
    for seq in (2, 3):
        rig.close(seq=seq)
    assert rig.close(seq=1) is False, "forgotten: late rather than believed"


def test_renewing_keeps_a_lease_up_to_its_longest_duration(rig):
    rig.server.grant(TERMS)
    for _ in range(3):
        rig.clock.advance(8)
        assert rig.send(wire.Renew(lease_ids=["g"])) == []
        rig.server.tick()
        assert rig.server.take_freed() == set()
    rig.clock.advance(1)
    assert rig.send(wire.Renew(lease_ids=["g", "x"])) == [wire.Gone(lease_ids=["g", "x"])]
    rig.server.tick()
    assert rig.server.take_freed() == {"r"}


def test_a_lease_without_a_ticket_is_renewed_by_request_id(rig):
    rig.server.grant(TERMS)
    rig.clock.advance(8)
    assert rig.send(wire.Renew(lease_ids=[], request_ids=["r", "unknown"])) == []
    rig.clock.advance(8)
    rig.server.tick()
    assert rig.server.take_freed() == set()


def test_opening_renews(rig):
    rig.server.grant(TERMS)
    rig.clock.advance(8)
    rig.open()
    rig.clock.advance(8)
    assert rig.close() is True


def test_a_lease_that_nobody_reads_is_freed_at_its_deadline(rig):
    rig.server.grant(TERMS)
    assert rig.server.next_deadline() == rig.clock() + 10
    rig.clock.advance(9.9)
    rig.server.tick()
    assert rig.server.take_freed() == set()
    rig.clock.advance(0.1)
    rig.server.tick()
    assert rig.server.take_freed() == {"r"}
    assert rig.server.next_deadline() is None


def test_other_messages_are_ignored(rig):
    assert rig.send(wire.Closed(seq=1, stood=True)) == []
    assert rig.send(wire.Reject(version=(3, 0), detail="x")) == []


@pytest.mark.parametrize("named", [("g", "x"), (None, "r")], ids=["ticket", "in-tree form"])
def test_a_lease_that_its_own_engine_was_offered_ends_unless_another_reads_it(rig, named):
    rig.server.grant(TERMS)
    rig.open()
    rig.server.release_own(*named)
    assert rig.server.take_freed() == set()
    assert rig.close(readers=2), "another reader's lease stands"
    rig.server.release_own(*named)
    assert rig.server.take_freed() == {"r"}
    rig.server.release_own(*named)
    rig.server.release_own(None, "never heard of")
    assert rig.server.take_freed() == set()
