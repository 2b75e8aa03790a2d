"""Work that is moved batch by batch: how it is cut, and how far each transfer has come.

What `messages` and `nccl` have in common. Knows no libraries and no memory: whoever moves a batch
says so with `Transfers.settle`, and ends a transfer only when its memory is left alone.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvconnect.errors import TransportError
from kvconnect.transport.base import Done, Op, TransferId, Work
from kvconnect.transport.reach import Spans


class SpanBatch(NamedTuple):
    """Part of a work that one request asks for."""

    op: Op
    spans: Spans
    nbytes: int


def cut(op: Op, spans: Spans, most_bytes: int, most_spans: int) -> Iterator[SpanBatch]:
    """Batches of at most so many bytes and spans; no span may be larger than that."""
    ours, theirs, nbytes = spans
    ends, first = np.cumsum(nbytes), 0
    while first < len(ends):
        begun = ends[first] - nbytes[first]
        last = int(np.searchsorted(ends, begun + most_bytes, side="right"))
        last = min(last, first + most_spans)
        part = slice(first, last)
        yield SpanBatch(op, (ours[part], theirs[part], nbytes[part]), int(ends[last - 1] - begun))
        first = last


@dataclass
class _BatchedTransfer:
    work: Work
    batches: Iterator[SpanBatch]
    started: float
    post_s: float = 0.0
    under_way: int = 0
    descriptors: int = 0
    exhausted: bool = False
    error: str | None = None


class Transfers:
    """Those that run, each with its batches left and under way, and those that have ended."""

    def __init__(self) -> None:
        self._running: dict[TransferId, _BatchedTransfer] = {}
        self._ended: list[Done] = []
        self._next = 1

    def begin(
        self,
        work: Work,
        batches: Callable[[Work], Iterator[SpanBatch]],
        post: Callable[[str], None],
    ) -> TransferId:
        """A new transfer, which has failed if ``batches`` raises TransportError.

        ``post`` puts batches of a peer under way, and is part of what submitting takes.
        """
        transfer_id, self._next = self._next, self._next + 1
        started = time.perf_counter()
        try:
            running = _BatchedTransfer(work, batches(work), started)
        except TransportError as e:
            self._ended.append(Done(transfer_id, str(e)))
            return transfer_id
        self._running[transfer_id] = running
        post(work.peer)
        running.post_s = time.perf_counter() - started
        return transfer_id

    def of(self, peer: str) -> list[TransferId]:
        """Those of a peer that run, oldest first."""
        return [t for t, running in self._running.items() if running.work.peer == peer]

    def op(self, transfer_id: TransferId) -> Op | None:
        """What a transfer does; None if it has ended."""
        running = self._running.get(transfer_id)
        return running.work.op if running else None

    def error(self, transfer_id: TransferId) -> str | None:
        """Why a transfer will have failed."""
        return self._running[transfer_id].error

    def take(self, peer: str) -> tuple[TransferId, SpanBatch] | None:
        """A peer's next batch, under way from now on; None if it has no more."""
        for transfer_id in self.of(peer):
            running = self._running[transfer_id]
            batch = None if running.exhausted else next(running.batches, None)
            if batch is not None:
                running.under_way += 1
                running.descriptors += len(batch.spans[0])
                return transfer_id, batch
            running.exhausted = True
            self._end_if_over(transfer_id)
        return None

    def settle(self, transfer_id: TransferId, error: str | None = None) -> None:
        """A batch is not under way any more; no effect if the transfer has ended."""
        if running := self._running.get(transfer_id):
            running.under_way -= 1
            running.error = running.error or error
            running.exhausted |= running.error is not None
            self._end_if_over(transfer_id)

    def fail(self, transfer_id: TransferId, error: str) -> None:
        """Begin no more batches; the transfer ends once none is under way."""
        if running := self._running.get(transfer_id):
            running.exhausted, running.error = True, running.error or error
            self._end_if_over(transfer_id)

    def end(self, transfer_id: TransferId, error: str) -> None:
        """End it with this error, whatever is under way."""
        if running := self._running.get(transfer_id):
            running.error, running.under_way = running.error or error, 0
            self.fail(transfer_id, error)

    def ended(self) -> list[Done]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _end_if_over(self, transfer_id: TransferId) -> None:
        r = self._running[transfer_id]
        if not r.exhausted or r.under_way:
            return
        del self._running[transfer_id]
        nbytes, wire_s = 0 if r.error else r.work.nbytes, time.perf_counter() - r.started
        self._ended.append(Done(transfer_id, r.error, nbytes, r.descriptors, r.post_s, wire_s))
