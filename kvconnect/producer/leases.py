"""The producer's half of a mover: answers readers of our leased blocks.

* A reader that is early (its lease is promised, not granted) is parked and answered when the
  lease is granted or withdrawn; those of one link are bounded, and so are links. One that is
  earlier still, because the router asked both engines at once and the request is not here yet,
  waits in `EarlyReaders`.
* A reader whose prompt is not the leased one is refused: a ticket or a request id alone is
  not enough to read another prompt's KV.
* A repeated Close, and only that very message, gets the answer of the first: another reader's
  Close of a lease that is over must hear that it is late.
"""

import hmac
import logging
from collections import OrderedDict
from collections.abc import Sequence

from kvconnect.control import wire
from kvconnect.control.channel import Link
from kvconnect.control.listener import Incoming, Listener
from kvconnect.deadlines import soonest
from kvconnect.lease import Clock, LeaseBook, LeaseState, Terms
from kvconnect.orders import Progress
from kvconnect.producer.direct import DirectReaders
from kvconnect.producer.promises import OpenPromises
from kvconnect.producer.waiting import EarlyReaders, ParkedReaders

logger = logging.getLogger(f"vllm.{__name__}")

REMEMBERED_CLOSES = 4096


class LeaseServer:
    """Leases of one rank, and the messages about them."""

    def __init__(self, listener: Listener, clock: Clock, max_duration_s: float) -> None:
        self._listener = listener
        listener.knows = self.knows
        self._clock = clock
        self._book = LeaseBook(clock, max_duration_s)
        self._early = EarlyReaders(clock)
        self._parked = ParkedReaders(clock)
        self._promises = OpenPromises()
        self._direct = DirectReaders()
        self._freed: set[str] = set()
        self._closed: OrderedDict[tuple[Link, int], bool] = OrderedDict()  # (…, seq) → stood
        self.expired = 0
        """Leases that ended by expiry since this was last read and set to 0."""
        self.late = 0
        """Closes that came after their lease was over, likewise."""

    @property
    def reading(self) -> bool:
        """Whether somebody may be reading our memory itself: the transport needs progress."""
        return self._direct.reading

    def held(self) -> dict[str, int]:
        """See `Mover.held`."""
        return {
            "leases": len(self._book),
            "promises": self._book.promises,
            "parked_readers": len(self._parked),
            "early_readers": len(self._early),
        }

    def knows(self, lease: str) -> bool:
        """Whether a lease is promised or stands, by its id or its name."""
        lease_id = self._book.find(lease) or lease
        return self._book.standing(lease_id) is not LeaseState.GONE

    def promise(self, name: str, lease_id: str) -> None:
        """A request that will be leased is being computed."""
        self._book.promise(name, lease_id)
        self._listener.known(lease_id, name)
        for link, message in self._early.take(name):
            self._park(link, message, lease_id)

    def progress(self, order: Progress) -> None:
        """More of a promised request's blocks are complete; one that is over is late."""
        if self._book.standing(order.lease_id) is LeaseState.PROMISED:
            self._promises.progress(order)
            self._answer_parked(order.lease_id, streaming=True)

    def grant(self, terms: Terms) -> None:
        """Lease a request's blocks, and answer whoever waits for them."""
        reading, closes = self._promises.end(terms.lease_id)
        self._book.grant(terms, reading)
        self._listener.known(terms.lease_id, terms.name or terms.request_id)
        for link, message in self._early.take(terms.name or terms.request_id):
            self._open(link, message)
        self._answer_parked(terms.lease_id)
        for close in closes:  # were done with it before it was granted
            if freed := self._book.close(terms.lease_id, *close)[1]:
                self._freed.add(freed)

    def withdraw(self, lease_id: str, successor: str = "") -> None:
        """A promised request ended without KV, or is promised as ``successor`` from now on."""
        self._book.withdraw(lease_id)
        _, closes = self._promises.end(lease_id)
        self._direct.end(lease_id)
        if self._book.standing(successor) is LeaseState.PROMISED:
            for close in closes:
                self._promises.close(successor, *close)
        for link, message in self._parked.take(lease_id):
            if successor and isinstance(message, wire.Open):
                self._open(link, message, successor)
            else:
                why = "the request ended without KV to hand over, or is computed anew"
                self._refuse(link, message, "withdrawn", why)

    def release_own(self, lease_id: str | None, name: str) -> None:
        """The reader of a lease is this very engine: the lease ends, if nobody else reads it."""
        lease_id = lease_id or self._book.find(name)
        if lease_id and (freed := self._book.release_unread(lease_id)):
            self._freed.add(freed)

    def revoke(self, lease_ids: Sequence[str]) -> None:
        """The blocks are wanted back: these leases end now, though somebody may be reading."""
        self._freed.update(freed for one in lease_ids if (freed := self._book.revoke(one)))
        for lease_id in lease_ids:
            self._direct.end(lease_id)

    def receive(self, incoming: Incoming) -> None:
        """Handle a message from a peer that dialled us."""
        link, message = incoming
        if isinstance(message, wire.Open):
            self._open(link, message)
        elif isinstance(message, wire.Follow):
            self._follow(link, message)
        elif isinstance(message, wire.Close):
            self._close(link, message)
        elif isinstance(message, wire.Renew):
            found = [g for r in message.request_ids if (g := self._book.find(r))]
            wanted = message.lease_ids + found
            gone = [g for g in wanted if self._book.renew(g) is LeaseState.GONE]
            if gone:
                self._listener.answer(link, wire.Gone(lease_ids=gone))

    def opened(self, lease_id: str, reader: tuple[Link, int]) -> Terms | None:
        """What is leased, if the lease stands and this reader of it is between open and close.

        Of a promised lease: what of it is complete by now.
        """
        if self._promises.is_open(lease_id, reader):
            return self._promises.terms(lease_id)
        is_open = self._book.is_open(lease_id, reader)
        return self._book.terms(lease_id) if is_open else None

    def tick(self) -> None:
        """End the leases that are over."""
        for lease_id, request_id in self._book.expire():
            logger.warning("request %s: lease expired, its blocks are freed", request_id)
            self.expired += 1
            self._freed.add(request_id)
            self._direct.end(lease_id)
        for link, message in self._early.tick():
            self._refuse(link, message, "gone", "the request never arrived at this engine")

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return soonest(self._book.next_deadline(), self._early.next_deadline())

    def take_freed(self) -> set[str]:
        """Requests whose blocks may be freed, each reported once."""
        freed, self._freed = self._freed, set()
        return freed

    def _open(self, link: Link, message: wire.Open, lease_id: str | None = None) -> None:
        lease_id = lease_id or self._lease_id(message)
        standing = self._book.standing(lease_id) if lease_id else LeaseState.GONE
        told = self._promises.terms(lease_id) if lease_id and message.stream else None
        if lease_id:
            self._promises.comes(lease_id, (link, message.reader))
        if lease_id and standing is LeaseState.PROMISED and told is None:
            self._park(link, message, lease_id)
            return
        if not lease_id and self._may_be_early(link, message):
            return
        if not lease_id or standing is LeaseState.GONE:
            self._refuse(link, message, "gone", "no such lease, or it is over")
            return
        terms = told or self._book.terms(lease_id)
        known = terms.digest_of(message.tokens)
        if known is None or not hmac.compare_digest(known, message.digest):
            seen = f"{terms.tokens} tokens of another prompt than the reader's {message.tokens}"
            self._refuse(link, message, "another prompt", f"the lease holds {seen}")
            return
        reader = link, message.reader
        if told is None:
            self._book.open(lease_id, reader)
            self._book.renew(lease_id)
        else:
            self._promises.open(lease_id, reader)
        if message.direct:
            self._direct.open(lease_id, reader)
        tables, more = tuple(map(tuple, terms.tables)), told is not None
        opened = wire.Opened(seq=message.seq, lease_id=lease_id, tables=tables, more=more)
        self._listener.answer(link, opened)

    def _follow(self, link: Link, message: wire.Follow) -> None:
        """A reader has read all that it was told of."""
        lease_id, reader = message.lease_id, (link, message.reader)
        terms = self.opened(lease_id, reader)
        if terms is None:
            self._refuse(link, message, "gone", "no such lease that you opened, or it is over")
            return
        if len(message.have) != len(terms.tables):
            detail = f"it says what it has of {len(message.have)} groups, of {len(terms.tables)}"
            self._refuse(link, message, "unusable", detail)
            return
        tables = tuple(tuple(t[n:]) for t, n in zip(terms.tables, message.have, strict=True))
        more = self._promises.is_told_of(lease_id)
        waits = more and not any(tables)
        self._direct.told(lease_id, reader, not waits)
        if waits:
            self._park(link, message, lease_id)
        else:
            computed = wire.Computed(seq=message.seq, tables=tables, more=more)
            self._listener.answer(link, computed)

    def _answer_parked(self, lease_id: str, streaming: bool = False) -> None:
        for link, message in self._parked.take(lease_id, streaming):
            if isinstance(message, wire.Open):
                self._open(link, message, lease_id)
            else:
                self._follow(link, message)

    def _close(self, link: Link, message: wire.Close) -> None:
        stood = self._closed.get((link, message.seq))
        if stood is None:
            stood = self._closed[link, message.seq] = self._end_reading(link, message)
            if len(self._closed) > REMEMBERED_CLOSES:
                self._closed.popitem(last=False)
        self._listener.answer(link, wire.Closed(seq=message.seq, stood=stood))

    def _end_reading(self, link: Link, message: wire.Close) -> bool:
        """Whether the lease still stood."""
        lease_id = self._lease_id(message)
        if lease_id is None:
            self._early.forget(message.request_id or "", link, message.reader)
            return False
        reader = (link, message.reader)
        if not message.final:
            granted = self._book.standing(lease_id) is LeaseState.GRANTED
            return granted or self.opened(lease_id, reader) is not None
        self._parked.forget(lease_id, link, message.reader)
        self._direct.close(lease_id, reader)
        if self._book.standing(lease_id) is LeaseState.PROMISED:
            self._promises.close(lease_id, reader, message.reader, message.readers)
            return False
        stood, freed = self._book.close(lease_id, reader, message.reader, message.readers)
        if freed:
            self._freed.add(freed)
        self.late += not stood
        return stood

    def _lease_id(self, message: wire.Open | wire.Close) -> str | None:
        if message.lease_id is not None:
            return message.lease_id
        return self._book.find(message.request_id) if message.request_id else None

    def _may_be_early(self, link: Link, message: wire.Open) -> bool:
        """Whether the reader waits for a request that has not arrived."""
        over = self._book.is_over(message.request_id or "", message.digest)
        return not over and self._early.admit(link, message)

    def _park(self, link: Link, message: wire.Open | wire.Follow, lease_id: str) -> None:
        if not self._parked.park(link, message, lease_id):
            self._refuse(link, message, "busy", "too many of your readers wait here")

    def _refuse(
        self, link: Link, message: wire.Open | wire.Follow, cause: str, detail: str
    ) -> None:
        self._listener.answer(link, wire.Refused(seq=message.seq, cause=cause, detail=detail))
