"""A transport with faults: a decorator over a real one.

* Plan faults with `plan`: the next transfers submitted take them, one each, in order.
* Stays inside the transport's contract: every transfer still ends exactly once, and after its
  Done its memory is not touched. What is allowed there and inconvenient, it does: bytes that
  arrive late, after a cancel, after the peer was dropped, or before a failure is reported.
"""

import enum
import itertools
from collections import deque
from dataclasses import dataclass

from kvconnect.transport.base import Done, TransferId, Transport, Work

KEPT = 1024


class Fault(enum.Enum):
    """What becomes of a transfer's bytes."""

    NONE = "none"
    LOST = "lost"
    """They never arrive; the transfer fails."""
    UNREPORTED = "unreported"
    """They arrive, yet the transfer fails."""
    HANGS = "hangs"
    """Nothing happens until the peer is dropped; then the transfer fails."""


@dataclass(frozen=True)
class Plan:
    """A transfer's fate: polls before its bytes move, polls from then to its Done."""

    fault: Fault = Fault.NONE
    late_polls: int = 0
    done_polls: int = 0


@dataclass
class _FaultyTransfer:
    work: Work
    plan: Plan
    age: int = 0  # polls since it was submitted
    inner: TransferId | None = None
    done: Done | None = None
    cancelled: bool = False
    dropped: bool = False  # its peer; it still drains
    error: str = ""  # ends it at once


class Faulty:
    """See the module's contract. ``running``: transfers that have not ended."""

    def __init__(self, transport: Transport) -> None:
        self.usual = Plan()
        """Fate of transfers that nothing was planned for."""
        self._transport = transport
        self._plans: deque[Plan] = deque()
        self._numbers = itertools.count(1)
        self._count = 0
        self._transfers: dict[TransferId, _FaultyTransfer] = {}
        self._dropped: set[str] = set()  # while transfers to them drain
        self._submitted: deque[Work] = deque(maxlen=KEPT)

    def plan(self, fault: Fault = Fault.NONE, late_polls: int = 0, done_polls: int = 0) -> None:
        """Decide about the next transfer that nothing was planned for."""
        self._plans.append(Plan(fault, late_polls, done_polls))

    def forget_plans(self) -> None:
        """Let transfers that are yet to come go well."""
        self.usual = Plan()
        self._plans.clear()

    @property
    def running(self) -> int:
        """Transfers that have not ended."""
        return len(self._transfers)

    @property
    def submitted(self) -> list[Work]:
        """The work so far, the last `KEPT` of it."""
        return list(self._submitted)

    @property
    def submitted_ever(self) -> int:
        """How many transfers there were."""
        return self._count

    def lose_peer(self, name: str) -> None:
        """The peer dies: its transfers fail at the next poll and so do later ones."""
        for transfer in self._transfers.values():
            if transfer.work.peer == name:
                transfer.error = transfer.error or f"peer {name} died"
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
        for transfer in self._transfers.values():
            transfer.dropped |= transfer.work.peer == name
        self._forget_dropped()

    def submit(self, work: Work) -> TransferId:
        self._count = number = next(self._numbers)
        plan = self._plans.popleft() if self._plans else self.usual
        if work.peer in self._dropped:
            plan = Plan(Fault.LOST)
        transfer = self._transfers[number] = _FaultyTransfer(work, plan)
        self._submitted.append(work)
        if plan == Plan():
            transfer.inner = self._transport.submit(work)
        return number

    def poll(self) -> list[Done]:
        inner = {done.transfer_id: done for done in self._transport.poll()}
        for transfer in self._transfers.values():
            transfer.done = transfer.done or inner.get(transfer.inner or 0)
        for transfer in self._transfers.values():
            transfer.age += 1
            self._start(transfer)
        inner = {done.transfer_id: done for done in self._transport.poll()}
        ended = []
        for number, transfer in list(self._transfers.items()):
            transfer.done = transfer.done or inner.get(transfer.inner or 0)
            if (done := self._end_of(number, transfer)) is not None:
                del self._transfers[number]
                ended.append(done)
        self._forget_dropped()
        return ended

    def cancel(self, transfer_id: TransferId) -> None:
        if known := self._transfers.get(transfer_id):
            known.cancelled = True
            if known.inner is not None and known.done is None:
                self._transport.cancel(known.inner)

    def close(self) -> None:
        for transfer in self._transfers.values():
            transfer.error = transfer.error or "transport closed"
        self._transport.close()

    def _forget_dropped(self) -> None:
        """As NIXL must: a peer is let go only when nothing runs on it any more."""
        in_use = {transfer.work.peer for transfer in self._transfers.values()}
        for name in self._dropped - in_use:
            self._dropped.remove(name)
            self._transport.drop_peer(name)

    def _start(self, transfer: _FaultyTransfer) -> None:
        """Let its bytes move, if it is time for that."""
        held = transfer.age <= transfer.plan.late_polls or transfer.error
        if (
            transfer.inner is None
            and not held
            and transfer.plan.fault not in (Fault.LOST, Fault.HANGS)
        ):
            transfer.inner = self._transport.submit(transfer.work)

    def _end_of(self, number: TransferId, transfer: _FaultyTransfer) -> Done | None:
        plan = transfer.plan
        if transfer.inner is not None and transfer.done is None:
            return None  # the real transport still has it
        if transfer.error:
            return Done(number, transfer.error)
        if plan.fault is Fault.HANGS:
            return Done(number, "peer was dropped") if transfer.dropped else None
        if transfer.age <= plan.late_polls + plan.done_polls:
            return None
        if transfer.dropped:
            return Done(number, "peer was dropped")
        if plan.fault is not Fault.NONE or transfer.done is None:
            return Done(number, f"planned fault: {plan.fault.value}")
        if transfer.cancelled:
            return Done(number, transfer.done.error or "cancelled")
        return transfer.done._replace(transfer_id=number)
