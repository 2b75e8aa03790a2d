"""Frames that cannot be forged, replayed, turned around or moved to another link."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.control.session import DIALER, LISTENER, Session, sign
from kvconnect.errors import WireError

SECRET = b"a secret of 16 b"


def link(secret=SECRET, other=SECRET, nonces=(b"n1", b"n2")):
    return Session(DIALER, secret, *nonces), Session(LISTENER, other, *nonces)


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_what_is_sealed_is_unsealed(messages):
    ours, theirs = link()
    for message in messages:
        assert theirs.unseal(ours.seal(message)) == message
        assert ours.unseal(theirs.seal(message)) == message


def test_each_proof_is_accepted_by_the_other_side_only():
    ours, theirs = link()
    assert theirs.accepts(ours.proof())
    assert ours.accepts(theirs.proof())
    assert not ours.accepts(ours.proof()), "a proof reflected to its maker was accepted"
    assert not theirs.accepts(b"")


@pytest.mark.parametrize(("mine", "yours"), [(SECRET, b"another secret 16"), (SECRET, b"")])
def test_another_secret_proves_nothing(mine, yours):
    ours, theirs = link(mine, yours)
    assert not theirs.accepts(ours.proof())
    assert not ours.accepts(theirs.proof())


@pytest.mark.parametrize("nonces", [(b"n1", b"x"), (b"x", b"n2")])
def test_a_proof_of_another_greeting_proves_nothing(nonces):
    ours, _ = link()
    _, theirs = link(nonces=nonces)
    assert not theirs.accepts(ours.proof())


def test_a_repeated_frame_is_refused():
    ours, theirs = link()
    frame = ours.seal(b"free the blocks")
    theirs.unseal(frame)
    with pytest.raises(WireError, match="frame 1 is a repetition, expected one after 1"):
        theirs.unseal(frame)


def test_a_frame_from_before_is_refused():
    ours, theirs = link()
    first, second = ours.seal(b"1"), ours.seal(b"2")
    theirs.unseal(second)
    with pytest.raises(WireError, match="repetition"):
        theirs.unseal(first)


def test_a_frame_sent_back_to_its_maker_is_refused():
    ours, _ = link()
    with pytest.raises(WireError, match="not authentic"):
        ours.unseal(ours.seal(b"to you"))


def test_a_frame_of_another_link_is_refused():
    ours, _ = link()
    _, theirs = link(nonces=(b"n1", b"n3"))
    with pytest.raises(WireError, match="not authentic"):
        theirs.unseal(ours.seal(b"x"))


@given(st.data())
def test_a_frame_with_any_changed_bit_is_refused(data):
    ours, theirs = link()
    frame = bytearray(ours.seal(b"close lease 1"))
    place = data.draw(st.integers(1, len(frame) - 1))
    frame[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(WireError):
        theirs.unseal(bytes(frame))


@pytest.mark.parametrize("frame", [b"\x01", b"\x01" + bytes(10), b"\x01" + bytes(40)])
def test_a_frame_that_is_too_short_is_refused(frame):
    with pytest.raises(WireError):
        link()[1].unseal(frame)


def test_a_refused_frame_does_not_use_up_a_number():
    ours, theirs = link()
    forged = bytearray(ours.seal(b"1"))
    forged[-1] ^= 1
    with pytest.raises(WireError):
        theirs.unseal(bytes(forged))
    assert theirs.unseal(ours.seal(b"2")) == b"2"


def test_a_tickets_signature_is_of_its_bytes_and_its_secret():
    assert sign(SECRET, b"ticket") == sign(SECRET, b"ticket")
    assert sign(SECRET, b"ticket") != sign(SECRET, b"Ticket")
    assert sign(SECRET, b"ticket") != sign(SECRET + b"!", b"ticket")
