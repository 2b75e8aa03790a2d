"""One span for each hand-over of a traced request, and what of it was waiting, reading, verifying.

Not in the reading path: a worker tells what it is told anyway, when an engine's step has ended.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvconnect.errors import contained
from kvconnect.stats import PeerRead
from kvconnect.telemetry.spans import SpanWriter

MAX_OPEN = 4096


@dataclass
class _HandOver:
    headers: Mapping[str, str]
    ordered_s: float
    reads: list[PeerRead] = field(default_factory=list)
    ended_s: float | None = None
    error: str = ""


class HandOverTraces:
    """Those of one rank. Times are of ``clock``, the mover's."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        writer: Callable[[], SpanWriter] = SpanWriter,
    ) -> None:
        """``writer`` is made when the first traced request comes."""
        self._clock = clock
        self._unix_clock = unix_clock
        self._make_writer = writer
        self._writer: SpanWriter | None = None
        self._open: OrderedDict[str, _HandOver] = OrderedDict()

    def ordered(self, traced: Mapping[str, Mapping[str, str]]) -> None:
        """Loads of these requests begin; of each the headers that tell its trace."""
        for request_id, headers in traced.items():
            self._open[request_id] = _HandOver(headers, self._clock())
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)

    def read(self, read: PeerRead) -> None:
        """A read of one rank ended well."""
        if (one := self._open.get(read.request_id)) is not None:
            one.reads.append(read)

    def ended(self, ended_s: Mapping[str, float], failed: Mapping[str, str]) -> None:
        """When loads ended; of those that failed, why."""
        for request_id in ended_s.keys() & self._open.keys() if self._open else ():
            self._open[request_id].ended_s = ended_s[request_id]
            self._open[request_id].error = failed.get(request_id, "")

    def write(self, rank: int) -> None:
        """Write the spans of those that have ended; after `read`, of which there are no more.

        ``rank``: which of its engine's ranks this one is; known once its caches are registered.
        """
        for request_id, one in list(self._open.items()):
            if one.ended_s is not None:
                del self._open[request_id]
                with contained(f"the trace of request {request_id}", _is_not_written):
                    self._write(rank, request_id, one, one.ended_s)

    def _write(self, rank: int, request_id: str, one: _HandOver, ended_s: float) -> None:
        if self._writer is None:
            self._writer = self._make_writer()
        writer, unix = self._writer, self._unix_clock() - self._clock()
        span = writer.begin("kvconnect.handover", one.headers, unix + one.ordered_s, server=False)
        began_s = min((read.began_s for read in one.reads), default=ended_s)
        read_s = max((read.ended_s for read in one.reads), default=ended_s)
        writer.child(span, "kvconnect.wait", unix + one.ordered_s, unix + began_s, {})
        for read in one.reads:
            about = {
                "kvconnect.path": read.path,
                "kvconnect.peer": read.peer,
                "kvconnect.bytes": read.nbytes,
                "kvconnect.bytes_per_second": read.bytes_per_second,
            }
            began, ended = unix + read.began_s, unix + read.ended_s
            writer.child(span, "kvconnect.transfer", began, ended, about)
        if one.reads:
            writer.child(span, "kvconnect.verify", unix + read_s, unix + ended_s, {})
        about = {"kvconnect.request_id": request_id, "kvconnect.rank": rank}
        writer.end(span, unix + ended_s, about, one.error)


def _is_not_written(_why: str) -> None:
    """An engine goes on without a trace."""
