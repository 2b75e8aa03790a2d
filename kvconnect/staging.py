"""Slots of staging memory: who uses which, and when one may be used again.

* A slot is free, taken, or quarantined: a remote may still write to it. A quarantined slot is
  free again when its user says that the remote has answered, or after `QUARANTINE_S`; after
  `ENDED_S` if the remote's process has ended, for only what is on the wire can still arrive. Should
  more, the checksums of the slot's next chunk fail: a load fails, and nothing wrong is served.
* Knows addresses, no transports; allocates nothing.
"""

from dataclasses import dataclass

import numpy as np

from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.lease import Clock

GRANULE_BYTES = 64 << 10  # what is written to a slot is a multiple of this
MOST_SLOT_BYTES = 4 << 20
QUARANTINE_S, ENDED_S = 60.0, 3.0


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
        self._free = list(range(region.nbytes // staging.slot_bytes))
        self._quarantined: dict[int, float] = {}  # slot → until when

    @property
    def free(self) -> int:
        """How many slots can be taken."""
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, if there is one."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """A taken or quarantined slot that nobody writes to any more."""
        self._quarantined.pop(slot, None)
        self._free.append(slot)

    def quarantine(self, slot: int, seconds: float = QUARANTINE_S) -> None:
        """A taken slot whose user gave up while a remote may still write to it."""
        self._quarantined[slot] = self._clock() + seconds

    def is_quarantined(self, slot: int) -> bool:
        """Whether nobody may use it yet."""
        return slot in self._quarantined

    def tick(self) -> None:
        """Free what was in quarantine for long enough."""
        now = self._clock()
        for slot in [s for s, until in self._quarantined.items() if now >= until]:
            self.give(slot)

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
