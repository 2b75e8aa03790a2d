"""Orders and outcomes: the only things that cross between scheduler and worker.

Orders are immutable and picklable (vLLM sends them through its own message queue, inside one
engine). The scheduler gives the same orders to every worker of the engine.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from kvconnect.control.wire import Address
from kvconnect.lease import Terms


@dataclass(frozen=True)
class Source:
    """A lease on a remote engine.

    Without a ticket (params of an in-tree form) only rank 0's address is known, which tells the
    others', and the lease's name there: ``request_id``; and no key, which has to be asked for.
    """

    shards: tuple[Address, ...]
    request_id: str
    lease_id: str | None
    ttl_s: float
    wait_s: float = 0.0
    """Where both engines are asked at once: how long the KV may take to be computed there."""
    samples: bool = False
    """The request is one of several samples of a prompt, which share the lease; how many there are
    is not known, and they arrive one by one."""

    @property
    def lease(self) -> "LeaseKey":
        """What tells its lease from others'."""
        return self.lease_id or self.request_id, self.shards[:1]


LeaseKey = tuple[str, tuple[Address, ...]]


class Offer(NamedTuple):
    """What a request's params say: the first ``tokens`` tokens can be had at ``source``.

    ``digest`` is our own digest of those tokens; the source refuses another prompt's.
    """

    source: Source
    tokens: int
    digest: bytes
    held_from: int | None = None
    """All groups hold everything from this token on; None where the source does not say."""


Blocks = tuple[tuple[tuple[int, int], ...], ...]
"""Blocks to fill: of each group, pairs (place in the request's block table, our block id), in the
order of their places."""


@dataclass(frozen=True)
class Promise:
    """Producer: this request is being computed and will be leased under ``lease_id``."""

    request_id: str
    lease_id: str
    name: str = ""
    """As in `kvconnect.lease.Terms`."""


@dataclass(frozen=True)
class Progress:
    """Producer: more blocks of a promised request are complete. See docs/adr/0008-streaming.md."""

    lease_id: str
    blocks: tuple[tuple[int, ...], ...]
    """Of each group, those that follow the ones told before; none where all come with the Grant."""
    tokens: int
    digest: bytes
    """What the lease will hold, as in `kvconnect.lease.Terms`."""


@dataclass(frozen=True)
class Grant:
    """Producer: the request's blocks hold its KV; lease them."""

    terms: Terms


@dataclass(frozen=True)
class Withdraw:
    """Producer: a promised request ended without KV to lease, or is computed anew."""

    lease_id: str
    successor: str = ""
    """The lease id under which it is promised anew."""


@dataclass(frozen=True)
class Revoke:
    """Producer: the blocks of these leases are wanted back. Who reads them is late.

    It is carried out before the step that it comes with writes into any block.
    """

    lease_ids: tuple[str, ...]


@dataclass(frozen=True)
class ReleaseOwn:
    """Producer: the reader of this lease is this very engine, and needs nothing of it.

    Found by lease id or, without a ticket, by request id.
    """

    lease_id: str | None
    request_id: str


@dataclass(frozen=True)
class RenewLease:
    """Consumer: a request that may fetch has arrived; greet its source and renew its lease."""

    request_id: str
    source: Source
    reports: bool = False
    """Whether to report when the source has computed it, or never will."""


@dataclass(frozen=True)
class Fetch:
    """Consumer: fill these blocks.

    ``tokens`` and ``digest`` identify the prompt that the source must hold.
    """

    request_id: str
    source: Source
    blocks: Blocks
    tokens: int
    digest: bytes
    needed_from: tuple[int, ...] = ()
    """Per group: tokens before this one need not be had, for no window sees them; () for none.
    Cells of the blocks that are left over, and those after ``tokens``, are filled all the same."""
    chained: bool = False
    """Others may stand in for its source; who orders it says what becomes of the whole load."""


@dataclass(frozen=True)
class Release:
    """Consumer: the request needs nothing from its source; let its lease go unread."""

    request_id: str
    source: Source


@dataclass(frozen=True)
class Cancel:
    """Consumer: the request ended while it was being fetched."""

    request_id: str


@dataclass(frozen=True)
class EngineAddresses:
    """All ranks of this engine, in rank order; rank 0 tells them to a dialer."""

    shards: tuple[Address, ...]


Order = (
    Promise
    | Progress
    | Grant
    | Withdraw
    | Revoke
    | ReleaseOwn
    | RenewLease
    | Fetch
    | Release
    | Cancel
    | EngineAddresses
)


@dataclass
class Outcome:
    """What a mover has to report since it was last asked."""

    sent: set[str] = field(default_factory=set)
    """Producer: requests whose blocks may be freed."""
    received: set[str] = field(default_factory=set)
    """Consumer: requests whose fetch ended, well or not."""
    failed: dict[str, str] = field(default_factory=dict)
    """Consumer: of those, the ones whose blocks do not hold the KV, with the reason."""
    computed: set[str] = field(default_factory=set)
    """Consumer: requests that wait for their source, where that was to be reported."""
    ended_s: dict[str, float] = field(default_factory=dict)
    """Consumer: when each fetch ended, by the mover's clock."""

    def add(self, other: "Outcome") -> None:
        """Report what ``other`` does as well."""
        self.sent |= other.sent
        self.received |= other.received
        self.failed |= other.failed
        self.computed |= other.computed
        self.ended_s |= other.ended_s

    def __bool__(self) -> bool:
        return bool(self.sent or self.received or self.computed)
