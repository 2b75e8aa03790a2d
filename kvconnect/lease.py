"""Who keeps blocks alive, until when.

A lease covers the blocks of one prefilled request on one rank. It carries a random
generation, so a stale reference to a request id or to a restarted engine never matches.

* expect → grant → end: expected while the request is computed (a reader that is early waits
  instead of being refused), granted when its blocks hold the KV, ended once: by its last
  reader, by expiry, or withdrawn before it was granted.
* A lease does not end by its last reader while another is between open and close, even one of
  another engine that was given the same ticket.
* Times are this process's monotonic clock; no other process's clock is ever compared.
* Knows block ids as opaque numbers; frees nothing itself: `LeaseBook.expire` and `close` say
  which requests' blocks may be freed, each exactly once.
"""

import enum
import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

Clock = Callable[[], float]

REMEMBERED_NAMES = 4096


@dataclass(frozen=True)
class Terms:
    """What is leased: block tables per KV cache group, and which tokens are in them."""

    request_id: str
    generation: str
    tables: tuple[tuple[int, ...], ...]
    """``tables[g][i]``: block of tokens ``[i, i + 1) * block_tokens``, or plan.NO_BLOCK."""
    tokens: int
    digest: bytes
    """Identity of the first ``tokens`` tokens; a reader with another prompt is refused."""
    ttl_s: float
    name: str = ""
    """Under which readers without a ticket find the lease, if not under ``request_id``."""


class Standing(enum.Enum):
    """How a lease stands when somebody asks."""

    EXPECTED = "expected"
    GRANTED = "granted"
    GONE = "gone"


@dataclass
class _Lease:
    terms: Terms
    deadline: float
    last_deadline: float
    readers: int | None = None  # how many ranks will close; said by the first one
    closed: set[int] = field(default_factory=set)  # of those, the ones that did
    reading: set[Hashable] = field(default_factory=set)  # who is between open and close


class LeaseBook:
    """All leases of one rank. Not thread-safe: the mover's thread owns it."""

    def __init__(self, clock: Clock, max_duration_s: float) -> None:
        self._clock = clock
        self._max_duration_s = max_duration_s
        self._expected: dict[str, str] = {}  # generation → name
        self._leases: dict[str, _Lease] = {}  # generation → lease
        self._generations: dict[str, str] = {}  # name → generation, expected or granted
        self._over: OrderedDict[str, None] = OrderedDict()  # names of leases that ended last
        self._heap: list[tuple[float, str]] = []  # (a deadline at or before the real one, gen.)

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def reading(self) -> bool:
        """Whether some reader is between open and close: the transport needs progress."""
        return any(lease.reading for lease in self._leases.values())

    def expect(self, name: str, generation: str) -> None:
        """A request that will be leased under ``generation`` is being computed."""
        self._expected[generation] = name
        self._named(name, generation)

    def grant(self, terms: Terms) -> None:
        """The blocks hold the KV now; the lease runs from here."""
        self._expected.pop(terms.generation, None)
        now = self._clock()
        lease = _Lease(terms, now + terms.ttl_s, now + self._max_duration_s)
        self._leases[terms.generation] = lease
        self._named(_name(terms), terms.generation)
        heapq.heappush(self._heap, (lease.deadline, terms.generation))

    def withdraw(self, generation: str) -> None:
        """An expected request ended without KV to hand over (abort, error)."""
        name = self._expected.pop(generation, None)
        if name is not None:
            self._unnamed(name, generation)

    def find(self, name: str) -> str | None:
        """Generation under which a request is expected or leased now."""
        return self._generations.get(name)

    def is_over(self, name: str) -> bool:
        """Whether what was last expected or leased under ``name`` ended a short while ago."""
        return name in self._over

    def standing(self, generation: str) -> Standing:
        """How the lease stands at this moment."""
        if generation in self._expected:
            return Standing.EXPECTED
        lease = self._leases.get(generation)
        if lease is None or self._clock() >= lease.deadline:
            return Standing.GONE
        return Standing.GRANTED

    def open(self, generation: str, reader: Hashable) -> Terms:
        """A reader starts to read; only while GRANTED."""
        lease = self._leases[generation]
        lease.reading.add(reader)
        return lease.terms

    def is_open(self, generation: str, reader: Hashable) -> bool:
        """Whether the lease stands and ``reader`` is between open and close."""
        granted = self.standing(generation) is Standing.GRANTED
        return granted and reader in self._leases[generation].reading

    def terms(self, generation: str) -> Terms:
        """What is leased; only while GRANTED."""
        return self._leases[generation].terms

    def renew(self, generation: str) -> Standing:
        """Keep the lease for another ttl, counted from now; GONE stays gone."""
        standing = self.standing(generation)
        if standing is Standing.GRANTED:
            lease = self._leases[generation]
            lease.deadline = min(self._clock() + lease.terms.ttl_s, lease.last_deadline)
        return standing

    def close(
        self, generation: str, reader: Hashable, rank: int, readers: int
    ) -> tuple[bool, str | None]:
        """A reader, rank ``rank`` of ``readers``, is done with the blocks, read or not.

        Returns whether the lease still stood, and the request id if that was the last reader
        and its blocks may be freed now.
        """
        if self.standing(generation) is not Standing.GRANTED:
            return False, None
        lease = self._leases[generation]
        if lease.readers is None:
            lease.readers = readers
        lease.closed.add(rank)
        lease.reading.discard(reader)
        if lease.reading or len(lease.closed) < lease.readers:
            return True, None
        return True, self._end(generation)

    def expire(self) -> list[str]:
        """End all leases that are over; returns the request ids whose blocks may be freed."""
        ended = []
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            _, generation = heapq.heappop(self._heap)
            lease = self._leases.get(generation)
            if lease is None:
                continue
            if lease.deadline > now:  # renewed since it was pushed
                heapq.heappush(self._heap, (lease.deadline, generation))
            else:
                ended.append(self._end(generation))
        return ended

    def next_deadline(self) -> float | None:
        """When `expire` is worth calling next."""
        return self._heap[0][0] if self._heap else None

    def _end(self, generation: str) -> str:
        terms = self._leases.pop(generation).terms
        self._unnamed(_name(terms), generation)
        return terms.request_id

    def _named(self, name: str, generation: str) -> None:
        self._generations[name] = generation
        self._over.pop(name, None)

    def _unnamed(self, name: str, generation: str) -> None:
        if self._generations.get(name) != generation:  # another has taken the name since
            return
        del self._generations[name]
        self._over[name] = None
        if len(self._over) > REMEMBERED_NAMES:
            self._over.popitem(last=False)


def _name(terms: Terms) -> str:
    return terms.name or terms.request_id
