"""KV in a file, as one rank moves it: slots in memory ↔ slots on disk.

* Nothing blocks but the write of a 128-byte header: payloads are moved by threads.
* A write is dropped, with a counter, where there is no free slot, no room in the queue, or the
  disk fails; after `MOST_FAILURES` in a row nothing is written any more. A read that fails, or
  ends early, is a miss. Nothing raises.
* What was read is verified by whoever scatters it: sums and digest travel with the payload.
* A neighbour's file that cannot be opened or read switches that neighbour off for a while.
* Not thread-safe: the runner's thread owns it.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvconnect.offload.jobs import JobDone
from kvconnect.offload.store.arena import Arena, SlotEntry
from kvconnect.offload.store.backing import FileBacking
from kvconnect.offload.store.header import pages
from kvconnect.offload.store.io_threads import File, IoThreads, SystemFile
from kvconnect.offload.store.neighbours import Neighbours
from kvconnect.offload.store.slot_index import SlotIndex

logger = logging.getLogger(f"vllm.{__name__}")

MOST_FAILURES = 8

Open = Callable[[Arena], File]


def system_file(arena: Arena) -> File:
    """The file that an arena lies in."""
    assert isinstance(arena.backing, FileBacking)
    return SystemFile(arena.backing.fd, arena.backing.to_write)


@dataclass
class _Write:
    job: int
    slot: int
    entry: SlotEntry  # as it is in memory


@dataclass
class _Read:
    job: int
    entry: SlotEntry
    arena: Arena
    own: bool


class DiskStore:
    """See the module's contract. ``index`` is of an arena in a file that is not mapped."""

    def __init__(
        self,
        index: SlotIndex,
        threads: IoThreads,
        neighbours: Neighbours | None = None,
        open_file: Open = system_file,
    ) -> None:
        self.index = index
        self.counts: Counter[str] = Counter(disk_half_written_discarded=index.discarded)
        self._threads = threads
        self.neighbours = neighbours
        self._open_file = open_file
        self._files: dict[bytes, File] = {index.arena.identity: open_file(index.arena)}
        self._jobs: dict[int, _Write | _Read] = {}
        self._failures = 0  # of writes, in a row
        self._lost: list[bytes] = []

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""
        return bool(self._jobs)

    @property
    def is_off(self) -> bool:
        """Whether nothing is written any more, for too many writes have failed in a row."""
        return self._failures >= MOST_FAILURES

    def write(self, job: int, entry: SlotEntry, payload: np.ndarray) -> bool:
        """Start to write what ``entry`` says is in ``payload``, which must stay; False: dropped."""
        if self.is_off:
            self.counts["disk_writes_dropped_disk_off"] += 1
            return False
        if not self._threads.room:
            self.counts["disk_writes_dropped_queue_full"] += 1
            return False
        try:
            slot = self.index.fill()
        except OSError as e:
            self._failed(str(e))
            return False
        if slot is None:
            self.counts["disk_writes_without_slot"] += 1
            return False
        arena = self.index.arena
        content = payload.data[: pages(entry.nbytes)]
        number = self._threads.write(self._files[arena.identity], content, arena.offset(slot))
        self._jobs[number] = _Write(job, slot, entry)
        return True

    @property
    def room(self) -> bool:
        """Whether `read` would start."""
        return self._threads.room > 0

    @property
    def longest_s(self) -> float:
        """For how long a file has kept one read or write waiting now: the longest."""
        return self._threads.longest_s

    def has(self, key: bytes) -> bool:
        """Whether a key can be read, as far as is known."""
        found = key in self.index or (self.neighbours and self.neighbours.find(key))
        self.counts["disk_reads_missed"] += not found
        return bool(found)

    def read(self, job: int, key: bytes, into: np.ndarray) -> SlotEntry | None:
        """Start to read a payload; returns what it will be. None: a miss."""
        entry, arena, own = self.index.use(key), self.index.arena, True
        if entry is None and self.neighbours and (found := self.neighbours.find(key)):
            arena, entry, own = *found, False
        if entry is None or not self._threads.room:
            self.counts["disk_reads_missed" if entry is None else "disk_reads_refused"] += 1
            if entry is not None and own:
                self.index.done(entry)
            return None
        try:
            file = self._file_of(arena)
        except OSError as e:
            assert not own, "our own file has been open since the start"
            self.counts["disk_reads_failed"] += 1
            self._spoilt(arena, str(e))
            return None
        content = into.data[: pages(entry.nbytes)]
        number = self._threads.read(file, content, arena.offset(entry.slot))
        self._jobs[number] = _Read(job, entry, arena, own)
        if not own:
            arena.begin_read()
        return entry

    def poll(self) -> list[JobDone]:
        """What ended since the last call."""
        ended = []
        for done in self._threads.poll():
            job = self._jobs.pop(done.id)
            try:
                if isinstance(job, _Write):
                    error, nbytes = self._end_write(job, done.error)
                else:
                    error, nbytes = self._end_read(job, done.error)
            except AssertionError:
                raise
            except Exception as e:  # it costs this job alone
                logger.exception("kvconnect: a job of the disk failed")
                self.counts["disk_job_faults"] += 1
                error, nbytes = f"{type(e).__name__}: {e}", 0
            if isinstance(job, _Read) and not job.own:
                job.arena.end_read()
            ended.append(JobDone(job.job, error, nbytes, done.seconds))
        return ended

    def drop(self, key: bytes) -> None:
        """Forget a key; its slot is free once nothing reads it."""
        self.index.drop(key)

    def damaged(self, entry: SlotEntry) -> None:
        """What was read of it turned out not to be what was written."""
        self.counts["disk_digest_mismatches"] += 1
        if self.index.drop_entry(entry):
            self._lost.append(entry.key)

    def take_lost(self) -> list[bytes]:
        """Keys that turned out to be damaged since the last call, and are gone."""
        lost, self._lost = self._lost, []
        return lost

    def close_files(self) -> None:
        """Close the files of neighbours that are gone, or were replaced by new ones."""
        used = {job.arena.identity for job in self._jobs.values() if isinstance(job, _Read)}
        used |= self.neighbours.identities() if self.neighbours else set()
        for identity in self._files.keys() - used - {self.index.arena.identity}:
            self._files.pop(identity).close()

    def close(self) -> None:
        """Wait for what runs; what was committed stays. Idempotent."""
        self._threads.close()
        self.poll()
        for file in self._files.values():
            file.close()
        self.index.arena.close()
        if self.neighbours:
            self.neighbours.close()

    def _end_write(self, job: _Write, error: str) -> tuple[str, int]:
        if not error:
            try:
                self.index.commit(job.entry.copied_to(job.slot))
            except OSError as e:
                error = str(e)
        if error:
            self.index.abandon(job.slot)
            self._failed(error)
            return f"not written: {error}", 0
        self._failures = 0
        self.counts["disk_written"] += 1
        return "", job.entry.nbytes

    def _end_read(self, job: _Read, error: str) -> tuple[str, int]:
        entry = job.entry
        if job.own:
            self.index.done(entry)
        if not error and not job.own and not job.arena.still(entry):
            self.counts["disk_neighbour_reads_spoilt"] += 1
            return "its writer overwrote it", 0
        if error:
            self.counts["disk_reads_failed"] += 1
            if not job.own:
                self._spoilt(job.arena, error)
            elif self.index.drop_entry(entry):
                self._lost.append(entry.key)
            return f"not read: {error}", 0
        self.counts["disk_read"] += 1
        return "", entry.nbytes

    def _file_of(self, arena: Arena) -> File:
        """The file that ``arena`` lies in; raises OSError if it cannot be opened."""
        file = self._files.get(arena.identity)
        if file is None:
            file = self._files[arena.identity] = self._open_file(arena)
        return file

    def _spoilt(self, arena: Arena, error: str) -> None:
        assert self.neighbours is not None
        self.neighbours.spoilt(arena, error)

    def _failed(self, error: str) -> None:
        self.counts["disk_writes_failed"] += 1
        self._failures += 1
        if self._failures == MOST_FAILURES:
            logger.warning(
                "kvconnect: %d writes in a row failed, the last with %s; no KV is written to disk "
                "any more until the engine is started again",
                MOST_FAILURES,
                error,
            )
