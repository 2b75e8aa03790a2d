"""Host memory and a disk, as one rank moves KV between them and its paged cache.

* `save` and `load` are between paged blocks and memory, `spill` from memory to disk. What is on
  disk only is promoted on its way: read into a slot in memory, which then holds it as any other;
  of a neighbour's disk it only passes through, and the slot is free again.
* Such a load waits for a slot, and for room in the disk's queue, while something is under way
  that may make it free; `PATIENCE_S` after the last promotion began or ended it fails.
* Where one read or write takes `DISK_S`, however many waited before it, the disk hangs (a server of
  files that is down): whoever waits for it fails, and until that ends it is asked for nothing more.
  A slot that is read to stays the disk's until then.
* A load falls back within itself: what is damaged in memory is taken from disk if it is there.
* Decides nothing about who stays: slots must have been freed by `forget`. Where there is none,
  the save is skipped, or the load fails.
* Each job that was started ends once in `poll`. Not thread-safe: the runner's thread owns it.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvconnect.offload.jobs import JobDone, Loss
from kvconnect.offload.store.arena import SlotEntry
from kvconnect.offload.store.host import HostStore

if TYPE_CHECKING:
    from kvconnect.offload.store.disk import DiskStore

PATIENCE_S = 5.0
DISK_S = 30.0
HANGS = f"the disk has not answered for {DISK_S:.0f} s"


class _Wanted(NamedTuple):
    """A load, as it was asked for."""

    job: int
    key: bytes
    group: int
    blocks: tuple[int, ...]


@dataclass
class _Promotion:
    """A promotion under way."""

    key: bytes
    slot: int
    entry: SlotEntry  # on disk
    passing: bool  # it is a neighbour's
    waiting: list[_Wanted]  # nobody: it was given up


class TieredStore:
    """See the module's contract. Without ``disk`` it is memory only."""

    def __init__(
        self,
        host: HostStore,
        disk: "DiskStore | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = host
        self.disk = disk
        self._clock = clock
        self._numbers = itertools.count(1)  # of jobs, as this store counts for host and disk
        self._saves: dict[int, int] = {}
        self._loads: dict[int, tuple[_Wanted, SlotEntry | None]] = {}  # → what on disk it came from
        self._spills: dict[int, tuple[int, SlotEntry]] = {}
        self._fetches: dict[int, _Promotion] = {}
        self._fetching: dict[bytes, _Promotion] = {}
        self._queued: deque[tuple[_Wanted, float]] = deque()  # since then
        self._promoted_at = clock()
        self._ended: list[JobDone] = []
        self._other_engines: set[bytes] = set()

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""
        return bool(self._moving or self._queued or self._ended)

    @property
    def _moving(self) -> bool:
        """Whether something is under way, which may free a slot when it ends."""
        return bool(self._saves or self._loads or self._spills or self._fetches)

    def keys(self, on_disk: bool) -> list[bytes]:
        """What the disk, or memory, holds, oldest first."""
        if on_disk:
            return self.disk.index.keys() if self.disk else []
        return self.host.index.keys()

    def holds(self, key: bytes, on_disk: bool) -> bool:
        """Whether the disk, or memory, holds a key."""
        if on_disk:
            return self.disk is not None and key in self.disk.index
        return key in self.host.index

    def look_around(self) -> tuple[set[bytes], set[bytes]]:
        """See what other engines hold: keys that can be had now and could not, and the reverse.

        Reads headers; worth doing every second or so, not at every step.
        """
        neighbours = [s.neighbours for s in (self.host, self.disk) if s and s.neighbours]
        for one in neighbours:
            one.refresh()
        if self.disk is not None:
            self.disk.close_files()
        now = {key for one in neighbours for key in one.found()}
        before, self._other_engines = self._other_engines, now
        return now - before, before - now

    def take_lost(self) -> list[Loss]:
        """What turned out to be damaged since the last call, and is gone."""
        lost = [Loss(key, False) for key in self.host.take_lost()]
        return lost + [Loss(key, True) for key in (self.disk.take_lost() if self.disk else ())]

    def save(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to copy blocks into memory; False: skipped."""
        number = next(self._numbers)
        if not self.host.store(number, key, group, blocks):
            return False
        self._saves[number] = job
        return True

    def load(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to fill those of ``blocks`` that are not NO_BLOCK; False: a miss."""
        return self._load(_Wanted(job, key, group, tuple(blocks)))

    def spill(self, job: int, key: bytes) -> bool:
        """Start to write what memory holds to disk, where it may be forgotten meanwhile.

        False: dropped, or not needed.
        """
        if self.disk is None or key in self.disk.index or self._hangs:
            return False
        entry = self.host.index.use(key)
        if entry is None:
            return False
        number = next(self._numbers)
        if not self.disk.write(number, entry, self.host.index.arena.payload(entry.slot)):
            self.host.index.done(entry)
            return False
        self._spills[number] = job, entry
        return True

    def forget(self, key: bytes) -> None:
        """Memory holds it no more; its slot is free once nothing reads it."""
        self.host.drop(key)

    def forget_on_disk(self, key: bytes) -> None:
        """The disk holds it no more; its slot is free once nothing reads it."""
        if self.disk is not None:
            self.disk.drop(key)

    def poll(self) -> list[JobDone]:
        """What ended since the last call."""
        for done in self.disk.poll() if self.disk else ():
            if done.id in self._spills:
                job, entry = self._spills.pop(done.id)
                self.host.index.done(entry)
                self._ended.append(done._replace(id=job))
            else:
                self._fetched(self._fetches.pop(done.id), done)
        for done in self.host.poll():
            if done.id in self._saves:
                self._ended.append(done._replace(id=self._saves.pop(done.id)))
            else:
                self._loaded(*self._loads.pop(done.id), done)
        self._give_up_fetches()
        self._start_fetches()
        ended, self._ended = self._ended, []
        return ended

    def _load(self, wanted: _Wanted, promoted: SlotEntry | None = None) -> bool:
        number = next(self._numbers)
        if self.host.load(number, *wanted[1:]):
            self._loads[number] = wanted, promoted
            return True
        return promoted is None and self._fetch(wanted)

    def _fetch(self, wanted: _Wanted) -> bool:
        """Promote what is wanted, once there is a slot for it; False: it is on no disk."""
        if self.disk is None or self._hangs or not self.disk.has(wanted.key):
            return False
        self._queued.append((wanted, self._clock()))
        self._start_fetches()
        return True

    @property
    def _hangs(self) -> bool:
        return self.disk is not None and self.disk.longest_s >= DISK_S

    def _give_up_fetches(self) -> None:
        if not self._hangs:
            return
        for fetch in self._fetches.values():
            waiting, fetch.waiting = fetch.waiting, []
            self._ended += [JobDone(wanted.job, HANGS) for wanted in waiting]
        self._ended += [JobDone(wanted.job, HANGS) for wanted, _ in self._queued]
        self._queued.clear()

    def _start_fetches(self) -> None:
        while self.disk is not None and self._queued:
            wanted, since_s = self._queued.popleft()
            if fetch := self._fetching.get(wanted.key):
                fetch.waiting.append(wanted)
            elif self.disk.room and (slot := self.host.index.fill()) is not None:
                self._read(wanted, slot)
            elif self._moving and self._clock() < max(since_s, self._promoted_at) + PATIENCE_S:
                self._queued.appendleft((wanted, since_s))
                return
            else:
                self.host.counts["host_promotions_without_slot"] += 1
                self._ended.append(JobDone(wanted.job, "no slot to read it to"))

    def _read(self, wanted: _Wanted, slot: int) -> None:
        """Promote it to ``slot``."""
        assert self.disk is not None
        number, index = next(self._numbers), self.host.index
        passing = not self.holds(wanted.key, on_disk=True)
        entry = self.disk.read(number, wanted.key, index.arena.payload(slot))
        if entry is None:
            index.abandon(slot)
            self._ended.append(JobDone(wanted.job, "not read"))
            return
        self._promoted_at = self._clock()
        fetch = _Promotion(wanted.key, slot, entry, passing, [wanted])
        self._fetches[number] = self._fetching[wanted.key] = fetch

    def _fetched(self, fetch: _Promotion, done: JobDone) -> None:
        del self._fetching[fetch.key]
        self._promoted_at = self._clock()
        index, entry = self.host.index, fetch.entry
        if done.error or not fetch.waiting:
            index.abandon(fetch.slot)
            for wanted in fetch.waiting:
                self._ended.append(done._replace(id=wanted.job))
            return
        saved = fetch.key in index  # meanwhile
        if saved:
            index.abandon(fetch.slot)
        else:
            index.commit(entry.copied_to(fetch.slot))
            self.host.counts["host_promoted"] += 1
        for wanted in fetch.waiting:
            if not self._load(wanted, entry):
                self._spoilt(entry)
                self._ended.append(JobDone(wanted.job, "damaged on disk"))
        if fetch.passing and not saved:
            self.host.drop(fetch.key)  # its slot is free once those loads have read it

    def _loaded(self, wanted: _Wanted, promoted: SlotEntry | None, done: JobDone) -> None:
        if done.error and promoted is not None:
            self._spoilt(promoted)
        if done.error and promoted is None and self._fetch(wanted):
            return
        self._ended.append(done._replace(id=wanted.job))

    def _spoilt(self, entry: SlotEntry) -> None:
        if self.disk is not None:
            self.disk.damaged(entry)
