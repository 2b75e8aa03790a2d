"""Reads of a lease that is still computed: what a rank has told, and what it is asked next.

* A rank is asked how far it is only when all that it told of has been read: until then it need
  not answer, and after that nothing of ours reads from it.
* What was read under a lease id counts if that lease is granted and stands when it is closed. A
  rank that does not know the id any more computes the prompt anew: it is opened by name once more,
  and all is read anew. Reads of before have ended by then, so none can land on those.
* A lease that is granted already is told of at once: the pull is the case without asking on.
* How long that may go on, and whatever else fails a fetch, is `Fetcher`'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvconnect.consumer.failures import LOST_LEASE, FailureCause, refusal
from kvconnect.consumer.reads import RankReads
from kvconnect.consumer.remote import ConsumerContext
from kvconnect.consumer.renew import LeaseRenewer
from kvconnect.control import wire
from kvconnect.control.calls import Call
from kvconnect.geometry.stretch import ALL, Stretch

if TYPE_CHECKING:
    from kvconnect.consumer.fetch import FetchState

MAX_BLOCKS_TOLD = 1 << 22  # in all groups: an Opened itself has fewer, by its bytes


@dataclass
class RankTables:
    """What one rank has told of a lease's blocks."""

    lease_id: str
    tables: list[list[int]]
    stretch: Stretch
    """What of it is being read, or was last."""
    more: bool
    """Whether there are blocks to come."""
    asked: Call | None = None
    """For more of them, once what was told is read."""

    @staticmethod
    def opened(reply: wire.Opened) -> "RankTables":
        """As it answers an Open."""
        stretch = Stretch(until=_lengths(reply.tables)) if reply.more else ALL
        return RankTables(reply.lease_id, list(map(list, reply.tables)), stretch, reply.more)

    def extend(self, computed: wire.Computed) -> None:
        """As it answers a Follow."""
        since = _lengths(self.tables)
        left = MAX_BLOCKS_TOLD - sum(since)
        for table, more in zip(self.tables, computed.tables, strict=False):
            table += more[:left]  # what is beyond is no prompt's
            left = max(left - len(more), 0)
        self.stretch = Stretch(since, _lengths(self.tables) if computed.more else None)
        self.more, self.asked = computed.more, None


class Follower:
    """What the ranks of one rank's fetches tell of their blocks, from opening a lease on."""

    def __init__(
        self,
        context: ConsumerContext,
        renewer: LeaseRenewer,
        reads: RankReads,
        fail: Callable[["FetchState", str, FailureCause], None],
    ) -> None:
        """``fail`` ends a fetch, of which a rank does not answer any more."""
        self._fail = fail
        self._calls = context.dialer.calls
        self._rank = context.rank
        self._renewer = renewer
        self._reads = reads
        reads.begin_anew = self.begin_anew

    def open(self, fetch: "FetchState", index: int) -> None:
        """Ask a rank to open the lease; where both engines were asked at once, early."""
        order, peer = fetch.order, fetch.remote.peers[index]
        path = fetch.remote.paths[index]
        fetch.opens[index] = self._renewer.open(
            peer,
            order.request_id,
            order.source,
            fetch.deadline,
            order.tokens,
            order.digest,
            stream=order.source.wait_s > 0,
            direct=path is not None and path.route is not None,
        )

    def go_on(self, fetch: "FetchState") -> bool:
        """Of each rank whose blocks were all read: read what it told since, or ask for more.

        Whether the last rank has told of its last block.
        """
        began = False
        for index, opened in list(fetch.opens.items()):
            if not fetch.is_reading:
                return False
            told = fetch.told.get(index)
            if told is None and isinstance(opened.reply, wire.Opened):
                told = fetch.told[index] = RankTables.opened(opened.reply)
                began = True
                self._reads.start(fetch, index)
            elif told is not None and (asked := told.asked) is not None:
                if asked.error:
                    self._fail(fetch, asked.error, FailureCause.PEER_LOST)
                elif isinstance(asked.reply, wire.Computed):
                    told.extend(asked.reply)
                    began = True
                    self._reads.start(fetch, index)
                elif isinstance(refused := asked.reply, wire.Refused):
                    self._refused(fetch, index, refused)
                    continue
            asks = told is not None and told.more and told.asked is None
            if told is not None and asks and fetch.is_reading and not fetch.reads(index):
                told.asked = self._ask(fetch, index, told)
        return began and fetch.has_all

    def begin_anew(self, fetch: "FetchState", index: int) -> bool:
        """Whether a rank that does not know the lease any more is to compute the prompt anew.

        Nothing of ours reads from it now.
        """
        if not fetch.told[index].more:
            return False
        del fetch.told[index]
        self.open(fetch, index)
        return True

    def _refused(self, fetch: "FetchState", index: int, refused: wire.Refused) -> None:
        if refused.cause in LOST_LEASE:  # the lease id is over, its name may not be
            self.begin_anew(fetch, index)
        else:
            self._fail(fetch, *refusal(fetch.remote.peers[index], refused))

    def _ask(self, fetch: "FetchState", index: int, told: RankTables) -> Call:
        lease_id, have = told.lease_id, _lengths(told.tables)
        return self._calls.send(
            fetch.remote.peers[index],
            lambda seq: wire.Follow(seq=seq, lease_id=lease_id, reader=self._rank, have=have),
            (wire.Computed, wire.Refused),
            fetch.deadline,
            fetch.order.request_id,
        )


def _lengths(tables: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(len, tables))
