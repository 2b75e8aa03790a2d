"""Tells a source that a lease is not needed any more.

* A release is of a request that reads nothing: its prompt is cached here already, or it ended
  while it waited. It is reported to nobody.
* A Close of a lease that the source does not know yet is lost on it. Where a router asks both
  engines at once, a release therefore first asks to open the lease, with no prompt: the source
  refuses that as soon as there is a lease to close.
* Whoever else waits for a lease or reads it keeps it: only the last one's Close is final.
* Samples of one prompt share its lease (vLLM's ``n`` > 1) and arrive one by one, so none of them
  knows that it is the last. The lease is released `SAMPLES_S` after the last that is known.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvconnect.consumer.remote import ConsumerContext, Remote, Remotes
from kvconnect.consumer.renew import LeaseRenewer
from kvconnect.consumer.wake_queue import WakeQueue
from kvconnect.control import wire
from kvconnect.control.calls import Call
from kvconnect.control.peer import PeerState
from kvconnect.deadlines import Deadlines, soonest
from kvconnect.orders import LeaseKey, Release, Source

CLOSE_TIMEOUT_S = 10.0
SAMPLES_S = 1.0


@dataclass
class _Releasing:
    source: Source
    remote: Remote
    deadline: float
    opens: list[Call] | None = None

    def lease_id_at(self, index: int) -> str | None:  # noqa: ARG002 - a fetch knows each rank's
        return self.source.lease_id


class Releaser:
    """All releases of one rank."""

    def __init__(
        self,
        context: ConsumerContext,
        remotes: Remotes,
        renewer: LeaseRenewer,
        ranks: int,
        timeout_s: float,
    ) -> None:
        """``ranks``: how many of our engine close each lease; ``timeout_s``: see `Release`."""
        self._dialer = context.dialer
        self._rank = context.rank
        self._remotes = remotes
        self._renewer = renewer
        self._clock = context.clock
        self._ranks = ranks
        self._timeout_s = timeout_s
        self.wake_queue = WakeQueue(context.clock)
        self._releasing: dict[str, _Releasing] = {}
        self._shared: dict[LeaseKey, Source] = {}  # leases of samples that are not renewed any more
        self._shared_due: Deadlines[LeaseKey] = Deadlines()  # when they are released

    def __len__(self) -> int:
        return len(self._releasing) + len(self._shared)

    def release(self, order: Release) -> None:
        """Let a lease go that the request does not read."""
        if order.source.samples:
            self._renewer.forget(order.request_id)
            self.done(order.source)
            return
        remote = self._remotes.of(order.source)
        deadline = self._clock() + order.source.wait_s + self._timeout_s
        self._releasing[order.request_id] = _Releasing(order.source, remote, deadline)
        self.wake_queue.add(order.request_id, remote)
        self.wake_queue.wake_at(deadline, order.request_id)

    def close(
        self,
        request_id: str,
        source: Source,
        remote: Remote,
        lease_id_at: Callable[[int], str | None],
    ) -> dict[int, Call]:
        """Tell every rank of a source, read or not, that a request is done with its blocks.

        Returns the calls by the index of the rank. ``lease_id_at``: the lease's id there.
        """
        self._renewer.closing(request_id)
        final = not (source.samples or self._renewer.waits_for(source, but=request_id))

        def close_of(lease_id: str | None) -> Callable[[int], wire.Close]:
            return lambda seq: wire.Close(
                seq=seq,
                lease_id=lease_id,
                request_id=source.request_id,
                reader=self._rank,
                readers=self._ranks,
                final=final,
            )

        deadline = self._clock() + CLOSE_TIMEOUT_S
        return {
            index: self._dialer.calls.send(
                peer, close_of(lease_id_at(index)), (wire.Closed,), deadline, request_id
            )
            for index, peer in enumerate(remote.peers)
        }

    def done(self, source: Source) -> None:
        """A request is done with the lease; of samples, it may have been the last one."""
        if source.samples and not self._renewer.waits_for(source):
            self._shared[source.lease] = source
            self._shared_due.set(source.lease, self._clock() + SAMPLES_S)

    def tick(self) -> None:
        """Move every release on as far as it goes."""
        for lease in self._shared_due.take(self._clock()):
            source = self._shared.pop(lease)
            if not self._renewer.waits_for(source):  # else another has come, and ends it
                name = f"samples of {source.request_id}"
                self.release(Release(name, replace(source, samples=False)))
        for request_id in self.wake_queue.take():
            releasing = self._releasing.get(request_id)
            if releasing is not None and self._can_close(request_id, releasing):
                for call in releasing.opens or ():
                    self._dialer.calls.cancel(call)
                self.close(request_id, releasing.source, releasing.remote, releasing.lease_id_at)
                del self._releasing[request_id]
                self.wake_queue.remove(request_id, releasing.remote)
                self._renewer.forget(request_id)

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return soonest(self._shared_due.next(), self.wake_queue.next_deadline())

    def _can_close(self, request_id: str, releasing: _Releasing) -> bool:
        """Whether to wait no longer: for the greeting, or for the source to know the lease."""
        remote, source = releasing.remote, releasing.source
        remote.advance()
        if self._clock() >= releasing.deadline or remote.state is PeerState.FAILED:
            return True
        if remote.state is PeerState.GREETING:
            return False
        if not source.wait_s:
            return True
        if releasing.opens is None:
            releasing.opens = [
                self._renewer.open(peer, request_id, source, releasing.deadline)
                for peer, path in zip(remote.peers, remote.paths, strict=True)
                if path is not None
            ]
        return not releasing.opens or any(call.reply or call.error for call in releasing.opens)
