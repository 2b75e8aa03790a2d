"""What is due, and when: one heap, so that a step costs nothing for what is not due.

* A key has one deadline: the one that was set last.
* To put a deadline off is an assignment: the key's entry in the heap stays where it is, and goes
  to its new place when it comes up. Leases are renewed far more often than they expire.
"""

import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """A deadline per key. Not thread-safe."""

    def __init__(self) -> None:
        self._times: dict[K, tuple[float, int]] = {}  # key → (its deadline, number of its entry)
        self._heap: list[tuple[float, int, K]] = []  # (no later than the deadline, number, key)
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many entries are kept: some may be of deadlines that do not count any more."""
        return len(self._heap)

    def set(self, key: K, when: float) -> None:
        """``key`` is due at ``when``, whatever was set for it before."""
        before, number = self._times.get(key, (float("inf"), -1))
        if when < before:
            number = next(self._numbers)
            heapq.heappush(self._heap, (when, number, key))
        self._times[key] = when, number

    def drop(self, key: K) -> None:
        """``key`` has no deadline any more. Idempotent."""
        self._times.pop(key, None)

    def take(self, now: float) -> Iterator[K]:
        """Keys that are due, the soonest first; each has no deadline once it is taken.

        Deadlines may be set and dropped between two keys.
        """
        while (when := self.next()) is not None and when <= now:
            key = heapq.heappop(self._heap)[2]
            del self._times[key]
            yield key

    def next(self) -> float | None:
        """The soonest deadline."""
        while self._heap:
            queued, number, key = self._heap[0]
            when, current = self._times.get(key, (queued, -1))
            if number != current:  # dropped, or set to a sooner time since
                heapq.heappop(self._heap)
            elif when > queued:  # put off since
                heapq.heapreplace(self._heap, (when, number, key))
            else:
                return queued
        return None


def soonest(*times: float | None) -> float | None:
    """Of deadlines, some of which may not be."""
    return min((at for at in times if at is not None), default=None)
