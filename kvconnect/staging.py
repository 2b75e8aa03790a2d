"""Slots of staging memory: who uses which, and when one may be used again.

* A slot is free, taken, or quarantined: a remote may still write to it. A quarantined slot is
  free again when its user says that the remote has answered, or after `QUARANTINE_S`; after
  `ENDED_S` if its connection broke: nearly always its process has ended then, and only what is on
  the wire can still arrive. (Else it is as with the slots below that are used again early.)
* The pool is small and remotes decide how long a slot is held, so each slot is taken for an owner,
  a peer, and counts as the owner's until it is free again, its quarantine included. An owner gets
  another slot only while it would hold no more than half of what is free without it (and one, if
  any is free). One peer that hangs, however many requests wait for it, leaves half to the others.
* Where so many peers hang that nothing is free, the slot that has been longest in quarantine is
  used again once it was there for `SCARCE_S`. A write may still arrive in it when a stopped peer
  goes on; the checksums of the chunk that uses it then fail, and so does that load, and nothing
  wrong is served. The alternative is that nobody loads for a minute. Likewise an owner whose whole
  share is in quarantine uses its own slots again after `SCARCE_S`: a peer that was stopped and goes
  on is greeted anew, and will never answer what it was asked over the link that broke.
* Knows addresses, no transports; allocates nothing.

Rejected: a spare set of slots that only replaces quarantined ones, since memory that is registered
and idle is worth more as slots; growing, since a transport registers its memory when it is made;
a fixed number per peer, since how many peers there are is not known. A quarantine that ends only
when the peer was fenced off would be best, but a NIC that holds our keys can be fenced off only by
registering all memory anew, which ends every other peer's transfers, too.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.lease import Clock

GRANULE_BYTES = 64 << 10  # what is written to a slot is a multiple of this
MOST_SLOT_BYTES = 4 << 20
QUARANTINE_S, ENDED_S = 60.0, 3.0
SCARCE_S = 10.0  # of quarantine, where there is nothing else for who wants a slot


@dataclass(frozen=True)
class Staging:
    """Memory for staging: ``region`` is cut in slots of ``slot_bytes``, a multiple of granules."""

    region: Region
    slot_bytes: int

    def halves(self) -> tuple["Staging", "Staging"]:
        """One to gather into, one to be written to; so that two engines never wait in a ring."""
        slots = self.region.nbytes // self.slot_bytes
        if slots < 2:
            raise ConfigError(
                f"staging_bytes is {self.region.nbytes}, expected at least two slots of "
                f"{self.slot_bytes}"
            )
        size = slots // 2 * self.slot_bytes
        r = self.region
        first, second = (
            Staging(Region(r.address + i * size, size, r.kind, r.device), self.slot_bytes)
            for i in (0, 1)
        )
        return first, second


def staging_slot_bytes(staging_bytes: int) -> int:
    """Bytes of a slot: at least eight of them, of at most 4 MiB, in whole granules."""
    wanted = min(staging_bytes // 8, MOST_SLOT_BYTES)
    return max(wanted // GRANULE_BYTES, 1) * GRANULE_BYTES


@dataclass(frozen=True)
class _Quarantine:
    since: float
    until: float
    is_over: Callable[[], bool]


def share(held: int, free: int) -> int:
    """How much of a pool somebody may hold who holds ``held`` of it when ``free`` is left."""
    return max(1, (held + free) // 2) if free else 0


class Slots:
    """The slots of one arena. Not thread-safe: the mover's thread owns it."""

    def __init__(self, staging: Staging, clock: Clock) -> None:
        region = staging.region
        self.slot_bytes = staging.slot_bytes
        self.region = region
        self.granules = region.nbytes // GRANULE_BYTES
        self.table = granule_table(region.address, self.granules, region.kind, region.device)
        """The arena as rows of one granule each."""
        self._clock = clock
        self._free = list(range(self.count))
        self._owners: dict[int, Hashable] = {}  # slot that is not free → who took it
        self._held: Counter[Hashable] = Counter()  # owner → slots
        self._quarantined: dict[int, _Quarantine] = {}  # in the order in which it began

    @property
    def count(self) -> int:
        """How many slots there are."""
        return self.region.nbytes // self.slot_bytes

    @property
    def free(self) -> int:
        """How many slots nobody has."""
        return len(self._free)

    def may_take(self, owner: Hashable) -> bool:
        """Whether `take` would give this owner a slot."""
        held = self._held[owner]
        return held < share(held, self._available()) or self._longest(owner) is not None

    def take(self, owner: Hashable) -> int | None:
        """A slot for ``owner``, if there is one and its share is not used up."""
        held = self._held[owner]
        if held >= share(held, self._available()):
            if (own := self._longest(owner)) is None:
                return None
            self.give(own)
        elif not self._free:
            self.give(next(iter(self._quarantined)))
        slot = self._free.pop()
        self._owners[slot] = owner
        self._held[owner] += 1
        return slot

    def give(self, slot: int) -> None:
        """A taken or quarantined slot that nobody writes to any more."""
        self._quarantined.pop(slot, None)
        owner = self._owners.pop(slot)
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._free.append(slot)

    def quarantine(self, slot: int, seconds: float, is_over: Callable[[], bool]) -> None:
        """A taken slot whose user gave up while a remote may still write to it.

        It is free again after so many seconds, or when ``is_over`` says that the remote is done.
        """
        now = self._clock()
        self._quarantined[slot] = _Quarantine(now, now + seconds, is_over)

    def tick(self) -> None:
        """Free what need not be in quarantine any more."""
        now = self._clock()
        for slot in [s for s, q in self._quarantined.items() if now >= q.until or q.is_over()]:
            self.give(slot)

    def _longest(self, owner: Hashable) -> int | None:
        """Of this owner's slots the one longest in quarantine, if it may be used again."""
        since = self._clock() - SCARCE_S
        own = (
            s for s, q in self._quarantined.items() if self._owners[s] == owner and q.since <= since
        )
        return next(own, None)

    def _available(self) -> int:
        """Free slots or, where there are none, whether a quarantined one may be used."""
        if self._free or not self._quarantined:
            return len(self._free)
        longest = next(iter(self._quarantined.values()))
        return int(self._clock() - longest.since >= SCARCE_S)

    def address(self, slot: int) -> int:
        """Where a slot starts."""
        return self.region.address + slot * self.slot_bytes

    def granule(self, slot: int) -> int:
        """The first granule of a slot."""
        return slot * (self.slot_bytes // GRANULE_BYTES)

    def rows(self, slot: int, nbytes: int) -> np.ndarray:
        """Granules of a slot that hold its first ``nbytes``."""
        return granules(self.granule(slot), nbytes)


def granules(first: int, nbytes: int) -> np.ndarray:
    """int32 numbers of the granules that hold ``nbytes`` from granule ``first`` on."""
    return np.arange(first, first + -(-nbytes // GRANULE_BYTES), dtype=np.int32)


def granule_table(address: int, count: int, kind: str, device: int) -> RowTable:
    """``count`` granules from ``address`` on, as rows."""
    rows = np.array([[address, GRANULE_BYTES, GRANULE_BYTES, count]], dtype=np.int64)
    return RowTable(rows, np.zeros(1, dtype=np.int64), kind, device)
