"""A line: a communicator, what is said about it, and the exchanges that go over it.

Each `Exchange` has steps, on the side that asks or on the one that serves, which are resumed
until they end. When a line is given up, they all end, its communicator is aborted, and it is to be
asked whether it is `gone`. Knows no peers' addresses, and of transfers no more than their numbers.
"""

import itertools
import logging
from collections.abc import Callable, Generator

import msgspec
import numpy as np

from kvconnect.control.channel import Channel, Link
from kvconnect.errors import TransportError
from kvconnect.ops.cuda import CudaLaunch
from kvconnect.transport.base import Op, TransferId
from kvconnect.transport.batches import SpanBatch
from kvconnect.transport.nccl.pair import Device, Move, RankPair
from kvconnect.transport.nccl.words import (
    AskSpans,
    Bye,
    LineFailed,
    LineMessage,
    Ping,
    Ready,
    SpansRefused,
    WriteFinished,
)
from kvconnect.transport.reach import Reach

logger = logging.getLogger(f"vllm.{__name__}")

BATCH_BYTES = 4 << 20
BATCH_SPANS = 1 << 13
WINDOW = 4  # batches that we ask for at once
MOST_ASKED = 4 * WINDOW  # by a peer: the side that serves sees the end of a batch later
SILENT_S = 60.0  # a line that a peer opened and does not ping for so long is given up


class Exchange:
    """A batch under way, on either side, and the staging buffer it uses."""

    def __init__(self, number: int, batch: SpanBatch, transfer_id: TransferId | None) -> None:
        self.number, self.batch, self.transfer_id = number, batch, transfer_id
        self.steps: Generator[None]
        self.buffer: int | None = None
        self.ready = self.finished = False
        self.copying = False
        """Whether our registered memory is in use."""
        self.error: str | None = None


class NcclLine:
    """See the module. ``peer``: whom we ask over it; None: a peer asks us."""

    def __init__(
        self,
        channel: Channel,
        link: Link,
        pair: RankPair,
        device: Device,
        peer: str | None,
        timeouts: tuple[float, float],
        clock: Callable[[], float],
    ) -> None:
        """``timeouts``: seconds to meet in, and that may pass without any progress."""
        self.link, self.peer = link, peer
        self._channel, self._pair, self._device, self._timeouts = channel, pair, device, timeouts
        self._clock = clock
        self._free = device.serving if peer is None else device.asking
        self._numbers = itertools.count()
        self._heard_at = self._progress_at = self._clock()
        self._ended: list[Exchange] = []
        self.exchanges: dict[int, Exchange] = {}
        self.broken: str | None = None
        """Why it was given up."""

    def say(self, said: LineMessage) -> None:
        """Send this."""
        self._channel.send(self.link, msgspec.msgpack.encode(said))

    def ask(self, batch: SpanBatch, transfer_id: TransferId) -> None:
        """Begin to read or write a batch. There must be a free buffer."""
        x = Exchange(next(self._numbers), batch, transfer_id)
        x.buffer = self._free.pop()
        self._begin(x, self._asking(x, x.buffer))

    def serve(self, asked: AskSpans, reach: Reach) -> None:
        """Begin what a peer asks for; raises TransportError if that is no request."""
        if len(asked.addresses) % 8 or len(asked.sizes) * 2 != len(asked.addresses):
            raise TransportError("a request is malformed")
        if asked.number in self.exchanges or len(self.exchanges) >= MOST_ASKED:
            raise TransportError("more is asked for than may be at once")
        addresses = np.frombuffer(asked.addresses, "<i8")
        sizes = np.frombuffer(asked.sizes, "<u4").astype(np.int64)
        nbytes = int(sizes.sum())
        if not 0 < nbytes <= BATCH_BYTES or len(sizes) > BATCH_SPANS:
            raise TransportError(f"{nbytes} bytes in {len(sizes)} spans are asked for at once")
        self._heard_at = self._clock()
        try:
            reach.check(addresses, sizes)
        except TransportError as e:
            logger.info("a request is refused: %s", e)
            self.say(SpansRefused(asked.number))
            return
        x = Exchange(asked.number, SpanBatch(asked.op, (addresses, addresses, sizes), nbytes), None)
        self._begin(x, self._serving(x))

    def progress(self) -> None:
        """Take steps; give up if the pair has failed or nothing goes on."""
        if self.broken:
            return
        try:
            if self._pair.progress():
                self._progress_at = self._clock()
            self._check()
        except TransportError as e:
            self.give_up(str(e))
        for exchange in list(self.exchanges.values()):
            if not self.broken:
                self._step(exchange)

    def heard(self, said: LineMessage) -> None:
        """Take in what is no request; raises TransportError if that ends the line."""
        self._heard_at = self._clock()
        if isinstance(said, Ping):
            return
        if not isinstance(said, Ready | WriteFinished | SpansRefused):
            raise TransportError(
                said.why if isinstance(said, LineFailed) else "the peer gave it up"
            )
        exchange = self.exchanges.get(said.number)
        if exchange is None or exchange.ready != isinstance(said, WriteFinished):
            raise TransportError("the peer answers what it was not asked")
        self._progress_at = self._heard_at
        if isinstance(said, SpansRefused):
            exchange.steps.close()
            self._end(exchange, "a row lies outside every region that the peer registered")
            return
        exchange.ready, exchange.finished = True, isinstance(said, WriteFinished)
        self._step(exchange)

    def ended(self) -> list[Exchange]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def give_up(self, why: str) -> None:
        """End it at both ends. Exchanges end, but those being copied, which do with `gone`."""
        if self.broken:
            return
        self.broken = why
        self.say(LineFailed(why) if self.peer is None else Bye())
        self._pair.abort()
        for exchange in self.exchanges.values():
            exchange.error = exchange.error or why
            if not exchange.copying:
                self._ended.append(exchange)

    def gone(self, wait_s: float = 0.0) -> bool:
        """Whether, given up, it has left our memory and the device; then buffers are free."""
        copying = [x for x in self.exchanges.values() if x.copying]
        for exchange in copying:
            self._step(exchange)
            if not exchange.copying:
                self._ended.append(exchange)
        if any(x.copying for x in copying) or not self._pair.gone(wait_s):
            return False
        self._free += [x.buffer for x in self.exchanges.values() if x.buffer is not None]
        self.exchanges.clear()
        return True

    # -- steps --------------------------------------------------------------------------

    def _asking(self, x: Exchange, buffer: int) -> Generator[None]:
        (ours, theirs, sizes), read = x.batch.spans, x.batch.op is Op.READ
        if not read:
            yield from self._copied(x, lambda: self._device.gather(ours, sizes, buffer))
        addresses, nbytes = theirs.astype("<i8").tobytes(), sizes.astype("<u4").tobytes()
        self.say(AskSpans(x.number, x.batch.op, addresses, nbytes))
        while not x.ready:
            yield
        if not read:
            yield from _moved(self._pair.send(buffer, x.batch.nbytes))
            while not x.finished:
                yield
            return
        yield from _moved(self._pair.receive(buffer, x.batch.nbytes))
        if x.transfer_id is not None:
            yield from self._copied(x, lambda: self._device.scatter(ours, sizes, buffer))

    def _serving(self, x: Exchange) -> Generator[None]:
        ours, _, sizes = x.batch.spans
        while not self._free:
            yield
        buffer = x.buffer = self._free.pop()
        if x.batch.op is Op.READ:
            yield from self._copied(x, lambda: self._device.gather(ours, sizes, buffer))
            self.say(Ready(x.number))
            yield from _moved(self._pair.send(buffer, x.batch.nbytes))
        else:
            self.say(Ready(x.number))
            yield from _moved(self._pair.receive(buffer, x.batch.nbytes))
            yield from self._copied(x, lambda: self._device.scatter(ours, sizes, buffer))
            self.say(WriteFinished(x.number))

    def _copied(self, exchange: Exchange, copy: Callable[[], CudaLaunch]) -> Generator[None]:
        """Wait until our memory is not in use any more, even if the line is given up."""
        exchange.copying = True
        try:
            launch = copy()
            while not launch.done():
                yield
        except TransportError:
            yield from self._device.drained()  # what failed may be a call, and the copy go on
            raise
        exchange.copying = False
        if self.broken:
            raise TransportError(self.broken)

    def _begin(self, exchange: Exchange, steps: Generator[None]) -> None:
        if not self.exchanges and self._pair.up:
            self._progress_at = self._clock()
        exchange.steps = steps
        self.exchanges[exchange.number] = exchange
        self._step(exchange)

    def _step(self, exchange: Exchange) -> None:
        try:
            next(exchange.steps)
        except StopIteration:
            self._end(exchange, None)
        except TransportError as e:
            exchange.copying = False
            self.give_up(str(e))

    def _end(self, exchange: Exchange, error: str | None) -> None:
        del self.exchanges[exchange.number]
        exchange.error = error
        self._ended.append(exchange)
        if exchange.buffer is not None:
            self._free.append(exchange.buffer)

    def _check(self) -> None:
        now, (init_s, transfer_s) = self._clock(), self._timeouts
        if not self._pair.up and now > self._progress_at + init_s:
            raise TransportError(f"the two did not meet in {init_s:g} s")
        if self._pair.up and self.exchanges and now > self._progress_at + transfer_s:
            raise TransportError(f"nothing has moved for {transfer_s:g} s")
        if self.peer is None and now > self._heard_at + SILENT_S:
            raise TransportError(f"the peer was silent for {SILENT_S:g} s")


def _moved(move: Move) -> Generator[None]:
    """Wait until NCCL has done its part."""
    while not move.done:
        yield
