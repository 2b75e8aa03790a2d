"""Adaptive replacement (Megiddo and Modha, FAST '03): recency and frequency, weighed as it goes.

``recent`` and ``frequent`` (T1 and T2 there) hold what is resident, their ghosts (B1 and B2) the
keys that were evicted from each. A key that comes back while its ghost is remembered says which
queue should have been longer, and moves ``target``, the size that ``recent`` is meant to have.
"""

from collections import OrderedDict

from kvconnect.offload.eviction.base import Insertion, Key, check_capacity

Queue = OrderedDict[Key, None]


class Arc:
    """See `kvconnect.offload.eviction.base`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = check_capacity(capacity)
        self._recent: Queue = OrderedDict()
        self._frequent: Queue = OrderedDict()
        self._recent_ghosts: Queue = OrderedDict()
        self._frequent_ghosts: Queue = OrderedDict()
        self._target = 0.0  # of pinned and queued keys together; in [0, capacity]
        self._pinned: dict[Key, Queue] = {}  # → the queue that it goes back to
        self._pinned_recent = 0  # how many of those go back to `recent`

    def __contains__(self, key: Key) -> bool:
        return key in self._recent or key in self._frequent or key in self._pinned

    def __len__(self) -> int:
        return len(self._recent) + len(self._frequent) + len(self._pinned)

    def insert(self, key: Key) -> Insertion:
        assert key not in self
        full = len(self) >= self._capacity
        if full and not self._recent and not self._frequent:
            return Insertion(False)
        returns = key in self._recent_ghosts or key in self._frequent_ghosts
        from_frequent = key in self._frequent_ghosts
        if returns:
            self._adapt(key)
        evicted = None
        if full:
            evicted = self._evict(from_frequent)
        if not returns:
            self._trim_ghosts()
        (self._frequent if returns else self._recent)[key] = None
        return Insertion(True, evicted)

    def touch(self, key: Key) -> None:
        if key in self._pinned:
            if self._pinned[key] is self._recent:
                self._pinned_recent -= 1
            self._pinned[key] = self._frequent
            return
        self._recent.pop(key, None)
        self._frequent[key] = None
        self._frequent.move_to_end(key)

    def pin(self, key: Key) -> None:
        home = self._recent if key in self._recent else self._frequent
        del home[key]
        self._pinned[key] = home
        self._pinned_recent += home is self._recent

    def unpin(self, key: Key) -> None:
        home = self._pinned.pop(key)
        self._pinned_recent -= home is self._recent
        home[key] = None

    def remove(self, key: Key) -> None:
        if key in self._pinned:
            self._pinned_recent -= self._pinned.pop(key) is self._recent
        else:
            del (self._recent if key in self._recent else self._frequent)[key]

    def _adapt(self, key: Key) -> None:
        """A ghost came back: the queue it was evicted from should have been longer."""
        recent, frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if key in self._recent_ghosts:
            self._target = min(self._target + max(1.0, frequent / recent), self._capacity)
            del self._recent_ghosts[key]
        else:
            self._target = max(self._target - max(1.0, recent / frequent), 0.0)
            del self._frequent_ghosts[key]

    def _evict(self, incoming_was_frequent: bool) -> Key:
        """REPLACE of the paper; where one queue is empty for pins, from the other."""
        recent = len(self._recent) + self._pinned_recent
        over = recent > self._target or (incoming_was_frequent and recent == self._target)
        from_recent = bool(self._recent) and (over or not self._frequent)
        queue = self._recent if from_recent else self._frequent
        ghosts = self._recent_ghosts if from_recent else self._frequent_ghosts
        victim, _ = queue.popitem(last=False)
        ghosts[victim] = None
        return victim

    def _trim_ghosts(self) -> None:
        """|recent| + its ghosts stay below the capacity, everything together below twice that."""
        recent = len(self._recent) + self._pinned_recent
        while self._recent_ghosts and recent + len(self._recent_ghosts) >= self._capacity:
            self._recent_ghosts.popitem(last=False)
        ghosts = len(self._recent_ghosts) + len(self._frequent_ghosts)
        while self._frequent_ghosts and len(self) + ghosts >= 2 * self._capacity:
            self._frequent_ghosts.popitem(last=False)
            ghosts -= 1
