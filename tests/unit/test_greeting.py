"""Listener and Dialer: who proves what to whom, and what hostile frames can do (nothing)."""

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.network import Network

from kvconnect.control import dialer as dialer_module
from kvconnect.control import listener as listener_module
from kvconnect.control import wire
from kvconnect.control.channel import Frame, Link
from kvconnect.control.dialer import RESEND_S, Dialer, PeerState
from kvconnect.control.listener import Listener
from kvconnect.control.session import DIALER, LISTENER, PLAIN, SEALED, Session
from kvconnect.testing import FakeClock
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
        self.incoming = []

    def tell_body(self):
        self.bodies += 1
        return self.body

    def greet(self):
        peer = self.dialer.greet(self.far.address)
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

        return self.dialer.call(peer, close, accepts, self.clock() + seconds)


def test_both_sides_prove_themselves_and_the_body_is_known():
    pair = Pair()
    peer = pair.greet()
    assert peer.state is PeerState.READY
    assert peer.body == BODY
    assert pair.dialer.greet(pair.far.address) is peer


def test_no_secret_on_either_side_is_fine_too():
    assert Pair(ours=b"", theirs=b"").greet().state is PeerState.READY


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
    """The dialer checks first; one that does not must still be stopped by the listener."""
    pair = Pair()
    link = pair.near.dial(pair.far.address)
    pair.near.send(link, PLAIN + wire.encode(wire.Hello(version=wire.VERSION, nonce=b"n")))
    (challenge,) = exchange(pair)
    session = Session(LISTENER, b"guessed", b"n", challenge.nonce)
    for proof in (b"", session.proof(), challenge.proof):  # the last one: theirs, sent back
        pair.near.send(link, PLAIN + wire.encode(wire.Prove(proof=proof)))
        (reject,) = exchange(pair)
        assert isinstance(reject, wire.Reject)
    assert pair.bodies == 0


def exchange(pair):
    """What the listener answers to what was sent, decoded; all of it is PLAIN."""
    for frame in pair.far.poll(0):
        assert pair.listener.receive(frame) is None
    frames = pair.near.poll(0)
    assert all(frame.data[:1] == PLAIN for frame in frames)
    return [wire.decode(frame.data[1:]) for frame in frames]


def test_a_proof_without_a_hello_is_rejected():
    pair = Pair()
    link = pair.near.dial(pair.far.address)
    pair.near.send(link, PLAIN + wire.encode(wire.Prove(proof=b"p")))
    (reject,) = exchange(pair)
    assert "no greeting" in reject.detail


@pytest.mark.parametrize("told", [True, False], ids=["connection broke", "silently"])
def test_a_peer_restarted_amid_the_greeting_is_greeted_from_the_start(told):
    """It used to be taken for one with another secret."""
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    for channel in (pair.far, pair.near):  # Hello, Challenge
        pair.network.flush()
        for frame in channel.poll(0):
            pair.listener.receive(frame) if channel is pair.far else pair.dialer.receive(frame)
    assert peer.session is not None
    pair.listener = Listener(pair.far, {"model": "m"}, pair.tell_body, SECRET)
    if told:
        pair.network.drop()  # the Prove
        pair.dialer.receive(Frame(peer.link, None))
    pair.go_on()
    assert peer.state is PeerState.READY
    assert peer.rejected is not told


def test_a_peer_that_rejects_every_proof_is_given_up():
    pair = Pair()
    peer = pair.dialer.greet(pair.far.address)
    pair.listener._welcome = lambda link, prove: pair.listener._reject(link, "for no reason")
    pair.go_on()
    assert peer.state is PeerState.FAILED
    assert "for no reason" in peer.error


def test_a_sealed_frame_without_a_session_is_rejected_so_that_its_sender_greets_anew():
    pair = Pair()
    peer = pair.greet()
    forgetful = Listener(pair.far, {"model": "m"}, pair.tell_body, SECRET)  # it was restarted
    pair.listener = forgetful
    pair.call(peer)
    pair.go_on()
    assert peer.state is PeerState.FAILED
    assert "greet again" in peer.error
    assert pair.incoming == []
    assert pair.greet().state is PeerState.READY


def test_another_major_wire_version_is_named(monkeypatch):
    pair = Pair()
    monkeypatch.setattr(listener_module.wire, "VERSION", (3, 1))
    peer = pair.dialer.greet(pair.far.address)
    for frame in pair.far.poll(0):
        pair.listener.receive(frame)
    monkeypatch.undo()
    pair.go_on()
    assert peer.state is PeerState.FAILED
    assert f"speaks wire version (3, 1), ours is {wire.VERSION}" in peer.error


FINGERPRINTS = {
    "another value": ({"model": "x"}, "model is 'x', ours is 'm'"),
    "missing": ({"vllm": "1"}, "model is None, ours is 'm'"),
    "one more": ({"model": "m", "vllm": "1"}, "vllm is '1', ours is None"),
}


@pytest.mark.parametrize(("theirs", "reason"), FINGERPRINTS.values(), ids=FINGERPRINTS)
def test_a_difference_in_the_fingerprint_is_named_before_the_body_is_read(theirs, reason):
    pair = Pair(fingerprint=theirs, body=wire.Reject(detail="not a body"))
    peer = pair.greet()
    assert peer.state is PeerState.FAILED
    assert reason in peer.error


def test_a_body_that_cannot_be_is_named():
    pair = Pair(body=wire.Reject(detail="not a body"))
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
    peer = pair.dialer.greet(pair.far.address)
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


def test_a_repeated_hello_gets_the_same_challenge():
    pair = Pair()
    link = pair.near.dial(pair.far.address)
    challenges = []
    for _ in range(2):
        pair.near.send(link, PLAIN + wire.encode(wire.Hello(version=wire.VERSION, nonce=b"n")))
        challenges += exchange(pair)
    assert challenges[0] == challenges[1], "a proof of the first one would be rejected"


def test_a_repeated_challenge_does_not_begin_the_session_anew():
    """Else the frames of the session so far could be replayed."""
    pair = Pair(held=True)
    peer = pair.dialer.greet(pair.far.address)
    pair.network.flush()
    for frame in pair.far.poll(0):
        pair.listener.receive(frame)
    pair.network.repeat()
    challenge = pair.network.pending[0].data
    pair.go_on()
    assert peer.state is PeerState.READY
    session = peer.session
    pair.dialer.receive(Frame(peer.link, challenge))
    assert peer.session is session


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
    pair.dialer.cancel(peer, call)
    pair.dialer.cancel(peer, call)
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
        wire.Opened(seq=seq, lease_id="g", tables=(), ttl_ms=1),
        wire.Closed(seq=seq + 1, stood=True),
        wire.Welcome(fingerprint={}, body=b""),
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

KINDS = st.sampled_from([PLAIN, SEALED, b"", b"\x02", b"\xff"])
MESSAGES = [
    wire.Hello(version=(9, 9), nonce=b""),
    wire.Challenge(version=(1, 0), nonce=b"n", proof=b"p", secret=True),
    wire.Prove(proof=b""),
    wire.Welcome(fingerprint={}, body=b""),
    wire.Open(seq=1, lease_id="g", request_id=None, reader=0, tokens=1, digest=b""),
    wire.Closed(seq=1, stood=True),
    wire.Gone(lease_ids=["g"]),
]
HOSTILE = st.one_of(st.binary(max_size=80), st.sampled_from([wire.encode(m) for m in MESSAGES]))


@pytest.mark.slow
@given(st.lists(st.tuples(KINDS, HOSTILE), max_size=6), st.booleans())
def test_no_frame_raises_in_the_listener_or_is_believed(frames, greeted):
    pair = Pair()
    if greeted:
        pair.greet()
    before = pair.bodies
    stranger = Link(False, secrets.token_bytes(4))
    for kind, data in frames:
        for link in (stranger, *([Link(False, b"1")] if greeted else [])):
            assert pair.listener.receive(Frame(link, kind + data)) is None
    assert pair.bodies == before, "memory was shown to somebody who proved nothing"


@pytest.mark.slow
@given(st.lists(st.tuples(KINDS, HOSTILE), max_size=6), st.booleans())
def test_no_frame_raises_in_the_dialler_or_makes_a_peer_ready(frames, greeted):
    pair = Pair()
    peer = pair.greet() if greeted else pair.dialer.greet(pair.far.address)
    call = pair.call(peer)
    for kind, data in frames:
        pair.dialer.receive(Frame(peer.link, kind + data))
        pair.dialer.receive(Frame(Link(True, b"never dialled"), kind + data))
    assert call.reply is None
    assert not peer.gone
    assert greeted or peer.state is not PeerState.READY


def test_links_that_proved_nothing_displace_only_their_like(monkeypatch):
    """Used to be: strangers who said Hello often enough ended everybody's session."""
    monkeypatch.setattr(listener_module, "MAX_UNPROVED", 3)
    pair = Pair()
    peer = pair.greet()
    for number in range(10):
        hello = wire.Hello(version=wire.VERSION, nonce=b"n")
        frame = Frame(Link(False, b"stranger %d" % number), PLAIN + wire.encode(hello))
        pair.listener.receive(frame)
    pair.call(peer)
    pair.go_on()
    assert len(pair.incoming) == 1


@pytest.mark.parametrize(("number", "known"), [(0, False), (9, True)])
def test_links_that_proved_nothing_are_bounded(number, known, monkeypatch):
    monkeypatch.setattr(listener_module, "MAX_UNPROVED", 3)
    pair, sent = Pair(), {}
    monkeypatch.setattr(pair.far, "send", lambda link, data: sent.update({link: data}))
    links = [Link(False, b"stranger %d" % i) for i in range(10)]
    for link in links:
        hello = wire.Hello(version=wire.VERSION, nonce=b"n")
        pair.listener.receive(Frame(link, PLAIN + wire.encode(hello)))
    challenge = wire.decode(sent[links[number]][1:])
    proof = Session(DIALER, SECRET, b"n", challenge.nonce).proof()
    pair.listener.receive(Frame(links[number], PLAIN + wire.encode(wire.Prove(proof=proof))))
    assert (sent[links[number]][:1] == SEALED) is known


def test_proved_links_are_bounded_and_the_longest_silent_one_goes(monkeypatch):
    monkeypatch.setattr(listener_module, "MAX_PROVED", 2)
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


def test_an_answer_to_a_link_that_is_not_proved_is_not_sent():
    pair = Pair(held=True)
    pair.listener.answer(Link(False, b"1"), wire.Closed(seq=1, stood=True))
    assert pair.network.pending == []
