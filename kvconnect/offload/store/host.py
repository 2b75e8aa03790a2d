"""KV in host memory, as one rank moves it: paged blocks ↔ slots.

* Nothing blocks. `store` and `load` start something and say whether they did; how it ended comes
  out of `poll`, once for each job. What was started between two polls is moved together: on a
  device a launch of its own for each chunk, or block, would cost more than small ones take.
* A store that finds no free slot is skipped; a load of what is not there, or is damaged, is a
  miss. Both are counted, neither raises.
* A load that fails may have written to its blocks: they hold nothing then.
* Our own arena first, then those of neighbours, whose slots may change while they are read:
  sums are of what was read, so that never counts as a hit.
* Not thread-safe: the runner's thread owns it. On a CPU the kernels run within `poll`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvconnect.errors import GeometryError, TransportError
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.jobs import JobDone
from kvconnect.offload.store.arena import Arena, SlotEntry, Written
from kvconnect.offload.store.neighbours import Neighbours
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, SlotMove
from kvconnect.ops import Verb

logger = logging.getLogger(f"vllm.{__name__}")

NONE = np.empty(0, np.uint64)


@dataclass
class _StoreJob:
    job: int
    key: bytes
    group: int
    blocks: Sequence[int]
    slot: int
    address: int


@dataclass
class _LoadJob:
    job: int
    entry: SlotEntry
    group: int
    blocks: Sequence[int]
    address: int
    arena: Arena
    own: bool
    sums: np.ndarray


_Job = _StoreJob | _LoadJob


@dataclass
class _Batch:
    """What one launch moves: all of one kind and group."""

    kind: type[_Job]
    jobs: Sequence[_Job]
    packed: SlotMove


class HostStore:
    """See the module's contract. ``slot_layouts``: of each KV cache group."""

    def __init__(
        self,
        index: SlotIndex,
        slot_layouts: Sequence[SlotLayout],
        neighbours: Neighbours | None = None,
    ) -> None:
        self.index = index
        self.counts: Counter[str] = Counter()
        self._slot_layouts = slot_layouts
        self.neighbours = neighbours
        self._lost: list[bytes] = []
        self._waiting: list[_Job] = []  # for the next launch
        self._batches: list[_Batch] = []
        self._ended: list[JobDone] = []
        self.counts["host_half_written_discarded"] += index.discarded

    def store(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to copy ``blocks`` into a slot for ``key``; False: skipped."""
        slot = self.index.fill()
        if slot is None:
            self.counts["host_stores_without_slot"] += 1
            return False
        address = self.index.arena.address(slot)
        self._waiting.append(_StoreJob(job, key, group, blocks, slot, address))
        return True

    def load(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to fill those of ``blocks`` that are not NO_BLOCK; False: a miss."""
        layout = self._slot_layouts[group]
        entry, arena, own = self.index.use(key), self.index.arena, True
        if entry is None and self.neighbours and (found := self.neighbours.find(key)):
            arena, entry, own = *found, False
        if entry is None:
            self.counts["host_loads_missed"] += 1
            return False
        sums = None
        if (entry.group, entry.tokens, entry.nbytes) == (group, layout.tokens, layout.nbytes):
            sums = layout.sums(arena.payload(entry.slot), entry.digest)
        if sums is None:
            self._damaged(entry, own)
            if own:
                self.index.done(entry)
            return False
        address = arena.address(entry.slot)
        self._waiting.append(_LoadJob(job, entry, group, blocks, address, arena, own, sums))
        if not own:
            arena.begin_read()
        return True

    def poll(self) -> list[JobDone]:
        """Launch what was started since the last call; what ended since then."""
        self._launch()
        # stores first: what was stored anew is not lost when a load finds the old one damaged
        for batch in sorted(self._batches, key=lambda one: one.kind is _LoadJob):
            self._end_batch(batch)
        ended, self._ended = self._ended, []
        return ended

    def drop(self, key: bytes) -> None:
        """Forget a key; its slot is free once nothing reads it."""
        self.index.drop(key)

    def take_lost(self) -> list[bytes]:
        """Keys that turned out to be damaged since the last call, and are gone."""
        lost, self._lost = self._lost, []
        return lost

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""
        return bool(self._waiting or self._batches)

    def _launch(self) -> None:
        """All that waits, by one launch for each kind and group."""
        waiting, self._waiting = self._waiting, []
        batches: dict[tuple[type[_Job], int], list[_Job]] = {}
        for job in waiting:
            batches.setdefault((type(job), job.group), []).append(job)
        for (kind, group), jobs in batches.items():
            slot_layout = self._slot_layouts[group]
            verb: Verb = "gather" if kind is _StoreJob else "scatter"
            try:
                packed = slot_layout.move(verb, [(job.blocks, job.address) for job in jobs])
            except AssertionError:
                raise
            except Exception as e:
                self._end(jobs, self._explained(e))
            else:
                self._batches.append(_Batch(kind, jobs, packed))

    def _end_batch(self, batch: _Batch) -> None:
        try:
            if not batch.packed.done():
                return
            sums = batch.packed.sums()
        except AssertionError:
            raise
        except Exception as e:
            self._end(batch.jobs, self._explained(e))
        else:
            self._end(batch.jobs, "", sums)
        self._batches.remove(batch)

    def _explained(self, error: Exception) -> str:
        """What kernels raised: it costs the jobs of one launch, whatever it is."""
        if isinstance(error, TransportError | GeometryError):
            return str(error)
        logger.exception("kvconnect: a launch of offloading failed")
        self.counts["host_job_faults"] += 1
        return f"{type(error).__name__}: {error}"

    def _end(self, jobs: Sequence[_Job], error: str, sums: np.ndarray = NONE) -> None:
        """``sums``: of all blocks that were moved, in their order."""
        written: list[Written] = []
        for job in jobs:
            moved = [place for place, block in enumerate(job.blocks) if block != NO_BLOCK]
            mine, sums = sums[: len(moved)], sums[len(moved) :]
            if isinstance(job, _StoreJob):
                written += self._end_store(job, error, mine)
            else:
                self._end_load(job, error, np.array_equal(mine, job.sums[moved]), len(moved))
        if written:
            self.index.commit(*written)

    def _end_store(self, store: _StoreJob, error: str, sums: np.ndarray) -> list[Written]:
        if error:
            self.index.abandon(store.slot)
            self.counts["host_stores_failed"] += 1
            self._ended.append(JobDone(store.job, error))
            return []
        slot_layout = self._slot_layouts[store.group]
        digest = slot_layout.put_sums(self.index.arena.payload(store.slot), sums)
        self.counts["host_stored"] += 1
        self._ended.append(JobDone(store.job, "", len(store.blocks) * slot_layout.block_bytes))
        what = store.slot, store.key, store.group, slot_layout.tokens, slot_layout.nbytes, digest
        return [Written(*what)]

    def _end_load(self, load: _LoadJob, error: str, right: bool, blocks: int) -> None:
        if error:
            self.counts["host_loads_failed"] += 1
        elif not right:
            error = "its sums are not those of what was stored"
            self._damaged(load.entry, load.own)
        if load.own:
            self.index.done(load.entry)
        else:
            load.arena.end_read()
        self.counts["host_loaded"] += not error
        nbytes = 0 if error else blocks * self._slot_layouts[load.group].block_bytes
        self._ended.append(JobDone(load.job, error, nbytes))

    def _damaged(self, entry: SlotEntry, own: bool) -> None:
        if own:
            self.counts["host_digest_mismatches"] += 1
            if self.index.drop_entry(entry):
                self._lost.append(entry.key)
        else:  # as often as not, its writer was faster than we
            self.counts["host_neighbour_reads_spoilt"] += 1
