"""Listener and Dialer: who shows what to whom, and what hostile frames can do (nothing)."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.control import dialer as dialer_module
from kvconnect.control import listener as listener_module
from kvconnect.control import wire
from kvconnect.control.calls import LOOK_S
from kvconnect.control.channel import Frame, Link
from kvconnect.control.dialer import Dialer
from kvconnect.control.listener import Listener
from kvconnect.control.peer import RESEND_S, LeaseRef, PeerState
from kvconnect.control.proof import DIALER, LISTENER, prove
from kvconnect.errors import WireError
from kvconnect.testing import FakeClock
from kvconnect.testing.network import Network
from kvconnect_bench.caches import Cache, Model

SECRET = b"a secret of 16 b"
MEMORY = Cache(Model(), 2).shard
BODY = wire.Body("incarnation", MEMORY.views, MEMORY.regions, "loopback", b"hello")
TIMEOUT_S = 5.0


class Pair:
    """A dialer and a listener on one network, stepped by hand."""

    def __init__(self, ours=SECRET, theirs=SECRET, fingerprint=None, body=BODY, held=False):
        self.clock = FakeClock()
        self.network = Network(held)
        self.near, self.far = self.network.channel(), self.network.channel()
        self.dialer = Dialer(self.near, self.clock, {"model": "m"}, ours, TIMEOUT_S)
        self.bodies = 0
        self.body = body
        self.listener = Listener(self.far, fingerprint or {"model": "m"}, self.tell_body, theirs)
        self.leases = {"stands"}
        self.listener.knows = lambda lease: lease in self.leases
        self.incoming = []

    def tell_body(self):
        self.bodies += 1
        return self.body

    def greet(self, *leases, address=None):
        shown = [LeaseRef(lease, "r") for lease in leases]
        peer = self.dialer.greet(address or self.far.address, shown)
        self.go_on()
        return peer

    def go_on(self, rounds=4):
        for _ in range(rounds):
            self.network.flush()
            for frame in self.far.poll(0):
                if frame.data is not None and (told := self.listener.receive(frame)):
                    self.incoming.append(told)
            self.network.flush()
            for frame in self.near.poll(0):
                self.dialer.receive(frame)
            self.dialer.tick()

    def call(self, peer, accepts=(wire.Closed,), seconds=60.0):
        def close(seq):
            return wire.Close(seq=seq, lease_id="g", request_id=None, reader=0, readers=1)

        return self.dialer.calls.send(peer, close, accepts, self.clock() + seconds)


class Stranger:
    """Says what it likes, and hears what is answered."""

    def __init__(self, pair):
        self.pair, self.channel = pair, pair.network.channel()
        self.link = self.channel.dial(pair.far.address)

    def greets(self, **changed):
        fields = {
            "version": wire.VERSION,
            "seq": 1,
            "nonce": b"n",
            "proof": b"",
            "lease_ids": [],
            "request_ids": [],
            "early": False,
        }
        return self.says(wire.Greet(**fields | changed))

    def says(self, message):
        self.channel.send(self.link, wire.encode(message))
        for frame in self.pair.far.poll(0):
            assert self.pair.listener.receive(frame) is None
        return [wire.decode(frame.data) for frame in self.channel.poll(0)]


def test_both_sides_prove_themselves_and_the_body_is_known():
    pair = Pair()
    peer = pair.greet()
    assert peer.state is PeerState.READY
    assert peer.body == BODY
    assert pair.dialer.greet(pair.far.address) is peer


def open_pair(**options):
    return Pair(ours=b"", theirs=b"", **options)


def test_without_a_secret_a_lease_that_stands_is_shown():
    assert open_pair().greet("stands").state is PeerState.READY


def test_without_a_secret_and_a_lease_nothing_is_told():
    pair = open_pair()
    peer = pair.greet("stale")
    assert peer.state is PeerState.FAILED
    assert "none of the leases" in peer.error
    assert pair.bodies == 0


def test_a_stale_lease_keeps_nobody_else_waiting():
    """It may come from a client."""
    pair = open_pair()
    assert pair.greet("stale").state is PeerState.FAILED
    assert pair.greet("stands").state is PeerState.READY


def test_of_several_leases_one_that_stands_is_enough():
    assert open_pair().greet("stale", "stands").state is PeerState.READY


def test_a_lease_that_comes_while_another_is_rejected_is_shown_next():
    pair = open_pair(held=True)
    peer = pair.dialer.greet(pair.far.address, [LeaseRef("stale", "r")])
    assert pair.dialer.greet(pair.far.address, [LeaseRef(None, "stands")]) is peer
    pair.go_on()
    assert peer.state is PeerState.READY


def test_what_is_shown_is_bounded_and_the_newest_stay():
    pair = open_pair(held=True)
    many = [LeaseRef(f"stale {i}", "r") for i in range(2 * wire.RENEWED_AT_ONCE)]
    peer = pair.dialer.greet(pair.far.address, [*many, LeaseRef("stands", "r")])
    pair.go_on()
    assert peer.state is PeerState.READY
    assert len(peer.shown) == wire.RENEWED_AT_ONCE


def early(pair, *names, wait_s=100.0):
    return pair.dialer.greet(pair.far.address, [LeaseRef(None, name, wait_s) for name in names])


def test_who_is_early_waits_until_the_lease_is_known():
    pair = open_pair()
    peer = early(pair, "soon")
    for _ in range(60):
        pair.go_on(1)
        pair.clock.advance(1.0)
    assert peer.state is PeerState.GREETING and pair.bodies == 0
    pair.listener.known("another", "one")
    pair.go_on()
    assert peer.state is PeerState.GREETING
    pair.leases.add("soon")
    pair.listener.known("its id", "soon")
    pair.go_on()
    assert peer.state is PeerState.READY


def test_who_waits_shows_at_once_what_comes_then():
    pair = open_pair()
    peer = early(pair, "soon")
    pair.go_on()
    assert peer.waits
    early(pair, "stands")
    pair.go_on()
    assert peer.state is PeerState.READY


def test_who_waited_for_too_long_is_rejected():
    pair = open_pair()
    peer = early(pair, "soon", wait_s=20.0)
    for _ in range(40):
        pair.go_on(1)
        pair.clock.advance(1.0)
    assert peer.state is PeerState.FAILED and "none of the leases" in peer.error


def test_who_waits_for_a_peer_that_is_gone_gives_up():
    pair = open_pair()
    peer = early(pair, "soon")
    pair.go_on()
    pair.network.held = True
    for _ in range(int(TIMEOUT_S) + 1):
        pair.clock.advance(1.0)
        pair.dialer.tick()
    assert peer.state is PeerState.FAILED and "within 5 s" in peer.error


def test_who_waits_takes_no_turn_from_others(monkeypatch):
    monkeypatch.setattr(dialer_module, "MAX_GREETINGS", 1)
    pair = open_pair()
    waits = early(pair, "soon")
    pair.go_on()
    assert pair.greet("stands", address=pair.far.key_address).state is PeerState.READY
    pair.leases.add("soon")
    pair.listener.known("soon")
    pair.go_on()
    assert waits.state is PeerState.READY
    pair.network.held = True
    for port in (1, 2):
        pair.dialer.greet(wire.Address("nobody", port))
    assert len(pair.network.pending) == 1, "one turn, and it was given back once"


def test_the_heap_does_not_grow_with_what_is_shown_while_it_waits():
    pair = open_pair()
    early(pair, "soon")
    for number in range(300):
        pair.go_on(1)
        early(pair, f"soon {number}")
        pair.clock.advance(0.3)
    assert len(pair.dialer.due) < 30


def test_where_no_key_is_known_it_is_asked_for():
    pair = open_pair()
    peer = pair.greet("stands", address=pair.far.key_address)
    assert peer.state is PeerState.READY
    assert (peer.address, peer.at) == (pair.far.key_address, pair.far.address)


def test_a_key_port_that_tells_no_key_is_named():
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.key_address)
    told = wire.PLAIN + wire.encode(wire.KeyTold(version=wire.VERSION, port=7))
    pair.dialer.receive(Frame(peer.link, told))
    assert peer.state is PeerState.FAILED and "told no key" in peer.error


def test_a_key_port_that_tells_what_is_no_key_is_named(monkeypatch):
    monkeypatch.setattr(dialer_module, "MAX_GREETINGS", 1)
    pair = Pair()
    peer = pair.dialer.greet(pair.far.key_address)

    def refuse(address):
        raise WireError(f"{address} cannot be dialled (Invalid argument)")

    with monkeypatch.context() as patch:
        patch.setattr(pair.near, "dial", refuse)
        pair.go_on()
    assert peer.state is PeerState.FAILED and "cannot be dialled" in peer.error
    assert pair.greet().state is PeerState.READY, "its turn was given back"


def test_a_ticket_of_a_process_that_has_ended_is_given_up_soon():
    """Its address says the key of that process."""
    pair = Pair()
    gone = wire.Address(pair.far.address.host, pair.far.address.port, "another key")
    started, peer = pair.clock(), pair.dialer.greet(gone)
    for _ in range(3):
        pair.go_on(1)
        pair.clock.advance(RESEND_S)
    pair.go_on(1)
    assert peer.state is PeerState.FAILED and "was it restarted?" in peer.error
    assert pair.clock() < started + TIMEOUT_S


SECRETS = {
    "another": (SECRET, b"another secret 16", "holds another secret than ours"),
    "only theirs": (b"", SECRET, "has an auth_secret_file and we have none; set the same one here"),
    "only ours": (SECRET, b"", "has no auth_secret_file and we have one; set the same one there"),
}


@pytest.mark.parametrize(("ours", "theirs", "reason"), SECRETS.values(), ids=SECRETS)
def test_a_wrong_secret_is_named_and_no_memory_is_shown(ours, theirs, reason):
    pair = Pair(ours, theirs)
    peer = pair.greet()
    assert peer.state is PeerState.FAILED
    assert reason in peer.error
    assert pair.bodies == 0


def test_a_dialler_that_lies_about_its_proof_is_rejected_and_sees_no_memory():
    pair = Pair()
    key = pair.far.address.key
    proofs = {
        "none": b"",
        "guessed": prove(b"guessed", DIALER, key, b"n"),
        "of another nonce": prove(SECRET, DIALER, key, b"m"),
        "of the other side": prove(SECRET, LISTENER, key, b"n"),
        "for another listener": prove(SECRET, DIALER, pair.near.address.key, b"n"),
    }
    stranger = Stranger(pair)
    for name, proof in proofs.items():
        (reject,) = stranger.greets(proof=proof, lease_ids=["stands"])
        assert isinstance(reject, wire.Reject), name
    assert pair.bodies == 0
    (welcome,) = stranger.greets(proof=prove(SECRET, DIALER, key, b"n"))
    assert isinstance(welcome, wire.Welcome)


def welcome_of(pair, peer, secret):
    """Of somebody who has put its own key into the answer of a key port."""
    proof = prove(secret, LISTENER, pair.far.address.key, peer.nonce)
    told = {"version": wire.VERSION, "fingerprint": {"model": "m"}, "body": wire.encode(BODY)}
    return Frame(peer.link, wire.encode(wire.Welcome(proof=proof, **told)))


@pytest.mark.parametrize("secret", [b"", b"guessed by somebody"])
def test_a_listener_that_lies_about_its_proof_is_not_believed(secret):
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    pair.dialer.receive(welcome_of(pair, peer, secret))
    assert peer.state is PeerState.FAILED and "auth_secret_file" in peer.error
    assert peer.body is None


def test_who_says_anything_but_a_greet_first_is_rejected():
    pair = Pair()
    for message in (wire.Renew(lease_ids=["stands"]), wire.Later(), wire.Closed(seq=1, stood=True)):
        (reject,) = Stranger(pair).says(message)
        assert "greet again" in reject.detail


@pytest.mark.parametrize("told", [True, False], ids=["connection broke", "silently"])
def test_a_peer_that_ends_amid_the_greeting_is_given_up(told):
    """Another process has another key, so it never comes back."""
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    pair.network.drop()
    pair.far.close()
    if not told:
        pair.network.pending.clear()
    started = pair.clock()
    while peer.state is PeerState.GREETING:
        pair.network.flush()
        pair.network.flush()
        for frame in pair.near.poll(0):
            pair.dialer.receive(frame)
        pair.clock.advance(RESEND_S)
        pair.dialer.tick()
        assert pair.clock() < started + TIMEOUT_S
    assert "was it restarted?" in peer.error


def test_a_peer_that_has_forgotten_us_is_greeted_anew():
    pair = Pair()
    peer = pair.greet()
    pair.listener = Listener(pair.far, {"model": "m"}, pair.tell_body, SECRET)
    pair.call(peer)
    pair.go_on()
    assert peer.state is PeerState.FAILED
    assert "greet again" in peer.error
    assert pair.incoming == []
    assert pair.greet().state is PeerState.READY


def test_a_rejection_of_what_was_shown_before_is_no_rejection():
    """Two Greets may be under way; and one that was repeated may come when the lease is over."""
    pair = open_pair(held=True)
    peer = pair.dialer.greet(pair.far.address, [LeaseRef("stale", "r")])
    pair.clock.advance(RESEND_S)
    pair.dialer.show(peer, [LeaseRef("stands", "r")])
    pair.dialer.tick()
    pair.go_on()
    assert peer.state is PeerState.READY
    late = wire.Reject(version=wire.VERSION, detail="late", seq=peer.seq)
    pair.dialer.receive(Frame(peer.link, wire.encode(late)))
    assert peer.state is PeerState.READY


def test_another_major_wire_version_is_named_on_both_sides():
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    pair.network.held = False
    (reject,) = Stranger(pair).greets(version=(4, 1))
    assert "another wire version" in reject.detail and reject.version == wire.VERSION
    later = wire.Reject(version=(4, 1), detail="no", seq=peer.seq)
    pair.dialer.receive(Frame(peer.link, wire.encode(later)))
    assert peer.state is PeerState.FAILED
    assert f"speaks wire version (4, 1), ours is {wire.VERSION}" in peer.error


FINGERPRINTS = {
    "another value": ({"model": "x"}, "model is 'x', ours is 'm'"),
    "missing": ({"vllm": "1"}, "model is None, ours is 'm'"),
    "one more": ({"model": "m", "vllm": "1"}, "vllm is '1', ours is None"),
}


@pytest.mark.parametrize(("theirs", "reason"), FINGERPRINTS.values(), ids=FINGERPRINTS)
def test_a_difference_in_the_fingerprint_is_named_before_the_body_is_read(theirs, reason):
    pair = Pair(fingerprint=theirs, body=wire.Later())
    peer = pair.greet()
    assert peer.state is PeerState.FAILED
    assert reason in peer.error


def test_a_body_that_cannot_be_is_named():
    pair = Pair(body=wire.Later())
    assert "bad description of its memory" in pair.greet().error


def test_a_body_whose_views_lie_outside_its_regions_is_named():
    pair = Pair(body=wire.Body("i", MEMORY.views, (), "loopback", b""))
    assert "outside every registered region" in pair.greet().error


def test_silence_ends_the_greeting_at_its_timeout():
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    pair.clock.advance(TIMEOUT_S - 0.1)
    pair.dialer.tick()
    assert peer.state is PeerState.GREETING
    pair.clock.advance(0.1)
    pair.dialer.tick()
    assert peer.state is PeerState.FAILED
    assert "did not complete the greeting within 5 s; is the engine up" in peer.error


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_frame_of_the_greeting_is_sent_again(lost):
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.key_address)
    for number in range(8):
        if pair.network.pending:
            (pair.network.drop if number == lost else pair.network.deliver)()
        for frame in pair.far.poll(0):
            pair.listener.receive(frame)
        for frame in pair.near.poll(0):
            pair.dialer.receive(frame)
        if not pair.network.pending and peer.state is PeerState.GREETING:
            pair.clock.advance(RESEND_S)
            pair.dialer.tick()
    pair.go_on()
    assert peer.state is PeerState.READY


def test_an_address_that_failed_is_left_alone_for_a_while():
    pair = Pair(theirs=b"another secret 16")
    assert pair.greet().state is PeerState.FAILED
    again = pair.dialer.greet(pair.far.address)
    assert again.state is PeerState.FAILED
    assert "another secret" in again.error, "the reason of the first failure is told again"
    pair.clock.advance(10)
    assert pair.dialer.greet(pair.far.address).state is PeerState.GREETING


def test_an_address_that_cannot_be_dialled_is_a_failed_peer():
    """Used to end the mover's thread with ZMQError: a client's remote_host reaches this."""
    pair = Pair()
    peer = pair.dialer.greet(wire.Address("bad host", 1))
    assert peer.state is PeerState.FAILED
    assert "cannot be dialled" in peer.error
    assert pair.dialer.next_deadline() is None


def test_greetings_under_way_are_bounded_and_others_wait_in_line():
    """Used to be: of a burst of 512 first greetings 384 failed at once."""
    pair = Pair(held=True)
    most, line = dialer_module.MAX_GREETINGS, dialer_module.MAX_IN_LINE
    peers = [pair.dialer.greet(wire.Address("nobody", port)) for port in range(1, most + line + 2)]
    assert [p.state for p in peers[:-1]] == [PeerState.GREETING] * (most + line)
    assert peers[-1].state is PeerState.FAILED
    assert "other peers wait to be greeted" in peers[-1].error
    assert len(pair.network.pending) == most
    pair.dialer.fail(peers[most], "given up in line")
    pair.dialer.fail(peers[0], "given up")
    assert len(pair.network.pending) == most + 1
    assert pair.network.pending[-1].address == peers[most + 1].address
    pair.clock.advance(TIMEOUT_S)
    pair.dialer.tick()
    assert all(p.state is PeerState.FAILED for p in peers[:most])
    assert peers[2 * most].state is PeerState.GREETING, "its time runs from its turn on"


def test_a_burst_of_512_first_greetings_is_served():
    pair = Pair()
    channels = [pair.network.channel() for _ in range(512)]
    listeners = [Listener(one, {"model": "m"}, pair.tell_body, SECRET) for one in channels]
    peers = [pair.dialer.greet(one.address) for one in channels]
    for _ in range(40):
        for channel, listener in zip(channels, listeners, strict=True):
            for frame in channel.poll(0):
                listener.receive(frame)
        for frame in pair.near.poll(0):
            pair.dialer.receive(frame)
    assert {p.state for p in peers} == {PeerState.READY}


def test_a_call_is_repeated_ever_less_often():
    """10,000 requests that wait at prefill are as many calls for each decode rank."""
    pair = Pair()
    call = pair.call(pair.greet(), seconds=100)
    for _ in range(600):
        pair.go_on(1)
        pair.clock.advance(0.1)
    assert not call.error and not call.reply
    assert 6 <= len(pair.incoming) <= 11, "after 1, 3, 7, and then every 8 seconds"


def test_a_peer_that_once_left_a_call_unanswered_has_as_long_for_the_next():
    pair = Pair()
    peer = pair.greet()
    pair.network.held = True

    def pass_time(seconds):
        for _ in range(int(seconds / LOOK_S)):
            pair.clock.advance(LOOK_S)
            pair.dialer.tick()

    pair.call(peer, seconds=3 * LOOK_S)
    pass_time(3 * LOOK_S)
    pair.call(peer, seconds=100)
    pass_time(3 * LOOK_S)
    assert peer.state is PeerState.READY, "given up for what it did not answer before"
    pass_time(LOOK_S)
    assert "has answered nothing for 9 s" in peer.error


# -- calls ---------------------------------------------------------------------------------


def test_a_call_is_repeated_until_it_is_answered():
    pair = Pair()
    peer = pair.greet()
    pair.network.held = True
    call = pair.call(peer)
    pair.network.drop()
    pair.clock.advance(RESEND_S)
    pair.dialer.tick()
    pair.go_on()
    (incoming,) = pair.incoming
    pair.listener.answer(incoming.link, wire.Closed(seq=incoming.message.seq, stood=True))
    pair.go_on()
    assert call.reply == wire.Closed(seq=incoming.message.seq, stood=True)
    pair.clock.advance(10 * RESEND_S)
    pair.go_on()
    assert len(pair.incoming) == 1, "an answered call was repeated"


def test_a_call_that_is_not_answered_in_time_ends_with_an_error():
    pair = Pair()
    call = pair.call(pair.greet(), seconds=3)
    pair.clock.advance(3)
    pair.dialer.tick()
    assert "did not answer in time" in call.error
    assert call.reply is None


def test_a_call_to_a_peer_that_is_not_ready_fails_at_once():
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    assert "not greeted yet" in pair.call(peer).error
    pair.dialer.fail(peer, "it is gone")
    assert "it is gone" in pair.call(peer).error


def test_all_calls_of_a_peer_end_when_it_fails():
    pair = Pair()
    peer = pair.greet()
    calls = [pair.call(peer) for _ in range(3)]
    pair.dialer.fail(peer, "it is gone")
    pair.dialer.fail(peer, "said twice")
    assert all("it is gone" in call.error for call in calls)
    assert pair.dialer.next_deadline() is None


def test_a_cancelled_call_is_not_repeated():
    """Used to be: an Open that was repeated after its Close opened the lease again."""
    pair = Pair()
    peer = pair.greet()
    call = pair.call(peer)
    pair.dialer.calls.cancel(call)
    pair.dialer.calls.cancel(call)
    pair.go_on()
    pair.clock.advance(10 * RESEND_S)
    pair.go_on()
    assert len(pair.incoming) == 1


def test_an_answer_must_fit_its_question():
    pair = Pair()
    peer = pair.greet()
    call = pair.call(peer, accepts=(wire.Closed,))
    pair.go_on()
    (incoming,) = pair.incoming
    seq = incoming.message.seq
    for wrong in (
        wire.Opened(seq=seq, lease_id="g", tables=()),
        wire.Closed(seq=seq + 1, stood=True),
        wire.Welcome(version=wire.VERSION, proof=b"", fingerprint={}, body=b""),
        wire.Renew(lease_ids=[]),
    ):
        pair.listener.answer(incoming.link, wrong)
    pair.go_on()
    assert call.reply is None
    assert peer.state is PeerState.READY


def test_what_a_peer_says_is_over_is_remembered():
    pair = Pair()
    peer = pair.greet()
    pair.call(peer)
    pair.go_on()
    pair.listener.answer(pair.incoming[0].link, wire.Gone(lease_ids=["g1"]))
    pair.go_on()
    assert list(peer.gone) == ["g1"]


def test_of_what_a_peer_says_is_over_the_last_is_remembered(monkeypatch):
    monkeypatch.setattr(dialer_module, "MAX_GONE", 3)
    pair = Pair()
    peer = pair.greet()
    pair.call(peer)
    pair.go_on()
    for number in range(5):
        pair.listener.answer(pair.incoming[0].link, wire.Gone(lease_ids=[f"g{number}"]))
    pair.go_on()
    assert list(peer.gone) == ["g2", "g3", "g4"]


def test_a_broken_connection_fails_a_peer_that_was_ready():
    pair = Pair()
    peer = pair.greet()
    pair.far.close()
    for frame in pair.near.poll(0):
        pair.dialer.receive(frame)
    assert peer.state is PeerState.FAILED
    assert "closed the connection" in peer.error


def test_a_connection_that_breaks_while_greeting_may_come_up_yet():
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    pair.dialer.receive(Frame(peer.link, None))
    pair.go_on()
    assert peer.state is PeerState.READY


# -- hostile frames ------------------------------------------------------------------------

GREET = wire.Greet(
    version=wire.VERSION,
    seq=1,
    nonce=b"",
    proof=b"",
    lease_ids=["stands"],
    request_ids=["r"],
    early=True,
)
TOLD = {"version": wire.VERSION, "fingerprint": {"model": "m"}, "body": wire.encode(BODY)}
MESSAGES = [
    wire.AskKey(version=(9, 9)),
    wire.KeyTold(version=(1, 0), key="k", port=1),
    GREET,
    wire.Later(),
    wire.Reject(version=wire.VERSION, detail="x", seq=9),
    wire.Welcome(proof=b"", **TOLD),
    wire.Welcome(proof=b"p", **TOLD),
    wire.Open(seq=1, lease_id="g", request_id=None, reader=0, tokens=1, digest=b""),
    wire.Closed(seq=9, stood=True),
]
HOSTILE = st.one_of(st.binary(max_size=80), st.sampled_from([wire.encode(m) for m in MESSAGES]))


@pytest.mark.slow
@given(st.lists(HOSTILE, max_size=6), st.booleans())
def test_no_frame_of_a_stranger_raises_in_the_listener_or_is_believed(frames, greeted):
    pair = Pair()
    if greeted:
        pair.greet()
    before = pair.bodies
    stranger = Link(False, secrets.token_bytes(4))
    for data in frames:
        assert pair.listener.receive(Frame(stranger, data)) is None
    assert pair.bodies == before, "memory was shown to somebody who proved nothing"


@pytest.mark.slow
@given(st.lists(HOSTILE, max_size=6), st.booleans(), st.booleans())
def test_no_frame_raises_in_the_dialler_or_makes_a_peer_ready(frames, greeted, key_address):
    pair = Pair()
    where = pair.far.key_address if key_address else pair.far.address
    peer = pair.greet(address=where) if greeted else pair.dialer.greet(where)
    call = pair.call(peer)
    for data in frames:
        pair.dialer.receive(Frame(peer.link, data))
        pair.dialer.receive(Frame(Link(True, b"never dialled"), data))
    assert call.reply is None
    assert not peer.gone
    assert greeted or peer.state is not PeerState.READY


def test_strangers_displace_only_their_like(monkeypatch):
    """Used to be: strangers who said Hello often enough ended everybody's session."""
    monkeypatch.setattr(listener_module, "MAX_WAITING", 3)
    pair = open_pair()
    peer = pair.greet("stands")
    strangers = [Stranger(pair) for _ in range(10)]
    for number, one in enumerate(strangers):
        (later,) = one.greets(request_ids=[f"guess {number}"], early=True)
        assert later == wire.Later()
    for number in range(10):
        pair.leases.add(f"guess {number}")
        pair.listener.known(f"guess {number}")
    told = [len(one.channel.poll(0)) for one in strangers]
    assert told == [0] * 7 + [1] * 3
    pair.call(peer)
    pair.go_on()
    assert len(pair.incoming) == 1


def test_who_was_displaced_asks_again(monkeypatch):
    monkeypatch.setattr(listener_module, "MAX_WAITING", 1)
    pair = open_pair()
    peer = early(pair, "soon")
    pair.go_on()
    Stranger(pair).greets(request_ids=["a guess"], early=True)
    pair.leases.add("soon")
    pair.listener.known("soon")
    for _ in range(9):
        pair.go_on()
        pair.clock.advance(1.0)
    assert peer.state is PeerState.READY


def test_welcome_links_are_bounded_and_the_longest_silent_one_goes(monkeypatch):
    monkeypatch.setattr(listener_module, "MAX_WELCOME", 2)
    pair = Pair()
    dialers = [Dialer(pair.near, pair.clock, {"model": "m"}, SECRET, TIMEOUT_S) for _ in range(3)]
    peers = []
    for pair.dialer in dialers:
        peers.append(pair.greet())
        if len(peers) == 2:  # the first one speaks: now the second is the longest silent
            pair.dialer = dialers[0]
            pair.call(peers[0])
            pair.go_on()
    for pair.dialer, peer in zip(dialers, peers, strict=True):
        pair.call(peer)
        pair.go_on()
    states = [peer.state for peer in peers]
    assert states == [PeerState.READY, PeerState.FAILED, PeerState.READY]
