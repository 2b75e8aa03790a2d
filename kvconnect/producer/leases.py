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
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvconnect.control import wire
from kvconnect.control.calls import MAX_RESEND_S
from kvconnect.control.channel import Link
from kvconnect.control.listener import Incoming, Listener
from kvconnect.deadlines import Deadlines, soonest
from kvconnect.lease import Clock, LeaseBook, LeaseState, Terms

logger = logging.getLogger(f"vllm.{__name__}")

MAX_PARKED = 1 << 14  # of one link, which is one rank of a decode engine
MAX_EARLY = 1 << 14  # likewise
MAX_WAIT_S = 60.0
SILENT_S = 3 * MAX_RESEND_S
REMEMBERED_CLOSES = 4096


class LeaseServer:
    """Leases of one rank, and the messages about them."""

    def __init__(self, listener: Listener, clock: Clock, max_duration_s: float) -> None:
        self._listener = listener
        listener.knows = self.knows
        self._clock = clock
        self._book = LeaseBook(clock, max_duration_s)
        self._early = EarlyReaders(clock)
        self._parked: dict[str, dict[tuple[Link, int], _Parked]] = {}
        self._parked_of: Counter[Link] = Counter()
        self._freed: set[str] = set()
        self._closed: OrderedDict[tuple[Link, int], bool] = OrderedDict()  # (…, seq) → stood
        self.expired = 0
        """Leases that ended by expiry since this was last read and set to 0."""
        self.late = 0
        """Closes that came after their lease was over, likewise."""

    @property
    def reading(self) -> bool:
        """Whether a reader is between open and close: the transport needs progress."""
        return self._book.reading

    def held(self) -> dict[str, int]:
        """See `Mover.held`."""
        return {
            "leases": len(self._book),
            "promises": self._book.promises,
            "parked_readers": sum(map(len, list(self._parked.values()))),
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

    def grant(self, terms: Terms) -> None:
        """Lease a request's blocks, and answer whoever waits for them."""
        self._book.grant(terms)
        self._listener.known(terms.lease_id, terms.name or terms.request_id)
        for link, message in self._early.take(terms.name or terms.request_id):
            self._open(link, message)
        for link, message in self._take_parked(terms.lease_id):
            self._open(link, message)

    def withdraw(self, lease_id: str) -> None:
        """A promised request ended without KV."""
        self._book.withdraw(lease_id)
        for link, message in self._take_parked(lease_id):
            self._refuse(link, message, "withdrawn", "the request ended without KV to hand over")

    def release_own(self, lease_id: str | None, name: str) -> None:
        """The reader of a lease is this very engine: the lease ends, if nobody else reads it."""
        lease_id = lease_id or self._book.find(name)
        if lease_id and (freed := self._book.release_unread(lease_id)):
            self._freed.add(freed)

    def revoke(self, lease_ids: Sequence[str]) -> None:
        """The blocks are wanted back: these leases end now, though somebody may be reading."""
        self._freed.update(freed for one in lease_ids if (freed := self._book.revoke(one)))

    def receive(self, incoming: Incoming) -> None:
        """Handle a message from a peer that dialled us."""
        link, message = incoming
        if isinstance(message, wire.Open):
            self._open(link, message)
        elif isinstance(message, wire.Close):
            self._close(link, message)
        elif isinstance(message, wire.Renew):
            found = [g for r in message.request_ids if (g := self._book.find(r))]
            wanted = message.lease_ids + found
            gone = [g for g in wanted if self._book.renew(g) is LeaseState.GONE]
            if gone:
                self._listener.answer(link, wire.Gone(lease_ids=gone))

    def opened(self, lease_id: str, reader: tuple[Link, int]) -> Terms | None:
        """What is leased, if the lease stands and this reader of it is between open and close."""
        is_open = self._book.is_open(lease_id, reader)
        return self._book.terms(lease_id) if is_open else None

    def tick(self) -> None:
        """End the leases that are over."""
        for request_id in self._book.expire():
            logger.warning("request %s: lease expired, its blocks are freed", request_id)
            self.expired += 1
            self._freed.add(request_id)
        for link, message in self._early.tick():
            self._refuse(link, message, "gone", "the request never arrived at this engine")

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return soonest(self._book.next_deadline(), self._early.next_deadline())

    def take_freed(self) -> set[str]:
        """Requests whose blocks may be freed, each reported once."""
        freed, self._freed = self._freed, set()
        return freed

    def _open(self, link: Link, message: wire.Open) -> None:
        lease_id = self._lease_id(message)
        standing = self._book.standing(lease_id) if lease_id else LeaseState.GONE
        if lease_id and standing is LeaseState.PROMISED:
            self._park(link, message, lease_id)
            return
        if not lease_id and self._may_be_early(link, message):
            return
        if not lease_id or standing is LeaseState.GONE:
            self._refuse(link, message, "gone", "no such lease, or it is over")
            return
        terms = self._book.terms(lease_id)
        same = hmac.compare_digest(terms.digest, message.digest)
        if message.tokens != terms.tokens or not same:
            self._refuse(
                link,
                message,
                "another prompt",
                f"the lease holds {terms.tokens} tokens of another prompt than the reader's "
                f"{message.tokens}",
            )
            return
        self._book.open(lease_id, (link, message.reader))
        self._book.renew(lease_id)
        self._listener.answer(
            link,
            wire.Opened(
                seq=message.seq,
                lease_id=lease_id,
                tables=terms.tables,
            ),
        )

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
            return self._book.standing(lease_id) is LeaseState.GRANTED
        self._unpark(lease_id, link, message.reader)
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
        return not self._book.is_over(message.request_id or "") and self._early.admit(link, message)

    def _park(self, link: Link, message: wire.Open, lease_id: str) -> None:
        waiting = self._parked.get(lease_id, {})
        if (link, message.seq) not in waiting:  # else it repeats itself
            if self._parked_of[link] >= MAX_PARKED:
                self._refuse(link, message, "busy", f"{MAX_PARKED} of your readers wait here")
                return
            self._parked_of[link] += 1
        self._parked.setdefault(lease_id, {})[link, message.seq] = _Parked(message, self._clock())

    def _unpark(self, lease_id: str, link: Link, reader: int) -> None:
        """A reader gave up waiting: opened later, it would never close."""
        waiting = self._parked.get(lease_id, {})
        for key in [k for k, p in waiting.items() if (k[0], p.message.reader) == (link, reader)]:
            del waiting[key]
            self._one_less(link)
        if not waiting:
            self._parked.pop(lease_id, None)

    def _take_parked(self, lease_id: str) -> list[tuple[Link, wire.Open]]:
        """Who waits for the lease and still repeats itself: one that died would never close."""
        waiting, now = self._parked.pop(lease_id, {}), self._clock()
        for link, _ in waiting:
            self._one_less(link)
        return [(k[0], p.message) for k, p in waiting.items() if now < p.heard + SILENT_S]

    def _one_less(self, link: Link) -> None:
        self._parked_of[link] -= 1
        if not self._parked_of[link]:
            del self._parked_of[link]

    def _refuse(self, link: Link, message: wire.Open, cause: str, detail: str) -> None:
        self._listener.answer(link, wire.Refused(seq=message.seq, cause=cause, detail=detail))


class _Parked(NamedTuple):
    message: wire.Open
    heard: float


@dataclass
class _Early:
    message: wire.Open
    until: float
    heard: float


class EarlyReaders:
    """Readers of one rank that came before the request whose lease they ask for.

    * Only readers that say how long they would wait do so, and none longer than `MAX_WAIT_S`.
    * A reader repeats its Open every few seconds. One that stops, because it gave up, its link
      broke or its process ended, is forgotten after `SILENT_S`.
    * Bounded: a reader is refused that finds `MAX_EARLY` others of its link here.
    * A step costs nothing for those that go on waiting.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, dict[tuple[Link, int], _Early]] = {}  # name → (…, seq)
        self._counts: Counter[Link] = Counter()
        self._ends: Deadlines[tuple[str, tuple[Link, int]]] = Deadlines()  # of (name, key)

    def __len__(self) -> int:
        return self._counts.total()

    def admit(self, link: Link, message: wire.Open) -> bool:
        """Whether the reader may wait, or go on waiting, for the lease that it names."""
        name, key, now = message.request_id, (link, message.seq), self._clock()
        if message.lease_id is not None or not name or not message.early_ms:
            return False
        waiting = self._waiting.get(name, {}).get(key)
        if waiting is None:
            if self._counts[link] >= MAX_EARLY:
                return False
            waiting = _Early(message, now + min(message.early_ms / 1000, MAX_WAIT_S), now)
            self._waiting.setdefault(name, {})[key] = waiting
            self._counts[link] += 1
        waiting.heard = now
        self._ends.set((name, key), min(waiting.until, now + SILENT_S))
        return True

    def take(self, name: str) -> list[tuple[Link, wire.Open]]:
        """Who waited for ``name``: it is known from now on."""
        taken = self._waiting.pop(name, {})
        for key in taken:
            self._counts[key[0]] -= 1
            self._ends.drop((name, key))
        return [(link, waiting.message) for (link, _), waiting in taken.items()]

    def forget(self, name: str, link: Link, reader: int) -> None:
        """A reader of ``link`` gave up."""
        for key, waiting in list(self._waiting.get(name, {}).items()):
            if (key[0], waiting.message.reader) == (link, reader):
                self._drop(name, key)

    def tick(self) -> list[tuple[Link, wire.Open]]:
        """Forget readers that have fallen silent; returns those that have waited for too long."""
        now, late = self._clock(), []
        for name, key in self._ends.take(now):
            waiting = self._waiting[name][key]
            self._drop(name, key)
            if now >= waiting.until:
                late.append((key[0], waiting.message))
        return late

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        return self._ends.next()

    def _drop(self, name: str, key: tuple[Link, int]) -> None:
        del self._waiting[name][key]
        self._ends.drop((name, key))
        self._counts[key[0]] -= 1
        if not self._waiting[name]:
            del self._waiting[name]
