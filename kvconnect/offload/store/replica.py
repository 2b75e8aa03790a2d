"""KV that another rank holds as well and stores for both: a store that only loads.

Ranks whose KV is the same (MLA, or more tensor-parallel ranks than KV heads) store one copy: the
*leader* keeps it, in memory that the other ranks map and read.

* Saves, spills and what is forgotten are the leader's; here they end at once, and well.
* What the leader has not yet, for it is still reading it from disk, is waited for, but not longer
  than `PATIENCE_S`: then the load fails, and the key is reported as lost.
* Nothing is locked: a key stays until every rank has answered. What is read is verified
  nevertheless, as of any neighbour.
* Not thread-safe: the runner's thread owns it.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvconnect.offload.jobs import JobDone, Loss
from kvconnect.offload.store.arena import make
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.neighbours import Neighbours
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout

PATIENCE_S = 5.0
RETRY_S = 2e-3  # reading the leader's table takes about 1 ms per 100,000 slots


class _WaitingLoad(NamedTuple):
    """A load of what is not there yet."""

    job: int
    key: bytes
    group: int
    blocks: Sequence[int]
    until_s: float


class ReplicaReader:
    """See the module's contract. ``leader``: its arena alone, and those that it shares with."""

    def __init__(
        self,
        leader: Neighbours,
        slot_layouts: Sequence[SlotLayout],
        found: tuple[list[bytes], list[bytes]],
        clock: Callable[[], float] = time.monotonic,
        ready: Callable[[], int] | None = None,
    ) -> None:
        """``found``: what the leader held in memory and on disk when it started; ``ready``: how
        many of its slots our device can read by now, by default all."""
        none = make(
            ArenaSpec(1, 1, bytes(32))
        )  # a store wants one of its own; nothing is put there
        self.host = HostStore(SlotIndex(none), slot_layouts, leader)
        self._leader = leader
        self._found = found
        self._clock = clock
        self._ready = ready
        self._looked_at = float("-inf")
        self._other_engines: set[bytes] = set()
        self._waiting: list[_WaitingLoad] = []
        self._ended: list[JobDone] = []
        self._lost: list[Loss] = []

    @property
    def busy(self) -> bool:
        return self.host.busy or bool(self._waiting or self._ended)

    def keys(self, on_disk: bool) -> list[bytes]:
        """What the leader held at the start, oldest first."""
        return self._found[on_disk]

    def holds(self, key: bytes, on_disk: bool) -> bool:
        """Whether the key is here; True for the disk, which only the leader writes and knows."""
        return on_disk or self._is_there(key)

    def look_around(self) -> tuple[set[bytes], set[bytes]]:
        """Keys that came and went since the last call, the leader's own among them."""
        self._leader.refresh()
        before, self._other_engines = self._other_engines, set(self._leader.found())
        return self._other_engines - before, before - self._other_engines

    def take_lost(self) -> list[Loss]:
        """What was waited for in vain."""
        lost, self._lost = self._lost, []
        return lost

    def save(self, job: int, *_: object) -> bool:
        """The leader does; here it ends at once."""
        self._ended.append(JobDone(job))
        return True

    def load(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to fill those of ``blocks`` that are not NO_BLOCK, now or when it is there."""
        until_s = self._clock() + PATIENCE_S
        self._waiting.append(_WaitingLoad(job, key, group, blocks, until_s))
        return True

    def spill(self, job: int, key: bytes) -> bool:
        """The leader does; here it ends at once."""
        return self.save(job, key)

    def forget(self, key: bytes) -> None:
        """The leader does."""

    def forget_on_disk(self, key: bytes) -> None:
        """The leader does."""

    def poll(self) -> list[JobDone]:
        if self._waiting:
            self._start()
        ended, self._ended = [*self._ended, *self.host.poll()], []
        return ended

    def close(self) -> None:
        """Let go of all memory. Idempotent."""
        self._leader.close()
        self.host.index.arena.close()

    def _is_there(self, key: bytes) -> bool:
        found = self._leader.find(key)
        return found is not None and (self._ready is None or found.entry.slot < self._ready())

    def _start(self) -> None:
        """All that is there by now, and what has been waited for long enough."""
        now = self._clock()
        missing = any(not self._is_there(one.key) for one in self._waiting)
        if missing and now - self._looked_at >= RETRY_S:
            self._looked_at = now
            self._leader.refresh()
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if self._is_there(one.key):
                if not self.host.load(*one[:-1]):
                    self._ended.append(JobDone(one.job, "damaged at the leader"))
            elif now < one.until_s:
                self._waiting.append(one)
            else:
                self._ended.append(JobDone(one.job, "not at the leader"))
                if self._leader.find(one.key) is None:  # else our device cannot read it yet
                    self._lost.append(Loss(one.key, False))
