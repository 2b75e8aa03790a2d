"""A store that is a dictionary, with faults.

It moves numbers between ``cells``, one per block, and itself. Faults are planned for the next
operations, one each, in order; the rest go well. `store_contract` holds it to
what the real one does.
"""

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.jobs import JobDone, Loss

GARBAGE = -1
BLOCK_BYTES = 1000  # as far as is counted


class StoreFault(enum.Enum):
    """What becomes of an operation."""

    NONE = "none"
    FAILS = "fails"
    """It ends with an error; blocks that were to be filled hold garbage."""
    DAMAGED = "damaged"
    """The same of a load, and what was to be loaded is gone."""
    REFUSED = "refused"
    """It is not started: no slot, no room in a queue."""


@dataclass(eq=False)
class _Slot:
    content: tuple[int, ...]
    users: int = 0


@dataclass
class _Work:
    job: int
    nbytes: int
    end: Callable[[str], None]
    fault: StoreFault
    polls: int


class FakeStore:
    """See the module's contract. ``late``: polls until an operation that starts now ends."""

    def __init__(self, cells: list[int], slots: int, disk_slots: int = 0) -> None:
        self.late = 1
        self._cells = cells
        self._slots = {False: slots, True: disk_slots}
        self._held: dict[bool, dict[bytes, _Slot]] = {False: {}, True: {}}
        self._others: dict[bool, list[_Slot]] = {False: [], True: []}  # filling, or leaving
        self._works: list[_Work] = []
        self._plans: deque[StoreFault] = deque()
        self._lost: list[Loss] = []

    def plan(self, *faults: StoreFault) -> None:
        """Decide about the next operations."""
        self._plans.extend(faults)

    def capacity(self, on_disk: bool = False) -> int:
        """How many slots there are."""
        return self._slots[on_disk]

    def free(self, on_disk: bool = False) -> int:
        """How many slots can be filled."""
        self._others[on_disk] = [slot for slot in self._others[on_disk] if slot.users]
        return self._slots[on_disk] - len(self._held[on_disk]) - len(self._others[on_disk])

    def restart(self) -> None:
        """The process died and another took over: what was held is held, nothing runs."""
        self._works.clear()
        self._lost.clear()
        self._plans.clear()
        for on_disk in (False, True):
            self._others[on_disk].clear()
            for slot in self._held[on_disk].values():
                slot.users = 0

    @property
    def busy(self) -> bool:
        return bool(self._works)

    def keys(self, on_disk: bool) -> list[bytes]:
        return list(self._held[on_disk])

    def holds(self, key: bytes, on_disk: bool) -> bool:
        return key in self._held[on_disk]

    def look_around(self) -> tuple[set[bytes], set[bytes]]:
        return set(), set()

    def take_lost(self) -> list[Loss]:
        lost, self._lost = self._lost, []
        return lost

    def save(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        fault = self._fault()
        if fault is StoreFault.REFUSED or not self.free():
            return False
        slot = self._take(False)

        def end(error: str) -> None:
            slot.users -= 1
            if not error:
                slot.content = tuple(self._cells[block] for block in blocks)
                self._hold(False, key, slot)

        self._start(job, len(blocks) * BLOCK_BYTES, end, fault)
        return True

    def load(
        self,
        job: int,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        fault = self._fault()
        on_disk = key not in self._held[False]
        source = self._held[on_disk].get(key)
        if fault is StoreFault.REFUSED or source is None or (on_disk and not self.free()):
            return False
        source.users += 1
        promoted = self._take(False) if on_disk else None

        def end(error: str) -> None:
            source.users -= 1
            if promoted is not None:
                promoted.users -= 1
            if error and fault is StoreFault.DAMAGED and self._held[on_disk].get(key) is source:
                self._drop(on_disk, key)
                self._lost.append(Loss(key, on_disk))
            for block, content in zip(blocks, source.content, strict=True):
                if block != NO_BLOCK:
                    self._cells[block] = GARBAGE if error else content
            if promoted is not None and not error:
                promoted.content = source.content
                self._hold(False, key, promoted)

        moved = sum(block != NO_BLOCK for block in blocks)
        self._start(job, moved * BLOCK_BYTES, end, fault)
        return True

    def spill(self, job: int, key: bytes) -> bool:
        fault = self._fault()
        source = self._held[False].get(key)
        if fault is StoreFault.REFUSED or source is None or self.holds(key, True):
            return False
        if not self.free(True):
            return False
        source.users += 1
        slot = self._take(True)

        def end(error: str) -> None:
            source.users -= 1
            slot.users -= 1
            if not error:
                slot.content = source.content
                self._hold(True, key, slot)

        self._start(job, 0, end, fault)
        return True

    def forget(self, key: bytes) -> None:
        self._drop(False, key)

    def forget_on_disk(self, key: bytes) -> None:
        self._drop(True, key)

    def poll(self) -> list[JobDone]:
        ended = []
        for work in list(self._works):
            work.polls -= 1
            if work.polls > 0:
                continue
            self._works.remove(work)
            error = "" if work.fault is StoreFault.NONE else f"planned fault: {work.fault.value}"
            work.end(error)
            ended.append(JobDone(work.job, error, 0 if error else work.nbytes))
        return ended

    def _fault(self) -> StoreFault:
        return self._plans.popleft() if self._plans else StoreFault.NONE

    def _start(self, job: int, nbytes: int, end: Callable[[str], None], fault: StoreFault) -> None:
        self._works.append(_Work(job, nbytes, end, fault, self.late))

    def _take(self, on_disk: bool) -> _Slot:
        slot = _Slot((), 1)
        self._others[on_disk].append(slot)
        return slot

    def _hold(self, on_disk: bool, key: bytes, slot: _Slot) -> None:
        self._drop(on_disk, key)
        self._others[on_disk].remove(slot)
        self._held[on_disk][key] = slot

    def _drop(self, on_disk: bool, key: bytes) -> None:
        slot = self._held[on_disk].pop(key, None)
        if slot is not None:
            self._others[on_disk].append(slot)
