"""Which keys a medium holds on all ranks: the scheduler's side of host memory, or of a disk.

* A key is absent, FILLING (admitted, and being stored; not to be loaded), or HELD.
* Admission makes room by the eviction policy. What is FILLING or pinned is never evicted; where
  nothing else is left, the newcomer is skipped and counted.
* Keys that are evicted are returned: every rank must forget them before anything is stored in
  its room. Forgetting what is not there does no harm.
* Knows keys, no slots, ranks or bytes. What became of a key that a pin was taken on, the pin
  knows: an old one never touches what came back under the same key.
"""

import enum
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvconnect.offload.eviction import Key, Policy

MOST_SEEN = 64_000  # keys whose offers are counted towards the threshold


class KeyState(enum.Enum):
    """How one key stands in a tier."""

    ABSENT = "absent"
    FILLING = "filling"
    HELD = "held"


@dataclass(eq=False)
class Pin:
    """A key as it was admitted, with what holds it; opaque to others."""

    key: Key
    standing: KeyState
    holders: int = 0
    cleared: bool = False
    """While FILLING, and so to leave as soon as it is settled."""


class Admission(NamedTuple):
    """What became of keys that were offered."""

    admitted: list[Key]
    """FILLING now; `settle` must follow for each."""
    evicted: list[Key]


class KeyChange(NamedTuple):
    """For KV events: a key that came to be held, or was and is not any more."""

    key: Key
    held: bool


class CacheTier:
    """See the module's contract. ``threshold``: offers of a key until it is worth storing."""

    def __init__(self, name: str, policy: Policy, threshold: int = 1) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self._policy = policy
        self._threshold = threshold
        self._known: dict[Key, Pin] = {}
        self._offers: OrderedDict[Key, int] = OrderedDict()
        self._changes: list[KeyChange] = []
        self._waiting: dict[Key, list[Sequence[Key]]] = {}  # what `ended` waits for

    @property
    def size(self) -> int:
        """How many keys are held or FILLING."""
        return len(self._known)

    @property
    def waiting(self) -> int:
        """How many keys have to be settled or unpinned before requests that ended count as such."""
        return len(self._waiting)

    def standing(self, key: Key) -> KeyState:
        """How a key stands now; no effect."""
        known = self._known.get(key)
        return known.standing if known else KeyState.ABSENT

    def holds(self, key: Key) -> bool:
        """Whether a key can be loaded; no effect."""
        return self.standing(key) is KeyState.HELD

    def offer(self, keys: Sequence[Key]) -> Admission:
        """KV of ``keys``, in the order of their prefix, can be stored; says which to store."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self._known]
        worth = [key for key in wanted if self._is_worth_it(key)]
        self.counts["keys_below_threshold"] += len(wanted) - len(worth)
        return self.admit(worth)

    def admit(self, keys: Sequence[Key]) -> Admission:
        """Admit those of ``keys`` that are not known, whatever the threshold; says what must go.

        A key that is evicted by this call is not admitted by it.
        """
        admitted: list[Key] = []
        evicted: list[Key] = []
        for key in [key for key in dict.fromkeys(keys) if key not in self._known]:
            insertion = self._policy.insert(key)
            if not insertion.ok:
                self.counts["keys_skipped_all_pinned"] += 1
                continue
            if insertion.evicted is not None:
                self._gone(insertion.evicted)
                self.counts["keys_evicted"] += 1
                evicted.append(insertion.evicted)
            self._policy.pin(key)  # until it is settled
            self._known[key] = Pin(key, KeyState.FILLING, 1)
            self._offers.pop(key, None)
            admitted.append(key)
        return Admission(admitted, evicted)

    def settle(self, key: Key, stored: bool) -> list[Key]:
        """A FILLING key was stored on all ranks, or not; returns who left."""
        known = self._known[key]
        assert known.standing is KeyState.FILLING
        if not stored:
            self.counts["keys_not_stored"] += 1
        if not stored or known.cleared:
            return self._leave(key)
        known.standing = KeyState.HELD
        self._release(known)
        self._changes.append(KeyChange(key, True))
        return []

    def pin(self, keys: Iterable[Key]) -> list[Pin]:
        """Keep held keys until `unpin`; they are used."""
        pins = [self._known[key] for key in keys]
        for known in pins:
            assert known.standing is KeyState.HELD
            known.holders += 1
            self._policy.touch(known.key)
            if known.holders == 1:
                self._policy.pin(known.key)
        return pins

    def unpin(self, pins: Iterable[Pin]) -> None:
        """One holder less of each, the last of a prefix first to go."""
        for known in reversed(list(pins)):
            self._release(known)

    def touch(self, keys: Sequence[Key]) -> None:
        """Keys are used, wherever from; of a prefix, its end is the first to go."""
        for key in reversed(keys):
            if key in self._known:
                self._policy.touch(key)

    def ended(self, keys: Sequence[Key]) -> None:
        """A request with ``keys``, in the order of its prefix, has ended: their end is to go first.

        That is so once none of them is FILLING or pinned, and counts as no use.
        """
        for key in keys:
            known = self._known.get(key)
            if known and known.holders:
                self._waiting.setdefault(key, []).append(keys)
                return
        for key in reversed(keys):
            if key in self._known:
                self._policy.pin(key)
                self._policy.unpin(key)

    def lose(self, key: Key) -> list[Key]:
        """A rank does not have a held key any more; returns who left."""
        if not self.holds(key):
            return []
        self.counts["keys_lost"] += 1
        return self._leave(key)

    def recover(self, keys: Iterable[Key]) -> list[Key]:
        """Found held when the engine started, oldest first; returns who had to leave."""
        left: list[Key] = []
        for key in keys:
            admission = self.admit([key])
            left += admission.evicted
            for one in admission.admitted:
                self.settle(one, True)
        return left

    def clear(self) -> list[Key]:
        """Forget everything; returns who left: also what is pinned, as by `lose`.

        FILLING keys leave when they are settled. Their KV may be of weights that are none any more.
        """
        for known in self._known.values():
            known.cleared = True
        held = [key for key in self._known if self.holds(key)]
        return [left for key in held for left in self._leave(key)]

    def take_changes(self) -> list[KeyChange]:
        """Since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def _is_worth_it(self, key: Key) -> bool:
        if self._threshold <= 1:
            return True
        offers = self._offers.pop(key, 0) + 1
        if offers >= self._threshold:
            return True
        self._offers[key] = offers
        if len(self._offers) > MOST_SEEN:
            self._offers.popitem(last=False)
        return False

    def _release(self, known: Pin) -> None:
        known.holders -= 1
        if known.holders:
            return
        if known.standing is not KeyState.ABSENT:
            self._policy.unpin(known.key)
        self._wake(known.key)

    def _leave(self, key: Key) -> list[Key]:
        self._policy.remove(key)
        self._gone(key)
        return [key]

    def _gone(self, key: Key) -> None:
        known = self._known.pop(key)
        if known.standing is KeyState.HELD:
            self._changes.append(KeyChange(key, False))
        known.standing = KeyState.ABSENT
        self._wake(key)

    def _wake(self, key: Key) -> None:
        for keys in self._waiting.pop(key, ()):
            self.ended(keys)
