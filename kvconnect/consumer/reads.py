"""How the ranks of fetches are read: on the path that costs less, and on the other once it failed.

* The paths of a rank stand in for each other once in a fetch. Trying again for longer costs the
  request more than prefilling here would.
* Which fetches there are, how far each has come and when one has failed is `Fetcher`'s business.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvconnect.consumer.failures import FailureCause
from kvconnect.consumer.remote import ConsumerContext, PeerPath, Remotes
from kvconnect.consumer.stage import ChunkReceiver
from kvconnect.errors import GeometryError
from kvconnect.stats import PeerRead, Stats, labelled
from kvconnect.transport.base import Done, Op, TransferId, Work

if TYPE_CHECKING:
    from kvconnect.consumer.fetch import FetchState
    from kvconnect.consumer.follow import RankTables

logger = logging.getLogger(f"vllm.{__name__}")


class RankReads:
    """All reads of one rank's fetches."""

    def __init__(
        self,
        context: ConsumerContext,
        remotes: Remotes,
        stats: Stats,
        fail: Callable[["FetchState", str, FailureCause], None],
    ) -> None:
        """``fail`` ends a fetch, of which a rank cannot be read."""
        self._context = context
        self._remotes = remotes
        self._stats = stats
        self._fail = fail
        self.begin_anew: Callable[[FetchState, int], bool] = lambda *_: False
        """Whether a rank that ended the lease is read anew; set by who asks ranks for blocks."""
        self._direct: dict[TransferId, FetchState] = {}
        self._receiving: set[str] = set()  # requests with chunks to come

    @property
    def running(self) -> bool:
        """Whether the transport has work of ours."""
        return bool(self._direct or self._receiving)

    def fetch_of(self, transfer_id: TransferId) -> "FetchState | None":
        """The fetch that a transfer which has ended was for; None if it was no direct read."""
        return self._direct.pop(transfer_id, None)

    def no_chunks(self, request_id: str) -> None:
        """No chunk is to come for a request."""
        self._receiving.discard(request_id)

    def done(self, fetch: "FetchState", done: Done) -> None:
        """Take in a direct read that ended; of a failed one, begin to read on the other path."""
        index = fetch.transfers.pop(done.transfer_id)
        path = fetch.remote.paths[index]
        assert path is not None
        if done.error is None:
            path.was_read = True
            self._stats.transfer(done)
            self._measured(fetch, index, False, done.nbytes, done.wire_s)
        elif fetch.is_reading:
            self._not_read(fetch, index, path, done.error)

    def start(self, fetch: "FetchState", index: int, staged: bool | None = None) -> None:
        """Begin to read a rank on this path; None: on the one that costs less."""
        path, told = fetch.remote.paths[index], fetch.told[index]
        assert path is not None
        try:
            if staged is None:
                found = path.choose_staged(told.tables, fetch.order.blocks, told.stretch)
                staged, fetch.expected[index] = found
                staged = fetch.fell_back.get(index, staged)
            fetch.path = _name(staged)
            if staged:
                self._start_receiver(fetch, index, path)
            else:
                self._submit(fetch, index, path, told)
        except (GeometryError, IndexError) as e:
            error = f"peer {fetch.remote.peers[index]}: {e}"
            self._fail(fetch, error, FailureCause.GEOMETRY)

    def _submit(self, fetch: "FetchState", index: int, path: PeerPath, told: "RankTables") -> None:
        route = path.route
        assert route is not None
        chosen = route.select(told.tables, fetch.order.blocks, told.stretch)
        if not len(chosen.src):
            return
        fetch.began[index] = self._context.clock()
        work = Work(
            op=Op.READ,
            peer=fetch.remote.name_of(index),
            local=route.dst,
            local_index=chosen.dst,
            remote=route.src,
            remote_index=chosen.src,
            nbytes=chosen.nbytes,
        )
        transfer_id = self._context.transport.submit(work)
        fetch.transfers[transfer_id], self._direct[transfer_id] = index, fetch

    def _not_read(self, fetch: "FetchState", index: int, path: PeerPath, error: str) -> None:
        """A direct read failed: stage instead."""
        peer = fetch.remote.peers[index]
        error = f"read from {fetch.remote.name_of(index)}: {error}"
        path.costs.failed(False, self._context.clock() - fetch.began[index])
        if path.staged is None or index in fetch.fell_back:
            if self._context.mode == "direct":
                error += "; where hosts cannot read each other's memory, transfer_mode must be auto"
            self._fail(fetch, error, FailureCause.TRANSFER)
            # its transport may have been made anew: learn of that by greeting it again
            self._context.dialer.fail(peer, f"a read failed: {error}")
            return
        if path.was_read:
            fetch.remote.greet_anew(error)
            self._remotes.look_again()
        self._fall_back(fetch, index, error, FailureCause.TRANSFER, staged=True)

    def _not_staged(self, fetch: "FetchState", index: int, receiver: ChunkReceiver) -> None:
        """A staged transfer failed, and touches our blocks no more: read directly instead."""
        path = fetch.remote.paths[index]
        assert path is not None
        if receiver.lease_is_over and self.begin_anew(fetch, index):
            return
        if receiver.only_this_path:
            path.costs.failed(True, self._context.clock() - fetch.began[index])
        if not receiver.only_this_path or path.route is None or index in fetch.fell_back:
            self._fail(fetch, receiver.error, receiver.cause)
        else:
            if receiver.cause is FailureCause.CHECKSUM:  # no load failed by it
                self._stats.count("num_checksum_failures")
            self._fall_back(fetch, index, receiver.error, receiver.cause, staged=False)

    def _fall_back(
        self, fetch: "FetchState", index: int, error: str, cause: FailureCause, staged: bool
    ) -> None:
        fetch.fell_back[index] = staged
        self._stats.count("num_fallbacks")
        self._stats.count(
            labelled("num_fallbacks_to", "staged" if staged else "direct", cause.label)
        )
        logger.warning(
            "request %s: the other path is taken to peer %s: %s",
            fetch.order.request_id,
            fetch.remote.peers[index],
            error,
        )
        self.start(fetch, index, staged)

    def _start_receiver(self, fetch: "FetchState", index: int, path: PeerPath) -> None:
        assert path.staged is not None
        hello = self._context.transport.hello()
        stretch = fetch.told[index].stretch
        receiver = ChunkReceiver(
            path.staged, fetch.order, hello, fetch.deadline, stretch, self._asked_again
        )
        if not receiver.done:
            fetch.receivers[index], fetch.began[index] = receiver, self._context.clock()
            self._receiving.add(fetch.order.request_id)

    def _asked_again(self, why: str) -> None:
        self._stats.count(labelled("num_retries", why))

    def receive(self, fetch: "FetchState") -> None:
        """Move the staged transfers of a fetch on."""
        for index, receiver in list(fetch.receivers.items()):
            receiver.advance(fetch.told[index].lease_id, self._context.rank)
            if receiver.error and not receiver.touches_blocks:
                receiver.abandon()
                del fetch.receivers[index]
                self._not_staged(fetch, index, receiver)
            elif receiver.done:
                del fetch.receivers[index]
                self._stats.count("num_chunks", receiver.chunks)
                seconds = self._context.clock() - fetch.began[index]
                self._stats.transfer(Done(0, None, receiver.nbytes, receiver.chunks, 0.0, seconds))
                self._measured(fetch, index, True, receiver.nbytes, seconds)
            if not fetch.is_reading:
                return

    def _measured(
        self, fetch: "FetchState", at: int, staged: bool, nbytes: int, seconds: float
    ) -> None:
        """For the next choice, and for people to see."""
        if path := fetch.remote.paths[at]:
            path.costs.measured(staged, fetch.expected.get(at, 0), nbytes, seconds)
            self._stats.path(staged, path.costs)
            request_id, peer = fetch.order.request_id, str(fetch.remote.peers[0])
            now = self._context.clock()
            read = PeerRead(request_id, _name(staged), peer, nbytes, now - seconds, now)
            self._stats.read(read)


def _name(staged: bool) -> str:
    """Of a path, as metrics and the log have it."""
    return "staged" if staged else "direct"
