"""A transport with faults: a decorator over a real one.

* Plan faults with `plan`: the next tickets submitted take them, one each, in order.
* Stays inside the transport's contract: every ticket still ends exactly once, and after its
  Done its memory is not touched. What is allowed there and inconvenient, it does: bytes that
  arrive late, after a cancel, after the peer was dropped, or before a failure is reported.
"""

import enum
import itertools
from collections import deque
from dataclasses import dataclass

from kvconnect.transport.base import Done, TransferId, Transport, Work


class Fault(enum.Enum):
    """What becomes of a ticket's bytes."""

    NONE = "none"
    LOST = "lost"
    """They never arrive; the ticket fails."""
    UNREPORTED = "unreported"
    """They arrive, yet the ticket fails."""
    HANGS = "hangs"
    """Nothing happens until the peer is dropped; then the ticket fails."""


@dataclass(frozen=True)
class Plan:
    """A ticket's fate: polls before its bytes move, polls from then to its Done."""

    fault: Fault = Fault.NONE
    late_polls: int = 0
    done_polls: int = 0


@dataclass
class _Ticket:
    work: Work
    plan: Plan
    age: int = 0  # polls since it was submitted
    inner: TransferId | None = None
    done: Done | None = None
    cancelled: bool = False
    dropped: bool = False  # its peer; it still drains
    error: str = ""  # ends it at once


class Faulty:
    """See the module's contract. ``running``: tickets that have not ended."""

    def __init__(self, transport: Transport) -> None:
        self.usual = Plan()
        """Fate of tickets that nothing was planned for."""
        self._transport = transport
        self._plans: deque[Plan] = deque()
        self._numbers = itertools.count(1)
        self._tickets: dict[TransferId, _Ticket] = {}
        self._dropped: set[str] = set()  # while tickets to them drain
        self._submitted: list[Work] = []

    def plan(self, fault: Fault = Fault.NONE, late_polls: int = 0, done_polls: int = 0) -> None:
        """Decide about the next ticket that nothing was planned for."""
        self._plans.append(Plan(fault, late_polls, done_polls))

    def forget_plans(self) -> None:
        """Let tickets that are yet to come go well."""
        self.usual = Plan()
        self._plans.clear()

    @property
    def running(self) -> int:
        """Tickets that have not ended."""
        return len(self._tickets)

    @property
    def submitted(self) -> list[Work]:
        """All work so far."""
        return list(self._submitted)

    def lose_peer(self, name: str) -> None:
        """The peer dies: its tickets fail at the next poll and so do later ones."""
        for ticket in self._tickets.values():
            if ticket.work.peer == name:
                ticket.error = ticket.error or f"peer {name} died"
        self._dropped.discard(name)
        self._transport.drop_peer(name)

    def hello(self) -> bytes:
        return self._transport.hello()

    def add_peer(self, name: str, hello: bytes) -> None:
        if name in self._dropped:
            self.lose_peer(name)
        self._transport.add_peer(name, hello)

    def drop_peer(self, name: str) -> None:
        self._dropped.add(name)
        for ticket in self._tickets.values():
            ticket.dropped |= ticket.work.peer == name
        self._forget_dropped()

    def submit(self, work: Work) -> TransferId:
        number = next(self._numbers)
        plan = self._plans.popleft() if self._plans else self.usual
        if work.peer in self._dropped:
            plan = Plan(Fault.LOST)
        ticket = self._tickets[number] = _Ticket(work, plan)
        self._submitted.append(work)
        if plan == Plan():
            ticket.inner = self._transport.submit(work)
        return number

    def poll(self) -> list[Done]:
        inner = {done.ticket: done for done in self._transport.poll()}
        for ticket in self._tickets.values():
            ticket.done = ticket.done or inner.get(ticket.inner or 0)
        for ticket in self._tickets.values():
            ticket.age += 1
            self._start(ticket)
        inner = {done.ticket: done for done in self._transport.poll()}
        ended = []
        for number, ticket in list(self._tickets.items()):
            ticket.done = ticket.done or inner.get(ticket.inner or 0)
            if (done := self._end_of(number, ticket)) is not None:
                del self._tickets[number]
                ended.append(done)
        self._forget_dropped()
        return ended

    def cancel(self, ticket: TransferId) -> None:
        if known := self._tickets.get(ticket):
            known.cancelled = True
            if known.inner is not None and known.done is None:
                self._transport.cancel(known.inner)

    def close(self) -> None:
        for ticket in self._tickets.values():
            ticket.error = ticket.error or "transport closed"
        self._transport.close()

    def _forget_dropped(self) -> None:
        """As NIXL must: a peer is let go only when nothing runs on it any more."""
        in_use = {ticket.work.peer for ticket in self._tickets.values()}
        for name in self._dropped - in_use:
            self._dropped.remove(name)
            self._transport.drop_peer(name)

    def _start(self, ticket: _Ticket) -> None:
        """Let its bytes move, if it is time for that."""
        held = ticket.age <= ticket.plan.late_polls or ticket.error
        if ticket.inner is None and not held and ticket.plan.fault not in (Fault.LOST, Fault.HANGS):
            ticket.inner = self._transport.submit(ticket.work)

    def _end_of(self, number: TransferId, ticket: _Ticket) -> Done | None:
        plan = ticket.plan
        if ticket.inner is not None and ticket.done is None:
            return None  # the real transport still has it
        if ticket.error:
            return Done(number, ticket.error)
        if plan.fault is Fault.HANGS:
            return Done(number, "peer was dropped") if ticket.dropped else None
        if ticket.age <= plan.late_polls + plan.done_polls:
            return None
        if ticket.dropped:
            return Done(number, "peer was dropped")
        if plan.fault is not Fault.NONE or ticket.done is None:
            return Done(number, f"planned fault: {plan.fault.value}")
        if ticket.cancelled:
            return Done(number, ticket.done.error or "cancelled")
        return ticket.done._replace(ticket=number)
