"""NCCL's point-to-point calls between GPUs: for hosts that have NCCL and nothing one-sided.

NCCL only sends and receives, in the same order on both sides, so each peer is asked over a line of
its own: a control channel, and a two-rank communicator (`nccl_pair`) made at the first use.

    who asks: OpenLine(key, unique id)       who is asked:
              AskSpans(number, op, spans)    Ready(number), or SpansRefused(number)
                                             WriteFinished(number), of a WRITE
              Ping, Bye                      LineFailed

* What is posted to NCCL is posted by both ends, in the order of the Readys, or the line breaks.
* The side that is asked checks each span against its regions, and who asks by the key of its
  hello. Rows pass through staging on both sides, and each step waits for the one before it.
* A line breaks when NCCL reports an error, the peer says so, or nothing goes on for
  ``transfer_timeout`` (``init_timeout`` until the two have met). Its transfers fail, and both ends
  abort the communicator; the next one makes another. Staging comes back when the abort is done.
* A WRITE that is under way when its peer is dropped may still be applied there.
"""

import hmac
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from kvconnect.config import Seconds, TransportOptions, parse_transport_options
from kvconnect.control.channel import Frame, Link, ZmqChannel
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, TransportError, WireError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Done, Op, TransferId, Work
from kvconnect.transport.batches import SpanBatch, Transfers, cut
from kvconnect.transport.greeting import read_hello
from kvconnect.transport.nccl.library import Nccl, find, spelt
from kvconnect.transport.nccl.line import BATCH_BYTES, BATCH_SPANS, WINDOW, NcclLine
from kvconnect.transport.nccl.pair import Device, RankPair
from kvconnect.transport.nccl.words import AskSpans, LineFailed, OpenLine, Ping, decode
from kvconnect.transport.reach import Reach, join, pair, split

logger = logging.getLogger(f"vllm.{__name__}")

BUFFERS = 8  # of BATCH_BYTES, to ask with; and as many to serve with
MAX_GUESTS = 256  # lines that others opened
PING_S = 10.0
CLOSE_S = 5.0  # that aborts get when the transport is closed


class NcclOptions(TransportOptions, frozen=True, kw_only=True):
    """Options of the nccl transport."""

    library: str = ""
    """Path of libnccl; else the one that is loaded already."""
    nccl_num_channels: Annotated[int, msgspec.Meta(ge=0, le=64)] = 8
    """CTAs that a communicator may use at most; 0: as many as NCCL wants."""
    init_timeout: Seconds = 30
    """Seconds within which two ranks must have met in a new communicator."""
    transfer_timeout: Seconds = 20
    """Seconds without any progress after which a communicator is aborted."""


class _NcclHello(msgspec.Struct):
    address: Address
    key: bytes
    nccl: int


@dataclass
class _NcclPeer:
    hello: _NcclHello
    line: NcclLine | None = None


class NcclTransport:
    """See `kvconnect.transport.base`. Raises ConfigError where NCCL or a GPU is missing."""

    def __init__(
        self,
        regions: Sequence[Region],
        host: str,
        options: NcclOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        devices = {r.device for r in regions} or {0}
        if len(devices) > 1 or any(r.kind != "VRAM" for r in regions):
            raise ConfigError(
                "the nccl transport moves one GPU's memory only; use nixl or ucx for a host's"
            )
        self._options, self._clock = options, clock
        self._nccl = Nccl(find(options.library))
        self._channel = ZmqChannel(host)
        try:
            self._device = Device(devices.pop(), BUFFERS, BATCH_BYTES, BATCH_SPANS)
        except ConfigError:
            self._channel.close()
            raise
        self._reach = Reach(regions)
        self._key = secrets.token_bytes(16)
        self._transfers = Transfers()
        self._peers: dict[str, _NcclPeer] = {}
        self._lines: dict[Link, NcclLine] = {}
        self._leaving: list[NcclLine] = []  # given up, not gone
        self._pinged_at = self._fed_at = clock()
        self._closed = False

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(
            _NcclHello(self._channel.address, self._key, self._nccl.version)
        )

    def add_peer(self, name: str, hello: bytes) -> None:
        theirs = read_hello(name, hello, _NcclHello)
        if theirs.nccl != self._nccl.version:
            raise TransportError(
                f"peer {name} has NCCL {spelt(theirs.nccl)}, we have {spelt(self._nccl.version)}; "
                "NCCL works between equal versions only"
            )
        self.drop_peer(name)
        self._peers[name] = _NcclPeer(theirs)

    def drop_peer(self, name: str) -> None:
        if peer := self._peers.pop(name, None):
            self._fail(name, peer.line, f"peer {name} was dropped")

    def submit(self, work: Work) -> TransferId:
        return self._transfers.begin(work, self._batches, self._fill)

    def poll(self) -> list[Done]:
        if not self._closed:
            for frame in self._channel.poll(0):
                self._hear(frame)
            self._ping()
            for line in self._lines.values():
                line.progress()
            self._sweep()
            for name in self._peers:
                self._fill(name)
            self._despair()
        return self._transfers.ended()

    def cancel(self, transfer_id: TransferId) -> None:
        read = self._transfers.op(transfer_id) is Op.READ
        self._transfers.fail(transfer_id, "cancelled")
        for line in self._lines.values() if read else ():
            for x in line.exchanges.values():
                # it goes on, for what is posted must be matched, but not into our memory
                if x.transfer_id == transfer_id and not x.copying:
                    x.transfer_id = None
                    self._transfers.settle(transfer_id)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for name in list(self._peers):
            self.drop_peer(name)
        for line in self._lines.values():
            line.give_up("transport closed")
        deadline = time.monotonic() + CLOSE_S
        self._sweep()
        while self._leaving and time.monotonic() < deadline:
            self._sweep(0.001)
        for name in {line.peer for line in self._leaving if line.peer is not None}:
            for transfer_id in self._transfers.of(name):
                self._transfers.end(transfer_id, "transport closed")
        self._device.close(free=not self._leaving)
        self._channel.close()

    # -- asking -------------------------------------------------------------------------

    def _batches(self, work: Work) -> Iterator[SpanBatch]:
        if work.peer not in self._peers:
            raise TransportError(f"peer {work.peer} is not reachable")
        spans = split(join(pair(work)), BATCH_BYTES)
        self._reach.check(spans[0], spans[2])
        return cut(work.op, spans, BATCH_BYTES, BATCH_SPANS)

    def _fill(self, name: str) -> None:
        """Put batches of this peer's transfers under way, as many as may be."""
        peer, free = self._peers[name], self._device.asking
        while free and (peer.line is None or len(peer.line.exchanges) < WINDOW):
            if (peer.line and peer.line.broken) or not (taken := self._transfers.take(name)):
                return
            transfer_id, batch = taken
            try:
                line = peer.line = peer.line or self._open(name, peer.hello)
            except TransportError as e:
                self._transfers.settle(transfer_id, str(e))
                continue
            line.ask(batch, transfer_id)
            self._fed_at = self._clock()

    def _despair(self) -> None:
        """Fail what waits for staging that aborts do not give back."""
        if self._device.asking or not self._leaving:
            self._fed_at = self._clock()
        elif self._clock() > self._fed_at + self._options.transfer_timeout:
            for name in self._peers:
                self._fail(name, None, "NCCL does not let go of the staging memory")

    def _open(self, name: str, hello: _NcclHello) -> NcclLine:
        unique_id = self._nccl.unique_id()
        try:
            link = self._channel.dial(hello.address)
        except WireError as e:
            raise TransportError(f"peer {name}: {e}") from e
        try:
            line = self._line(link, unique_id, name)
        except TransportError:
            self._channel.drop(link)
            raise
        line.say(OpenLine(hello.key, unique_id))
        return line

    def _line(self, link: Link, unique_id: bytes, peer: str | None) -> NcclLine:
        options, rank = self._options, 0 if peer is not None else 1
        made = RankPair(self._nccl, self._device, unique_id, rank, options.nccl_num_channels)
        timeouts = options.init_timeout, options.transfer_timeout
        line = NcclLine(self._channel, link, made, self._device, peer, timeouts, self._clock)
        self._lines[link] = line
        return line

    # -- being asked --------------------------------------------------------------------

    def _stranger(self, link: Link, data: bytes | None) -> None:
        """Somebody speaks on a line that is none, or not any more: to open one, if all is well."""
        try:
            said = decode(data, answers=False)
            if not isinstance(said, OpenLine):
                raise TransportError("the communicator was given up")
            if not hmac.compare_digest(said.key, self._key):
                raise TransportError("this is another transport than the one you were greeted by")
            if sum(line.peer is None for line in self._lines.values()) >= MAX_GUESTS:
                raise TransportError(f"{MAX_GUESTS} peers have opened communicators already")
            self._line(link, said.unique_id, None)
        except TransportError as e:
            logger.info("a communicator that a peer asks for is not there: %s", e)
            self._channel.send(link, msgspec.msgpack.encode(LineFailed(str(e))))

    # -- lines --------------------------------------------------------------------------

    def _hear(self, frame: Frame) -> None:
        line = self._lines.get(frame.link)
        if line is None:
            if not frame.link.dialled:
                self._stranger(frame.link, frame.data)
        elif not line.broken:
            try:
                said = decode(frame.data, answers=frame.link.dialled)
                if isinstance(said, AskSpans):
                    line.serve(said, self._reach)
                else:
                    line.heard(said)
            except TransportError as e:
                line.give_up(str(e))

    def _ping(self) -> None:
        if (now := self._clock()) > self._pinged_at + PING_S:
            self._pinged_at = now
            for line in self._lines.values():
                if line.peer is not None:
                    line.say(Ping())

    def _sweep(self, wait_s: float = 0.0) -> None:
        """Take in what lines have ended, and put broken ones aside until they are gone."""
        for link, line in list(self._lines.items()):
            self._settle(line)
            if line.broken:
                logger.info("the communicator with %s is aborted: %s", line.peer, line.broken)
                del self._lines[link]
                self._leaving.append(line)
                if line.peer is not None:
                    self._channel.drop(link)
        for line in list(self._leaving):
            if line.gone(wait_s):
                self._leaving.remove(line)
            self._settle(line)
        for name, peer in self._peers.items():
            if peer.line is not None and peer.line.broken:
                why, peer.line = peer.line.broken, None
                self._fail(name, None, why)

    def _settle(self, line: NcclLine) -> None:
        for x in line.ended():
            if x.transfer_id is not None:
                self._transfers.settle(x.transfer_id, x.error)

    def _fail(self, name: str, line: NcclLine | None, why: str) -> None:
        """Fail all of a peer's transfers; what is being copied ends a little later."""
        for transfer_id in self._transfers.of(name):
            self._transfers.fail(transfer_id, why)
        if line is not None:
            line.give_up(why)
            self._sweep()


def make(regions: Sequence[Region], host: str, options: Mapping[str, Any]) -> NcclTransport:
    """For `registry`; options are those of `NcclOptions`."""
    return NcclTransport(regions, host, parse_transport_options(options, NcclOptions, "nccl"))
