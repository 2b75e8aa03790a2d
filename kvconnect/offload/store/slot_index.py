"""Which slot of an arena holds which key, and which slots may be written to.

A slot is free; being filled; holding a key; or *leaving*: its key was dropped while somebody
still read it, so that it is free once the last reader is done.

* A slot that is read, or being filled, is never given out.
* A key is held by at most one slot. Dropping one that is not held does nothing.
* Decides nothing: who fills must have dropped something if all slots are taken.
"""

from collections import Counter
from collections.abc import Callable

from kvconnect.offload.store.arena import Arena, SlotEntry, Written


class SlotIndex:
    """Not thread-safe: the thread that owns the arena owns it.

    ``ready``: how many slots, from the first on, can be used by now; by default all.
    """

    def __init__(self, arena: Arena, ready: Callable[[], int] | None = None) -> None:
        self.arena = arena
        self._ready = ready or (lambda: arena.spec.slots)
        self._held: dict[bytes, SlotEntry] = {}
        self._users: Counter[int] = Counter()  # slot → how many read it
        self._leaving: set[int] = set()
        self._filling: set[int] = set()
        found = arena.scan()
        self.discarded = len(found.discarded)
        """Slots that a writer who died had not finished, or that are damaged."""
        for slot in found.discarded:
            arena.drop(slot)
        for entry in found.entries:  # oldest first: of two slots with one key the newer stays
            older = self._held.pop(entry.key, None)
            if older is not None:
                arena.drop(older.slot)
            self._held[entry.key] = entry
        taken = {entry.slot for entry in self._held.values()}
        self._free = [s for s in reversed(range(arena.spec.slots)) if s not in taken]

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    @property
    def free(self) -> int:
        """How many slots can be filled now."""
        return len(self._free)

    def keys(self) -> list[bytes]:
        """Held keys, oldest first."""
        return list(self._held)

    def slot_of(self, key: bytes) -> int | None:
        """The slot that holds ``key``; no effect. None: none does."""
        entry = self._held.get(key)
        return None if entry is None else entry.slot

    def fill(self) -> int | None:
        """A slot whose payload may be written from now on; None if there is none.

        Raises OSError, and nothing has changed, if its header cannot be written.
        """
        ready = self._ready()
        places = reversed(range(len(self._free)))
        place = next((one for one in places if self._free[one] < ready), None)
        if place is None:
            return None
        slot = self._free[place]
        self.arena.begin(slot)
        self._free.pop(place)
        self._filling.add(slot)
        return slot

    def commit(self, *written: Written) -> list[SlotEntry]:
        """Slots' payloads are written: they hold their keys, which nothing else does any more.

        Raises OSError, and all are still being filled, if a header cannot be written.
        """
        for one in written:
            self.drop(one.key)
        entries = self.arena.commit(written)
        for entry in entries:
            self.drop(entry.key)  # the same key twice
            self._filling.remove(entry.slot)
            self._held[entry.key] = entry
        return entries

    def abandon(self, slot: int) -> None:
        """Nobody writes to a slot that was being filled any more, and nothing came of it."""
        self._filling.remove(slot)
        self.arena.drop(slot)
        self._free.append(slot)

    def use(self, key: bytes) -> SlotEntry | None:
        """The slot that holds ``key``, whose payload stays until `done`; None: no ready one."""
        entry = self._held.get(key)
        if entry is None or entry.slot >= self._ready():
            return None
        self._users[entry.slot] += 1
        return entry

    def done(self, entry: SlotEntry) -> None:
        """One reader less."""
        self._users[entry.slot] -= 1
        if self._users[entry.slot] > 0:
            return
        del self._users[entry.slot]
        if entry.slot in self._leaving:
            self._leaving.remove(entry.slot)
            self._free.append(entry.slot)

    def drop(self, key: bytes) -> None:
        """Forget a key; its slot is free as soon as nobody reads it."""
        entry = self._held.pop(key, None)
        if entry is None:
            return
        self.arena.drop(entry.slot)
        if self._users[entry.slot] > 0:
            self._leaving.add(entry.slot)
        else:
            del self._users[entry.slot]
            self._free.append(entry.slot)

    def drop_entry(self, entry: SlotEntry) -> bool:
        """Forget a key if it is this slot that still holds it; says whether it was."""
        if self._held.get(entry.key) != entry:
            return False
        self.drop(entry.key)
        return True
