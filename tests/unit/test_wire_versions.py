"""A peer one minor version older, from recorded bytes: it still greets, lends and reads.

``recorded/wire-<major>.<minor>.json`` holds every frame of two conversations, as that version
wrote them: one in which it dialled, one in which it listened. Nonces are not random in them, so
that today's side, with the same nonces, has the keys that the recorded proofs and seals need.
`python tests/unit/test_wire_versions.py` records the present version; a minor version that adds
a field adds a recording, and leaves those before it alone.
"""

import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from kvconnect.control import wire
from kvconnect.control.channel import Frame, Link
from kvconnect.control.dialer import Dialer, PeerState
from kvconnect.control.listener import Listener
from kvconnect.control.session import LISTENER, PLAIN, Session
from kvconnect.control.wire import Address
from kvconnect.geometry.blocks import BlockView, Heads, Part, Region
from kvconnect.lease import Terms
from kvconnect.producer.leases import LeaseServer
from kvconnect.testing import FakeClock

FOLDER = Path(__file__).parent / "recorded"
SECRET = b"a secret of 16 b"
FINGERPRINT = {"model": "m"}
ADDRESS = Address("test", 20_000)
LINK = Link(True, b"1")
TERMS = Terms("request", "generation", ((4, 2, -1), (7,)), 40, b"digest", 30.0)

PART = Part(4096, (2048, 1024, 64, 2), (2, 16, 32), 2, "k", scale=0.5)
VIEW = BlockView("layers.0", 0, 8, 16, Heads(0, 2, 4), "bfloat16", "dense", (PART,))
BODY = wire.Body("incarnation", (VIEW,), (Region(4096, 1 << 14),), "nixl:UCX", b"h", (ADDRESS,))
PIECE = wire.HeadSlice("layers.0", "k", 0, 2, 32, "bfloat16")
STAGE = wire.Stage(seq=2, hello=b"h", arena=wire.Granules(1 << 40, 1 << 16, 64), pieces=(PIECE,))
WANT = wire.Want(
    seq=3,
    lease_id="generation",
    reader=1,
    group=0,
    first=0,
    count=1,
    runs=((0, 16), (32, 8)),
    granule=5,
    nbytes=3072,
)


class Wires:
    """A channel that keeps what is sent."""

    address = ADDRESS

    def __init__(self):
        self.sent = []

    def dial(self, address):
        return LINK

    def send(self, link, data):
        self.sent.append(data)

    def drop(self, link):
        """Nothing is open."""


def nonces():
    """Instead of the operating system's randomness."""
    numbers = itertools.count(1)
    return mock.patch("secrets.token_bytes", lambda n: next(numbers).to_bytes(n, "big"))


class Conversation:
    """Both sides, each fed with frames by hand."""

    def __init__(self, body=BODY):
        self.clock = FakeClock()
        self.near, self.far = Wires(), Wires()
        self.dialer = Dialer(self.near, self.clock, FINGERPRINT, SECRET, 60.0)
        self.listener = Listener(self.far, FINGERPRINT, lambda: body, SECRET)
        self.lender = LeaseServer(self.listener, self.clock, 60.0)
        self.lender.grant(TERMS)
        self.heard = []
        self.peer = None

    def dial(self):
        self.peer = self.dialer.greet(ADDRESS)

    def open_and_close(self):
        """The dialer's requests, after the greeting."""
        deadline = self.clock() + 60
        self.calls = [
            self.dialer.call(self.peer, make, (wire.Opened, wire.Closed), deadline)
            for make in (
                lambda seq: wire.Open(
                    seq=seq,
                    lease_id="generation",
                    request_id=None,
                    reader=1,
                    tokens=TERMS.tokens,
                    digest=TERMS.digest,
                ),
                lambda seq: wire.Close(
                    seq=seq, lease_id="generation", request_id=None, reader=1, readers=2
                ),
            )
        ]
        for message in (STAGE, WANT):
            self.dialer.tell(self.peer, message)

    def to_listener(self, data):
        """Returns what the listener sends back."""
        del self.far.sent[:]
        incoming = self.listener.receive(Frame(Link(False, b"1"), data))
        if incoming:
            self.heard.append(incoming.message)
            self.lender.receive(incoming)
        return list(self.far.sent)

    def to_dialer(self, data):
        """Returns what the dialer sends back."""
        del self.near.sent[:]
        self.dialer.receive(Frame(LINK, data))
        return list(self.near.sent)


def record():
    """Frames of one whole conversation, by who sent them."""
    with nonces():
        talk = Conversation()
        talk.dial()
        dialled, listened = [], []
        hello = list(talk.near.sent)
        (challenge,) = talk.to_listener(hello[0])
        (prove,) = talk.to_dialer(challenge)
        (welcome,) = talk.to_listener(prove)
        talk.to_dialer(welcome)
        assert talk.peer.state is PeerState.READY
        del talk.near.sent[:]
        talk.open_and_close()
        requests = list(talk.near.sent)
        dialled += [*hello, prove, *requests]
        listened += [challenge, welcome]
        for frame in requests:
            listened += talk.to_listener(frame)
    return {
        "dialled": [frame.hex() for frame in dialled],
        "listened": [frame.hex() for frame in listened],
    }


RECORDED = sorted(FOLDER.glob("wire-*.json"))


@pytest.fixture(params=RECORDED, ids=lambda path: path.stem)
def frames(request):
    told = json.loads(request.param.read_text())
    return {side: [bytes.fromhex(frame) for frame in found] for side, found in told.items()}


def test_there_is_a_recording_of_this_version_and_of_the_one_before():
    major, minor = wire.VERSION
    wanted = {f"wire-{major}.{m}" for m in (minor, minor - 1) if m >= 0}
    assert wanted <= {path.stem for path in RECORDED}


def test_an_older_reader_is_understood_and_answered(frames):
    hello, prove, *requests = frames["dialled"]
    with nonces():
        talk = Conversation()
        talk.dial()  # takes the dialer's nonce from the same sequence
        (challenge,) = talk.to_listener(hello)
        (welcome,) = talk.to_listener(prove)
        answers = [answer for frame in requests for answer in talk.to_listener(frame)]
    opened, closed, stage, want = talk.heard
    assert (opened.lease_id, opened.tokens, opened.digest) == ("generation", 40, b"digest")
    assert (closed.reader, closed.readers, closed.final) == (1, 2, True)
    assert stage == STAGE
    assert want == WANT
    # and it understands us: what it was answered then is what it is answered now, but for fields
    # that it does not know
    assert known_to(frames["listened"][0], challenge)
    assert len(answers) == len(frames["listened"]) - 2
    assert welcome


def test_an_older_lender_is_understood(frames):
    challenge, welcome, *answers = frames["listened"]
    with nonces():
        talk = Conversation()
        talk.dial()
        (prove,) = talk.to_dialer(challenge)
        assert prove == frames["dialled"][1], "the proof is that of the recorded session"
        talk.to_dialer(welcome)
        assert talk.peer.state is PeerState.READY, talk.peer.error
        body = talk.peer.body
        assert (body.incarnation, body.views, body.regions) == (
            BODY.incarnation,
            BODY.views,
            BODY.regions,
        )
        assert (body.transport, body.hello, body.shards) == ("nixl:UCX", b"h", (ADDRESS,))
        assert (body.direct, body.staged) == (True, False)
        talk.open_and_close()
        for answer in answers:
            talk.to_dialer(answer)
    opened, closed = (call.reply for call in talk.calls)
    assert (opened.lease_id, opened.tables, opened.ttl_ms) == (
        "generation",
        TERMS.tables,
        30_000,
    )
    assert closed.stood


def test_an_altered_recording_is_noticed(frames):
    """So that the two above show something."""
    challenge, welcome, *_ = frames["listened"]
    with nonces():
        talk = Conversation()
        talk.dial()
        talk.to_dialer(challenge)
        talk.to_dialer(welcome[:-1] + bytes([welcome[-1] ^ 1]))
    assert talk.peer.state is PeerState.GREETING


def test_fields_of_a_later_minor_version_are_ignored():
    """What makes a minor version one: an old reader passes over what it does not know."""
    with nonces():
        talk = Conversation()
        talk.dial()
        hello = wire.decode(talk.near.sent[0][1:])
        nonce = (99).to_bytes(16, "big")
        session = Session(LISTENER, SECRET, hello.nonce, nonce)
        later = {
            "type": "Challenge",
            "version": [wire.VERSION[0], wire.VERSION[1] + 1],
            "nonce": nonce,
            "proof": session.proof(),
            "secret": True,
            "from the future": {"a": [1, 2]},
        }
        talk.to_dialer(PLAIN + wire.encode(later))
        body = {**as_dict(BODY), "from the future": [1]}
        welcome = {"type": "Welcome", "fingerprint": FINGERPRINT, "body": wire.encode(body)}
        talk.to_dialer(session.seal(wire.encode({**welcome, "more": 1})))
    assert talk.peer.state is PeerState.READY, talk.peer.error
    assert talk.peer.body == BODY


def as_dict(body):
    return msgspec.msgpack.decode(wire.encode(body))


def known_to(old, new):
    """Whether ``new`` says all that ``old`` said; both plain frames."""
    before, after = (msgspec.msgpack.decode(frame[1:]) for frame in (old, new))
    before.pop("version"), after.pop("version")
    return before.items() <= after.items()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "wire-{}.{}.json".format(*wire.VERSION)
    path.write_text(json.dumps(record(), indent=1) + "\n")
    sys.stdout.write(f"{path.name} is recorded\n")
