"""Readers that read our memory themselves, and whether any of them may be doing so now.

* While one does, our transport must be looked after: a read over UCX ends only with an answer of
  ours. For nobody else: who waits for more of a promised lease, and who has all written to it.
* A reader that says nothing of it, as before 3.2, may read by itself.
* Kept from its Open to its Close, or to the end of its lease.
"""

from collections import defaultdict
from collections.abc import Hashable


class DirectReaders:
    """Of all leases of one rank. Not thread-safe: the mover's thread owns it."""

    def __init__(self) -> None:
        # lease id → reader → whether it may be reading now
        self._readers: defaultdict[str, dict[Hashable, bool]] = defaultdict(dict)
        self._reading = 0  # how many of them may

    @property
    def reading(self) -> bool:
        """Whether the transport needs progress."""
        return self._reading > 0

    def open(self, lease_id: str, reader: Hashable) -> None:
        """It was told of blocks, for the first time or once more."""
        self._set(lease_id, reader, True)

    def told(self, lease_id: str, reader: Hashable, more: bool) -> None:
        """It asked for more blocks, and was told of some; not ``more``: waits for them."""
        if reader in self._readers.get(lease_id, {}):
            self._set(lease_id, reader, more)

    def close(self, lease_id: str, reader: Hashable) -> None:
        """It is done with the lease. Idempotent."""
        readers = self._readers.get(lease_id, {})
        self._reading -= readers.pop(reader, False)
        if not readers:
            self._readers.pop(lease_id, None)

    def end(self, lease_id: str) -> None:
        """The lease is over, whoever reads it. Idempotent."""
        self._reading -= sum(self._readers.pop(lease_id, {}).values())

    def _set(self, lease_id: str, reader: Hashable, reads: bool) -> None:
        readers = self._readers[lease_id]
        self._reading += reads - readers.get(reader, False)
        readers[reader] = reads
