"""Host memory and a disk as one tier: what to load from where, and what to keep.

* `has` says whether a chunk can be loaded, from memory, disk or another engine. No effect.
* `load` and `store` return jobs for every rank; `answered` is called when all ranks have answered
  one, and returns jobs that follow from it, and what ended by it.
* What is on disk only passes through memory and stays there. Where memory has no room that could
  be freed, the chunk is failed at once: nobody waits.
* Write-through spills what was saved; write-back spills what memory evicts. Either may be dropped
  by a rank; then the disk does not hold it.
* What other engines hold (`other_engines`) can be loaded and is neither pinned nor kept.
* Pure: knows keys and block ids, no ranks' slots, bytes or clocks. A fault is a failed chunk.
"""

import enum
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvconnect.offload.cache import CacheTier, KeyState, Pin
from kvconnect.offload.eviction import Key
from kvconnect.offload.jobs import Fill, Forget, Job, Save, Spill

CHUNKS_FROM = {
    "host": "chunks_from_host",
    "disk": "chunks_from_disk",
    "beside": "chunks_from_beside",
}  # what is counted, by where chunks were loaded from


class Writes(enum.Enum):
    """When the disk gets what memory holds."""

    THROUGH = "write-through"
    BACK = "write-back"


class KeyedChunk(NamedTuple):
    """Blocks of one group that a key stands for; NO_BLOCK: not wanted."""

    key: Key
    group: int
    blocks: tuple[int, ...]


@dataclass
class Effects:
    """What followed from something."""

    jobs: list[Job] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    """Numbers of saves that have ended, well or not: their blocks are free of them."""
    loaded: dict[str, list[Key]] = field(default_factory=dict)
    """Requests whose loads have ended → keys that failed, whose blocks hold nothing."""


@dataclass
class _RequestLoad:
    """A request's load under way."""

    running: set[int] = field(default_factory=set)
    failed: list[Key] = field(default_factory=list)


class _RunningFill(NamedTuple):
    """A Fill under way."""

    key: Key
    request_id: str
    tier: CacheTier | None
    pins: list[Pin]
    promotes: bool


class OffloadTier:
    """See the module's contract. Not thread-safe: the scheduler's thread owns it."""

    def __init__(
        self,
        host: CacheTier,
        disk: CacheTier | None = None,
        writes: Writes = Writes.THROUGH,
        ranks: int = 1,
    ) -> None:
        self.host = host
        self.disk = disk
        self.counts: Counter[str] = Counter()
        self._writes = writes
        self._ranks = ranks
        self._other_engines: Counter[Key] = Counter()  # → how many ranks see it
        self._numbers = itertools.count(1)
        self._saves: dict[int, Key] = {}
        self._spills: dict[int, tuple[Key, list[Pin]]] = {}
        self._fills: dict[int, _RunningFill] = {}
        self._loads: dict[str, _RequestLoad] = {}

    @property
    def busy(self) -> bool:
        """Whether some job has not been answered."""
        return bool(self._saves or self._spills or self._fills)

    def has(self, key: Key) -> bool:
        """Whether a chunk can be loaded; no effect. See `kvconnect.offload.hits`."""
        return bool(self.source_of(key))

    def source_of(self, key: Key) -> str:
        """From where a chunk would be loaded: host, disk, beside, or "" for nowhere; no effect."""
        for tier in (self.host, self.disk):
            if tier and tier.holds(key):
                return tier.name
        return "beside" if self._other_engines[key] >= self._ranks else ""

    def ended(self, keys: Sequence[Key]) -> None:
        """A request with ``keys``, in the order of its prefix, has ended: see `CacheTier.ended`."""
        self.host.ended(keys)
        if self.disk:
            self.disk.ended(keys)

    def load(self, request_id: str, chunks: Sequence[KeyedChunk]) -> Effects:
        """Fill the blocks of ``chunks``, of which `has` is true; once a request at a time."""
        result = Effects()
        load = self._loads[request_id] = _RequestLoad()
        sources = [self._pin(chunk.key) for chunk in chunks]  # all, before any makes room
        for chunk, (tier, pins) in zip(chunks, sources, strict=True):
            promotes = False
            if tier is not None and tier is self.disk and not self._is_known(chunk.key):
                promotes = self._make_room(chunk.key, result)
                if not promotes:
                    self.counts["chunks_without_room"] += 1
                    tier.unpin(pins)
                    load.failed.append(chunk.key)
                    continue
            self.counts[CHUNKS_FROM[tier.name if tier else "beside"]] += 1
            number = next(self._numbers)
            load.running.add(number)
            self._fills[number] = _RunningFill(chunk.key, request_id, tier, pins, promotes)
            result.jobs.append(Fill(number, *chunk))
        self._end(request_id, result)
        return result

    def store(self, chunks: Sequence[KeyedChunk]) -> Effects:
        """KV of ``chunks``, in the order of their prefix, is computed: save what is worth it."""
        result = Effects()
        keys = [chunk.key for chunk in chunks]
        self.host.touch(keys)  # those that are there: the last to make room for the others
        admission = self.host.offer(keys)
        self._leave(admission.evicted, result)
        wanted = set(admission.admitted)
        for chunk in chunks:
            if chunk.key in wanted:
                wanted.remove(chunk.key)
                number = next(self._numbers)
                self._saves[number] = chunk.key
                result.jobs.append(Save(number, *chunk))
        return result

    def answered(self, number: int, well: bool) -> Effects:
        """All ranks have answered a job; ``well``: every one of them."""
        result = Effects()
        if number in self._saves:
            key = self._saves.pop(number)
            result.saved.append(number)
            self._forget(self.host.settle(key, well), self.host, result)
            if self._writes is Writes.THROUGH and self.host.holds(key):
                self._spill(key, result, pin=True)
        elif number in self._spills:
            assert self.disk is not None
            key, pins = self._spills.pop(number)
            self.host.unpin(pins)
            self._forget(self.disk.settle(key, well), self.disk, result)
        else:
            self._filled(number, well, result)
            if not well:
                self.counts["chunks_failed"] += 1
        return result

    def declined(self, number: int) -> Effects:
        """All ranks have answered a fill, and none failed, but some were not to carry it out."""
        result = Effects()
        self._filled(number, False, result, failed=False)
        return result

    def lost(self, key: Key, on_disk: bool) -> Effects:
        """A rank does not have what it was thought to have: no rank's is of use any more."""
        result = Effects()
        tier = self.disk if on_disk else self.host
        if tier is not None:
            self._forget(tier.lose(key), tier, result)
        return result

    def recovered(self, host: Sequence[Key], disk: Sequence[Key]) -> Effects:
        """What every rank found when the engine started, oldest first."""
        result = Effects()
        self._forget(self.host.recover(host), self.host, result)
        if self.disk:
            self._forget(self.disk.recover(disk), self.disk, result)
        return result

    def other_engines(self, gained: Iterable[Key], lost: Iterable[Key]) -> None:
        """A rank sees what other engines hold, or held."""
        self._other_engines.update(gained)
        for key in lost:
            self._other_engines[key] -= 1
            if self._other_engines[key] <= 0:  # it may have come before this tier was made
                del self._other_engines[key]

    def clear(self) -> Effects:
        """Forget everything; what is under way is forgotten when it has ended."""
        result = Effects()
        for tier in (self.host, self.disk):
            if tier:
                self._forget(tier.clear(), tier, result)
        return result

    def _pin(self, key: Key) -> tuple[CacheTier | None, list[Pin]]:
        for tier in (self.host, self.disk):
            if tier and tier.holds(key):
                return tier, tier.pin([key])
        return None, []

    def _is_known(self, key: Key) -> bool:
        """Whether memory holds it, or is being filled with it."""
        return self.host.standing(key) is not KeyState.ABSENT

    def _make_room(self, key: Key, result: Effects) -> bool:
        """Make room in memory for what comes from disk; says whether there is."""
        admission = self.host.admit([key])
        self._leave(admission.evicted, result)
        return bool(admission.admitted)

    def _leave(self, evicted: Iterable[Key], result: Effects) -> None:
        """Memory forgets, perhaps for the disk."""
        for key in evicted:
            if self._writes is Writes.BACK:
                self._spill(key, result, pin=False)  # a rank reads its slot until it is written
            result.jobs.append(Forget(key, False))

    def _spill(self, key: Key, result: Effects, pin: bool) -> None:
        if self.disk is None or self.disk.standing(key) is not KeyState.ABSENT:
            return
        admission = self.disk.admit([key])
        self._forget(admission.evicted, self.disk, result)
        if not admission.admitted:
            return
        number = next(self._numbers)
        self._spills[number] = key, self.host.pin([key]) if pin else []
        result.jobs.append(Spill(number, key))

    def _filled(self, number: int, well: bool, result: Effects, failed: bool = True) -> None:
        """``failed``: what is not well is."""
        filling = self._fills.pop(number)
        if filling.tier is not None:
            filling.tier.unpin(filling.pins)
        if filling.promotes:
            self._forget(self.host.settle(filling.key, well), self.host, result)
        elif not self._is_known(filling.key):
            result.jobs.append(Forget(filling.key, False))  # a rank may have promoted it
        load = self._loads[filling.request_id]
        load.running.remove(number)
        if failed and not well:
            load.failed.append(filling.key)
        self._end(filling.request_id, result)

    def _end(self, request_id: str, result: Effects) -> None:
        if not self._loads[request_id].running:
            result.loaded[request_id] = self._loads.pop(request_id).failed

    def _forget(self, left: Iterable[Key], tier: CacheTier, result: Effects) -> None:
        result.jobs += [Forget(key, tier is self.disk) for key in left]


def common(found: Sequence[Sequence[Key]]) -> tuple[list[Key], list[set[Key]]]:
    """Keys that every rank found, in the first one's order, and which others each found."""
    if not found:
        return [], []
    everywhere = set(found[0]).intersection(*found[1:])
    kept = [key for key in found[0] if key in everywhere]
    return kept, [set(keys) - everywhere for keys in found]
