"""Work that is moved piece by piece: how it is cut, and how far each ticket has come.

What `messages` and `nccl` have in common. Knows no libraries and no memory: whoever moves a piece
says so with `Tickets.settle`, and ends a ticket only when its memory is left alone.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvconnect.errors import TransportError
from kvconnect.transport.base import Done, Op, TransferId, Work
from kvconnect.transport.reach import Spans


class Piece(NamedTuple):
    """Part of a work that one request asks for."""

    op: Op
    spans: Spans
    nbytes: int


def cut(op: Op, spans: Spans, most_bytes: int, most_spans: int) -> Iterator[Piece]:
    """Pieces of at most so many bytes and spans; no span may be larger than that."""
    ours, theirs, nbytes = spans
    ends, first = np.cumsum(nbytes), 0
    while first < len(ends):
        begun = ends[first] - nbytes[first]
        last = int(np.searchsorted(ends, begun + most_bytes, side="right"))
        last = min(last, first + most_spans)
        part = slice(first, last)
        yield Piece(op, (ours[part], theirs[part], nbytes[part]), int(ends[last - 1] - begun))
        first = last


@dataclass
class _Running:
    work: Work
    pieces: Iterator[Piece]
    started: float
    post_s: float = 0.0
    under_way: int = 0
    descriptors: int = 0
    exhausted: bool = False
    error: str | None = None


class Tickets:
    """Those that run, each with its pieces left and under way, and those that have ended."""

    def __init__(self) -> None:
        self._running: dict[TransferId, _Running] = {}
        self._ended: list[Done] = []
        self._next = 1

    def begin(
        self, work: Work, pieces: Callable[[Work], Iterator[Piece]], post: Callable[[str], None]
    ) -> TransferId:
        """A new ticket, which has failed if ``pieces`` raises TransportError.

        ``post`` puts pieces of a peer under way, and is part of what submitting takes.
        """
        ticket, self._next = self._next, self._next + 1
        started = time.perf_counter()
        try:
            running = _Running(work, pieces(work), started)
        except TransportError as e:
            self._ended.append(Done(ticket, str(e)))
            return ticket
        self._running[ticket] = running
        post(work.peer)
        running.post_s = time.perf_counter() - started
        return ticket

    def of(self, peer: str) -> list[TransferId]:
        """Those of a peer that run, oldest first."""
        return [t for t, running in self._running.items() if running.work.peer == peer]

    def op(self, ticket: TransferId) -> Op | None:
        """What a ticket does; None if it has ended."""
        running = self._running.get(ticket)
        return running.work.op if running else None

    def error(self, ticket: TransferId) -> str | None:
        """Why a ticket will have failed."""
        return self._running[ticket].error

    def take(self, peer: str) -> tuple[TransferId, Piece] | None:
        """A peer's next piece, under way from now on; None if it has no more."""
        for ticket in self.of(peer):
            running = self._running[ticket]
            piece = None if running.exhausted else next(running.pieces, None)
            if piece is not None:
                running.under_way += 1
                running.descriptors += len(piece.spans[0])
                return ticket, piece
            running.exhausted = True
            self._end_if_over(ticket)
        return None

    def settle(self, ticket: TransferId, error: str | None = None) -> None:
        """A piece is not under way any more; no effect if the ticket has ended."""
        if running := self._running.get(ticket):
            running.under_way -= 1
            running.error = running.error or error
            running.exhausted |= running.error is not None
            self._end_if_over(ticket)

    def fail(self, ticket: TransferId, error: str) -> None:
        """Begin no more pieces; the ticket ends once none is under way."""
        if running := self._running.get(ticket):
            running.exhausted, running.error = True, running.error or error
            self._end_if_over(ticket)

    def end(self, ticket: TransferId, error: str) -> None:
        """End it with this error, whatever is under way."""
        if running := self._running.get(ticket):
            running.error, running.under_way = running.error or error, 0
            self.fail(ticket, error)

    def ended(self) -> list[Done]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _end_if_over(self, ticket: TransferId) -> None:
        r = self._running[ticket]
        if not r.exhausted or r.under_way:
            return
        del self._running[ticket]
        nbytes, wire_s = 0 if r.error else r.work.nbytes, time.perf_counter() - r.started
        self._ended.append(Done(ticket, r.error, nbytes, r.descriptors, r.post_s, wire_s))
