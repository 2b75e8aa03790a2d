"""Whose turn it is: the engines of one role in ``balance``'s order, those that failed sitting out.

Does not know what is asked of an engine, nor how it is reached. Time is an injected clock.

- ``candidates`` lists the engines to try, in order. One that failed is not among them until its
  backoff (1 s, 2 s, … 15 s) has passed; then one caller at a time gets it first, as a probe.
- ``put``, ``drain`` and ``remove``: engines come and go. One that drains gets no more requests
  and is gone when it has none; reports about an engine that is gone mean nothing.
- ``failed`` and ``succeeded`` report what came of a try. A burst of failures of one outage
  counts once.
- ``last_resort`` lists those that sit out, for callers who have nobody else to ask.
- Whoever waits for an engine does so within ``patience``: when the engine is given up, all of its
  waits end at once, as if the connection had broken. ``silent`` lists whom nobody has heard from,
  ``stuck`` those of them who say nothing while others answer: for `STUCK_S` and `STUCK_TIMES` as
  long as any engine lately took for as many tokens.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from kvconnect.proxy.engines.balance import REQUEST_TOKENS, Policy, crowded_from, in_order

# An engine that answers nobody for so long is asked whether it is alive.
QUIET_S = 2.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 15.0
ENGINE_STATES = ("stuck", "draining", "up", "down", "not heard of")
"""Of these the first that is so; the last: it has not answered yet."""
STUCK_S = 10.0
STUCK_TIMES = 5.0
# How long "lately" is, at least; at most twice that.
_LATELY_S = 300.0


class EngineState(msgspec.Struct, frozen=True):
    """One engine, for people to look at."""

    url: str
    up: bool
    failures: int
    """Failed tries since the last success, bursts counted once."""
    retry_in_s: float
    in_flight: int
    tokens: int
    """Guessed from bytes: those of its requests in flight."""
    draining: bool
    stuck: bool

    @property
    def state(self) -> str:
        """All of it in one of `ENGINE_STATES`."""
        told = (self.stuck, self.draining, self.up, bool(self.failures), True)
        return ENGINE_STATES[told.index(True)]


@dataclass(slots=True)
class _Engine:
    url: str
    failures: int = 0
    retry_at_s: float = 0.0
    probed: bool = False
    in_flight: int = 0
    tokens: int = 0
    draining: bool = False
    answered: bool = False
    """Whether it has ever: until then nobody knows that it is there."""
    heard_at_s: float = float("-inf")
    """When a byte of it came last."""
    quiet_since_s: float = 0.0
    """The same, or when the first of those who wait for it began to."""
    waits: "set[_Wait]" = field(default_factory=set)
    stuck: bool = False
    """Given up though its API server lives: only a token of its shows that it works again."""
    hangs: bool = False
    """Given up while it accepted requests: it gets none, not even a probe, before it shows life."""


class Pool:
    """The engines of one role."""

    def __init__(
        self,
        urls: Iterable[str],
        clock: Callable[[], float],
        policy: Policy = "least-loaded",
        full_at: int | None = None,
    ) -> None:
        """An engine for each of ``urls``; ``clock`` tells seconds, from any point on.

        ``full_at``: with so many requests in flight an engine is passed over while others have not.
        """
        self._engines = {url: _Engine(url) for url in urls}
        self._clock = clock
        self._policy = policy
        self._full_at = full_at
        self._turn = 0
        self._slowest = SlowestWait(clock)

    def candidates(
        self, key: bytes | None = None, held: Mapping[str, int] | None = None
    ) -> tuple[str, ...]:
        """Engines to try, in this order: at most one probe, those that are up, others due.

        ``key``: requests with the same one belong to the same engine. ``held``: tokens of the
        request that an engine need not compute.
        """
        now = self._clock()
        here = [engine for engine in self._engines.values() if not engine.draining]
        up = [engine for engine in here if not engine.failures]
        due = [engine for engine in here if _is_due(engine, now)]
        if due:
            # Whoever asks next leaves the probe alone until it reported, or for one more backoff.
            due[0].probed = True
            due[0].retry_at_s = now + _backoff_s(due[0].failures)
        ordered = in_order(up, self._policy, self._turn, key, held)
        if self._full_at is not None:
            ordered.sort(key=lambda engine: engine.in_flight >= (self._full_at or 0))
        self._turn += 1
        return tuple(e.url for e in (*due[:1], *ordered, *due[1:]))

    def last_resort(self) -> tuple[str, ...]:
        """Engines that sit out now, the one that is due soonest first."""
        now = self._clock()
        down = [
            engine
            for engine in self._engines.values()
            if engine.failures and not engine.draining and not _is_due(engine, now)
        ]
        return tuple(engine.url for engine in sorted(down, key=lambda e: e.retry_at_s))

    def put(self, url: str) -> bool:
        """The engine is there, and drains no longer. True if that was news."""
        news = url not in self._engines or self._engines[url].draining
        self._engines.setdefault(url, _Engine(url)).draining = False
        return news

    def drain(self, url: str) -> bool:
        """No more requests for the engine; it is gone once it has none. True if that was news."""
        engine = self._of(url)
        news = url in self._engines and not engine.draining
        engine.draining = True
        self._forget_if_idle(engine)
        return news

    def remove(self, url: str) -> bool:
        """The engine is gone: whoever waits for it waits no longer. True if that was news."""
        news = url in self._engines
        self.give_up(url)
        self._engines.pop(url, None)
        return news

    def serving(self) -> int:
        """How many engines are there, have not failed since they answered, and do not drain."""
        return sum(self.serves(url) for url in self._engines)

    def has(self, url: str) -> bool:
        """Whether the engine is there; it may be down, or drain."""
        return url in self._engines

    def urls(self) -> tuple[str, ...]:
        """Engines that are there; they may be down, or drain."""
        return tuple(self._engines)

    def staying(self) -> tuple[str, ...]:
        """Engines that do not drain; they may be down."""
        return tuple(engine.url for engine in self._engines.values() if not engine.draining)

    def at_ease(self, url: str) -> bool:
        """Whether the engine serves, and has not too much of the load."""
        up = [engine for engine in self._engines.values() if self.serves(engine.url)]
        return self.serves(url) and self._engines[url].tokens <= crowded_from(up)

    def serves(self, url: str) -> bool:
        """Whether the engine is there, up, and does not drain."""
        engine = self._engines.get(url)
        return engine is not None and not engine.failures and not engine.draining

    def _of(self, url: str) -> _Engine:
        """The engine; one that nobody sees where it is gone."""
        return self._engines.get(url) or _Engine(url)

    def _forget_if_idle(self, engine: _Engine) -> None:
        # another one may have been put in its place
        if engine.draining and not engine.in_flight and self._engines.get(engine.url) is engine:
            del self._engines[engine.url]

    def failed(self, url: str) -> bool:
        """The engine could not be reached, or broke off. True if that was news."""
        engine, now = self._of(url), self._clock()
        if engine.failures and now < engine.retry_at_s and not engine.probed:
            return False  # one of many requests that were on it when it went
        engine.failures += 1
        engine.probed = False
        engine.retry_at_s = now + _backoff_s(engine.failures)
        return True

    def succeeded(self, url: str) -> bool:
        """The engine answered. True if that was news."""
        engine = self._of(url)
        was_down = engine.failures > 0
        engine.failures, engine.probed, engine.answered = 0, False, True
        engine.hangs = engine.stuck = False
        return was_down

    def busy(self, url: str, tokens: int = 0) -> "_Load":
        """Counts one request of about so many tokens as in flight at the engine, while entered."""
        return _Load(self._of(url), tokens + REQUEST_TOKENS, self._forget_if_idle)

    def patience(self, url: str) -> "_Wait":
        """Waits, while entered, for a byte of the engine.

        TimeoutError if it is given up meanwhile, or is gone.
        """
        if url not in self._engines:
            raise TimeoutError("the engine was removed")
        return _Wait(self._engines[url], self._clock, self._slowest)

    def silent(self) -> tuple[str, ...]:
        """Engines that are waited for and have sent nothing for `QUIET_S`."""
        since = self._clock() - QUIET_S
        return tuple(e.url for e in self._engines.values() if e.waits and e.quiet_since_s <= since)

    def stuck(self) -> tuple[str, ...]:
        """Of those that are silent: while others answer, and for much longer than any took."""
        now, others = self._clock(), self._engines.values()
        return tuple(
            e.url
            for e in map(self._of, self.silent())
            if now - e.quiet_since_s >= max(STUCK_S, STUCK_TIMES * self._slowest.of(e.tokens))
            and any(_is_up(other) and other.heard_at_s > e.quiet_since_s for other in others)
        )

    def give_up(self, url: str, stuck: bool = False) -> None:
        """Ends all waits for an engine that hangs; ``stuck``: its API server may answer."""
        engine = self._of(url)
        engine.hangs, engine.stuck = True, engine.stuck or stuck
        for wait in engine.waits:
            wait.give_up()

    def is_stuck(self, url: str) -> bool:
        """Whether the engine was given up though its API server may answer."""
        return self._of(url).stuck

    def hanging(self) -> tuple[str, ...]:
        """Engines that were given up and have not shown life since."""
        return tuple(engine.url for engine in self._engines.values() if engine.hangs)

    def lives(self, url: str) -> None:
        """The engine has answered whether it is alive."""
        engine = self._of(url)
        engine.hangs = engine.stuck = False

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
                tokens=engine.tokens,
                draining=engine.draining,
                stuck=engine.stuck,
            )
            for engine in self._engines.values()
        )


# Both are classes, and no generators: each request has five of them.


class _Load:
    """A request in flight at an engine, while it is entered."""

    __slots__ = ("_ended", "_engine", "_tokens")

    def __init__(self, engine: _Engine, tokens: int, ended: Callable[[_Engine], None]) -> None:
        self._engine, self._tokens, self._ended = engine, tokens, ended

    def __enter__(self) -> None:
        self._engine.in_flight += 1
        self._engine.tokens += self._tokens

    def __exit__(self, *_error: object) -> None:
        self._engine.in_flight -= 1
        self._engine.tokens -= self._tokens
        self._ended(self._engine)


class _Wait:
    """A task's wait for an engine, while it is entered. `asyncio.timeout`, without a time."""

    __slots__ = ("_cancels_before", "_clock", "_engine", "_given_up", "_slowest", "_task")

    def __init__(self, engine: _Engine, clock: Callable[[], float], slowest: "SlowestWait") -> None:
        self._engine, self._clock, self._slowest = engine, clock, slowest
        self._given_up = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "waits for an engine outside of a task"
        self._task, self._cancels_before = task, task.cancelling()
        if not self._engine.waits:
            self._engine.quiet_since_s = self._clock()
        self._engine.waits.add(self)

    def give_up(self) -> None:
        """The wait ends with TimeoutError. Idempotent: it may still be closing its connection."""
        if not self._given_up:
            self._given_up = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        engine = self._engine
        engine.waits.remove(self)
        if kind is None:
            now = self._clock()
            self._slowest.saw(now - engine.quiet_since_s, engine.tokens)
            engine.heard_at_s = engine.quiet_since_s = now
        # somebody else may have cancelled the task, too
        ours_alone = self._given_up and self._task.uncancel() <= self._cancels_before
        if ours_alone and kind is asyncio.CancelledError:
            raise TimeoutError("the engine was given up") from None


class SlowestWait:
    """The longest time per token that any engine of a role lately took to say something."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` tells seconds, from any point on."""
        self._clock = clock
        self._since_s = clock()
        self._now = self._before = 0.0

    def saw(self, waited_s: float, tokens: int) -> None:
        """An engine with so many tokens in flight said something after such a time."""
        if self._clock() - self._since_s >= _LATELY_S:
            self._since_s, self._before, self._now = self._clock(), self._now, 0.0
        self._now = max(self._now, waited_s / max(tokens, 1))

    def of(self, tokens: int) -> float:
        """How long an engine with so many tokens in flight may take, by what was seen."""
        return max(self._now, self._before) * tokens


def _is_due(engine: _Engine, now: float) -> bool:
    return bool(engine.failures) and now >= engine.retry_at_s and not engine.hangs


def _is_up(engine: _Engine) -> bool:
    return engine.answered and not engine.failures


def _backoff_s(failures: int) -> float:
    # the shift is bounded too: an engine may be away for days
    return min(FIRST_BACKOFF_S * (1 << min(failures - 1, 8)), MAX_BACKOFF_S)
