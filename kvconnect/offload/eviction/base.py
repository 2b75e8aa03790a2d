"""What an eviction policy is.

* Knows keys and a capacity: no bytes, no slots, no requests.
* A resident key is evictable or pinned. A pinned key is never evicted; `unpin` makes it
  evictable again, as the newest of its queue. Pins do not nest: who needs counts keeps them.
* Every operation takes O(1) steps, amortised; pinned keys are out of the queues, so that no
  number of them slows an eviction down.
* ``len`` never exceeds the capacity, pinned keys included.
"""

from typing import NamedTuple, Protocol

Key = bytes


class Insertion(NamedTuple):
    """What became of an `Policy.insert`."""

    ok: bool
    """False: everything is pinned, and nothing changed."""
    evicted: Key | None = None
    """Who had to go; None where there was room, or not ``ok``."""


class Policy(Protocol):
    """See the module's contract."""

    def __contains__(self, key: Key) -> bool:
        """Whether a key is resident."""

    def __len__(self) -> int:
        """How many keys are resident."""

    def insert(self, key: Key) -> Insertion:
        """Make a key resident that is not, evicting another if need be. It is evictable."""

    def touch(self, key: Key) -> None:
        """A resident key was used."""

    def pin(self, key: Key) -> None:
        """A resident key, not pinned, must stay until `unpin`."""

    def unpin(self, key: Key) -> None:
        """A pinned key may go."""

    def remove(self, key: Key) -> None:
        """A resident key, pinned or not, is gone for another reason; it leaves no trace."""


def check_capacity(capacity: int) -> int:
    """``capacity``, which must be at least one key."""
    if capacity < 1:
        raise ValueError(f"a policy for {capacity} keys, expected at least one")
    return capacity
