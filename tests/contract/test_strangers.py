"""What who reaches a rank's ports learns there, over real ZMQ: its public key, and nothing else.

A lending mover runs on its thread; strangers say to it what the wire has, or raw bytes. What they
are answered is decoded and looked through for all that a Welcome would tell.
"""

import contextlib
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
import zmq

from kvconnect.config import Settings
from kvconnect.control import wire
from kvconnect.control.channel import ZmqChannel, key_answer
from kvconnect.control.dialer import Dialer
from kvconnect.control.peer import LeaseRef, PeerState
from kvconnect.control.proof import DIALER, prove
from kvconnect.lease import Terms
from kvconnect.mover import Mover
from kvconnect.orders import Grant
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect_bench.caches import Cache, Model

HOST = "127.0.0.1"
SECRET = b"a secret of 16 b"
PATIENCE_S = 60.0
QUIET_S = 0.3
TABLE = (3, 1, 6)
TERMS = Terms("request", "the id of a lease", (TABLE,), 12, b"digest", 60.0)
STALE = Terms("another", "the id of one that is over", (TABLE,), 12, b"digest", 0.05)


class Lender:
    """A mover that lends, on its thread."""

    def __init__(self, secret):
        self.secret = secret
        self.cache = Cache(Model(layers=2, block_tokens=4), 8)
        settings = Settings(0, 1, {"model": "a model"}, "loopback", secret)
        transport = LoopbackTransport(list(self.cache.shard.regions), Fabric())
        self.mover = Mover(settings, self.cache.shard, transport, ZmqChannel(HOST))
        self.address, self.key_address = self.mover.address, self.mover.key_address
        self.mover.put([Grant(TERMS), Grant(STALE)])
        self.mover.start()
        end = time.monotonic() + PATIENCE_S
        while STALE.request_id not in self.mover.take().sent:
            assert time.monotonic() < end

    def told_in(self, data):
        """What of our secrets is in ``data``."""
        region = self.cache.shard.regions[0]
        known = {
            "its memory's address": msgspec.msgpack.encode(region.address),
            "a layer's name": self.cache.shard.views[0].layer.encode(),
            "its fingerprint": b"a model",
            "a block table": msgspec.msgpack.encode(TABLE),
            "a lease's id": TERMS.lease_id.encode(),
            "its incarnation": self.mover.incarnation.encode(),
        }
        return [name for name, secret in known.items() if secret in data]


@pytest.fixture(params=[None, SECRET], ids=["no secret", "secret"])
def lender(request):
    made = Lender(request.param)
    yield made
    made.mover.close()


class Stranger:
    """Somebody who knows where a rank listens; of its key, what the key port tells anybody."""

    def __init__(self, lender, address=None):
        self.lender = lender
        self.channel = ZmqChannel(HOST)
        self.link = self.channel.dial(address or lender.address)
        self.heard = []

    def says(self, *messages, answers):
        """At least so many answers, or silence for a while; all of them decoded."""
        for message in messages:
            data = message if isinstance(message, bytes) else wire.encode(message)
            self.channel.send(self.link, data)
        frames, end = [], time.monotonic() + (PATIENCE_S if answers else QUIET_S)
        while time.monotonic() < end and (not answers or len(frames) < answers):
            frames += [f.data for f in self.channel.poll(0.02) if f.data is not None]
        assert len(frames) == answers
        self.heard += frames
        return [wire.decode(frame) for frame in frames]

    def learned(self):
        return self.lender.told_in(b"".join(self.heard))


@pytest.fixture
def stranger(lender):
    made = Stranger(lender)
    yield made
    made.channel.close()


def greet(lease_ids=(), request_ids=(), **changed):
    fields = {
        "version": wire.VERSION,
        "seq": 1,
        "nonce": b"nonce",
        "proof": b"",
        "early": False,
        "lease_ids": list(lease_ids),
        "request_ids": list(request_ids),
    }
    return wire.Greet(**fields | changed)


REQUESTS = [
    wire.Open(
        seq=1, lease_id=TERMS.lease_id, request_id=None, reader=0, tokens=12, digest=b"digest"
    ),
    wire.Open(seq=2, lease_id=None, request_id="request", reader=0, tokens=12, digest=b"digest"),
    wire.Close(seq=3, lease_id=TERMS.lease_id, request_id=None, reader=0, readers=1),
    wire.Renew(lease_ids=[TERMS.lease_id]),
]


def test_what_the_looking_through_finds(lender, stranger):
    """So that all the others show something: who is welcome learns what they must not."""
    proof = prove(SECRET, DIALER, lender.address.key, b"nonce")
    (welcome,) = stranger.says(greet([TERMS.lease_id], proof=proof), answers=1)
    assert isinstance(welcome, wire.Welcome)
    (opened,) = stranger.says(REQUESTS[0], answers=1)
    assert opened.tables == (TABLE,)
    assert len(stranger.learned()) == 6


def test_a_stranger_at_the_key_port_learns_the_key(lender):
    stranger = Stranger(lender, lender.key_address)
    for question in (wire.AskKey(version=wire.VERSION), greet([TERMS.lease_id]), *REQUESTS):
        stranger.channel.send(stranger.link, wire.encode(question))
    end = time.monotonic() + PATIENCE_S
    while len(stranger.heard) < 6 and time.monotonic() < end:
        stranger.heard += [f.data for f in stranger.channel.poll(0.02)]
    assert stranger.heard == [key_answer(lender.address)] * 6
    assert stranger.learned() == []
    stranger.channel.close()


def test_a_stranger_who_shows_nothing_learns_nothing(stranger):
    answers = stranger.says(*REQUESTS, greet(), *REQUESTS, answers=9)
    assert {type(a) for a in answers} == {wire.Reject}
    assert stranger.learned() == []


def test_a_stranger_with_a_stale_lease_id_learns_nothing(stranger):
    shown = greet([STALE.lease_id, "one that never was"], [STALE.request_id])
    answers = stranger.says(shown, *REQUESTS, answers=5)
    assert {type(a) for a in answers} == {wire.Reject}
    assert stranger.learned() == []


def test_a_stranger_who_waits_learns_nothing(lender, stranger):
    answers = stranger.says(greet(request_ids=["a guess"], early=True), *REQUESTS, answers=5)
    assert isinstance(answers[0], wire.Reject if lender.secret else wire.Later)
    assert {type(a) for a in answers[1:]} == {wire.Reject}
    assert stranger.learned() == []


@pytest.mark.parametrize("lender", [SECRET], indirect=True, ids=["secret"])
@pytest.mark.parametrize("secret", [b"", b"another secret 16"], ids=["none", "a wrong one"])
def test_who_has_not_the_secret_learns_nothing_even_with_a_lease_that_stands(
    lender, stranger, secret
):
    proof = prove(secret, DIALER, lender.address.key, b"nonce")
    answers = stranger.says(greet([TERMS.lease_id], proof=proof), *REQUESTS, answers=5)
    assert {type(a) for a in answers} == {wire.Reject}
    assert stranger.learned() == []


@pytest.mark.parametrize("lender", [SECRET], indirect=True, ids=["secret"])
def test_a_proof_that_is_handed_on_is_worth_nothing(lender):
    """Somebody lets itself be greeted in the lender's stead, and greets the lender with that."""
    between = ZmqChannel(HOST)
    ours = ZmqChannel(HOST)
    dialer = Dialer(ours, time.monotonic, {"model": "a model"}, SECRET, PATIENCE_S)
    peer = dialer.greet(between.address, [LeaseRef(TERMS.lease_id, TERMS.request_id)])
    frames = []
    while not frames:
        frames = between.poll(0.02)
        ours.poll(0)
    stranger = Stranger(lender)
    (answer,) = stranger.says(frames[0].data, answers=1)
    assert isinstance(answer, wire.Reject) and stranger.learned() == []
    assert peer.state is PeerState.GREETING
    for channel in (between, ours, stranger.channel):
        channel.close()


@pytest.mark.parametrize("shape", ["raw bytes", "a plain DEALER", "a plain DEALER at the key port"])
def test_who_does_not_encrypt_learns_nothing(lender, shape):
    if shape == "raw bytes":
        heard = b"".join(
            _raw(where, [np.random.default_rng(1).bytes(n)])
            for where in (lender.address, lender.key_address)
            for n in (1, 64, 500, 5000)
        )
    else:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        where = lender.key_address if "key port" in shape else lender.address
        dealer.connect(f"tcp://{where}")
        for message in (greet([TERMS.lease_id]), *REQUESTS):
            dealer.send(wire.encode(message))
        heard = b""
        while dealer.poll(int(QUIET_S * 1000)):
            heard += dealer.recv()
        context.destroy(linger=0)
        assert bool(heard) == ("key port" in shape)
    assert lender.told_in(heard) == []
    assert lender.mover.take() is not None, "the thread goes on"


def test_replayed_frames_do_nothing_and_are_told_nothing(lender):
    """Whoever reads the network has all that a reader said, byte for byte, and says it again."""
    with _Tap(lender.address) as tap:
        at = wire.Address(HOST, tap.port, lender.address.key)
        reader = Stranger(lender, at)
        proof = prove(SECRET, DIALER, lender.address.key, b"nonce")
        reader.says(greet([TERMS.lease_id], proof=proof), REQUESTS[0], answers=2)
        assert len(reader.learned()) == 6
        reader.channel.close()
    said, heard = b"".join(tap.said), b"".join(tap.heard)
    assert len(said) > 500 and len(heard) > 1000
    assert lender.told_in(said) == lender.told_in(heard) == [], "who listens in learns nothing"
    before = lender.mover.held()
    again = _raw(lender.address, tap.said)
    assert lender.told_in(again) == []
    assert len(again) < 300, "the handshake goes no further than the greeting of ZMTP"
    assert lender.mover.held() == before
    stranger = Stranger(lender)
    (reject,) = stranger.says(REQUESTS[2], answers=1)
    assert isinstance(reject, wire.Reject), "its link is no better than any other"
    stranger.channel.close()


def _raw(where, pieces):
    """What a plain TCP connection is answered to these bytes."""
    heard = b""
    with socket.create_connection((where.host, where.port), PATIENCE_S) as raw:
        raw.settimeout(QUIET_S)
        with contextlib.suppress(OSError):
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(0.01)  # as they came
        with contextlib.suppress(OSError):
            while more := raw.recv(1 << 16):
                heard += more
    return heard


class _Tap:
    """A TCP proxy that keeps what passes."""

    def __init__(self, to):
        self._to = to
        self._server = socket.create_server((HOST, 0))
        self.port = self._server.getsockname()[1]
        self.said, self.heard = [], []
        self._thread = threading.Thread(target=self._carry)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join(PATIENCE_S)
        self._server.close()

    def _carry(self):
        near, _ = self._server.accept()
        with near, socket.create_connection((self._to.host, self._to.port)) as far:
            back = threading.Thread(target=self._pass, args=(far, near, self.heard))
            back.start()
            self._pass(near, far, self.said)
            back.join()

    @staticmethod
    def _pass(source, target, kept):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                kept.append(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
