"""Whose turn it is among engines that come, go and get stuck; how much may be asked again."""

import asyncio
import collections
import json
from dataclasses import dataclass

import msgspec
import pytest

from kvconnect.proxy.engines.balance import in_order
from kvconnect.proxy.engines.pool import FIRST_BACKOFF_S, STUCK_S, Pool
from kvconnect.proxy.policy import guessed_tokens, prompt_head, read_body
from kvconnect.proxy.requests.budget import RESERVE, RetryBudget
from kvconnect.testing import FakeClock


@pytest.fixture
def clock():
    return FakeClock()


@dataclass
class Loaded:
    url: str
    tokens: int = 0


def first(loads, policy, turn=0, key=None):
    return in_order([Loaded(url, tokens) for url, tokens in loads.items()], policy, turn, key)[
        0
    ].url


# --- policies ----------------------------------------------------------------------------------


def test_least_loaded_counts_tokens_and_not_requests():
    pool = Pool(["a", "b"], FakeClock())
    with pool.busy("a", tokens=9000), pool.busy("b", tokens=10), pool.busy("b", tokens=10):
        assert pool.candidates() == ("b", "a")
    assert pool.states()[0].tokens == pool.states()[1].tokens == 0


def test_round_robin_does_not_look_at_the_load():
    loads = {"a": 0, "b": 9000, "c": 5}
    assert [first(loads, "round-robin", turn) for turn in range(4)] == ["a", "b", "c", "a"]


@pytest.mark.parametrize("policy", ["prefix", "least-loaded", "round-robin"])
def test_a_key_has_its_engine_whoever_else_is_less_busy(policy):
    for key in (b"one", b"two", b"three"):
        asked = {first({"a": turn % 7, "b": 0, "c": turn}, policy, turn, key) for turn in range(20)}
        assert len(asked) == 1


def test_keys_spread_and_an_engine_that_goes_moves_only_its_own():
    keys = [b"%d" % number for number in range(300)]
    three, two = {"a": 0, "b": 0, "c": 0}, {"a": 0, "b": 0}
    before = {key: first(three, "prefix", key=key) for key in keys}
    after = {key: first(two, "prefix", key=key) for key in keys}
    assert min(collections.Counter(before.values()).values()) > 60
    assert all(after[key] == engine for key, engine in before.items() if engine != "c")


def test_an_engine_that_is_crowded_is_passed_over():
    home = first({"a": 0, "b": 0}, "prefix", key=b"k")
    other = "b" if home == "a" else "a"
    assert first({home: 4000, other: 0}, "prefix", key=b"k") == home
    assert first({home: 9000, other: 8000}, "prefix", key=b"k") == home
    assert first({home: 9000, other: 0}, "prefix", key=b"k") == other


def head(**body):
    return prompt_head(read_body(json.dumps(body).encode()))


def test_the_turns_of_a_conversation_have_one_head():
    system = {"role": "system", "content": 'be "role": "user" kind'}
    one = {"role": "user", "content": "what is it?"}
    turns = [system, one, {"role": "assistant", "content": "it"}, {"role": "user", "content": "?"}]
    for key in ("messages", "input"):
        assert head(**{key: turns[:2]}) == head(**{key: turns})
        assert head(**{key: turns}) != head(**{key: [system, one | {"content": "another"}]})
    assert head(prompt="x" * 5000 + "y") == head(prompt="x" * 5000 + "z")
    assert head(prompt="xy") != head(prompt="xz")
    for odd in ({}, {"messages": []}, {"messages": None, "prompt": [1, 2]}, {"input": "q"}):
        assert isinstance(head(**odd), bytes)


def test_tokens_are_guessed_from_bytes():
    assert guessed_tokens({"prompt": msgspec.Raw(b'"' + b"x" * 398 + b'"')}) == 100


# --- engines come and go -----------------------------------------------------------------------


def test_an_engine_that_comes_is_asked_and_one_that_drains_is_not(clock):
    pool = Pool(["a"], clock)
    assert (pool.put("b"), pool.put("b")) == (True, False)
    assert set(pool.candidates()) == {"a", "b"}
    with pool.busy("b"):
        assert (pool.drain("b"), pool.drain("b")) == (True, False)
        assert pool.candidates() == ("a",)
        assert pool.last_resort() == ()
        assert [state.draining for state in pool.states()] == [False, True]
        assert pool.put("b"), "it comes back before its last request ended"
        assert set(pool.candidates()) == {"a", "b"}
        pool.drain("b")
    assert not pool.has("b"), "gone with its last request"


def test_one_request_at_a_time_tries_an_engine_that_failed(clock):
    pool = Pool(["a", "b"], clock)
    pool.failed("a")
    clock.advance(FIRST_BACKOFF_S)
    assert pool.candidates() == ("a", "b")
    assert pool.candidates() == ("b",)
    clock.advance(FIRST_BACKOFF_S)
    assert pool.candidates() == ("a", "b"), "whoever had the probe never told"


def test_an_engine_that_drains_and_failed_is_no_last_resort(clock):
    pool = Pool(["a", "b"], clock)
    with pool.busy("a"):
        pool.failed("a")
        assert pool.last_resort() == ("a",)
        pool.drain("a")
        assert pool.last_resort() == ()


def test_an_idle_engine_that_drains_is_gone_at_once(clock):
    pool = Pool(["a"], clock)
    pool.drain("a")
    assert pool.states() == pool.candidates() == ()


def test_whoever_waits_for_an_engine_that_is_removed_waits_no_longer(clock):
    async def scenario() -> None:
        pool = Pool(["a", "b"], clock)

        async def ask() -> None:
            with pool.busy("a"), pool.patience("a"):
                await asyncio.Event().wait()

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        assert pool.remove("a")
        with pytest.raises(TimeoutError):
            await asking
        assert not pool.remove("a")

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_reports_about_an_engine_that_is_gone_mean_nothing(clock):
    pool = Pool(["a"], clock)
    for report in (pool.failed, pool.succeeded, pool.lives, pool.give_up, pool.drain, pool.remove):
        report("gone")
    with pool.busy("gone"):
        assert pool.candidates() == ("a",)
    assert [state.url for state in pool.states()] == ["a"]


def test_an_engine_that_is_put_back_stays_when_an_old_request_ends(clock):
    """A request of one that drained and was removed used to take the new one with it."""
    pool = Pool(["a"], clock)
    with pool.busy("a"):
        pool.drain("a")
        pool.remove("a")
        pool.put("a")
    assert pool.candidates() == ("a",)


def test_nobody_waits_for_an_engine_that_was_removed(clock):
    """A stream that was just being written to its client used to go on, and nobody watched it."""

    async def scenario() -> None:
        pool = Pool(["a"], clock)
        with pool.busy("a"):
            pool.remove("a")
            with pytest.raises(TimeoutError, match="removed"), pool.patience("a"):
                pass

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_who_is_cancelled_while_its_engine_is_given_up_is_cancelled(clock):
    """Its client went in the same moment: nobody is left for whom another engine could be asked."""

    async def scenario() -> None:
        pool = Pool(["a"], clock)

        async def ask() -> None:
            with pool.patience("a"):
                await asyncio.Event().wait()

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        pool.give_up("a")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_who_was_given_up_can_wait_for_another_engine_within_a_deadline(clock):
    """A cancellation that is left over would end the next wait, or hide that a deadline passed."""

    async def scenario() -> None:
        pool = Pool(["a", "b"], clock)

        async def wait_for(url: str) -> None:
            with pool.patience(url):
                await asyncio.Event().wait()

        async def ask() -> None:
            async with asyncio.timeout(0.05):
                with pytest.raises(TimeoutError, match="given up"):
                    await wait_for("a")
                await wait_for("b")

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        pool.give_up("a")
        with pytest.raises(TimeoutError) as late:
            await asking
        assert not str(late.value)  # asyncio's own: the deadline, and not the engine
        assert not asking.cancelling()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_an_engine_may_be_given_up_again_while_its_connections_close(clock):
    """The second time used to raise, which ended the watch over all engines."""

    async def scenario() -> None:
        pool = Pool(["a"], clock)
        waiting, closing, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def ask() -> None:
            with pool.patience("a"):
                try:
                    waiting.set()
                    await asyncio.Event().wait()
                finally:
                    closing.set()
                    await closed.wait()

        asking = asyncio.create_task(ask())
        await waiting.wait()
        pool.give_up("a")
        await closing.wait()
        pool.give_up("a")
        closed.set()
        with pytest.raises(TimeoutError):
            await asking

    asyncio.run(asyncio.wait_for(scenario(), 60))


# --- engines that are stuck --------------------------------------------------------------------


class Waits:
    """Requests that wait for engines of a pool; each goes on when it is told that a byte came."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.came: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def on(self, url: str, tokens: int = 0) -> None:
        came = self.came[url] = asyncio.Event()

        async def wait() -> None:
            with self.pool.busy(url, tokens):
                with self.pool.patience(url):
                    await came.wait()
                self.pool.succeeded(url)

        self.tasks[url] = asyncio.create_task(wait())
        await asyncio.sleep(0)

    async def hear(self, url: str) -> None:
        self.came[url].set()
        await self.tasks[url]


def with_waits(scenario, clock):
    async def run() -> None:
        pool = Pool(["a", "b"], clock)
        waits = Waits(pool)
        await scenario(pool, waits)
        for task in waits.tasks.values():
            task.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_engine_is_stuck_that_says_nothing_while_another_answers(clock):
    async def scenario(pool: Pool, waits: Waits) -> None:
        await waits.on("a")
        clock.advance(STUCK_S)
        assert pool.stuck() == (), "nobody else answers either"
        await waits.on("b")
        assert pool.stuck() == (), "the other one was only asked"
        clock.advance(0.1)
        await waits.hear("b")
        assert pool.stuck() == ("a",)
        pool.give_up("a", stuck=True)
        with pytest.raises(TimeoutError):
            await waits.tasks["a"]
        assert pool.is_stuck("a")
        pool.succeeded("a")
        assert not pool.is_stuck("a")

    with_waits(scenario, clock)


def test_an_engine_with_much_to_compute_is_given_time_in_proportion(clock):
    async def scenario(pool: Pool, waits: Waits) -> None:
        await waits.on("b", tokens=1000)
        clock.advance(2)
        await waits.hear("b")
        await waits.on("a", tokens=10_000)
        clock.advance(80)
        await waits.on("b")
        await waits.hear("b")
        assert pool.stuck() == (), "19 s is what so many tokens take; 5 times that it may have"
        clock.advance(20)
        assert pool.stuck() == ("a",)

    with_waits(scenario, clock)


def test_what_was_slow_long_ago_excuses_nobody(clock):
    async def scenario(pool: Pool, waits: Waits) -> None:
        await waits.on("b")
        clock.advance(200)
        await waits.hear("b")
        for _ in range(3):
            clock.advance(300)
            await waits.on("b")
            await waits.hear("b")
        await waits.on("a")
        clock.advance(STUCK_S)
        await waits.on("b")
        clock.advance(0.1)
        await waits.hear("b")
        assert pool.stuck() == ("a",)

    with_waits(scenario, clock)


# --- retries -----------------------------------------------------------------------------------


def test_retries_are_a_share_of_requests(clock):
    budget = RetryBudget(0.25, clock)
    assert [budget.spend() for _ in range(int(RESERVE) + 1)] == [True] * int(RESERVE) + [False]
    for _ in range(40):
        budget.earn()
    assert sum(budget.spend() for _ in range(20)) == 10
    clock.advance(3)
    assert sum(budget.spend() for _ in range(20)) == 3


def test_retries_are_not_saved_up_without_end(clock):
    budget = RetryBudget(0.25, clock)
    clock.advance(10_000)
    for _ in range(10_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(200)) == RESERVE
