"""Who keeps blocks alive, until when.

A lease covers the blocks of one prefilled request on one rank. It carries a random
lease_id, so a stale reference to a request id or to a restarted engine never matches.

* promise → grant → end: promised while the request is computed (a reader that is early waits
  instead of being refused), granted when its blocks hold the KV, ended once: by its last
  reader, by expiry, revoked, or withdrawn before it was granted.
* A lease does not end by its last reader while another is between open and close, even one of
  another engine that was given the same ticket.
* Times are this process's monotonic clock; no other process's clock is ever compared.
* Knows block ids as opaque numbers; frees nothing itself: `LeaseBook.expire` and `close` say
  which requests' blocks may be freed, each exactly once.

Why it is so, and what was rejected:

* One lease with one deadline, not several maps by request id (vLLM's in-tree NIXL has four):
  each map has its own way to be forgotten, and a block kept for ever is KV memory lost for ever.
* A random id, not the request id: request ids come from clients and come again, and a restarted
  engine knows nothing of the ids that it had. An id that is not found is over; nothing is guessed.
* Time is counted here, from when a renewal arrived. An expiry time in the ticket would compare two
  machines' clocks, and be wrong by as much as these differ. The reader learns whether its lease
  stood by asking after the read (Close), so it needs no clock of ours at all.
* An expired lease frees its blocks though a reader may be in the middle of a read: nothing that a
  remote does may keep memory here. The reader's data is then worthless, and Close tells it so.
* A reader is counted by its rank, not by a message: a Close that is repeated ends nothing twice,
  and two decode engines with one ticket do not end each other's reads.
* A promise holds no blocks and has no deadline: the scheduler ends it, by a grant or a withdrawal.
"""

import enum
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from kvconnect.deadlines import Deadlines

Clock = Callable[[], float]

REMEMBERED_NAMES = 4096


@dataclass(frozen=True)
class Terms:
    """What is leased: block tables per KV cache group, and which tokens are in them."""

    request_id: str
    lease_id: str
    tables: Sequence[Sequence[int]]
    """``tables[g][i]``: block of tokens ``[i, i + 1) * block_tokens``, or plan.NO_BLOCK."""
    tokens: int
    digest: bytes
    """Identity of the first ``tokens`` tokens; a reader with another prompt is refused."""
    ttl_s: float
    name: str = ""
    """Under which early readers find the lease; those without a ticket do by ``request_id``."""
    prefixes: Mapping[int, bytes] = field(default_factory=dict)
    """Identities of shorter beginnings, by their tokens: of a prompt that agrees no further."""

    def digest_of(self, tokens: int) -> bytes | None:
        """Identity of the first so many tokens; None: no reader may have just these."""
        return self.digest if tokens == self.tokens else self.prefixes.get(tokens)


class LeaseState(enum.Enum):
    """How a lease stands when somebody asks."""

    PROMISED = "promised"
    GRANTED = "granted"
    GONE = "gone"


@dataclass
class _Lease:
    terms: Terms
    deadline: float
    last_deadline: float
    readers: int | None = None  # how many ranks will close; said by the first one
    closed: set[int] = field(default_factory=set)  # of those, the ones that did
    reading: set[Hashable] = field(default_factory=set)  # readers between open and close


class LeaseBook:
    """All leases of one rank. Not thread-safe: the mover's thread owns it."""

    def __init__(self, clock: Clock, max_duration_s: float) -> None:
        self._clock = clock
        self._max_duration_s = max_duration_s
        self._promised: dict[str, str] = {}  # lease_id → name
        self._leases: dict[str, _Lease] = {}  # lease_id → lease
        self._lease_ids: dict[str, str] = {}  # name → lease_id, promised or granted
        self._over: OrderedDict[str, bytes] = OrderedDict()  # names that ended last → digest
        self._deadlines: Deadlines[str] = Deadlines()  # of lease ids

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def promises(self) -> int:
        """How many leases are promised and not granted yet."""
        return len(self._promised)

    def promise(self, name: str, lease_id: str) -> None:
        """A request that will be leased under ``lease_id`` is being computed."""
        self._promised[lease_id] = name
        self._named(name, lease_id)

    def grant(self, terms: Terms, reading: Collection[Hashable] = ()) -> None:
        """The blocks hold the KV now; the lease runs from here. ``reading``: who began before."""
        self._promised.pop(terms.lease_id, None)
        now = self._clock()
        lease = _Lease(terms, now + terms.ttl_s, now + self._max_duration_s, reading=set(reading))
        self._leases[terms.lease_id] = lease
        for name in _names(terms):
            self._named(name, terms.lease_id)
        self._deadlines.set(terms.lease_id, lease.deadline)

    def withdraw(self, lease_id: str) -> None:
        """A promised request ended without KV to lease (abort, error)."""
        name = self._promised.pop(lease_id, None)
        if name is not None:
            self._unnamed(name, lease_id, b"")

    def release_unread(self, lease_id: str) -> str | None:
        """End a lease that nobody reads; returns the request id whose blocks may be freed."""
        if self.standing(lease_id) is not LeaseState.GRANTED or self._leases[lease_id].reading:
            return None
        return self._end(lease_id)

    def revoke(self, lease_id: str) -> str | None:
        """End a lease, read or not; returns the request id if it was granted. Late is failed."""
        return self._end(lease_id) if lease_id in self._leases else None

    def find(self, name: str) -> str | None:
        """Id under which a request's lease is promised or granted now."""
        return self._lease_ids.get(name)

    def is_over(self, name: str, digest: bytes = b"") -> bool:
        """Whether a lease of that name, and of that prompt if it is known, has just ended."""
        ended = self._over.get(name)
        return ended is not None and (not ended or not digest or ended == digest)

    def standing(self, lease_id: str) -> LeaseState:
        """How the lease stands at this moment."""
        if lease_id in self._promised:
            return LeaseState.PROMISED
        lease = self._leases.get(lease_id)
        if lease is None or self._clock() >= lease.deadline:
            return LeaseState.GONE
        return LeaseState.GRANTED

    def open(self, lease_id: str, reader: Hashable) -> Terms:
        """A reader starts to read; only while GRANTED."""
        lease = self._leases[lease_id]
        lease.reading.add(reader)
        return lease.terms

    def is_open(self, lease_id: str, reader: Hashable) -> bool:
        """Whether the lease stands and ``reader`` is between open and close."""
        granted = self.standing(lease_id) is LeaseState.GRANTED
        return granted and reader in self._leases[lease_id].reading

    def terms(self, lease_id: str) -> Terms:
        """What is leased; only while GRANTED."""
        return self._leases[lease_id].terms

    def renew(self, lease_id: str) -> LeaseState:
        """Keep the lease for another ttl, counted from now; GONE stays gone."""
        standing = self.standing(lease_id)
        if standing is LeaseState.GRANTED:
            lease = self._leases[lease_id]
            lease.deadline = min(self._clock() + lease.terms.ttl_s, lease.last_deadline)
            self._deadlines.set(lease_id, lease.deadline)
        return standing

    def close(
        self, lease_id: str, reader: Hashable, rank: int, readers: int
    ) -> tuple[bool, str | None]:
        """A reader, rank ``rank`` of ``readers``, is done with the blocks, read or not.

        Returns whether the lease still stood, and the request id if that was the last reader
        and its blocks may be freed now.
        """
        if self.standing(lease_id) is not LeaseState.GRANTED:
            return False, None
        lease = self._leases[lease_id]
        if lease.readers is None:
            lease.readers = readers
        lease.closed.add(rank)
        lease.reading.discard(reader)
        if lease.reading or len(lease.closed) < lease.readers:
            return True, None
        return True, self._end(lease_id)

    def expire(self) -> list[tuple[str, str]]:
        """End all leases that are over; returns their ids, and the requests to be freed."""
        return [(ended, self._end(ended)) for ended in self._deadlines.take(self._clock())]

    def next_deadline(self) -> float | None:
        """When `expire` is worth calling next."""
        return self._deadlines.next()

    def _end(self, lease_id: str) -> str:
        lease = self._leases.pop(lease_id)
        self._deadlines.drop(lease_id)
        for name in _names(lease.terms):
            self._unnamed(name, lease_id, lease.terms.digest)
        return lease.terms.request_id

    def _named(self, name: str, lease_id: str) -> None:
        self._lease_ids[name] = lease_id
        self._over.pop(name, None)

    def _unnamed(self, name: str, lease_id: str, digest: bytes) -> None:
        if self._lease_ids.get(name) != lease_id:  # another has taken the name since
            return
        del self._lease_ids[name]
        self._over[name] = digest
        if len(self._over) > REMEMBERED_NAMES:
            self._over.popitem(last=False)


def _names(terms: Terms) -> set[str]:
    """By which readers without its id find a granted lease."""
    return {terms.name or terms.request_id, terms.request_id}
