"""Promised leases of one rank whose blocks are read before the last of them is computed.

* Of a lease that is here some blocks are complete, and what it will hold as a whole is known.
* What a reader took of it counts only if the lease is granted, and stands when the reader closes:
  nothing here has to be fenced, and a promise ends without asking its readers.
* Who is done with a promise before it is granted is remembered until then, told of it or not: else
  nobody would end that lease before its time. Bounded by reader.
* Holds no blocks: they are the running request's.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from kvconnect.lease import Terms
from kvconnect.orders import Progress

Closing = tuple[Hashable, int, int]
"""A reader, its rank, and how many ranks will close; as `LeaseBook.close` takes it."""


@dataclass
class _Promised:
    terms: Terms
    tables: list[list[int]]
    """Those of the terms: they grow."""
    readers: set[Hashable] = field(default_factory=set)
    """Who is between open and close."""


class OpenPromises:
    """Not thread-safe: the mover's thread owns it."""

    def __init__(self) -> None:
        self._promised: dict[str, _Promised] = {}  # by lease id
        self._closes: dict[str, dict[Hashable, Closing]] = {}  # lease id → reader → its Close

    def progress(self, order: Progress) -> None:
        """These blocks are complete as well."""
        promised = self._promised.get(order.lease_id)
        if promised is None:
            tables: list[list[int]] = [[] for _ in order.blocks]
            terms = Terms("", order.lease_id, tables, order.tokens, order.digest, 0.0)
            promised = self._promised[order.lease_id] = _Promised(terms, tables)
        for table, more in zip(promised.tables, order.blocks, strict=True):
            table += more

    def terms(self, lease_id: str) -> Terms | None:
        """What is complete of a promised lease; None if nothing was said of it."""
        promised = self._promised.get(lease_id)
        return promised.terms if promised else None

    def open(self, lease_id: str, reader: Hashable) -> None:
        """A reader starts to read what is complete."""
        self._promised[lease_id].readers.add(reader)

    def comes(self, lease_id: str, reader: Hashable) -> None:
        """A reader wants the promise; that it was done with it before counts no more."""
        self._closes.get(lease_id, {}).pop(reader, None)

    def is_open(self, lease_id: str, reader: Hashable) -> bool:
        """Whether ``reader`` is between open and close."""
        promised = self._promised.get(lease_id)
        return promised is not None and reader in promised.readers

    def is_told_of(self, lease_id: str) -> bool:
        """Whether something was said of a promised lease, and more may be."""
        return lease_id in self._promised

    def close(self, lease_id: str, reader: Hashable, rank: int, readers: int) -> None:
        """A reader is done with a promise, whether or not it had opened it."""
        if promised := self._promised.get(lease_id):
            promised.readers.discard(reader)
        self._closes.setdefault(lease_id, {})[reader] = reader, rank, readers

    def end(self, lease_id: str) -> tuple[set[Hashable], list[Closing]]:
        """It is granted or withdrawn; returns who has it open, and who is done with it."""
        closes = list(self._closes.pop(lease_id, {}).values())
        if (promised := self._promised.pop(lease_id, None)) is None:
            return set(), closes
        return promised.readers, closes
