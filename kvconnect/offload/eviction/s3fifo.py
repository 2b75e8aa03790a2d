"""S3-FIFO (Yang et al., SOSP '23): a small queue that what is used once only passes through.

New keys enter ``small``, a tenth of the capacity; those used again while there go on to ``main``,
the others leave and are remembered as ghosts, who enter ``main`` directly. ``main`` gives a key
one more round per use. Scans cannot wash ``main`` out.
"""

from collections import OrderedDict

from kvconnect.offload.eviction.base import Insertion, Key, check_capacity

SMALL_PART = 10  # small is one part in so many
MOST_USES = 3
USES_TO_STAY = 1  # in small; the paper asks for 2, which measured lower: `kvconnect bench offload`

Queue = OrderedDict[Key, int]  # → uses, at most MOST_USES


class S3Fifo:
    """See `kvconnect.offload.eviction.base`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = check_capacity(capacity)
        self._small_size = max(1, capacity // SMALL_PART)
        self._small: Queue = OrderedDict()
        self._main: Queue = OrderedDict()
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self._pinned: dict[Key, tuple[Queue, int]] = {}  # → queue that it goes back to, uses
        self._pinned_small = 0  # how many of those go back to `small`

    def __contains__(self, key: Key) -> bool:
        return key in self._small or key in self._main or key in self._pinned

    def __len__(self) -> int:
        return len(self._small) + len(self._main) + len(self._pinned)

    def insert(self, key: Key) -> Insertion:
        assert key not in self
        evicted = None
        if len(self) >= self._capacity:
            if not self._small and not self._main:
                return Insertion(False)
            evicted = self._evict()
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0
        return Insertion(True, evicted)

    def touch(self, key: Key) -> None:
        if key in self._pinned:
            home, uses = self._pinned[key]
            self._pinned[key] = home, min(uses + 1, MOST_USES)
            return
        home = self._small if key in self._small else self._main
        home[key] = min(home[key] + 1, MOST_USES)

    def pin(self, key: Key) -> None:
        home = self._small if key in self._small else self._main
        self._pinned[key] = home, home.pop(key)
        self._pinned_small += home is self._small

    def unpin(self, key: Key) -> None:
        home, uses = self._pinned.pop(key)
        self._pinned_small -= home is self._small
        home[key] = uses

    def remove(self, key: Key) -> None:
        if key in self._pinned:
            self._pinned_small -= self._pinned.pop(key)[0] is self._small
        else:
            del (self._small if key in self._small else self._main)[key]

    def _evict(self) -> Key:
        """Each turn that evicts nobody spends a use or a stay in small: O(1) amortised."""
        while True:
            small = len(self._small) + self._pinned_small
            if self._small and (small >= self._small_size or not self._main):
                key, uses = self._small.popitem(last=False)
                if uses < USES_TO_STAY:
                    self._remember(key)
                    return key
                self._main[key] = 0
            else:
                key, uses = self._main.popitem(last=False)
                if not uses:
                    return key
                self._main[key] = uses - 1

    def _remember(self, key: Key) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > self._capacity - self._small_size:
            self._ghosts.popitem(last=False)
