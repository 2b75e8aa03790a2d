"""A vault that is a dictionary, with faults; and the contract that it and the real one are held to.

* `FakeVault` moves numbers between ``cells``, one per block, and itself. Faults are planned for
  the next operations, one each, in order; the rest go well.
* `check_vault` runs the contract of `kvconnect.tier.store.hand.Vault` on a `Rig`.
"""

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvconnect.plan import NO_BLOCK
from kvconnect.tier.jobs import Loss
from kvconnect.tier.store.hand import Vault
from kvconnect.tier.store.host import Ended

GARBAGE = -1


class VaultFault(enum.Enum):
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
    ticket: int
    key: bytes
    end: Callable[[str], None]
    fault: VaultFault
    polls: int


class FakeVault:
    """See the module's contract. ``late``: polls until an operation that starts now ends."""

    def __init__(self, cells: list[int], slots: int, disk_slots: int = 0) -> None:
        self.late = 1
        self._cells = cells
        self._slots = {False: slots, True: disk_slots}
        self._held: dict[bool, dict[bytes, _Slot]] = {False: {}, True: {}}
        self._others: dict[bool, list[_Slot]] = {False: [], True: []}  # filling, or leaving
        self._works: list[_Work] = []
        self._plans: deque[VaultFault] = deque()
        self._lost: list[Loss] = []

    def plan(self, *faults: VaultFault) -> None:
        """Decide about the next operations."""
        self._plans.extend(faults)

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
        ticket: int,
        key: bytes,
        group: int,  # noqa: ARG002 - cells are of all groups
        blocks: Sequence[int],
        after: int | None = None,  # noqa: ARG002 - nothing to wait for
    ) -> bool:
        fault = self._fault()
        if fault is VaultFault.REFUSED or not self.free():
            return False
        slot = self._take(False)

        def end(error: str) -> None:
            slot.users -= 1
            if not error:
                slot.content = tuple(self._cells[block] for block in blocks)
                self._hold(False, key, slot)

        self._start(ticket, key, end, fault)
        return True

    def load(
        self,
        ticket: int,
        key: bytes,
        group: int,  # noqa: ARG002 - cells are of all groups
        blocks: Sequence[int],
        after: int | None = None,  # noqa: ARG002 - nothing to wait for
    ) -> bool:
        fault = self._fault()
        on_disk = key not in self._held[False]
        source = self._held[on_disk].get(key)
        if fault is VaultFault.REFUSED or source is None or (on_disk and not self.free()):
            return False
        source.users += 1
        promoted = self._take(False) if on_disk else None

        def end(error: str) -> None:
            source.users -= 1
            if promoted is not None:
                promoted.users -= 1
            if error and fault is VaultFault.DAMAGED and self._held[on_disk].get(key) is source:
                self._drop(on_disk, key)
                self._lost.append(Loss(key, on_disk))
            for block, content in zip(blocks, source.content, strict=True):
                if block != NO_BLOCK:
                    self._cells[block] = GARBAGE if error else content
            if promoted is not None and not error:
                promoted.content = source.content
                self._hold(False, key, promoted)

        self._start(ticket, key, end, fault)
        return True

    def spill(self, ticket: int, key: bytes) -> bool:
        fault = self._fault()
        source = self._held[False].get(key)
        if fault is VaultFault.REFUSED or source is None or self.holds(key, True):
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

        self._start(ticket, key, end, fault)
        return True

    def forget(self, key: bytes) -> None:
        self._drop(False, key)

    def forget_on_disk(self, key: bytes) -> None:
        self._drop(True, key)

    def poll(self) -> list[Ended]:
        ended = []
        for work in list(self._works):
            work.polls -= 1
            if work.polls > 0:
                continue
            self._works.remove(work)
            error = "" if work.fault is VaultFault.NONE else f"planned fault: {work.fault.value}"
            work.end(error)
            ended.append(Ended(work.ticket, work.key, error, 0 if error else 1))
        return ended

    def _fault(self) -> VaultFault:
        return self._plans.popleft() if self._plans else VaultFault.NONE

    def _start(
        self, ticket: int, key: bytes, end: Callable[[str], None], fault: VaultFault
    ) -> None:
        self._works.append(_Work(ticket, key, end, fault, self.late))

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


class Rig(Protocol):
    """A vault over a cache, made by whoever runs the contract: chunks of 2 blocks, 4 slots, 8 on
    disk, and at least 12 blocks."""

    vault: Vault

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        """Write what ``seed`` stands for into a chunk's blocks."""

    def holds(self, blocks: Sequence[int], seed: int) -> bool:
        """Whether they hold it, as far as they are not NO_BLOCK."""

    def settle(self) -> dict[int, str]:
        """Poll until the vault is not busy: ticket → error."""


def check_vault(make_rig: Callable[[], Rig]) -> None:
    """Raise AssertionError for what the vault that ``make_rig`` makes does otherwise."""
    for check in (_moves, _misses, _is_full, _promotes, _spills_once, _forgets_in_use, _parts):
        check(make_rig())


def _key(seed: int) -> bytes:
    return seed.to_bytes(32, "big")


def _save(rig: Rig, seed: int) -> bool:
    rig.fill((0, 1), seed)
    return rig.vault.save(seed, _key(seed), 0, (0, 1)) and not rig.settle()[seed]


def _loads(rig: Rig, seed: int, blocks: tuple[int, int] = (6, 7)) -> bool:
    rig.fill([block for block in blocks if block != NO_BLOCK], 99)
    if not rig.vault.load(1000 + seed, _key(seed), 0, blocks):
        return False
    error = rig.settle()[1000 + seed]
    assert error or rig.holds(blocks, seed), "a load went well and brought something else"
    return not error


def _moves(rig: Rig) -> None:
    assert not rig.vault.busy
    assert _save(rig, 1)
    assert _save(rig, 2)
    rig.fill((0, 1), 98)
    assert _loads(rig, 1)
    assert _loads(rig, 2)
    assert _loads(rig, 1, (7, 6))
    assert rig.vault.keys(on_disk=False) == [_key(1), _key(2)]
    assert rig.vault.keys(on_disk=True) == []
    assert rig.vault.poll() == [], "a ticket ended twice"
    assert rig.vault.take_lost() == []


def _misses(rig: Rig) -> None:
    assert not _loads(rig, 1)
    assert not rig.vault.spill(7, _key(1))
    rig.vault.forget(_key(1))
    rig.vault.forget_on_disk(_key(1))
    assert not rig.vault.busy


def _is_full(rig: Rig) -> None:
    assert [_save(rig, seed) for seed in range(5)] == [True] * 4 + [False]
    rig.vault.forget(_key(2))
    assert not rig.vault.holds(_key(2), on_disk=False)
    assert _save(rig, 4)
    assert [_loads(rig, seed) for seed in range(5)] == [True, True, False, True, True]


def _promotes(rig: Rig) -> None:
    assert _save(rig, 1)
    assert rig.vault.spill(7, _key(1))
    assert rig.settle() == {7: ""}
    rig.vault.forget(_key(1))
    assert _loads(rig, 1)
    assert rig.vault.holds(_key(1), on_disk=False)
    assert rig.vault.holds(_key(1), on_disk=True)
    rig.vault.forget(_key(1))
    assert [_save(rig, seed) for seed in range(2, 6)] == [True] * 4
    assert not _loads(rig, 1), "it was promoted to a slot that is not there"
    rig.vault.forget(_key(2))
    assert _loads(rig, 1)
    rig.vault.forget(_key(1))
    rig.vault.forget_on_disk(_key(1))
    assert not _loads(rig, 1)


def _spills_once(rig: Rig) -> None:
    assert _save(rig, 1)
    assert rig.vault.spill(7, _key(1))
    rig.settle()
    assert not rig.vault.spill(8, _key(1))
    for seed in range(2, 12):
        rig.vault.forget(_key(seed - 1))
        assert _save(rig, seed)
        assert rig.vault.spill(20 + seed, _key(seed)) == (seed <= 8)
        rig.settle()
    assert rig.vault.keys(on_disk=True) == [_key(seed) for seed in range(1, 9)]


def _forgets_in_use(rig: Rig) -> None:
    assert [_save(rig, seed) for seed in range(4)] == [True] * 4
    for seed in range(4):
        assert rig.vault.load(30 + seed, _key(seed), 0, (4 + 2 * seed, 5 + 2 * seed))
        assert rig.vault.spill(40 + seed, _key(seed))
        rig.vault.forget(_key(seed))
    rig.fill((0, 1), 50)
    for seed in range(50, 54):  # in their slots, unless somebody still reads them
        if rig.vault.save(seed, _key(seed), 0, (0, 1)):
            rig.vault.forget(_key(seed))
    ended = rig.settle()
    assert (
        {ended[30 + seed] for seed in range(4)} == {ended[40 + seed] for seed in range(4)} == {""}
    )
    assert all(rig.holds((4 + 2 * seed, 5 + 2 * seed), seed) for seed in range(4))
    for key in rig.vault.keys(on_disk=False):
        rig.vault.forget(key)
    assert [_loads(rig, seed) for seed in range(4)] == [True] * 4, "from disk"


def _parts(rig: Rig) -> None:
    assert _save(rig, 1)
    rig.fill((6, 7), 99)
    assert rig.vault.load(5, _key(1), 0, (NO_BLOCK, 7))
    assert rig.settle() == {5: ""}
    assert rig.holds((NO_BLOCK, 7), 1)
    assert rig.holds((6, NO_BLOCK), 99)
