"""Keeps leases alive while the requests that will fetch them wait to be scheduled; opens leases.

Greets their source early, and renews every third of the ttl from the mover's own clock. Knows no
fetches and releases: whatever ends one calls `forget`. Of a request that waits for its source to
compute it, and is to be reported, an Open without a prompt finds out: it is refused once there is
a lease.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvconnect.consumer.remote import ConsumerContext, Remote, Remotes
from kvconnect.consumer.wake_queue import WakeQueue
from kvconnect.control import wire
from kvconnect.control.calls import Call
from kvconnect.control.peer import Peer, PeerState
from kvconnect.orders import LeaseKey, RenewLease, Source

RENEWALS_PER_TTL = 3
MIN_RENEWAL_S = 1.0  # whatever ttl a ticket claims


@dataclass
class _Renewal:
    source: Source
    remote: Remote
    renew_at: float
    closing: bool = False
    """Its fetch has said that it is done with the lease."""
    reports: bool = False
    asked: Call | None = None
    """To open the lease, where it is to be reported when there is one."""


class LeaseRenewer:
    """The leases that one rank waits for."""

    def __init__(self, context: ConsumerContext, remotes: Remotes) -> None:
        self._dialer = context.dialer
        self._rank = context.rank
        self._remotes = remotes
        self._clock = context.clock
        self.wake_queue = WakeQueue(context.clock)
        self._renewals: dict[str, _Renewal] = {}
        self._sharing: dict[LeaseKey, set[str]] = {}  # lease → the requests that wait for it
        self._computed: set[str] = set()

    def __len__(self) -> int:
        return len(self._renewals)

    def renew(self, order: RenewLease) -> None:
        """Greet early and keep the lease alive while the request waits."""
        self.forget(order.request_id)
        remote = self._remotes.of(order.source)
        self.wake_queue.add(order.request_id, remote)
        self._renewals[order.request_id] = _Renewal(
            order.source, remote, self._clock(), reports=order.reports
        )
        self._sharing.setdefault(order.source.lease, set()).add(order.request_id)

    def closing(self, request_id: str) -> None:
        """Its fetch needs the lease no more, but for being told whether it stands."""
        if watch := self._renewals.get(request_id):
            watch.closing = True

    def forget(self, request_id: str) -> None:
        """Its fetch or release has ended."""
        if watch := self._renewals.pop(request_id, None):
            if watch.asked:
                self._dialer.calls.cancel(watch.asked)
            self.wake_queue.remove(request_id, watch.remote)
            sharing = self._sharing[watch.source.lease]
            sharing.discard(request_id)
            if not sharing:
                del self._sharing[watch.source.lease]

    def waits_for(self, source: Source, but: str = "") -> bool:
        """Whether a request other than ``but`` waits for this lease, or reads it."""
        sharing = self._sharing.get(source.lease, set()) - {but}
        return any(not self._renewals[request_id].closing for request_id in sharing)

    def open(
        self,
        peer: Peer,
        request_id: str,
        source: Source,
        deadline: float,
        tokens: int = 0,
        digest: bytes = b"",
        stream: bool = False,
        direct: bool = True,
    ) -> Call:
        """Ask one rank of a source to open a lease; with no prompt it refuses, if it knows it.

        ``stream``: already when it is promised, to take its blocks as they are computed.
        ``direct``: and perhaps to read them itself.
        """
        return self._dialer.calls.send(
            peer,
            lambda seq: wire.Open(
                seq=seq,
                lease_id=source.lease_id,
                request_id=source.request_id,
                reader=self._rank,
                tokens=tokens,
                digest=digest,
                early_ms=round(source.wait_s * 1000),
                stream=stream,
                direct=direct,
            ),
            (wire.Opened, wire.Refused),
            deadline,
            request_id,
        )

    def take_computed(self) -> set[str]:
        """Requests that were to be reported, and whose source has computed them or never will."""
        taken, self._computed = self._computed, set()
        return taken

    def tick(self) -> None:
        """Renew what is due, many leases of one source in one message."""
        now = self._clock()
        due: dict[int, tuple[Remote, list[Source]]] = {}
        for request_id in self.wake_queue.take():
            watch = self._renewals.get(request_id)
            if watch is None:
                continue
            watch.remote.advance()
            self._look(request_id, watch)
            if now < watch.renew_at:
                continue
            watch.remote.used_at = now
            if watch.remote.state is PeerState.GREETING:
                continue  # it is looked at again when that has ended
            watch.renew_at = now + max(watch.source.ttl_s / RENEWALS_PER_TTL, MIN_RENEWAL_S)
            if watch.remote.state is PeerState.FAILED:
                # it may be back before the request is loaded
                self.wake_queue.remove(request_id, watch.remote)
                watch.remote = self._remotes.of(watch.source)
                self.wake_queue.add(request_id, watch.remote)
            else:
                due.setdefault(id(watch.remote), (watch.remote, []))[1].append(watch.source)
            self.wake_queue.wake_at(watch.renew_at, request_id)
        for remote, sources in due.values():
            for some in _batched(sources, wire.RENEWED_AT_ONCE):
                renew = wire.Renew(
                    lease_ids=[s.lease_id for s in some if s.lease_id],
                    request_ids=[s.request_id for s in some if not s.lease_id],
                )
                for peer in remote.peers:
                    self._dialer.calls.tell(peer, renew)

    def _look(self, request_id: str, watch: _Renewal) -> None:
        """Report a request that is to be reported, once it is computed."""
        if not watch.reports or watch.remote.state is PeerState.GREETING:
            return
        if watch.asked is None and watch.remote.state is PeerState.READY:
            deadline = self._clock() + watch.source.wait_s
            watch.asked = self.open(watch.remote.peers[0], request_id, watch.source, deadline)
        if watch.asked is None or watch.asked.reply or watch.asked.error:
            watch.reports = False
            self._computed.add(request_id)


def _batched(items: list[Source], size: int) -> Iterator[list[Source]]:
    """``items`` in lists of at most ``size`` (itertools.batched, which Python 3.11 lacks)."""
    return (items[i : i + size] for i in range(0, len(items), size))
