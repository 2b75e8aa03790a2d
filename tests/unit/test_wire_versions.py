"""A peer one minor version older, from recorded bytes: it still greets, lends and reads.

``recorded/wire-<major>.<minor>.json`` holds every message of two conversations, as that version
wrote them: one in which it dialled, one in which it listened. Nonces are not random in them, so
that today's side, with the same nonce and key, finds the recorded proofs right.
`python tests/unit/test_wire_versions.py` records the present version; a minor version that adds
a field adds a recording, and leaves those before it alone. Those of another major version stay,
too: each side has to name the other's.
"""

import base64
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from kvconnect.control import wire
from kvconnect.control.channel import Frame, Link, key_answer
from kvconnect.control.dialer import Dialer
from kvconnect.control.listener import Listener
from kvconnect.control.peer import PeerState
from kvconnect.control.proof import LISTENER, prove
from kvconnect.control.wire import Address
from kvconnect.errors import OfferError
from kvconnect.geometry.blocks import BlockView, Heads, Part, Region
from kvconnect.lease import Terms
from kvconnect.producer.leases import LeaseServer
from kvconnect.testing import FakeClock
from kvconnect.vllm.params import Ticket, open_ticket, seal_ticket

FOLDER = Path(__file__).parent / "recorded"
SECRET = b"a secret of 16 b"
FINGERPRINT = {"model": "m"}
KEY_ADDRESS = Address("test", 20_000)
ADDRESS = Address("test", 20_001, "k" * 40)
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
        self.peer = self.dialer.greet(KEY_ADDRESS)

    def open_and_close(self):
        """The dialer's requests, after the greeting."""
        deadline = self.clock() + 60
        self.calls = [
            self.dialer.calls.send(self.peer, make, (wire.Opened, wire.Closed), deadline)
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
            self.dialer.calls.tell(self.peer, message)

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
        dialled, listened = list(talk.near.sent), [key_answer(ADDRESS)]
        (greet,) = talk.to_dialer(listened[0])
        (welcome,) = talk.to_listener(greet)
        talk.to_dialer(welcome)
        assert talk.peer.state is PeerState.READY
        del talk.near.sent[:]
        talk.open_and_close()
        requests = list(talk.near.sent)
        dialled += [greet, *requests]
        listened.append(welcome)
        for frame in requests:
            listened += talk.to_listener(frame)
    return {
        "dialled": [frame.hex() for frame in dialled],
        "listened": [frame.hex() for frame in listened],
    }


RECORDED = sorted(FOLDER.glob(f"wire-{wire.VERSION[0]}.*.json"))
OTHERS = sorted(FOLDER.glob("wire-2.*.json"))


def frames_in(path):
    told = json.loads(path.read_text())
    return {side: [bytes.fromhex(frame) for frame in found] for side, found in told.items()}


@pytest.fixture(params=RECORDED, ids=lambda path: path.stem)
def frames(request):
    return frames_in(request.param)


@pytest.fixture(params=OTHERS, ids=lambda path: path.stem)
def others(request):
    return frames_in(request.param)


def test_there_is_a_recording_of_this_version_and_of_the_one_before():
    major, minor = wire.VERSION
    wanted = {f"wire-{major}.{m}" for m in (minor, minor - 1) if m >= 0}
    assert wanted <= {path.stem for path in RECORDED}


def test_an_older_reader_is_understood_and_answered(frames):
    _, greet, *requests = frames["dialled"]
    talk = Conversation()
    (welcome,) = talk.to_listener(greet)
    answers = [answer for frame in requests for answer in talk.to_listener(frame)]
    opened, closed, stage, want = talk.heard
    assert (opened.lease_id, opened.tokens, opened.digest) == ("generation", 40, b"digest")
    assert (closed.reader, closed.readers, closed.final) == (1, 2, True)
    assert stage == STAGE
    assert want == WANT
    # and it understands us: what it was answered then is what it is answered now, but for fields
    # that it does not know
    assert known_to(frames["listened"][1], welcome)
    assert len(answers) == len(frames["listened"]) - 2


def test_an_older_lender_is_understood(frames):
    told, welcome, *answers = frames["listened"]
    with nonces():
        talk = Conversation()
        talk.dial()
        (greet,) = talk.to_dialer(told)
        assert known_to(frames["dialled"][1], greet), "with the recorded proof"
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
    assert (opened.lease_id, opened.tables) == ("generation", TERMS.tables)
    assert closed.stood


def test_an_altered_recording_is_noticed(frames):
    """So that the two above show something."""
    told, welcome, *_ = frames["listened"]
    at = welcome.index(prove(SECRET, LISTENER, ADDRESS.key, (1).to_bytes(16, "big")))
    with nonces():
        talk = Conversation()
        talk.dial()
        talk.to_dialer(told)
        talk.to_dialer(welcome[:at] + bytes([welcome[at] ^ 1]) + welcome[at + 1 :])
    assert talk.peer.state is PeerState.FAILED


def test_fields_of_a_later_minor_version_are_ignored():
    """What makes a minor version one: an old reader passes over what it does not know."""
    later = [wire.VERSION[0], wire.VERSION[1] + 1]
    with nonces():
        talk = Conversation()
        talk.dial()
        told = as_dict(wire.KeyTold(version=wire.VERSION, port=20_001, key=ADDRESS.key))
        talk.to_dialer(wire.PLAIN + wire.encode({**told, "version": later, "more": 1}))
        proof = prove(SECRET, LISTENER, ADDRESS.key, talk.peer.nonce)
        body = wire.encode({**as_dict(BODY), "from the future": [1]})
        known = wire.Welcome(version=(3, 0), proof=proof, fingerprint=FINGERPRINT, body=body)
        talk.to_dialer(wire.encode({**as_dict(known), "version": later, "more": {"a": [1]}}))
    assert talk.peer.state is PeerState.READY, talk.peer.error
    assert talk.peer.body == BODY


# -- another major version -----------------------------------------------------------------------


class Challenge2(msgspec.Struct, tag="Challenge"):
    """As 2.x read the answer to its Hello, whose version it looked at first."""

    version: tuple[int, int]
    nonce: bytes
    proof: bytes
    secret: bool


class Address2(msgspec.Struct, array_like=True):
    host: str
    port: int


class Ticket2(msgspec.Struct, array_like=True):
    """As 2.x read a ticket, whose version it looked at next."""

    version: int
    engine_id: str
    lease_id: str
    request_id: str
    tokens: int
    digest: bytes
    ttl_ms: int
    shards: tuple[tuple[Address2, str], ...]


def test_an_older_major_version_is_told_ours():
    """Its Hello goes where it always went, which is our key port now; that answers anything."""
    answer = key_answer(ADDRESS)
    assert answer[:1] == b"\0", "plain, as 2.x expects it"
    assert msgspec.msgpack.decode(answer[1:], type=Challenge2).version == wire.VERSION


def test_an_older_major_version_is_named(others):
    talk = Conversation()
    talk.dial()
    assert talk.to_dialer(others["listened"][0]) == []
    assert talk.peer.state is PeerState.FAILED
    assert "speaks wire version (2, " in talk.peer.error and "upgrade" in talk.peer.error


def test_what_an_older_major_version_says_on_a_link_is_not_believed(others):
    """It cannot: it does not encrypt. If it did, nothing would come of it."""
    talk = Conversation()
    for frame in others["dialled"]:
        for sent in talk.to_listener(frame):
            assert isinstance(wire.decode(sent), wire.Reject)
    assert talk.heard == []
    talk.dial()
    talk.to_dialer(key_answer(ADDRESS))
    for frame in others["listened"]:
        talk.to_dialer(frame)
    assert talk.peer.state is PeerState.GREETING and talk.peer.body is None


@pytest.mark.parametrize("secret", [None, SECRET])
def test_tickets_name_the_other_major_version_on_both_sides(secret):
    shards = ((Address("10.0.0.1", 5600), "incarnation"),)
    ours = seal_ticket(Ticket(3, "P", "g", "r", 40, b"d", 30_000, shards), secret)
    payload = base64.urlsafe_b64decode(ours.partition(".")[0])
    assert msgspec.msgpack.decode(payload, type=Ticket2).version == 3
    older = seal_ticket(
        Ticket2(1, "P", "g", "r", 40, b"d", 30_000, ((Address2("10.0.0.1", 5600), "i"),)), secret
    )
    with pytest.raises(OfferError, match="ticket of version 1, expected 3; upgrade kvconnect"):
        open_ticket(older, secret)


def as_dict(body):
    return msgspec.msgpack.decode(wire.encode(body))


def known_to(old, new):
    """Whether ``new`` says all that ``old`` said, but for versions and a Welcome's body."""
    before, after = (msgspec.msgpack.decode(frame) for frame in (old, new))
    for said in (before, after):
        said.pop("version"), said.pop("body", None)
    return before.items() <= after.items()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "wire-{}.{}.json".format(*wire.VERSION)
    path.write_text(json.dumps(record(), indent=1) + "\n")
    sys.stdout.write(f"{path.name} is recorded\n")
