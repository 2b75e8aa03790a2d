"""A transport made of a library that can only send and receive tagged messages (`post`).

Reads and writes are requests to the peer's `Agent`, which answers while it is polled. A request
goes to a tag that all know, its reply to one that only the asker knows.

* At most `WINDOW` batches per peer are under way.
* Each peer is asked through a line of its own, made anew when the peer is added again. What was
  under way when it was dropped lands, if at all, in buffers that nobody looks at.
* A written batch that was under way when its peer was dropped may still be applied there.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Done, Op, TransferId, Work
from kvconnect.transport.batches import SpanBatch, Transfers
from kvconnect.transport.greeting import read_hello
from kvconnect.transport.ucx.agent import BUFFER_BYTES, Agent, reply_bytes
from kvconnect.transport.ucx.post import Handle, Post, RequestLine

logger = logging.getLogger(f"vllm.{__name__}")

WINDOW = 8
KEPT_BUFFERS = 32  # free ones, of 1.25 MB
SERVED = 64  # requests of peers under way; the others wait in the library
SERVED_S = 10.0  # after which a reply that its asker does not take makes way, if others wait
RETIRE_S = 20.0  # that a dropped line's requests get to leave; libraries leak if cut off there
REQUEST_TAG = 1 << 63  # tags of replies are below


class _MessageHello(msgspec.Struct):
    address: bytes
    key: bytes


@dataclass
class _OpenRequest:
    """A batch under way: its request, and the receive that its reply matches."""

    transfer_id: TransferId
    batch: SpanBatch
    buffers: tuple[np.ndarray, np.ndarray]
    sent: Handle
    received: Handle


class _Reply(NamedTuple):
    to: bytes
    buffer: np.ndarray
    sent: Handle
    since: float


@dataclass
class _MessagePeer:
    line: RequestLine
    key: bytes
    exchanges: list[_OpenRequest] = field(default_factory=list)
    dropped_at: float = 0.0


class MessageTransport:
    """See `kvconnect.transport.base`, and the module's contract."""

    def __init__(self, regions: Sequence[Region], post: Post) -> None:
        self._post = post
        self._agent = Agent(regions)
        self._tag = secrets.randbelow(1 << 62)
        self._peers: dict[str, _MessagePeer] = {}
        self._transfers = Transfers()
        self._buffers: list[np.ndarray] = []  # free ones
        self._arriving: list[tuple[Handle, np.ndarray, int]] = []
        self._replies: list[_Reply] = []
        self._retired: list[_MessagePeer] = []  # dropped, their requests leaving
        self._closed = False

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(_MessageHello(self._post.address, self._agent.key))

    def add_peer(self, name: str, hello: bytes) -> None:
        theirs = read_hello(name, hello, _MessageHello)
        if len(theirs.key) != len(self._agent.key):
            raise TransportError(f"peer {name}: its key has {len(theirs.key)} bytes")
        self.drop_peer(name)
        self._peers[name] = _MessagePeer(self._post.dial(theirs.address), theirs.key)

    def drop_peer(self, name: str) -> None:
        self._drop(name, f"peer {name} was dropped")

    def submit(self, work: Work) -> TransferId:
        return self._transfers.begin(work, self._batches, self._fill)

    def poll(self) -> list[Done]:
        if not self._closed:
            self._serve()
            for name, peer in list(self._peers.items()):
                peer.line.progress()
                self._advance(peer)
                if peer.line.alive:
                    self._fill(name)
                else:
                    self._drop(name, f"peer {name} closed the connection")
            self._retired = [peer for peer in self._retired if not self._is_gone(peer)]
            del self._buffers[KEPT_BUFFERS:]
        return self._transfers.ended()

    def cancel(self, transfer_id: TransferId) -> None:
        # read bytes only reach their place in `_advance`, written ones are the peer's to place
        if self._transfers.op(transfer_id) is Op.READ:
            self._transfers.end(transfer_id, "cancelled")
        else:
            self._transfers.fail(transfer_id, "cancelled")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for name in list(self._peers):
            self._drop(name, "transport closed")
        for peer in self._retired:
            peer.line.close()
        self._post.close()
        self._replies.clear()
        self._retired.clear()
        self._arriving.clear()

    # -- reading and writing ------------------------------------------------------------

    def _batches(self, work: Work) -> Iterator[SpanBatch]:
        if work.peer not in self._peers:
            raise TransportError(f"peer {work.peer} is not reachable")
        return self._agent.batches(work)

    def _fill(self, name: str) -> None:
        """Put batches of this peer's transfers under way, as many as may be."""
        peer = self._peers[name]
        while len(peer.exchanges) < WINDOW and (taken := self._transfers.take(name)):
            self._ask(peer, *taken)

    def _ask(self, peer: _MessagePeer, transfer_id: TransferId, batch: SpanBatch) -> None:
        request, reply = self._buffer(), self._buffer()
        tag, self._tag = self._tag, self._tag + 1
        size = self._agent.request(batch, peer.key, peer.line.address, tag, request)
        try:
            received = peer.line.receive(reply[: reply_bytes(batch)], tag)
            sent = peer.line.send(request[:size], REQUEST_TAG)
        except TransportError as e:
            # buffers are left to the garbage: who knows whether the library has them
            self._transfers.settle(transfer_id, str(e))
            return
        peer.exchanges.append(_OpenRequest(transfer_id, batch, (request, reply), sent, received))

    def _advance(self, peer: _MessagePeer) -> None:
        """Settle the batches whose replies have come."""
        under_way = []
        for x in peer.exchanges:
            if not (x.sent.completed and x.received.completed):
                under_way.append(x)
                continue
            if self._transfers.op(x.transfer_id):
                error = self._transfers.error(x.transfer_id) or _error(x.sent) or _error(x.received)
                error = error or self._agent.settle(x.batch, x.buffers[1])
                self._transfers.settle(x.transfer_id, error)
            self._buffers += x.buffers
        peer.exchanges = under_way

    def _drop(self, name: str, why: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        peer.dropped_at = time.monotonic()
        self._retired.append(peer)
        for transfer_id in self._transfers.of(name):
            self._transfers.end(transfer_id, why)

    def _is_gone(self, peer: _MessagePeer) -> bool:
        """Close a dropped peer's line as soon as may be."""
        peer.line.progress()
        leaving = peer.line.alive and any(not x.sent.completed for x in peer.exchanges)
        if leaving and time.monotonic() < peer.dropped_at + RETIRE_S:
            return False
        peer.line.close()
        return True

    # -- being read and written ---------------------------------------------------------

    def _serve(self) -> None:
        self._free_replies()
        while len(self._arriving) + len(self._replies) < SERVED:
            buffer = self._buffer()
            arrival = self._post.arrival(buffer, REQUEST_TAG)
            if arrival is None:
                self._buffers.append(buffer)
                break
            self._arriving.append((arrival[0], buffer, arrival[1]))
        arriving, self._arriving = self._arriving, []
        for handle, buffer, size in arriving:
            if not handle.completed:
                self._arriving.append((handle, buffer, size))
                continue
            if size and not handle.status:
                self._answer(buffer[:size])
            self._buffers.append(buffer)

    def _answer(self, request: np.ndarray) -> None:
        out = self._buffer()
        try:
            answer = self._agent.answer(request, out)
            sent = self._post.reply(answer.reply_to, out[: answer.nbytes], answer.tag)
        except TransportError as e:
            logger.info("a request gets no reply: %s", e)  # its asker has gone, as a rule
            return
        self._replies.append(_Reply(answer.reply_to, out, sent, time.monotonic()))

    def _free_replies(self) -> None:
        if len(self._replies) >= SERVED:
            long_ago = time.monotonic() - SERVED_S
            for to in {r.to for r in self._replies if r.since < long_ago}:
                self._post.hang_up(to)
        self._buffers += [r.buffer for r in self._replies if r.sent.completed]
        self._replies = [r for r in self._replies if not r.sent.completed]

    def _buffer(self) -> np.ndarray:
        return self._buffers.pop() if self._buffers else np.empty(BUFFER_BYTES, np.uint8)


def _error(handle: Handle) -> str | None:
    return f"a message to the peer ended with status {handle.status}" if handle.status else None
