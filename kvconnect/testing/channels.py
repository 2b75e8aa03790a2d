"""What every control channel must do: `check_channel` holds one to `kvconnect.control.channel`.

Each check takes ``make``, which returns a new channel that others made by it can reach, and
closes what it made. `CHECKS` has them by name, for ``pytest.mark.parametrize``.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvconnect.control.channel import Channel, Frame, Link, key_answer
from kvconnect.control.wire import Address
from kvconnect.errors import WireError

PATIENCE_S = 60.0
SHORT_S = 0.02

MakeChannel = Callable[[], Channel]


def check_channel(make: MakeChannel) -> None:
    """Raise AssertionError unless channels by ``make`` keep the contract."""
    for check in CHECKS.values():
        check(make)


@contextmanager
def _channels(make: MakeChannel, count: int) -> Iterator[list[Channel]]:
    made = [make() for _ in range(count)]
    try:
        yield made
    finally:
        for channel in made:
            channel.close()


def _receive(channel: Channel, count: int) -> list[Frame]:
    """Poll until ``count`` frames have arrived."""
    frames: list[Frame] = []
    end = time.monotonic() + PATIENCE_S
    while len(frames) < count and time.monotonic() < end:
        frames += channel.poll(0.1)
    assert len(frames) == count, f"{len(frames)} frames arrived, expected {count}"
    return frames


def frames_arrive_whole_and_in_order(make: MakeChannel) -> None:
    with _channels(make, 2) as (ours, theirs):
        link = ours.dial(theirs.address)
        sent = [b"", b"\x00", b"second", bytes(1 << 20), *(str(i).encode() for i in range(50))]
        for data in sent:
            ours.send(link, data)
        frames = _receive(theirs, len(sent))
        assert [f.data for f in frames] == sent
        assert len({f.link for f in frames}) == 1


def a_reply_reaches_whoever_dialled(make: MakeChannel) -> None:
    with _channels(make, 3) as (listener, first, second):
        links = {first: first.dial(listener.address), second: second.dial(listener.address)}
        first.send(links[first], b"from first")
        second.send(links[second], b"from second")
        arrived = {f.data: f.link for f in _receive(listener, 2)}
        assert arrived[b"from first"] != arrived[b"from second"]
        assert not any(link.dialled for link in arrived.values())
        listener.send(arrived[b"from first"], b"to first")
        listener.send(arrived[b"from second"], b"to second")
        assert _receive(first, 1) == [Frame(links[first], b"to first")]
        assert _receive(second, 1) == [Frame(links[second], b"to second")]


def two_links_of_one_dialler_are_two_conversations(make: MakeChannel) -> None:
    with _channels(make, 2) as (ours, theirs):
        links = [ours.dial(theirs.address) for _ in range(2)]
        assert links[0] != links[1]
        assert all(link.dialled for link in links)
        for link in links:
            ours.send(link, link.key)
        for frame in _receive(theirs, 2):
            theirs.send(frame.link, b"re " + (frame.data or b""))
        assert {f.link: f.data for f in _receive(ours, 2)} == {n: b"re " + n.key for n in links}


def a_channel_may_dial_itself(make: MakeChannel) -> None:
    with _channels(make, 1) as (channel,):
        link = channel.dial(channel.address)
        channel.send(link, b"hello me")
        (arrived,) = _receive(channel, 1)
        assert not arrived.link.dialled
        channel.send(arrived.link, b"hello back")
        assert _receive(channel, 1) == [Frame(link, b"hello back")]


def a_dropped_link_is_silent(make: MakeChannel) -> None:
    with _channels(make, 2) as (ours, theirs):
        gone, kept = ours.dial(theirs.address), ours.dial(theirs.address)
        ours.send(gone, b"gone")
        ours.send(kept, b"kept")
        arrived = {f.data: f.link for f in _receive(theirs, 2)}
        ours.drop(gone)
        ours.drop(gone)  # idempotent
        theirs.send(arrived[b"gone"], b"late")
        theirs.send(arrived[b"kept"], b"answer")
        assert _receive(ours, 1) == [Frame(kept, b"answer")]
        assert ours.poll(SHORT_S) == []
        ours.send(gone, b"after drop")  # lost, not raised
        assert theirs.poll(SHORT_S) == []


def a_broken_connection_is_told_and_frames_to_it_are_lost(make: MakeChannel) -> None:
    with _channels(make, 2) as (ours, theirs):
        link = ours.dial(theirs.address)
        ours.send(link, b"hello")
        _receive(theirs, 1)
        theirs.close()
        _ends(ours, link, refused=False)
        ours.send(link, b"too late")
        ours.send(Link(False, b"unknown"), b"to nobody who dialled us")
        assert not any(frame.data for frame in ours.poll(SHORT_S))


def an_address_that_cannot_be_is_a_wire_error(make: MakeChannel) -> None:
    with _channels(make, 1) as (channel,):
        key = channel.address.key
        for host in ("bad host", "a\0b", "new\nline"):
            try:
                channel.dial(Address(host, 1, key))
            except WireError:
                continue
            raise AssertionError(f"dialling {host!r} raised nothing, expected WireError")


def the_key_port_tells_anybody_the_key_and_nothing_else(make: MakeChannel) -> None:
    with _channels(make, 2) as (stranger, theirs):
        link = stranger.dial(theirs.key_address)
        for question in (b"", b"\0anything", bytes(100)):
            stranger.send(link, question)
        answers = _answers(stranger, theirs, 3)
        assert answers == [Frame(link, key_answer(theirs.address))] * 3
        assert theirs.poll(SHORT_S) == [], "what is said at the key port goes nowhere"


def who_dials_an_address_of_nobody_is_refused(make: MakeChannel) -> None:
    with _channels(make, 2) as (ours, gone):
        gone.close()
        link = ours.dial(gone.address)
        ours.send(link, b"is anybody there?")
        _ends(ours, link, refused=True)


def who_dials_another_key_is_refused(make: MakeChannel) -> None:
    """Else one could be led to another process than the ticket's."""
    with _channels(make, 2) as (ours, theirs):
        at = theirs.address
        link = ours.dial(Address(at.host, at.port, ours.address.key))
        ours.send(link, b"for the other one")
        _ends(ours, link, True, theirs)
        assert theirs.poll(SHORT_S) == []


def who_dials_no_key_is_refused_where_links_arrive(make: MakeChannel) -> None:
    with _channels(make, 2) as (ours, theirs):
        at = theirs.address
        link = ours.dial(Address(at.host, at.port))
        ours.send(link, b"not encrypted")
        _ends(ours, link, True, theirs)
        assert theirs.poll(SHORT_S) == []


def _answers(ours: Channel, theirs: Channel, count: int) -> list[Frame]:
    """At least ``count`` frames that reach ``ours``, while ``theirs`` polls and hears nothing."""
    frames: list[Frame] = []
    end = time.monotonic() + PATIENCE_S
    while len(frames) < count and time.monotonic() < end:
        assert theirs.poll(0) == []
        frames += ours.poll(SHORT_S)
    assert len(frames) >= count, f"{len(frames)} frames arrived, expected {count}"
    return frames


def _ends(ours: Channel, link: Link, refused: bool, theirs: Channel | None = None) -> None:
    """Poll until we are told that ``link`` broke or is refused; no data may arrive."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        assert theirs is None or theirs.poll(0) == []
        for frame in ours.poll(SHORT_S):
            assert (frame.link, frame.data) == (link, None)
            if frame.refused == refused:
                return
    raise AssertionError("nothing was told of the link")


def poll_waits_no_longer_than_asked(make: MakeChannel) -> None:
    with _channels(make, 1) as (channel,):
        started = time.monotonic()
        assert channel.poll(0) == []
        assert channel.poll(SHORT_S) == []
        assert time.monotonic() - started < PATIENCE_S / 2


def wake_ends_a_poll(make: MakeChannel) -> None:
    with _channels(make, 1) as (channel,):
        waker = threading.Thread(target=channel.wake)
        started = time.monotonic()
        waker.start()
        assert channel.poll(PATIENCE_S) == []
        waker.join()
        assert time.monotonic() - started < PATIENCE_S / 2


def close_is_idempotent_and_wake_may_come_after(make: MakeChannel) -> None:
    channel = make()
    channel.close()
    channel.close()
    channel.wake()


CHECKS: dict[str, Callable[[MakeChannel], None]] = {
    check.__name__: check
    for check in (
        frames_arrive_whole_and_in_order,
        a_reply_reaches_whoever_dialled,
        two_links_of_one_dialler_are_two_conversations,
        a_channel_may_dial_itself,
        a_dropped_link_is_silent,
        a_broken_connection_is_told_and_frames_to_it_are_lost,
        an_address_that_cannot_be_is_a_wire_error,
        the_key_port_tells_anybody_the_key_and_nothing_else,
        who_dials_an_address_of_nobody_is_refused,
        who_dials_another_key_is_refused,
        who_dials_no_key_is_refused_where_links_arrive,
        poll_waits_no_longer_than_asked,
        wake_ends_a_poll,
        close_is_idempotent_and_wake_may_come_after,
    )
}
