"""The life of each request: which engines worked for it, and when what happened.

Does not know HTTP or engines. Whoever shows, counts or traces requests reads it here.

- ``Journal.of`` makes a `RequestLife`; `legs` and `app` note in it what happens.
- ``running`` are those under way, ``recent`` the last hundred that ended, oldest first.
- ``on_begin`` and ``on_end`` list callables that get each life when it began, and when it ended.
  They must not raise, nor take long.
- Times are seconds of the journal's clock, None for what did not happen. ``began_unix_s`` is for
  people and traces.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

REMEMBERED = 100


@dataclass(slots=True)
class LegTry:
    """One engine that was asked for one leg of a request."""

    role: str
    """``prefill`` or ``decode``."""
    url: str
    asked_s: float
    answered_s: float | None = None
    """When prefill's answer was there, or decode's first byte."""
    status: int | None = None
    """HTTP status; None if the engine could not be reached, broke off, or was given up."""


@dataclass(slots=True, eq=False)  # two requests may have one id
class RequestLife:
    """One request of a client. Of two tries of a role, the last one is the one that counted."""

    request_id: str
    path: str
    began_s: float
    began_unix_s: float
    clock: Callable[[], float] = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """Those that go to both engines: ``traceparent`` among them, if the client sent one."""
    tries: list[LegTry] = field(default_factory=list)
    cause: str = ""
    """Why no prefill engine worked for it, or why it failed; empty if all went as it should."""
    status: int | None = None
    """What the client got; None if it gave up before."""
    admitted_s: float | None = None
    """When it had waited for its turn; None: it has not, or nobody has to."""
    on_leg: list[Callable[["LegTry"], None]] = field(default_factory=list, repr=False)
    """Told of each engine that is asked, and again when it has answered."""
    outcome: str = "running"
    """``ok``, ``error`` (status of 400 or more), ``broken`` or ``aborted``."""
    sent_bytes: int = 0
    """Length of the answer's body, so far."""
    ended_s: float | None = None

    def asked(self, role: str, url: str) -> LegTry:
        """An engine is asked now."""
        leg = LegTry(role, url, self.clock())
        self.tries.append(leg)
        self._tell(leg)
        return leg

    def answered(self, leg: LegTry, status: int) -> None:
        """The engine that ``leg`` asked has answered now."""
        leg.answered_s, leg.status = self.clock(), status
        self._tell(leg)

    def _tell(self, leg: LegTry) -> None:
        for told in self.on_leg:
            told(leg)

    def leg(self, role: str) -> LegTry | None:
        """The try that counted."""
        return next((leg for leg in reversed(self.tries) if leg.role == role), None)


class Journal:
    """Lives of the requests of one proxy."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.running: set[RequestLife] = set()
        self.recent: deque[RequestLife] = deque(maxlen=REMEMBERED)
        self.on_begin: list[Callable[[RequestLife], None]] = []
        self.on_end: list[Callable[[RequestLife], None]] = []
        self._clock = clock

    @contextlib.contextmanager
    def of(self, request_id: str, path: str, headers: dict[str, str]) -> Iterator[RequestLife]:
        """A request's life, from now until the block is left. Who sets no outcome gave it up."""
        life = RequestLife(request_id, path, self._clock(), time.time(), self._clock, headers)
        self.running.add(life)
        for told in self.on_begin:
            told(life)
        try:
            yield life
        finally:
            self.running.remove(life)
            if life.outcome == "running":
                life.outcome = "aborted"
            life.ended_s = self._clock()
            self.recent.append(life)
            for told in self.on_end:
                told(life)
