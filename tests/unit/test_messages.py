"""`MessageTransport` over a library that does exactly what the test says."""

import time
import weakref

import msgspec
import numpy as np
import pytest

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.transport.base import Op, Work
from kvconnect.transport.ucx import agent, messages
from kvconnect.transport.ucx.messages import KEPT_BUFFERS, SERVED, WINDOW, MessageTransport

ROW, ROWS = 64, 32


class Handle:
    def __init__(self, completed=True, status=0):
        self.completed, self.status = completed, status


class Line:
    def __init__(self, post, to, number):
        self.post, self.to, self.address = post, to, b"line %d" % number
        self.alive, self.closed, self.broken = True, 0, False
        self.rooms = {}  # tag → (room, handle)
        self.sends = []

    def progress(self):
        return None

    def send(self, data, tag):
        if self.broken:
            raise TransportError("the library says no")
        handle = Handle(completed=not self.post.net.slow)
        self.sends.append(handle)
        self.post.net.sent.append((self.to, data, tag, handle))
        return handle

    def receive(self, room, tag):
        handle = Handle(completed=False)
        self.rooms[tag] = room, handle
        return handle

    def close(self):
        self.closed += 1


class Post:
    def __init__(self, net):
        self.net, self.address = net, b"post %d" % len(net.posts)
        self.queue, self.lines, self.replies, self.hung_up, self.closed = [], [], [], [], 0
        self.leaving = []  # what replies were made of
        self.receiving = Handle  # makes the handle of what arrives
        net.posts[self.address] = self

    def dial(self, address):
        if address not in self.net.posts:
            raise TransportError("no such address")
        self.lines.append(Line(self, address, len(self.net.lines)))
        self.net.lines[self.lines[-1].address] = self.lines[-1]
        return self.lines[-1]

    def arrival(self, room, tag):
        if not self.queue:
            return None
        data, sent_tag = self.queue.pop(0)
        size = len(data) if sent_tag == tag and len(data) <= len(room) else 0
        room[:size] = data[:size]
        return self.receiving(), size

    def reply(self, address, data, tag):
        if address not in self.net.lines:
            raise TransportError("its asker has gone")
        handle = Handle(completed=not self.net.slow_replies)
        self.replies.append(handle)
        self.leaving.append(data)
        room, received = self.net.lines[address].rooms.pop(tag)
        room[: len(data)] = data
        received.completed = True
        return handle

    def hang_up(self, address):
        self.hung_up.append(address)
        for handle in self.replies:
            handle.completed = True

    def close(self):
        self.closed += 1


class Net:
    """Messages wait until `deliver`."""

    def __init__(self):
        self.posts, self.lines, self.sent = {}, {}, []
        self.slow = self.slow_replies = False

    def deliver(self, count=None):
        for to, data, tag, _ in self.sent[:count]:
            self.posts[to].queue.append((data.copy(), tag))
        del self.sent[:count]


class Side:
    def __init__(self, net, seed):
        self.memory = np.random.default_rng(seed).integers(0, 256, ROW * ROWS, np.uint8)
        self.post = Post(net)
        at = int(self.memory.ctypes.data)
        self.transport = MessageTransport([Region(at, self.memory.nbytes)], self.post)
        self.table = RowTable(np.array([[at, ROW, ROW, ROWS]]), np.zeros(1, np.int64), "DRAM", 0)


class Rig:
    def __init__(self, monkeypatch):
        monkeypatch.setattr(agent, "BATCH_BYTES", ROW)  # a message a row
        self.net = Net()
        self.ours, self.theirs = Side(self.net, 1), Side(self.net, 2)
        self.ours.transport.add_peer("peer", self.theirs.transport.hello())
        self.before = self.ours.memory.copy()

    @property
    def line(self):
        return self.ours.post.lines[-1]

    def submit(self, op=Op.READ, rows=1):
        index = np.arange(rows, dtype=np.int32)
        return self.ours.transport.submit(
            Work(op, "peer", self.ours.table, index, self.theirs.table, index, rows * ROW)
        )

    def go_on(self, rounds=20):
        """Everything arrives, is served and settled; what ended at our side."""
        ended = []
        for _ in range(rounds):
            self.net.deliver()
            self.theirs.transport.poll()
            ended += self.ours.transport.poll()
        return ended

    def is_untouched(self):
        return np.array_equal(self.ours.memory, self.before)


@pytest.fixture
def rig(monkeypatch):
    return Rig(monkeypatch)


def test_at_most_a_window_of_batches_is_under_way(rig):
    transfer_id = rig.submit(rows=ROWS)
    assert len(rig.net.sent) == WINDOW
    rig.net.deliver(3)
    rig.theirs.transport.poll()
    assert rig.ours.transport.poll() == []
    assert len(rig.net.sent) == WINDOW  # three have come back, three more are sent
    (done,) = rig.go_on()
    assert (done.transfer_id, done.error, done.descriptors) == (transfer_id, None, ROWS)
    assert np.array_equal(rig.ours.memory, rig.theirs.memory)


def test_buffers_for_a_crowd_of_peers_are_given_back(rig):
    """All used to be kept for ever: 16 of 1.25 MB for each peer that was read at one time."""
    names = [f"peer {n}" for n in range(2 * KEPT_BUFFERS // WINDOW)]
    index = np.arange(ROWS, dtype=np.int32)
    for name in names:
        rig.ours.transport.add_peer(name, rig.theirs.transport.hello())
        tables = rig.ours.table, index, rig.theirs.table, index
        rig.ours.transport.submit(Work(Op.READ, name, *tables, ROWS * ROW))
    rooms = [room for line in rig.ours.post.lines for room, _ in line.rooms.values()]
    buffers = [weakref.ref(room.base) for room in rooms]
    del rooms
    assert len(buffers) == 2 * KEPT_BUFFERS
    assert len(rig.go_on(rounds=100)) == len(names)
    assert sum(buffer() is not None for buffer in buffers) <= KEPT_BUFFERS


def test_a_cancelled_read_ends_at_once_and_what_still_arrives_is_not_placed(rig):
    transfer_id = rig.submit(rows=ROWS)
    rig.ours.transport.cancel(transfer_id)
    rig.ours.transport.cancel(transfer_id)
    (done,) = rig.ours.transport.poll()
    assert (done.transfer_id, done.error, done.nbytes) == (transfer_id, "cancelled", 0)
    assert rig.go_on() == []
    assert rig.is_untouched()


def test_a_cancelled_write_ends_once_what_was_sent_is_answered_and_sends_no_more(rig):
    theirs = rig.theirs.memory.copy()
    transfer_id = rig.submit(Op.WRITE, rows=ROWS)
    rig.ours.transport.cancel(transfer_id)
    assert rig.ours.transport.poll() == [], "the peer may still place what was sent"
    (done,) = rig.go_on()
    assert (done.transfer_id, done.error) == (transfer_id, "cancelled")
    changed = (rig.theirs.memory != theirs).reshape(ROWS, ROW).any(axis=1)
    assert changed.sum() == WINDOW


def test_a_transfer_that_is_over_or_never_was_may_be_cancelled(rig):
    transfer_id = rig.submit()
    assert len(rig.go_on()) == 1
    rig.ours.transport.cancel(transfer_id)
    rig.ours.transport.cancel(12345)
    assert rig.go_on() == []


@pytest.mark.parametrize("which", ["sent", "received"])
def test_a_message_that_the_library_lost_fails_its_transfer_and_nothing_is_placed(rig, which):
    rig.net.slow = True  # the request does not leave
    rig.submit()
    ((_, received),) = rig.line.rooms.values()
    rig.go_on(3)
    assert rig.is_untouched(), "the library still has the request, and so its buffer"
    sent = rig.line.sends[0]
    sent.completed = True
    {"sent": sent, "received": received}[which].status = -3
    (done,) = rig.go_on()
    assert "status -3" in done.error
    assert rig.is_untouched()


def test_a_send_that_the_library_refuses_fails_its_transfer(rig):
    rig.line.broken = True
    transfer_id = rig.submit(rows=3)
    (done,) = rig.ours.transport.poll()
    assert (done.transfer_id, done.error) == (transfer_id, "the library says no")


def test_a_work_of_no_rows_ends(rig):
    transfer_id = rig.submit(rows=0)
    assert [(done.transfer_id, done.error) for done in rig.ours.transport.poll()] == [
        (transfer_id, None)
    ]


def test_a_refused_batch_ends_the_transfer_and_no_more_are_asked_for(rig):
    index = np.arange(ROWS, dtype=np.int32)
    at = int(rig.theirs.memory.ctypes.data) + 1  # the last row ends outside
    outside = RowTable(np.array([[at, ROW, ROW, ROWS]]), np.zeros(1, np.int64), "DRAM", 0)
    backwards = index[::-1].copy()
    transfer_id = rig.ours.transport.submit(
        Work(Op.WRITE, "peer", rig.ours.table, backwards, outside, backwards, ROWS * ROW)
    )
    asked = len(rig.net.sent)
    rig.net.deliver(1)
    rig.theirs.transport.poll()
    assert rig.ours.transport.poll() == []  # others of its batches are under way
    assert len(rig.net.sent) == asked - 1, "no more batches of a work that has failed"
    rig.ours.transport.cancel(transfer_id)  # which is not why it failed
    (done,) = rig.go_on()
    assert "outside" in done.error


def test_a_dropped_peers_transfers_end_and_its_line_is_closed_once_its_requests_have_left(rig):
    rig.net.slow = True
    transfers = [rig.submit(), rig.submit(Op.WRITE)]
    rig.ours.transport.drop_peer("peer")
    rig.ours.transport.drop_peer("peer")
    ended = rig.ours.transport.poll()
    assert [done.transfer_id for done in ended] == transfers
    assert all("dropped" in done.error for done in ended)
    assert not rig.line.closed
    for handle in rig.line.sends:
        handle.completed = True
    assert rig.go_on() == []
    assert rig.line.closed == 1
    assert rig.is_untouched()


@pytest.mark.parametrize("ends", ["never", "dead"])
def test_a_dropped_line_is_not_kept_for_ever(rig, monkeypatch, ends):
    rig.net.slow = True
    rig.submit()
    rig.ours.transport.drop_peer("peer")
    now = time.monotonic()
    if ends == "dead":
        rig.line.alive = False
    else:
        rig.ours.transport.poll()
        assert not rig.line.closed
        monkeypatch.setattr(messages.time, "monotonic", lambda: now + messages.RETIRE_S + 1)
    rig.ours.transport.poll()
    assert rig.line.closed == 1


def test_a_peer_added_again_is_asked_through_another_line(rig):
    first, transfer_id = rig.line, rig.submit()
    rig.ours.transport.add_peer("peer", rig.theirs.transport.hello())
    (done,) = rig.ours.transport.poll()
    assert done.transfer_id == transfer_id and done.error
    assert rig.line is not first and first.closed
    rig.submit()
    assert [done.error for done in rig.go_on()] == [None]


def test_a_line_that_died_ends_its_peers_transfers(rig):
    transfer_id = rig.submit()
    rig.line.alive = False
    (done,) = rig.ours.transport.poll()
    assert done.transfer_id == transfer_id and "closed the connection" in done.error
    rig.submit()
    (late,) = rig.ours.transport.poll()
    assert "not reachable" in late.error


def test_a_hello_with_a_key_of_another_size_is_refused(rig):
    hello = msgspec.msgpack.encode({"address": rig.theirs.post.address, "key": b"short"})
    with pytest.raises(TransportError, match="5 bytes"):
        rig.ours.transport.add_peer("other", hello)


@pytest.mark.parametrize("hello", [b"", b"\x81\xa7address\x05", b"\x91" * 5000])
def test_a_malformed_hello_is_a_transport_error(rig, hello):
    with pytest.raises(TransportError, match="malformed"):
        rig.ours.transport.add_peer("bad", hello)


def test_close_ends_all_transfers_and_all_lines_once(rig):
    rig.net.slow = True
    rig.submit()
    rig.ours.transport.drop_peer("peer")
    retired = rig.line
    rig.ours.transport.add_peer("peer", rig.theirs.transport.hello())
    rig.submit()
    rig.ours.transport.close()
    rig.ours.transport.close()
    assert len(rig.ours.transport.poll()) == 2
    assert retired.closed == rig.line.closed == 1
    assert rig.ours.post.closed == 1


# -- the passive side ------------------------------------------------------------------------


def test_requests_beyond_what_is_served_wait_in_the_library(rig):
    rig.net.slow_replies = True
    for _ in range(SERVED + 10):  # one request each, since a peer's window is small
        rig.ours.transport.add_peer("peer", rig.theirs.transport.hello())
        rig.submit()
    rig.net.deliver()
    for _ in range(3):
        rig.theirs.transport.poll()
    assert len(rig.theirs.post.queue) == 10
    for handle in rig.theirs.post.replies:
        handle.completed = True
    for _ in range(3):
        rig.theirs.transport.poll()
    assert rig.theirs.post.queue == []


def test_who_does_not_take_replies_makes_way_if_others_wait(rig, monkeypatch):
    rig.net.slow_replies = True
    for _ in range(SERVED + 1):
        rig.ours.transport.add_peer("peer", rig.theirs.transport.hello())
        rig.submit()
    rig.net.deliver()
    for _ in range(3):
        rig.theirs.transport.poll()
    assert rig.theirs.post.hung_up == []
    now = time.monotonic()
    monkeypatch.setattr(messages.time, "monotonic", lambda: now + messages.SERVED_S + 1)
    rig.theirs.transport.poll()
    assert len(set(rig.theirs.post.hung_up)) == SERVED
    rig.theirs.transport.poll()
    assert rig.theirs.post.queue == []


def test_replies_that_are_not_taken_may_wait_as_long_as_nobody_else_does(rig, monkeypatch):
    rig.net.slow_replies = True
    rig.submit()
    rig.go_on(2)
    now = time.monotonic()
    monkeypatch.setattr(messages.time, "monotonic", lambda: now + messages.SERVED_S + 1)
    rig.theirs.transport.poll()
    assert rig.theirs.post.hung_up == []


@pytest.mark.parametrize("how", ["is not there yet", "was lost", "has another tag"])
def test_a_request_that_has_not_arrived_is_not_answered(rig, how):
    pending = Handle(completed=how != "is not there yet", status=-1 if how == "was lost" else 0)
    rig.theirs.post.receiving = lambda: pending
    rig.submit()
    if how == "has another tag":
        rig.net.sent = [(to, data, 5, handle) for to, data, _, handle in rig.net.sent]
    assert rig.go_on(3) == []
    assert rig.theirs.post.replies == []
    if how == "is not there yet":
        pending.completed = True
        assert [done.error for done in rig.go_on(3)] == [None]


def test_a_request_whose_asker_has_gone_harms_nobody(rig):
    rig.submit()
    rig.net.deliver()
    del rig.net.lines[rig.line.address]
    assert rig.theirs.transport.poll() == []
    rig.ours.transport.add_peer("peer", rig.theirs.transport.hello())
    rig.submit()
    assert [done.error for done in rig.go_on() if "dropped" not in (done.error or "")] == [None]


def test_a_buffer_that_a_reply_leaves_from_is_not_used_until_it_has_left(rig):
    rig.net.slow_replies = True
    rig.submit(rows=2)
    rig.go_on(2)
    leaving = list(rig.theirs.post.leaving)
    said = [data.copy() for data in leaving]
    assert len(leaving) == 2
    rig.submit(rows=8)
    rig.go_on(4)
    assert len(rig.theirs.post.leaving) > 2
    assert all(np.array_equal(data, was) for data, was in zip(leaving, said, strict=True))
