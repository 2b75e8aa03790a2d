"""What a link is expected to do, and one warning for each peer that does much less.

* A transport that was chosen silently may be a hundred times slower than another one. What is
  expected is what an operator says (``expected_gb_s``), of which half will do, or `FLOOR` of a raw
  copy of this host's memory.
* A peer is judged once, by the fastest of its first `JUDGED` sizeable reads: one alone may have
  paid for what is set up once, or have waited for others.
* The raw copy is measured once, on a thread of its own, when the first such read has ended. It
  takes some tens of milliseconds, which no step of an engine may wait for.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from kvconnect.stats import PeerRead

logger = logging.getLogger(f"vllm.{__name__}")

COPIED_BYTES = 32 << 20
ROUNDS = 5
FLOOR = 0.05  # of a raw copy, where nobody says what to expect
SIZEABLE_BYTES = 1 << 20
JUDGED = 4
MAX_PEERS = 2048
REMEDY = (
    "look at the NIC's speed (`ethtool`), what else is busy, and UCX_TLS and UCX_NET_DEVICES if "
    "the transport is over UCX"
)


def raw_copy() -> float:
    """GB/s of a copy within this process's memory, the fastest of some."""
    source = np.ones(COPIED_BYTES, dtype=np.uint8)
    target, best = np.empty_like(source), 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        np.copyto(target, source)
        best = max(best, COPIED_BYTES / (time.perf_counter() - began) / 1e9)
    return best


def floor_gb_s(copy: float, expected: float | None) -> float:
    """Below this a link is slow; ``expected`` GB/s, of which half will do, if anybody says so."""
    return expected / 2 if expected else FLOOR * copy


def start_thread(work: Callable[[], None]) -> None:
    """Do ``work`` meanwhile."""
    threading.Thread(target=work, name="kvconnect-copy", daemon=True).start()


class BandwidthWatch:
    """The peers of one rank. Not thread-safe, but for what measures the copy."""

    def __init__(
        self,
        expected_gb_s: float | None,
        copy: Callable[[], float] = raw_copy,
        meanwhile: Callable[[Callable[[], None]], None] = start_thread,
    ) -> None:
        """``copy`` measures a raw copy, which ``meanwhile`` lets it do at leisure."""
        self._expected = expected_gb_s
        self._copy = copy
        self._meanwhile = meanwhile
        self._copied: float | None = None
        self._asked = False
        self._seen: OrderedDict[str, list[PeerRead]] = OrderedDict()  # [] once judged

    @property
    def ceiling(self) -> float:
        """Bytes a second that are expected of a link at most; 0 while that is not known."""
        return (self._expected or self._copied or 0.0) * 1e9

    def read(self, read: PeerRead) -> None:
        """Take in a read; warn if it is time to, and the peer is slow."""
        if read.nbytes < SIZEABLE_BYTES or not read.bytes_per_second:
            return
        if not self._asked:
            self._asked = True
            self._meanwhile(self._measure)
        seen = self._seen.setdefault(read.peer, [read])
        if len(self._seen) > MAX_PEERS:
            self._seen.popitem(last=False)
        if not seen:
            return
        if seen[0] is not read and len(seen) < JUDGED:
            seen.append(read)
        if len(seen) == JUDGED and self._copied is not None:
            self._judge(max(seen, key=lambda one: one.bytes_per_second), self._copied)
            seen.clear()

    def _measure(self) -> None:
        self._copied = self._copy()

    def _judge(self, best: PeerRead, copied: float) -> None:
        gb_s, floor = best.bytes_per_second / 1e9, floor_gb_s(copied, self._expected)
        if gb_s >= floor:
            return
        wanted = f"{self._expected:g} were" if self._expected else f"at least {floor:.2g} was"
        logger.warning(
            "kvconnect: peer %s is read at %.2g GB/s (%s) where %s expected (a raw copy here makes "
            "%.3g): %s; `kvconnect doctor --peer HOST:PORT` measures it apart",
            best.peer,
            gb_s,
            best.path,
            wanted,
            copied,
            REMEDY,
        )
