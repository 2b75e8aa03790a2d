"""Readers that came before the request whose lease they ask for.

Some routers ask prefill and decode at once, so a reader may name a lease of which its engine has
not heard yet. It waits here until the request arrives, instead of being refused.

* Only readers that say how long they would wait do so, and none longer than `MAX_WAIT_S`.
* A reader repeats its Open every second. One that stops, because it gave up, its link broke or
  its process ended, is forgotten after `SILENT_S`.
* Bounded: whoever finds `MAX_WAITING` others here is told to go.
"""

from dataclasses import dataclass

from kvconnect.control import wire
from kvconnect.control.channel import Link
from kvconnect.lease import Clock

MAX_WAIT_S = 60.0
SILENT_S = 5.0
MAX_WAITING = 4096


@dataclass
class _Waiting:
    message: wire.Open
    until: float
    heard: float

    @property
    def ends(self) -> float:
        return min(self.until, self.heard + SILENT_S)


class EarlyReaders:
    """Of one rank. Not thread-safe: the mover's thread owns it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: dict[str, dict[tuple[Link, int], _Waiting]] = {}  # name → (…, seq) → who
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def admit(self, link: Link, message: wire.Open) -> bool:
        """Whether the reader may wait, or go on waiting, for the lease that it names."""
        name, key, now = message.request_id, (link, message.seq), self._clock()
        if message.lease_id is not None or not name or not message.early_ms:
            return False
        waiting = self._waiting.get(name, {}).get(key)
        if waiting is None:
            if self._count >= MAX_WAITING:
                return False
            waiting = _Waiting(message, now + min(message.early_ms / 1000, MAX_WAIT_S), now)
            self._waiting.setdefault(name, {})[key] = waiting
            self._count += 1
        waiting.heard = now
        return True

    def take(self, name: str) -> list[tuple[Link, wire.Open]]:
        """Who waited for ``name``: it is known from now on."""
        taken = self._waiting.pop(name, {})
        self._count -= len(taken)
        return [(link, waiting.message) for (link, _), waiting in taken.items()]

    def forget(self, name: str, link: Link, reader: int) -> None:
        """A reader of ``link`` gave up."""
        for key, waiting in list(self._waiting.get(name, {}).items()):
            if (key[0], waiting.message.reader) == (link, reader):
                self._drop(name, key)

    def tick(self) -> list[tuple[Link, wire.Open]]:
        """Forget those who have fallen silent; returns those who have waited for too long."""
        now, late = self._clock(), []
        for name, readers in list(self._waiting.items()):
            for key, waiting in list(readers.items()):
                if now < waiting.ends:
                    continue
                self._drop(name, key)
                if now >= waiting.until:
                    late.append((key[0], waiting.message))
        return late

    def next_deadline(self) -> float | None:
        """When `tick` is worth calling next."""
        every = (w.ends for readers in self._waiting.values() for w in readers.values())
        return min(every, default=None)

    def _drop(self, name: str, key: tuple[Link, int]) -> None:
        del self._waiting[name][key]
        self._count -= 1
        if not self._waiting[name]:
            del self._waiting[name]
