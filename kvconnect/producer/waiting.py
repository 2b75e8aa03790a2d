"""Readers that wait at a producer: for a request to arrive, or for its lease to be granted.

* A reader repeats its message every few seconds. One that stops, because it gave up, its link
  broke or its process ended, is forgotten or passed over after `SILENT_S`.
* Bounded by link, which is one rank of a decode engine.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvconnect.control import wire
from kvconnect.control.calls import MAX_RESEND_S
from kvconnect.control.channel import Link
from kvconnect.deadlines import Deadlines
from kvconnect.lease import Clock

MAX_PARKED = 1 << 14  # of one link
MAX_EARLY = 1 << 14  # likewise
MAX_WAIT_S = 60.0
SILENT_S = 3 * MAX_RESEND_S

Key = tuple[Link, int]
"""Of a message that waits: its link and its number."""


class _Parked(NamedTuple):
    message: wire.Open | wire.Follow
    heard: float


class ParkedReaders:
    """Readers of one rank that wait for a promised lease: to be granted, or for more of it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, dict[Key, _Parked]] = {}  # lease id → (link, seq) → what it said
        self._counts: Counter[Link] = Counter()

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))

    def park(self, link: Link, message: wire.Open | wire.Follow, lease_id: str) -> bool:
        """Have a reader wait, or go on waiting; whether it may."""
        waiting, key = self._waiting.get(lease_id, {}), (link, message.seq)
        if key not in waiting:  # else it repeats itself
            if self._counts[link] >= MAX_PARKED:
                return False
            self._counts[link] += 1
        self._waiting.setdefault(lease_id, {})[key] = _Parked(message, self._clock())
        return True

    def forget(self, lease_id: str, link: Link, reader: int) -> None:
        """A reader gave up waiting: opened later, it would never close."""
        self._take(lease_id, lambda key, said: (key[0], said.reader) == (link, reader))

    def take(
        self, lease_id: str, streaming: bool = False
    ) -> list[tuple[Link, wire.Open | wire.Follow]]:
        """Who waits for the lease and still repeats itself: one that died would never close.

        ``streaming``: only readers that take blocks before the lease is granted.
        """
        now = self._clock()
        taken = self._take(lease_id, lambda _, said: not streaming or _streams(said))
        return [(link, p.message) for (link, _), p in taken.items() if now < p.heard + SILENT_S]

    def _take(
        self, lease_id: str, chosen: Callable[[Key, wire.Open | wire.Follow], bool]
    ) -> dict[Key, _Parked]:
        waiting = self._waiting.get(lease_id, {})
        taken = {key: p for key, p in waiting.items() if chosen(key, p.message)}
        for key in taken:
            del waiting[key]
            self._counts[key[0]] -= 1
            if not self._counts[key[0]]:
                del self._counts[key[0]]
        if not waiting:
            self._waiting.pop(lease_id, None)
        return taken


def _streams(message: wire.Open | wire.Follow) -> bool:
    return isinstance(message, wire.Follow) or message.stream


@dataclass
class _Early:
    message: wire.Open
    until: float
    heard: float


class EarlyReaders:
    """Readers of one rank that came before the request whose lease they ask for.

    * Only readers that say how long they would wait do so, and none longer than `MAX_WAIT_S`.
    * Bounded: a reader is refused that finds `MAX_EARLY` others of its link here.
    * A step costs nothing for those that go on waiting.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, dict[tuple[Link, int], _Early]] = {}  # name → (…, seq)
        self._counts: Counter[Link] = Counter()
        self._ends: Deadlines[tuple[str, tuple[Link, int]]] = Deadlines()  # of (name, key)

    def __len__(self) -> int:
        return self._counts.total()

    def admit(self, link: Link, message: wire.Open) -> bool:
        """Whether the reader may wait, or go on waiting, for the lease that it names."""
        name, key, now = message.request_id, (link, message.seq), self._clock()
        if message.lease_id is not None or not name or not message.early_ms:
            return False
        waiting = self._waiting.get(name, {}).get(key)
        if waiting is None:
            if self._counts[link] >= MAX_EARLY:
                return False
            waiting = _Early(message, now + min(message.early_ms / 1000, MAX_WAIT_S), now)
            self._waiting.setdefault(name, {})[key] = waiting
            self._counts[link] += 1
        waiting.heard = now
        self._ends.set((name, key), min(waiting.until, now + SILENT_S))
        return True

    def take(self, name: str) -> list[tuple[Link, wire.Open]]:
        """Who waited for ``name``: it is known from now on."""
        taken = self._waiting.pop(name, {})
        for key in taken:
            self._counts[key[0]] -= 1
            self._ends.drop((name, key))
        return [(link, waiting.message) for (link, _), waiting in taken.items()]

    def forget(self, name: str, link: Link, reader: int) -> None:
        """A reader of ``link`` gave up."""
        for key, waiting in list(self._waiting.get(name, {}).items()):
            if (key[0], waiting.message.reader) == (link, reader):
                self._drop(name, key)

    def tick(self) -> list[tuple[Link, wire.Open]]:
        """Forget readers that have fallen silent; returns those that have waited for too long."""
        now, late = self._clock(), []
        for name, key in self._ends.take(now):
            waiting = self._waiting[name][key]
            self._drop(name, key)
            if now >= waiting.until:
                late.append((key[0], waiting.message))
        return late

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return self._ends.next()

    def _drop(self, name: str, key: tuple[Link, int]) -> None:
        del self._waiting[name][key]
        self._ends.drop((name, key))
        self._counts[key[0]] -= 1
        if not self._waiting[name]:
            del self._waiting[name]
