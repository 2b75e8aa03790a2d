"""Whatever bytes arrive: a message within its bounds, or WireError."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.control import wire
from kvconnect.errors import WireError
from kvconnect_bench.caches import Cache, Model

pytestmark = pytest.mark.slow  # hypothesis; a few seconds together

SHARD = Cache(Model(), 2).shard
BODY = wire.Body(
    "incarnation", SHARD.views, SHARD.regions, "nixl", b"hello", (wire.Address("h", 1, "k"),)
)
MESSAGES = [
    wire.AskKey(version=(1, 0), nonce=b"n"),
    wire.KeyTold(version=(1, 7), port=5, key="k" * 40),
    wire.Later(),
    wire.Welcome(version=(3, 0), proof=b"p", fingerprint={"a": "b"}, body=wire.encode(BODY)),
    wire.Reject(version=(3, 0), detail="no", seq=3, secret=True),
    wire.Open(seq=1, lease_id="g", request_id=None, reader=0, tokens=3, digest=b"d"),
    wire.Opened(seq=1, lease_id="g", tables=((1, 2, -1), ())),
    wire.Refused(seq=1, cause="gone", detail="over"),
    wire.Renew(lease_ids=["g", "h"]),
    wire.Gone(lease_ids=[]),
    wire.Close(seq=2, lease_id=None, request_id="r", reader=1, readers=2),
    wire.Closed(seq=2, stood=False),
    wire.Stage(
        seq=3,
        hello=b"hello",
        arena=wire.Granules(1 << 40, 1 << 16, 64),
        pieces=(wire.HeadSlice("model.layers.0", "k", 2, 4, 64, "fp8_e4m3", 0.5),),
    ),
    wire.Staged(seq=3),
    wire.Follow(seq=5, lease_id="g", reader=1, have=(3, 0)),
    wire.Computed(seq=5, tables=((4, 2), ()), more=True),
    wire.Want(
        seq=4,
        lease_id="g",
        reader=0,
        group=1,
        first=0,
        count=2,
        runs=((0, 16), (32, 5)),
        granule=7,
        nbytes=4096,
    ),
    wire.Filled(seq=4, nbytes=4096, sums=b"12345678"),
    wire.Greet(
        version=(3, 0),
        seq=1,
        nonce=b"n",
        proof=b"p",
        lease_ids=["g"],
        request_ids=["r"],
        early=True,
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_survives_the_wire(message):
    assert wire.decode(wire.encode(message)) == message


def test_every_message_type_is_in_this_list():
    assert {type(m) for m in MESSAGES} == set(wire.AnyMessage.__args__)


def test_a_body_survives_the_wire_without_its_memory():
    assert wire.decode_body(wire.encode(BODY)) == BODY


@given(st.binary(max_size=300))
def test_random_bytes_are_a_wire_error_or_a_message(data):
    for decode in (wire.decode, wire.decode_body):
        try:
            decode(data)
        except WireError:
            continue


@given(st.sampled_from(MESSAGES), st.data())
def test_a_message_with_a_changed_byte_is_a_wire_error_or_a_message(message, data):
    encoded = bytearray(wire.encode(message))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] = data.draw(st.integers(0, 255))
    for end in (len(encoded), place):
        try:
            wire.decode(bytes(encoded[:end]))
        except WireError:
            continue


def field(message, name, value):
    """``message`` on the wire with another value of one field."""
    fields = msgspec.msgpack.decode(wire.encode(message))
    return msgspec.msgpack.encode({**fields, name: value})


OPEN, OPENED, CLOSE, GREET = MESSAGES[5], MESSAGES[6], MESSAGES[10], MESSAGES[-1]
BEYOND = {
    "rank": field(OPEN, "reader", wire.MAX_RANKS),
    "negative rank": field(OPEN, "reader", -1),
    "no readers": field(CLOSE, "readers", 0),
    "readers": field(CLOSE, "readers", wire.MAX_RANKS + 1),
    "seq": field(OPEN, "seq", 1 << 63),
    "tokens": field(OPEN, "tokens", (1 << 40) + 1),
    "digest": field(OPEN, "digest", bytes(65)),
    "lease_id": field(OPEN, "lease_id", "g" * 65),
    "empty lease_id": field(OPEN, "lease_id", ""),
    "request id": field(OPEN, "request_id", "r" * 1025),
    "block id": field(OPENED, "tables", [[1 << 63]]),
    "block id below none": field(OPENED, "tables", [[-2]]),
    "fraction of a block": field(OPENED, "tables", [[0.5]]),
    "groups": field(OPENED, "tables", [[]] * 4097),
    "blocks": field(OPENED, "tables", [[0] * ((1 << 20) + 1)]),
    "lease_ids": field(MESSAGES[8], "lease_ids", ["g"] * (wire.RENEWED_AT_ONCE + 1)),
    "shown": field(GREET, "lease_ids", ["g"] * (wire.RENEWED_AT_ONCE + 1)),
    "names shown": field(GREET, "request_ids", ["r"] * (wire.RENEWED_AT_ONCE + 1)),
    "proof": field(GREET, "proof", bytes(65)),
    "key": field(MESSAGES[1], "key", "k" * 41),
    "port": field(MESSAGES[1], "port", 1 << 16),
    "detail": field(MESSAGES[4], "detail", "x" * 4097),
    "fingerprint": field(MESSAGES[3], "fingerprint", {str(i): "" for i in range(65)}),
    "nonce": field(MESSAGES[0], "nonce", bytes(65)),
    "version": field(MESSAGES[0], "version", [1, 0, 0]),
    "missing": msgspec.msgpack.encode({"type": "Open", "seq": 1}),
    "unknown type": field(OPEN, "type", "Pickle"),
    "no type": msgspec.msgpack.encode({"seq": 1}),
    "not a map": msgspec.msgpack.encode([1, 2]),
    "endless nesting": b"\x81\xa1x" + b"\x91" * 100_000,
    "not UTF-8": b"\x81\xa4type\xa2\xff\xff",
    "a repeated key that lies": b"\x82\xa4type\xa4Open\xa4type\xa5Close",
}


@pytest.mark.parametrize("data", BEYOND.values(), ids=BEYOND)
def test_what_exceeds_a_bound_is_a_wire_error(data):
    with pytest.raises(WireError):
        wire.decode(data)


def test_a_message_beyond_the_largest_is_not_even_parsed():
    with pytest.raises(WireError, match=f"expected at most {wire.MAX_MESSAGE_BYTES}"):
        wire.decode(bytes(wire.MAX_MESSAGE_BYTES + 1))


def test_a_field_of_a_later_minor_version_is_ignored():
    assert wire.decode(field(OPEN, "priority", 7)) == OPEN


def test_an_ipv6_address_is_shown_in_brackets():
    assert str(wire.Address("::1", 5)) == "[::1]:5"
    assert str(wire.Address("host", 5)) == "host:5"
