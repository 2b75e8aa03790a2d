"""Whose turn it is to be sent to engines that have no room for all."""

import asyncio

import pytest
from test_proxy_app import TEXT, Engine, answers, prefills, rig, run, waits
from test_proxy_engines import until

from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.policy import asked_priority, read_body
from kvconnect.proxy.requests import admission
from kvconnect.proxy.requests.admission import AdmissionQueue
from kvconnect.proxy.requests.life import Journal
from kvconnect.proxy.ui.view import request_view
from kvconnect.testing import FakeClock

P, D, D2 = "http://p:1", "http://d:1", "http://d:2"


class Desk:
    """An admission, and requests that come to it and go when they are told to."""

    def __init__(self, limit=1, max_queue=10, decode=(D,)):
        self.clock = FakeClock()
        self.prefillers = Pool((P,), self.clock, full_at=limit)
        self.decoders = Pool(decode, self.clock, full_at=limit)
        self.admission = AdmissionQueue(
            self.prefillers, self.decoders, limit, max_queue, self.clock
        )
        self.journal = Journal(self.clock)
        self.order = []
        self.lives = {}
        self._ends = {}
        self._tasks = {}

    async def come(self, *names, priority=0, split=False):
        for name in names:
            self._tasks[name] = asyncio.create_task(self._request(name, priority, split))
            await settled()

    async def go(self, *names):
        for name in names:
            self._ends[name].set()
            await settled()

    def give_up(self, name):
        """It learns of that as soon as it runs again."""
        self._tasks[name].cancel()

    def prefilled(self, name):
        """Lets others have their turn, who learn of that as soon as they run again."""
        self.lives[name].answered(self.lives[name].asked("prefill", P), 200)

    async def _request(self, name, priority, split):
        self._ends[name] = asyncio.Event()
        with self.journal.of(name, TEXT, {}) as life:
            self.lives[name] = life
            async with self.admission.enter(life, split, priority) as admitted:
                self.order.append(name if admitted else f"{name} is refused")
                if admitted:
                    await self._ends[name].wait()


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


def test_lower_priorities_come_first_then_who_came_first():
    async def scenario() -> None:
        desk = Desk()
        await desk.come("a")
        await desk.come("late", "later", priority=1)
        await desk.come("b", "c")
        await desk.come("urgent", priority=-5)
        await desk.go("a", "urgent", "b", "c", "late", "later")
        assert desk.order == ["a", "urgent", "b", "c", "late", "later"]
        assert desk.admission.state() == admission.QueueState(0, 0.0, 0)

    run(scenario())


def test_without_a_limit_nobody_waits():
    async def scenario() -> None:
        desk = Desk(limit=None)
        await desk.come("a", "b", split=True)
        assert desk.order == ["a", "b"]
        assert not desk.admission.limited

    run(scenario())


def test_a_queue_that_is_full_keeps_who_has_priority():
    async def scenario() -> None:
        desk = Desk(max_queue=2)
        await desk.come("runs", "waits", "waits too", "one too many")
        assert desk.order == ["runs", "one too many is refused"]
        await desk.come("urgent", priority=-1)
        assert desk.order[2:] == ["waits too is refused"]
        assert desk.admission.state().waiting == 2
        await desk.go("runs", "urgent", "waits")
        assert desk.order[3:] == ["urgent", "waits"]

    run(scenario())


def test_who_goes_leaves_the_queue():
    async def scenario() -> None:
        desk = Desk()
        await desk.come("runs", "gone", "waits")
        desk.give_up("gone")
        await settled()
        assert desk.admission.state().waiting == 1
        await desk.go("runs")
        assert desk.order == ["runs", "waits"]

    run(scenario())


@pytest.mark.parametrize("first", ["its turn comes", "its client goes"])
def test_a_turn_that_came_as_its_client_went_is_the_next_ones(first):
    """Such a place used to stay taken; and who had gone could not be told that it was its turn."""

    async def scenario() -> None:
        desk = Desk(decode=(D, D2))
        await desk.come("runs", "gone", split=True)
        if first == "its turn comes":
            desk.prefilled("runs")
            desk.give_up("gone")
        else:
            desk.give_up("gone")
            desk.prefilled("runs")
        await settled()
        assert desk.admission.state() == admission.QueueState(0, 0.0, 1)
        await desk.come("next", split=True)
        await desk.go("runs", "next")
        assert desk.order == ["runs", "next"]
        assert desk.admission.state() == admission.QueueState(0, 0.0, 0)

    run(scenario())


def test_prefill_has_room_again_once_it_has_answered():
    async def scenario() -> None:
        desk = Desk(decode=(D, D2))
        await desk.come("a", "b", split=True)
        assert desk.order == ["a"], "there is one prefill engine"
        await desk.come("alone")
        assert desk.order == ["a", "alone"], "decode has room for two"
        await desk.go("alone")
        desk.prefilled("a")
        desk.prefilled("a")  # counts once
        await settled()
        assert desk.order == ["a", "alone", "b"]
        await desk.come("c", split=True)
        await desk.go("a")
        assert desk.admission.state().waiting == 1
        await desk.go("b")
        assert desk.order[3:] == ["c"]
        assert [desk.lives[name].on_leg for name in ("a", "b")] == [[], []], "nobody listens on"

    run(scenario())


def test_prefill_has_room_again_where_decode_is_asked_alone():
    """It has the prompt already, say. Where both are asked at once, prefill is at work."""

    async def scenario() -> None:
        desk = Desk(decode=(D, D2))
        await desk.come("alone", "next", split=True)
        desk.lives["alone"].asked("decode", D)
        await settled()
        assert desk.order == ["alone", "next"]
        await desk.go("alone")
        desk.lives["next"].asked("prefill", P)
        desk.lives["next"].asked("decode", D)
        await desk.come("last", split=True)
        assert desk.order == ["alone", "next"]
        await desk.go("next")
        assert desk.order == ["alone", "next", "last"]

    run(scenario())


def test_engines_that_come_and_go_change_the_room(monkeypatch):
    monkeypatch.setattr(admission, "LOOK_EVERY_S", 0.001)

    async def scenario() -> None:
        desk = Desk()
        watch = asyncio.create_task(desk.admission.watch())
        await desk.come("a", "b", "c")
        desk.decoders.put(D2)
        await until(lambda: desk.order == ["a", "b"])
        desk.decoders.failed(D)
        desk.decoders.failed(D2)  # nobody waits for engines that are not there
        await until(lambda: desk.order == ["a", "b", "c"])
        watch.cancel()

    run(scenario())


def test_who_is_told_to_come_again_is_told_when():
    async def scenario() -> None:
        desk = Desk(max_queue=1)
        assert desk.admission.retry_after_s == 1
        await desk.come("a", "b")
        desk.clock.advance(6.5)
        assert desk.admission.state().oldest_s == 6.5
        await desk.go("a")
        assert desk.admission.retry_after_s == 7
        assert desk.lives["b"].admitted_s == desk.lives["b"].began_s + 6.5
        await desk.come("c")
        desk.clock.advance(9999)
        await desk.go("b")
        assert desk.admission.retry_after_s == admission.MAX_RETRY_AFTER_S

    run(scenario())


@pytest.mark.parametrize(
    ("header", "field", "priority"),
    [
        (None, None, 0),
        (None, b"-3", -3),
        ("7", b"-3", 7),
        ("soon", b"-3", -3),
        (None, b'"soon"', 0),
        (None, b"null", 0),
    ],
)
def test_priority_is_the_headers_or_the_fields_as_in_vllm(header, field, priority):
    body = read_body(b'{"priority": %s}' % field if field else b"{}")
    assert asked_priority(body, header) == priority


def test_an_engine_that_is_full_is_passed_over_even_by_who_belongs_to_it():
    pool = Pool((D, D2), FakeClock(), "prefix", full_at=1)
    first, other = pool.candidates(b"session")
    assert pool.candidates(b"session") == (first, other)
    with pool.busy(first):
        assert pool.candidates(b"session") == (other, first)


# --- as clients see it ---------------------------------------------------------------------------


async def waiting(r, count):
    async with asyncio.timeout(50):
        while (await r.health())["queue"]["waiting"] != count:
            await asyncio.sleep(0.01)


def test_the_queue_over_http():
    async def scenario() -> None:
        d = Engine(waits, answers)
        limits = {"max_requests_per_engine": 1, "max_queue": 2}
        async with rig([Engine(prefills)], [d], **limits) as r:
            first = asyncio.create_task(r.ask(prompt="first"))
            await d.reached.wait()
            low = asyncio.create_task(r.ask(prompt="low", priority=9))
            await waiting(r, 1)
            high = asyncio.create_task(r.ask(prompt="high"))
            await waiting(r, 2)
            async with r.session.post(TEXT, json={"prompt": "p", "priority": 10}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert "2 requests wait" in (await response.json())["error"]["message"]
            async with r.session.post("/tokenize", json={"prompt": "p"}) as response:
                assert response.status == 200, "what does not generate does not wait"
            r.clock.advance(3)
            d.go_on.set()
            for one in (first, low, high):
                assert (await one)[0] == 200
            assert [body["prompt"] for body in d.bodies] == ["first", "p", "high", "low"]
            assert (await r.counters())["queue_full"] == 1
            queue, *_ = request_view(r.journal.recent[-1], 0.0).phases
            assert (queue.name, queue.to_s) == ("queue", 3.0), "the waterfall shows the wait"

    run(scenario())


def test_deadlines_count_while_a_request_waits_and_who_goes_is_forgotten():
    async def scenario() -> None:
        d = Engine(waits, answers)
        async with rig([Engine(prefills)], [d], max_requests_per_engine=1) as r:
            first = asyncio.create_task(r.ask())
            await d.reached.wait()
            soon = {"X-Request-Timeout-S": "0.05"}
            async with r.session.post(TEXT, json={"prompt": "p"}, headers=soon) as response:
                assert response.status == 504
            await waiting(r, 0)
            gone = asyncio.create_task(r.ask())
            await waiting(r, 1)
            gone.cancel()
            await waiting(r, 0)
            d.go_on.set()
            assert (await first)[0] == 200
            assert (await r.ask())[0] == 200
            assert (await r.health())["queue"] == {"waiting": 0, "oldest_s": 0.0, "admitted": 0}

    run(scenario())
