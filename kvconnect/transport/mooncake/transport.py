"""Mooncake's TransferEngine: one-sided reads and writes over RDMA or TCP (kvcache-ai/Mooncake).

* Each span is a transfer of its own. Of a batch, Mooncake's Python interface tells only by
  spinning that it ended, and of one with a failed span before its others have ended. Over TCP
  batches were no faster either.
* Spans wait here until at most `WINDOW` of a peer are under way: a TCP peer fails what exceeds
  its queue. Rows that are neighbours on both sides are joined.
* Contact with a new peer is made on a thread, for Mooncake blocks there, up to a minute; what is
  submitted meanwhile waits.
* Nothing can be cancelled. What a dropped peer leaves under way is waited for, then fenced off by
  making the engine anew. Its own threads serve peers: a passive side need not poll.
"""

import gc
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvconnect.config import MooncakeOptions, parse_transport_options
from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Done, Op, TransferId, Work
from kvconnect.transport.greeting import read_hello
from kvconnect.transport.mooncake.engine import import_mooncake, start
from kvconnect.transport.reach import Reach, Spans, join, pair

logger = logging.getLogger(f"vllm.{__name__}")

WINDOW = 128
FENCE_S = 20.0  # that a dropped peer's transfers get to end by themselves
CLOSE_S = 2.0  # that all get when the transport is closed
UNENDED = (0, -2)  # of transfer_check_status: waiting; late, yet not ended


class _MooncakeHello(msgspec.Struct):
    segment: str
    incarnation: str
    regions: tuple[Region, ...]


class _MooncakePeer:
    """A peer and how contact with it stands: None under way, else whether it was made."""

    def __init__(self, hello: _MooncakeHello) -> None:
        self.hello = hello
        self.reach = Reach(hello.regions)
        self.met: bool | None = None


@dataclass
class _MooncakeTransfer:
    work: Work
    peer: _MooncakePeer
    spans: Spans
    started: float
    posted: int = 0  # spans that are under way or have ended
    post_s: float = 0.0
    descriptors: int = 0
    under_way: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def spans_left(self) -> int:
        """How many are to be posted; none once it has failed."""
        return 0 if self.error else len(self.spans[0]) - self.posted

    def next_span(self) -> tuple[int, int, int]:
        """Our address, the peer's and the bytes of the next one to post.

        Taken from the arrays one by one: a list of a million spans would take submit a second.
        """
        ours, theirs, nbytes = (int(side[self.posted]) for side in self.spans)
        self.posted += 1
        return ours, theirs, nbytes


class MooncakeTransport:
    """See `kvconnect.transport.base`. Raises ConfigError if the engine cannot start as asked."""

    def __init__(self, regions: Sequence[Region], host: str, options: MooncakeOptions) -> None:
        """Peers must reach ``host``."""
        self._regions, self._host, self._options = tuple(regions), host, options
        self._make = import_mooncake(host)
        self._reach = Reach(regions)
        self._peers: dict[str, _MooncakePeer] = {}
        self._known: dict[str, str] = {}  # segment → incarnation, of all that we ever met
        self._running: dict[TransferId, _MooncakeTransfer] = {}
        self._ended: list[Done] = []
        self._next_id = 1
        self._fence_at = float("inf")
        self._meetings: list[threading.Thread] = []
        self._engine: Any = None
        self._make_engine()

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(
            _MooncakeHello(self._segment, self._incarnation, self._regions)
        )

    def add_peer(self, name: str, hello: bytes) -> None:
        theirs = read_hello(name, hello, _MooncakeHello)
        try:
            peer = _MooncakePeer(theirs)
        except OverflowError as e:
            raise TransportError(f"peer {name}: its hello is malformed: {e}") from e
        self.drop_peer(name)
        if self._known.get(theirs.segment, theirs.incarnation) != theirs.incarnation:
            # Mooncake keeps what it knows of a segment and cannot be told to forget it
            self._make_anew(f"another process is Mooncake segment {theirs.segment} now")
        self._known[theirs.segment] = theirs.incarnation
        self._peers[name] = peer
        meeting = threading.Thread(target=_meet, args=(self._engine, peer), daemon=True)
        self._meetings = [m for m in self._meetings if m.is_alive()] + [meeting]
        meeting.start()

    def drop_peer(self, name: str) -> None:
        if self._peers.pop(name, None) is None:
            return
        for transfer_id, running in list(self._running.items()):
            if running.work.peer == name:
                self._fail(running, f"peer {name} was dropped")
                self._end_if_over(transfer_id)
        if any(r.work.peer == name for r in self._running.values()):
            self._fence_at = min(self._fence_at, time.monotonic() + FENCE_S)

    def submit(self, work: Work) -> TransferId:
        transfer_id, self._next_id = self._next_id, self._next_id + 1
        started = time.perf_counter()
        try:
            if work.peer not in self._peers:
                raise TransportError(f"peer {work.peer} is not reachable")
            peer = self._peers[work.peer]
            ours, theirs, nbytes = spans = join(pair(work))
            self._reach.check(ours, nbytes)
            peer.reach.check(theirs, nbytes)
        except TransportError as e:
            self._ended.append(Done(transfer_id, str(e)))
            return transfer_id
        running = self._running[transfer_id] = _MooncakeTransfer(work, peer, spans, started)
        running.descriptors = len(ours)
        self._post()
        running.post_s = time.perf_counter() - started
        return transfer_id

    def poll(self) -> list[Done]:
        self._advance()
        self._post()
        if time.monotonic() >= self._fence_at and not self.is_meeting:
            self._make_anew(f"a dropped peer's transfers did not end in {FENCE_S:g} s")
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, transfer_id: TransferId) -> None:
        if running := self._running.get(transfer_id):
            self._fail(running, "cancelled")
            self._end_if_over(transfer_id)

    def close(self) -> None:
        if self._engine is None:
            return
        deadline = time.monotonic() + CLOSE_S
        for running in self._running.values():
            self._fail(running, "transport closed")
        while (self._running or self.is_meeting) and time.monotonic() < deadline:
            self._advance()
            time.sleep(0.001)
        self._drop_engine("transport closed")

    # -- transfers ----------------------------------------------------------------------

    def _post(self) -> None:
        """Put spans under way, oldest transfers first."""
        under_way: dict[str, int] = {}
        for transfer_id, running in list(self._running.items()):
            segment = running.peer.hello.segment
            count = under_way.get(segment, 0) + len(running.under_way)
            if running.peer.met is False:
                self._fail(running, f"peer {running.work.peer} cannot be reached by Mooncake")
            while running.peer.met and running.spans_left and count < WINDOW:
                count += self._transfer(running, *running.next_span())
            under_way[segment] = count
            self._end_if_over(transfer_id)

    def _transfer(self, running: _MooncakeTransfer, ours: int, theirs: int, nbytes: int) -> int:
        engine, segment = self._engine, running.peer.hello.segment
        read = running.work.op is Op.READ
        start = engine.batch_transfer_async_read if read else engine.batch_transfer_async_write
        transfer: int = start(segment, [ours], [theirs], [nbytes])
        if not transfer:
            self._fail(running, "Mooncake refused the transfer; its log says why")
            return 0
        running.under_way.append(transfer)
        return 1

    def _advance(self) -> None:
        for transfer_id, running in list(self._running.items()):
            under_way = []
            for transfer in running.under_way:
                state = self._engine.transfer_check_status(transfer)
                if state in UNENDED:
                    under_way.append(transfer)
                elif state != 1:
                    self._fail(running, "Mooncake could not move a row; its log says why")
            running.under_way = under_way
            self._end_if_over(transfer_id)
        if all(r.work.peer in self._peers for r in self._running.values()):
            self._fence_at = float("inf")

    def _fail(self, running: _MooncakeTransfer, error: str) -> None:
        """What is under way goes on; it ends, with this error, when that has ended."""
        running.error = running.error or error

    def _end_if_over(self, transfer_id: TransferId) -> None:
        r = self._running[transfer_id]
        if r.spans_left or r.under_way:
            return
        del self._running[transfer_id]
        nbytes, wire_s = 0 if r.error else r.work.nbytes, time.perf_counter() - r.started
        self._ended.append(Done(transfer_id, r.error, nbytes, r.descriptors, r.post_s, wire_s))

    # -- the engine ---------------------------------------------------------------------

    def _make_engine(self) -> None:
        self._engine, self._segment, self._incarnation = start(
            self._make, self._regions, self._host, self._options
        )

    @property
    def is_meeting(self) -> bool:
        """Whether a thread makes contact: it has the engine, which then cannot be destroyed."""
        return any(meeting.is_alive() for meeting in self._meetings)

    def _make_anew(self, why: str) -> None:
        if self.is_meeting:
            raise TransportError(f"{why}, and the engine cannot be made anew yet; greet again")
        logger.error("%s: Mooncake's engine is made anew, and all peers are greeted again", why)
        self._drop_engine("Mooncake's engine was made anew")
        self._make_engine()

    def _drop_engine(self, why: str) -> None:
        """Destroy the engine and with it all registrations, peers and transfers."""
        for transfer_id, running in self._running.items():
            self._ended.append(Done(transfer_id, running.error or why))
        self._running.clear()
        self._peers.clear()
        self._known.clear()
        self._fence_at = float("inf")
        self._engine = None
        gc.collect()  # it ends with the last who knows it; see that that is now


def _meet(engine: Any, peer: _MooncakePeer) -> None:
    """Make contact. The probe first: what follows keeps all others waiting while it lasts."""
    segment, region = peer.hello.segment, peer.hello.regions[0] if peer.hello.regions else None
    if engine.send_probe(segment) or region is None:
        peer.met = False
        return
    nothing = engine.batch_transfer_async_read(segment, [region.address], [region.address], [0])
    peer.met = bool(nothing) and engine.transfer_check_status(nothing) == 1


def make(regions: Sequence[Region], host: str, options: Mapping[str, Any]) -> MooncakeTransport:
    """For `registry`; options are those of `MooncakeOptions`."""
    wanted = parse_transport_options(options, MooncakeOptions, "mooncake")
    return MooncakeTransport(regions, host, wanted)
