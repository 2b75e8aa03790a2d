"""Whose turn it is: the engine with the fewest requests, with those that failed sitting out.

Does not know what is asked of an engine, nor how it is reached. Time is an injected clock.

- ``candidates`` lists the engines to try, in order: least busy first, by turns among equals. One
  that failed is not among them until its
  backoff (1 s, 2 s, … 15 s) has passed; then one caller at a time gets it first, as a probe.
- ``failed`` and ``succeeded`` report what came of a try. A burst of failures of one outage
  counts once.
- ``last_resort`` lists those that sit out, for callers who have nobody else to ask.
- Whoever waits for an engine does so within ``patience``: when the engine is given up, all of its
  waits end at once, as if the connection had broken. ``silent`` lists whom nobody has heard from.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

# An engine that answers nobody for so long is asked whether it is alive.
QUIET_S = 2.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 15.0


class EngineState(msgspec.Struct, frozen=True):
    """One engine, for people to look at."""

    url: str
    up: bool
    failures: int
    """Failed tries since the last success, bursts counted once."""
    retry_in_s: float
    in_flight: int


@dataclass(slots=True)
class _Engine:
    url: str
    failures: int = 0
    retry_at_s: float = 0.0
    probed: bool = False
    in_flight: int = 0
    answered: bool = False
    """Whether it has ever: until then nobody knows that it is there."""
    heard_at_s: float = 0.0
    """When a byte of it came last, or the first of those who wait for it began to."""
    waits: set[asyncio.Timeout] = field(default_factory=set)
    hangs: bool = False
    """Given up while it accepted requests: it gets none, not even a probe, before it shows life."""


class Pool:
    """The engines of one role."""

    def __init__(self, urls: Sequence[str], clock: Callable[[], float]) -> None:
        self._engines = {url: _Engine(url) for url in urls}
        self._clock = clock
        self._turn = 0

    def candidates(self) -> tuple[str, ...]:
        """Engines to try, in this order: at most one probe, those that are up, others due."""
        now = self._clock()
        up = [engine for engine in self._engines.values() if not engine.failures]
        due = [e for e in self._engines.values() if _is_due(e, now)]
        if due:
            # Whoever asks next leaves the probe alone until it reported, or for one more backoff.
            due[0].probed = True
            due[0].retry_at_s = now + _backoff_s(due[0].failures)
        turn = self._turn % len(up) if up else 0
        self._turn += 1
        fair = sorted((*up[turn:], *up[:turn]), key=lambda engine: engine.in_flight)
        return tuple(e.url for e in (*due[:1], *fair, *due[1:]))

    def last_resort(self) -> tuple[str, ...]:
        """Engines that sit out now, the one that is due soonest first."""
        now = self._clock()
        down = [e for e in self._engines.values() if e.failures and not _is_due(e, now)]
        return tuple(engine.url for engine in sorted(down, key=lambda e: e.retry_at_s))

    def failed(self, url: str) -> bool:
        """The engine could not be reached, or broke off. True if that was news."""
        engine, now = self._engines[url], self._clock()
        if engine.failures and now < engine.retry_at_s and not engine.probed:
            return False  # one of many requests that were on it when it went
        engine.failures += 1
        engine.probed = False
        engine.retry_at_s = now + _backoff_s(engine.failures)
        return True

    def succeeded(self, url: str) -> bool:
        """The engine answered. True if that was news."""
        engine = self._engines[url]
        was_down = engine.failures > 0
        engine.failures, engine.probed, engine.answered = 0, False, True
        engine.hangs = False
        return was_down

    @contextlib.contextmanager
    def busy(self, url: str) -> Iterator[None]:
        """Counts one request as in flight at the engine."""
        engine = self._engines[url]
        engine.in_flight += 1
        try:
            yield
        finally:
            engine.in_flight -= 1

    @contextlib.asynccontextmanager
    async def patience(self, url: str) -> AsyncIterator[None]:
        """Waits for a byte of the engine: TimeoutError if it is given up meanwhile."""
        engine = self._engines[url]
        if not engine.waits:
            engine.heard_at_s = self._clock()
        async with asyncio.timeout(None) as wait:
            engine.waits.add(wait)
            try:
                yield
                engine.heard_at_s = self._clock()
            finally:
                engine.waits.remove(wait)

    def silent(self) -> tuple[str, ...]:
        """Engines that are waited for and have sent nothing for `QUIET_S`."""
        since = self._clock() - QUIET_S
        return tuple(e.url for e in self._engines.values() if e.waits and e.heard_at_s <= since)

    def give_up(self, url: str) -> None:
        """Ends all waits for an engine that hangs."""
        self._engines[url].hangs = True
        for wait in self._engines[url].waits:
            wait.reschedule(asyncio.get_running_loop().time())

    def hanging(self) -> tuple[str, ...]:
        """Engines that were given up and have not shown life since."""
        return tuple(engine.url for engine in self._engines.values() if engine.hangs)

    def lives(self, url: str) -> None:
        """The engine has answered whether it is alive."""
        engine = self._engines[url]
        engine.hangs, engine.heard_at_s = False, self._clock()

    def any_up(self) -> bool:
        """Whether an engine has answered, and not failed since."""
        return any(_is_up(engine) for engine in self._engines.values())

    def states(self) -> tuple[EngineState, ...]:
        now = self._clock()
        return tuple(
            EngineState(
                url=engine.url,
                up=_is_up(engine),
                failures=engine.failures,
                retry_in_s=round(max(0.0, engine.retry_at_s - now), 3) if engine.failures else 0.0,
                in_flight=engine.in_flight,
            )
            for engine in self._engines.values()
        )


def _is_due(engine: _Engine, now: float) -> bool:
    return bool(engine.failures) and now >= engine.retry_at_s and not engine.hangs


def _is_up(engine: _Engine) -> bool:
    return engine.answered and not engine.failures


def _backoff_s(failures: int) -> float:
    # the shift is bounded too: an engine may be away for days
    return min(FIRST_BACKOFF_S * (1 << min(failures - 1, 8)), MAX_BACKOFF_S)
