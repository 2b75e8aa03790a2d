"""Which requests are to be looked at in a step, so that a step costs nothing for those that wait.

* A request is looked at once it is woken: by its owner, by the end of a call that was made for it,
  by a change of the remote engine that it needs, or by the time that was set for it.
* Names of requests that have ended may still come up; owners pass over them.
"""

from collections.abc import Iterable, Iterator

from kvconnect.consumer.remote import Remote
from kvconnect.control.wire import Address
from kvconnect.deadlines import Deadlines
from kvconnect.lease import Clock
from kvconnect.staging import Slots


class WakeQueue:
    """For one part of a mover: which of its fetches, releases or renewals to look at next."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._woken: dict[str, None] = {}  # in the order in which they were
        self._times: Deadlines[str] = Deadlines()
        self._by_remote: dict[Remote, dict[str, None]] = {}

    def add(self, name: str, remote: Remote) -> None:
        """Look at a request now, and whenever its remote engine changes."""
        self._by_remote.setdefault(remote, {})[name] = None
        self.wake(name)

    def remove(self, name: str, remote: Remote) -> None:
        """The request has ended, or needs another remote engine from now on."""
        self._times.drop(name)
        names = self._by_remote.get(remote, {})
        names.pop(name, None)
        if not names:
            self._by_remote.pop(remote, None)

    def wake(self, *names: str) -> None:
        """Look at these in the next turn."""
        self._woken |= dict.fromkeys(names)

    def changed(self, remotes: Iterable[Remote]) -> None:
        """Look at the requests of these, whose state is another one."""
        for remote in remotes:
            self._woken |= self._by_remote.get(remote, {})

    def wake_at(self, when: float, name: str) -> None:
        """Look at a request then, if not before; a time that was set before counts no more."""
        self._times.set(name, when)

    def take(self) -> list[str]:
        """Whom to look at now."""
        self.wake(*self._times.take(self._clock()))
        taken, self._woken = list(self._woken), {}
        return taken

    def next_deadline(self) -> float | None:
        """When `take` is worth calling next."""
        return self._clock() if self._woken else self._times.next()


class SlotQueue:
    """Requests that are to get a staging slot for their next chunk, by the peer that fills it."""

    def __init__(self) -> None:
        self._waiting: dict[Address, dict[str, None]] = {}  # each in the order in which they came

    def add(self, address: Address, name: str) -> None:
        """A request waits for a slot that this peer fills."""
        self._waiting.setdefault(address, {})[name] = None

    def take(self, slots: Slots) -> Iterator[str]:
        """For each peer that may fill another slot, the request that has waited longest for one."""
        for address, waiting in list(self._waiting.items()):
            if slots.may_take(address):
                name = next(iter(waiting))
                del waiting[name]
                if not waiting:
                    del self._waiting[address]
                yield name
