"""Least recently used: one queue, newest last."""

from collections import OrderedDict

from kvconnect.offload.eviction.base import Insertion, Key, check_capacity


class Lru:
    """See `kvconnect.offload.eviction.base`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = check_capacity(capacity)
        self._queue: OrderedDict[Key, None] = OrderedDict()
        self._pinned: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._queue or key in self._pinned

    def __len__(self) -> int:
        return len(self._queue) + len(self._pinned)

    def insert(self, key: Key) -> Insertion:
        assert key not in self
        evicted = None
        if len(self) >= self._capacity:
            if not self._queue:
                return Insertion(False)
            evicted, _ = self._queue.popitem(last=False)
        self._queue[key] = None
        return Insertion(True, evicted)

    def touch(self, key: Key) -> None:
        if key not in self._pinned:  # a pinned one becomes the newest when it is unpinned
            self._queue.move_to_end(key)

    def pin(self, key: Key) -> None:
        del self._queue[key]
        self._pinned.add(key)

    def unpin(self, key: Key) -> None:
        self._pinned.remove(key)
        self._queue[key] = None

    def remove(self, key: Key) -> None:
        if key in self._pinned:
            self._pinned.remove(key)
        else:
            del self._queue[key]
