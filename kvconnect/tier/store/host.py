"""KV in host memory, as one rank moves it: paged blocks ↔ slots.

* Nothing blocks. `store` and `load` start something and say whether they did; how it ended comes
  out of `poll`, once per ticket.
* A store that finds no free slot is skipped; a load of what is not there, or is damaged, is a
  miss. Both are counted, neither raises.
* A load that fails may have written to its blocks: they hold nothing then.
* Our own arena first, then those of neighbours, whose slots may change while they are read:
  sums are of what was read, so that never counts as a hit.
* Not thread-safe: the mover's thread owns it. On CPU the kernels run within the call.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvconnect.errors import TransportError
from kvconnect.plan import NO_BLOCK
from kvconnect.tier.store.arena import Arena, Entry
from kvconnect.tier.store.neighbours import Neighbours
from kvconnect.tier.store.packing import Packed, Packing
from kvconnect.tier.store.shelf import Shelf

Ticket = int


class Ended(NamedTuple):
    """End of a ticket; ``error`` empty if it went well."""

    ticket: Ticket
    key: bytes
    error: str
    nbytes: int


@dataclass
class _Store:
    key: bytes
    group: int
    slot: int
    packed: Packed


@dataclass
class _Load:
    entry: Entry
    arena: Arena
    own: bool
    packed: dict[int, Packed]
    sums: list[int]
    nbytes: int


class HostStore:
    """See the module's contract. ``packings``: of each KV cache group."""

    def __init__(
        self,
        shelf: Shelf,
        packings: Sequence[Packing],
        neighbours: Neighbours | None = None,
    ) -> None:
        self.shelf = shelf
        self.counts: Counter[str] = Counter()
        self._packings = packings
        self.neighbours = neighbours
        self._lost: list[bytes] = []
        self._stores: dict[Ticket, _Store] = {}
        self._loads: dict[Ticket, _Load] = {}
        self._ended: list[Ended] = []
        self.counts["half_written_discarded"] += shelf.discarded

    def store(
        self,
        ticket: Ticket,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to copy ``blocks`` into a slot for ``key``; False: skipped."""
        slot = self.shelf.fill()
        if slot is None:
            self.counts["stores_without_slot"] += 1
            return False
        packing = self._packings[group]
        packed = packing.gather(blocks, self.shelf.arena.address(slot))
        self._stores[ticket] = _Store(key, group, slot, packed)
        return True

    def load(
        self,
        ticket: Ticket,
        key: bytes,
        group: int,
        blocks: Sequence[int],
    ) -> bool:
        """Start to fill those of ``blocks`` that are not NO_BLOCK; False: a miss."""
        packing = self._packings[group]
        entry, arena, own = self.shelf.use(key), self.shelf.arena, True
        if entry is None and self.neighbours and (found := self.neighbours.find(key)):
            arena, entry, own = *found, False
        if entry is None:
            self.counts["loads_missed"] += 1
            return False
        sums = None
        if (entry.group, entry.tokens, entry.nbytes) == (group, packing.tokens, packing.nbytes):
            sums = packing.sums(arena.payload(entry.slot), entry.digest)
        if sums is None:
            self._damaged(entry, own)
            if own:
                self.shelf.done(entry)
            return False
        packed = packing.scatter(blocks, arena.address(entry.slot))
        nbytes = packing.block_bytes * sum(block != NO_BLOCK for block in blocks)
        self._loads[ticket] = _Load(entry, arena, own, packed, sums, nbytes)
        return True

    def poll(self) -> list[Ended]:
        """What ended since the last call."""
        for ticket, store in list(self._stores.items()):
            self._end_store(ticket, store)
        for ticket, load in list(self._loads.items()):
            self._end_load(ticket, load)
        ended, self._ended = self._ended, []
        return ended

    def drop(self, key: bytes) -> None:
        """Forget a key; its slot is free once nothing reads it."""
        self.shelf.drop(key)

    def take_lost(self) -> list[bytes]:
        """Keys that turned out to be damaged since the last call, and are gone."""
        lost, self._lost = self._lost, []
        return lost

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to wait for."""
        return bool(self._stores or self._loads)

    def _end_store(self, ticket: Ticket, store: _Store) -> None:
        packing = self._packings[store.group]
        try:
            if not store.packed.done():
                return
        except TransportError as e:
            del self._stores[ticket]
            self.shelf.abandon(store.slot)
            self.counts["stores_failed"] += 1
            self._ended.append(Ended(ticket, store.key, str(e), 0))
            return
        del self._stores[ticket]
        payload = self.shelf.arena.payload(store.slot)
        digest = packing.put_sums(payload, store.packed.sums())
        self.shelf.commit(
            store.slot, store.key, store.group, packing.tokens, packing.nbytes, digest
        )
        self.counts["stored"] += 1
        self._ended.append(Ended(ticket, store.key, "", packing.nbytes))

    def _end_load(self, ticket: Ticket, load: _Load) -> None:
        error = ""
        try:
            if not all(packed.done() for packed in load.packed.values()):
                return
        except TransportError as e:
            error = str(e)
            self.counts["loads_failed"] += 1
        del self._loads[ticket]
        key = load.entry.key
        if not error and not self._is_right(load):
            error = "its sums are not those of what was stored"
            self._damaged(load.entry, load.own)
        if load.own:
            self.shelf.done(load.entry)
        self.counts["loaded"] += not error
        self._ended.append(Ended(ticket, key, error, 0 if error else load.nbytes))

    def _is_right(self, load: _Load) -> bool:
        read = {place: packed.sums()[0] for place, packed in load.packed.items()}
        return all(load.sums[place] == total for place, total in read.items())

    def _damaged(self, entry: Entry, own: bool) -> None:
        if own:
            self.counts["digest_mismatches"] += 1
            if self.shelf.drop_entry(entry):
                self._lost.append(entry.key)
        else:  # as often as not, its writer was faster than we
            self.counts["neighbour_reads_spoilt"] += 1
