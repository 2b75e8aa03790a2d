"""The consumer's half of a mover: fills our blocks from leased blocks of remote engines.

A fetch is GREETING → OPENING → READING → CLOSING → ended. Its data counts only if every rank
that was read says, after the read, that the lease still stood: late is failed. Whatever goes
wrong moves it to FAILING, where it stays until no transport can touch our blocks any more.

* An id is reported exactly once, and only if it was ordered by a Fetch.
* Every remote rank, read or not, gets a Close when we are done with its blocks.
* Its lease is renewed until it ends (`kvconnect.consumer.renew`). A request that fetches nothing
  is no business of this module (`kvconnect.consumer.release`).

Why it is so, and what was rejected:

* We read, they do not write into our blocks. Bytes that arrive too late by a read are thrown away
  by whoever asked for them; a late write cannot be unwritten, and the block may have a new owner.
  What is written to us is chunks, into staging slots that are nobody's KV.
* Whether the lease stood is asked after the read, of every rank that was read, and counts for all
  of it. Asking before proves nothing; checking clocks compares two machines'; a checksum of every
  block would find changed bytes, not a block that honestly holds another prompt by now.
* FAILING is a phase, not an exit: blocks that are reported are freed by vLLM and written by
  others. A fetch is reported once no read of ours runs and no scatter of ours does; a read that
  does not end by its deadline is fenced by dropping the peer, which ends all reads from it.
* A phase machine that `tick` advances, not a callback for each answer or a coroutine for each
  fetch: the deadline, an abort, a peer's end and an answer may come in any order, and there is one
  place that looks at all of them. Tests step it with a clock that stands still.
* A failure belongs to a fetch and says why in one line with the request's id. What is left of a
  partial read is not used: which blocks of it were whole is known only once the lease was checked.
"""

import contextlib
import enum
from dataclasses import dataclass, field

from kvconnect.consumer.failures import FailureCause, count_failure, log_failure, refusal
from kvconnect.consumer.follow import Follower, RankTables
from kvconnect.consumer.reads import RankReads
from kvconnect.consumer.release import Releaser
from kvconnect.consumer.remote import ConsumerContext, Remote, Remotes
from kvconnect.consumer.renew import LeaseRenewer
from kvconnect.consumer.stage import ChunkReceiver
from kvconnect.consumer.wake_queue import SlotQueue, WakeQueue
from kvconnect.control import wire
from kvconnect.control.calls import Call
from kvconnect.control.peer import PeerState
from kvconnect.errors import contained
from kvconnect.orders import Cancel, Fetch, Release
from kvconnect.stats import Stats
from kvconnect.transport.base import Done, TransferId


class Phase(enum.Enum):
    """How far a fetch has come."""

    GREETING = "greeting"
    OPENING = "opening"
    READING = "reading"
    CLOSING = "closing"
    FAILING = "failing"


@dataclass
class FetchState:
    """One fetch, until it is reported."""

    order: Fetch
    remote: Remote
    deadline: float
    phase: Phase = Phase.GREETING
    error: str = ""
    cause: FailureCause = FailureCause.TRANSFER
    path: str = ""  # that was begun last: direct or staged
    aborted: bool = False
    opens: dict[int, Call] = field(default_factory=dict)  # index of the rank → call
    closes: dict[int, Call] = field(default_factory=dict)
    transfers: dict[TransferId, int] = field(default_factory=dict)  # running → index of the rank
    receivers: dict[int, ChunkReceiver] = field(default_factory=dict)  # index of the rank → running
    began: dict[int, float] = field(default_factory=dict)  # index of the rank → when, by its path
    fell_back: dict[int, bool] = field(default_factory=dict)  # whose path has failed → staged now?
    expected: dict[int, int] = field(default_factory=dict)  # index of the rank → descriptors
    told: dict[int, RankTables] = field(default_factory=dict)  # index of the rank → its blocks

    @property
    def is_reading(self) -> bool:
        return self.phase is Phase.READING

    def reads(self, index: int) -> bool:
        """Whether something reads from a rank now."""
        return index in self.receivers or index in self.transfers.values()

    def ends_at(self, load_timeout_s: float) -> float:
        """When it has failed; sooner while a direct read runs, which prefill does not hold up."""
        began = [self.began[index] for index in self.transfers.values()]
        return min([self.deadline, *(at + load_timeout_s for at in began)])

    @property
    def has_all(self) -> bool:
        """Whether every rank has told of all its blocks."""
        return len(self.told) == len(self.opens) and not any(t.more for t in self.told.values())

    def lease_id_at(self, index: int) -> str | None:
        """That rank's lease id; failing that, another rank's; failing that, the ticket's."""
        asked = [self.opens[index]] if index in self.opens else []
        for call in (*asked, *self.opens.values()):
            if isinstance(call.reply, wire.Opened):
                return call.reply.lease_id
        return self.order.source.lease_id


class Fetcher:
    """All fetches of one rank."""

    def __init__(
        self,
        context: ConsumerContext,
        remotes: Remotes,
        renewer: LeaseRenewer,
        releaser: Releaser,
        stats: Stats,
        load_timeout_s: float,
    ) -> None:
        """``load_timeout_s``: from a Fetch until its KV must have arrived."""
        self._dialer = context.dialer
        self._transport = context.transport
        self._slots = context.slots
        self._remotes = remotes
        self._renewer = renewer
        self._releaser = releaser
        self._clock = context.clock
        self._stats = stats
        self._load_timeout_s = load_timeout_s
        self.wake_queue = WakeQueue(context.clock)
        self._fetches: dict[str, FetchState] = {}
        self._reads = RankReads(context, remotes, stats, self._fail)
        self._follower = Follower(context, renewer, self._reads, self._fail)
        self._waiting = SlotQueue()
        self._received: set[str] = set()
        self._failed: dict[str, str] = {}

    @property
    def reading(self) -> bool:
        """Whether the transport has work of ours."""
        return self._reads.running

    def held(self) -> dict[str, int]:
        """See `Mover.held`."""
        fetches = list(self._fetches.values())
        return {
            "fetches": len(fetches),
            "direct_reads": sum(len(fetch.transfers) for fetch in fetches),
            "staged_reads": sum(len(fetch.receivers) for fetch in fetches),
        }

    def fetch(self, order: Fetch) -> None:
        """Begin a fetch."""
        remote = self._remotes.of(order.source)
        deadline = self._clock() + order.source.wait_s + self._load_timeout_s
        remote.fetches += 1
        self._fetches[order.request_id] = FetchState(order, remote, deadline)
        self.wake_queue.add(order.request_id, remote)
        self.wake_queue.wake_at(deadline, order.request_id)

    def cancel(self, order: Cancel) -> None:
        """The request ended; its fetch ends as failed once its reads have drained."""
        if fetch := self._fetches.get(order.request_id):
            fetch.aborted = True
            self._fail(fetch, "the request was aborted", FailureCause.ABORTED)
            self.wake_queue.wake(order.request_id)

    def done(self, done: Done) -> None:
        """Take in a transfer that ended."""
        if (fetch := self._reads.fetch_of(done.transfer_id)) is not None:
            self.wake_queue.wake(fetch.order.request_id)
            with self._contained(fetch):
                self._reads.done(fetch, done)

    def tick(self) -> None:
        """Move on, as far as they go, the fetches of which something has changed."""
        if self._slots is not None:
            self._slots.tick()
            self.wake_queue.wake(*self._waiting.take(self._slots))
        for request_id in self.wake_queue.take():
            if (fetch := self._fetches.get(request_id)) is None:
                continue
            if self._is_done(fetch):
                del self._fetches[request_id]
                self._reads.no_chunks(request_id)
                self.wake_queue.remove(request_id, fetch.remote)
                fetch.remote.fetches -= 1
                self._renewer.forget(request_id)
                self._releaser.done(fetch.order.source)
                self._report(request_id, fetch)
            elif self._goes_on(request_id, fetch):
                self.wake_queue.wake(request_id)

    def _goes_on(self, request_id: str, fetch: FetchState) -> bool:
        """Whether to look at it in every step; if not, it waits for what wakes it."""
        if not fetch.receivers:
            self._reads.no_chunks(request_id)
            return fetch.phase is Phase.FAILING and not fetch.transfers
        waits = all(receiver.waits_for_slot for receiver in fetch.receivers.values())
        if fetch.phase is not Phase.READING or not waits:
            return True
        for index in fetch.receivers:
            self._waiting.add(fetch.remote.peers[index].address, request_id)
        return False

    def take(self) -> tuple[set[str], dict[str, str]]:
        """Requests whose fetch ended, and of those the failed ones; each is reported once."""
        taken = self._received, self._failed
        self._received, self._failed = set(), {}
        return taken

    def _contained(self, fetch: FetchState) -> contextlib.AbstractContextManager[None]:
        """Let what is unexpected fail this fetch alone."""

        def end(why: str) -> None:
            self._stats.count("num_unexpected_errors")
            self._fail(fetch, why, FailureCause.UNEXPECTED)

        return contained(f"fetch of request {fetch.order.request_id}", end)

    def _is_done(self, fetch: FetchState) -> bool:
        if fetch.phase is Phase.FAILING:
            # nothing may go wrong here: blocks must not be given back before nobody touches them
            return self._advance(fetch)
        with self._contained(fetch):
            return self._advance(fetch)
        return False

    def _report(self, request_id: str, fetch: FetchState) -> None:
        self._received.add(request_id)
        if not fetch.error and any(told.stretch.since for told in fetch.told.values()):
            self._stats.count("num_streamed_transfers")
        if fetch.error and not fetch.aborted:
            self._failed[request_id] = fetch.error
            if not fetch.order.chained:
                log_failure(fetch)

    # -- one fetch ----------------------------------------------------------------------

    def _advance(self, fetch: FetchState) -> bool:
        """Move ``fetch`` on; True once it has ended."""
        self._check_time(fetch)
        if fetch.phase is not Phase.FAILING:
            self._check(fetch)
        if fetch.phase is Phase.GREETING and fetch.remote.state is PeerState.READY:
            self._open(fetch)
        if fetch.phase is Phase.OPENING and all(c.reply for c in fetch.opens.values()):
            fetch.phase = Phase.READING
        if fetch.phase is Phase.READING:
            self._reads.receive(fetch)
            if self._follower.go_on(fetch):
                fetch.deadline = min(fetch.deadline, self._clock() + self._load_timeout_s)
            ends_at = fetch.ends_at(self._load_timeout_s)
            self.wake_queue.wake_at(ends_at, fetch.order.request_id)
        running = fetch.transfers or fetch.receivers
        if fetch.phase is Phase.READING and not running and fetch.has_all:
            self._close(fetch)
            fetch.phase = Phase.CLOSING
        if fetch.phase is Phase.CLOSING:
            return all(c.reply for i, c in fetch.closes.items() if i in fetch.opens)
        if fetch.phase is Phase.FAILING and not fetch.transfers:
            if any(receiver.touches_blocks for receiver in fetch.receivers.values()):
                return False
            for receiver in fetch.receivers.values():
                receiver.abandon()
            fetch.receivers.clear()
            unknown = fetch.order.source.wait_s > 0 and not fetch.told  # perhaps, at the source
            if fetch.aborted and (unknown or fetch.remote.state is PeerState.GREETING):
                self._releaser.release(Release(fetch.order.request_id, fetch.order.source))
            elif not fetch.closes:  # else it failed while closing
                self._close(fetch)
            return True
        return False

    def _check(self, fetch: FetchState) -> None:
        """Fail a fetch that cannot succeed any more."""
        remote = fetch.remote
        remote.advance()
        for index, call in (*fetch.opens.items(), *fetch.closes.items()):
            late = isinstance(call.reply, wire.Closed) and not call.reply.stood
            if call.error and index in fetch.opens:
                self._fail(fetch, call.error, FailureCause.PEER_LOST)
            elif isinstance(call.reply, wire.Refused):
                self._fail(fetch, *refusal(remote.peers[index], call.reply))
            elif late and index in fetch.opens:
                self._stats.count("num_late_reads")
                error = "the lease was over before the read had ended"
                self._fail(fetch, error, FailureCause.LATE)
        if remote.state is PeerState.FAILED:
            greeting = fetch.phase is Phase.GREETING
            cause = FailureCause.HANDSHAKE if greeting else FailureCause.PEER_LOST
            self._fail(fetch, remote.error, cause)

    def _check_time(self, fetch: FetchState) -> None:
        if self._clock() < fetch.ends_at(self._load_timeout_s):
            return
        opened = fetch.phase in (Phase.READING, Phase.CLOSING) and fetch.has_all
        waited = 0.0 if opened or fetch.transfers else fetch.order.source.wait_s
        error = f"not loaded within {self._load_timeout_s + waited:g} s"
        self._fail(fetch, error, FailureCause.TIMEOUT)
        if fetch.transfers and fetch.remote.state is not PeerState.FAILED:
            # the fence: without it a read could still land in blocks that get a new owner
            fetch.remote.fail("a read did not end in time")

    def _open(self, fetch: FetchState) -> None:
        source = fetch.order.source
        if source.lease_id and any(source.lease_id in p.gone for p in fetch.remote.peers):
            self._fail(fetch, "the lease is over", FailureCause.LEASE_OVER)
            return
        for index, path in enumerate(fetch.remote.paths):
            if path is not None:
                self._follower.open(fetch, index)
        fetch.phase = Phase.OPENING

    def _close(self, fetch: FetchState) -> None:
        """Tell every rank of the source that we are done with its blocks."""
        order = fetch.order
        fetch.closes = self._releaser.close(
            order.request_id, order.source, fetch.remote, fetch.lease_id_at
        )

    def _fail(self, fetch: FetchState, error: str, cause: FailureCause) -> None:
        if fetch.phase is Phase.FAILING:
            return
        fetch.phase, fetch.error, fetch.cause = Phase.FAILING, error, cause
        if not fetch.aborted:
            count_failure(self._stats, cause)
        asked = [told.asked for told in fetch.told.values() if told.asked]
        for call in (*fetch.opens.values(), *asked):
            self._dialer.calls.cancel(call)
        for transfer_id in fetch.transfers:
            self._transport.cancel(transfer_id)
