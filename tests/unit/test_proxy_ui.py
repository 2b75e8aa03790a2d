"""What `/ui` sends and to whom; `test_ui_in_a_browser` looks at the page itself."""

import asyncio
import json
import re
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from test_proxy_app import (
    ANSWER,
    Engine,
    Rig,
    answers,
    hangs,
    prefills,
    rig,
    run,
    says,
    stream_that_breaks,
)
from test_proxy_engines import until

from kvconnect.proxy.requests.life import Journal
from kvconnect.proxy.ui import engines, server
from kvconnect.proxy.ui.engines import EngineReading, EngineWatch, errors, held, tiers, transfers
from kvconnect.proxy.ui.view import TransferView, request_view

ROOT = Path(__file__).parents[2]
KEY = {"Authorization": "Bearer operator"}
SECRET_PROMPT, SECRET_KEY = "the prompt is secret", "client-key"

METRICS = """\
# TYPE vllm:kvconnect_read_bytes_total counter
vllm:kvconnect_read_bytes_total{engine="0",model_name="m",path="staged",peer="10.0.0.1:5600"} %d
# TYPE vllm:kvconnect_reads_total counter
vllm:kvconnect_reads_total{engine="0",model_name="m",path="staged",peer="10.0.0.1:5600"} %d
# TYPE vllm:kvconnect_read_seconds_total counter
vllm:kvconnect_read_seconds_total{engine="0",model_name="m",path="staged",peer="10.0.0.1:5600"} %f
# TYPE vllm:kvconnect_held_blocks gauge
vllm:kvconnect_held_blocks{engine="0",model_name="m",cause="leased"} 40
vllm:kvconnect_held_blocks{engine="1",model_name="m",cause="leased"} 2
vllm:kvconnect_held_oldest_seconds{engine="0",model_name="m",cause="leased"} 3.5
vllm:kvconnect_held_oldest_seconds{engine="1",model_name="m",cause="leased"} 9.25
# TYPE vllm:kvconnect_failed_loads_total counter
vllm:kvconnect_failed_loads_total{engine="0",model_name="m",cause="timeout"} 3
vllm:kvconnect_failed_loads_total{engine="0",model_name="m",cause="transfer"} 0
# TYPE vllm:nixl_num_failed_transfers_total counter
vllm:nixl_num_failed_transfers_total{engine="0",model_name="m"} 3
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 250
# TYPE vllm:kvconnect_offload_tokens_from_host_total counter
vllm:kvconnect_offload_tokens_from_host_total{engine="0",model_name="m"} 600
# TYPE vllm:kvconnect_offload_tokens_from_disk_total counter
vllm:kvconnect_offload_tokens_from_disk_total{engine="0",model_name="m"} 100
# TYPE vllm:kvconnect_offload_tokens_missed_total counter
vllm:kvconnect_offload_tokens_missed_total{engine="0",model_name="m"} 300
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",model_name="m",finished_reason="stop"} 7
"""


class Metered(Engine):
    """Answers ``/metrics``, where another read has ended each time that somebody asks."""

    looks = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/metrics":
            return await super().handle(request)
        self.looks += 1
        done = self.looks * 8
        return web.Response(text=METRICS % (done * 2**20, done, done / 1000))


async def events(response: aiohttp.ClientResponse):
    async for line in response.content:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def watched(prefill: list[Engine], decode: list[Engine], **settings):
    return rig(prefill, decode, admin_key="operator", **settings)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits for the pace of people here."""
    monkeypatch.setattr(server, "EVERY_S", 0.02)
    monkeypatch.setattr(engines, "READ_EVERY_S", 0.02)


# --- who sees what -----------------------------------------------------------------------------


def test_strangers_get_the_page_and_nothing_on_it():
    async def scenario() -> None:
        async with watched([Engine(prefills)], [Engine(answers)], api_key="clients") as r:
            for key in ({}, {"Authorization": "Bearer clients"}):
                async with r.session.get("/ui/events", headers=key) as response:
                    assert response.status == 401
            async with r.session.get("/ui") as response:
                page, policy = await response.text(), response.headers["Content-Security-Policy"]
            assert "127.0.0.1" not in page
            assert policy.startswith("default-src 'none'; script-src 'sha256-")
            assert "unsafe" not in policy and "connect-src 'self'" in policy

    run(scenario())


def test_it_is_not_there_without_an_admin_key():
    async def scenario() -> None:
        async with rig([Engine(prefills)], [Engine(answers)], api_key="clients") as r:
            for path in ("/ui", "/ui/events"):
                async with r.session.get(path, headers=KEY) as response:
                    assert response.status == 404

    run(scenario())


def test_the_page_needs_nothing_of_elsewhere_and_puts_in_no_markup():
    page, _ = server.read_page()
    assert not re.findall(r"https?://(?!\)|\[)\w", page)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(| on\w+=", page
    )
    assert '<link rel="icon" href="data:,">' in page  # or browsers ask for one


# --- the events --------------------------------------------------------------------------------


async def four_requests(r: Rig, d: Engine) -> None:
    """One well, one refused, one broken off, one given up."""
    broken = stream_that_breaks(b"data: 1\n\n")
    d.behaviours = [answers, says(b"{}", 400), answers, broken, hangs]
    head = {"X-Request-Id": "well", "Authorization": f"Bearer {SECRET_KEY}"}
    body = {"prompt": SECRET_PROMPT}
    async with r.session.post("/v1/completions", json=body, headers=head) as response:
        assert await response.read() == ANSWER
    await r.ask(prompt=SECRET_PROMPT)
    await until(lambda: len(d.bodies) == 3)  # the KV of what was refused is let go
    with pytest.raises(aiohttp.ClientError):
        await r.ask(prompt=SECRET_PROMPT, stream=True)
    asking = asyncio.create_task(r.ask(prompt=SECRET_PROMPT))
    await d.reached.wait()
    asking.cancel()
    await d.aborted.wait()


def test_an_event_says_all_that_there_is_and_nothing_of_what_was_said():
    async def scenario() -> None:
        p, d = Metered(prefills), Metered(answers)
        async with watched([p], [d]) as r:
            await four_requests(r, d)
            await until(lambda: len(r.journal.recent) >= 4)
            d.behaviours, d.reached = [hangs], asyncio.Event()
            asking = asyncio.create_task(r.ask(prompt=SECRET_PROMPT))
            await d.reached.wait()
            async with r.session.get("/ui/events", headers=KEY) as response:
                assert response.content_type == "text/event-stream"
                stream = events(response)
                first = await anext(stream)
                async for event in stream:
                    if event["transfers"]:
                        break
            asking.cancel()

        assert first["first"] and [one["outcome"] for one in first["recent"][:3]] == [
            "ok",
            "error",
            "broken",
        ]
        well = first["recent"][0]
        assert (well["request_id"], well["status"], well["tries"]) == ("well", 200, 2)
        assert (well["prefill"], well["decode"], well["path"]) == (p.url, d.url, "/v1/completions")
        assert [phase["name"] for phase in well["phases"]] == [
            "queue",
            "prefill",
            "hand-over",
            "decode",
        ]
        assert first["recent"][-1]["outcome"] == "aborted"
        (running,) = first["running"]
        assert (running["outcome"], running["phases"][-1]["name"]) == ("running", "hand-over")
        assert {
            e["cause"]: e["count"] for e in first["errors"] if e["where"] == "proxy"
        }.items() >= {
            "answer broken off by an engine": 1,
            "given up by the client": 1,
        }.items()
        assert {e["metrics"] for e in first["engines"]} == {"not read yet"}

        assert not event["first"] and event["recent"] == []
        shown = [(e["role"], e["url"], e["state"], e["in_flight"]) for e in event["engines"]]
        assert shown == [("prefill", p.url, "up", 0), ("decode", d.url, "up", 1)]
        assert event["transfers"][0]["source"] == "10.0.0.1:5600"
        assert {h["engine"]: (h["blocks"], h["oldest_s"]) for h in event["held"]}[d.url] == (
            42,
            9.25,
        )
        assert {"device", "host", "disk"} <= {t["tier"] for t in event["tiers"]}
        assert [e["cause"] for e in event["errors"] if e["where"] == d.url] == [
            "load failed: timeout"
        ]
        for told in (first, event):
            assert SECRET_PROMPT not in json.dumps(told) and "Paris" not in json.dumps(told)
            assert SECRET_KEY not in json.dumps(told)

    run(scenario())


def test_what_ended_is_told_once():
    async def scenario() -> None:
        async with watched([Engine(prefills)], [Engine(answers)]) as r:
            await r.ask()
            async with r.session.get("/ui/events", headers=KEY) as response:
                stream = events(response)
                told = (await anext(stream))["recent"]
                await r.ask()
                await r.ask()
                async for event in stream:
                    told += event["recent"]
                    if len(told) >= 3:
                        break
                event = await anext(stream)
                assert len({(one["request_id"]) for one in told}) == len(told) == 3
                assert event["recent"] == [] and not event["first"]

    run(scenario())


def test_engines_are_read_only_while_somebody_looks():
    async def scenario() -> None:
        d = Metered(answers)
        async with d.serving():
            watch = EngineWatch(lambda: [d.url])
            before = asyncio.all_tasks()
            with watch.looked_at(), watch.looked_at():
                (reading,) = asyncio.all_tasks() - before
                await until(lambda: d.looks > 1)
            await asyncio.wait([reading])
            assert reading.cancelled() and watch.fault(d.url) == ""
            with watch.looked_at():
                assert watch.readings == {}  # nothing is compared with what is old
                await until(lambda: bool(watch.readings))

    run(scenario())


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (says(b"", 404), "/metrics answers 404"),
        (says(b"vllm:nixl_x{a=\n", kind="text/plain"), "/metrics cannot be read"),
    ],
    ids=["none", "garbled"],
)
def test_an_engine_without_usable_metrics_is_shown_with_the_reason(behaviour, said):
    async def scenario() -> None:
        d = Engine(behaviour)
        async with d.serving():
            watch = EngineWatch(lambda: [d.url, "http://127.0.0.1:1"])
            with watch.looked_at():
                await until(lambda: "/metrics" in watch.fault(d.url))
                assert said in watch.fault(d.url)
                await until(lambda: "cannot be reached" in watch.fault("http://127.0.0.1:1"))

    run(scenario())


def test_whoever_looks_does_not_keep_the_proxy_from_ending():
    """It used to wait for as long as answers under way may take."""

    async def scenario() -> None:
        async with aiohttp.ClientSession() as session:
            async with watched([Engine(prefills)], [Engine(answers)]) as r:
                url = r.session._base_url / "ui/events"
                response = await session.get(url, headers=KEY)
                await anext(events(response))
            # the end of the body, and no broken connection
            async for _ in events(response):
                pass
            assert response.content.at_eof() and response.content.exception() is None

    run(scenario())


# --- what is made of lives and readings --------------------------------------------------------


@pytest.mark.parametrize(
    ("legs", "cause", "phases"),
    [
        ([], "", [("queue", 0, 9)]),
        ([("prefill", 1, None, None)], "", [("queue", 0, 1), ("prefill", 1, 9)]),
        (
            [("prefill", 1, 4, 200), ("decode", 4, 6, 200)],
            "",
            [("queue", 0, 1), ("prefill", 1, 4), ("hand-over", 4, 6), ("decode", 6, 9)],
        ),
        (  # the first try does not count
            [("prefill", 0, None, None), ("prefill", 2, 4, 200), ("decode", 4, None, None)],
            "",
            [("queue", 0, 2), ("prefill", 2, 4), ("hand-over", 4, 9)],
        ),
        (  # decode alone computes itself
            [("prefill", 1, 2, 400), ("decode", 2, 6, 200)],
            "prefill refused it",
            [("queue", 0, 2), ("prefill", 2, 6), ("decode", 6, 9)],
        ),
        (
            [("prefill", 1, None, None), ("decode", 2, 6, 200)],
            "no prefill engine",
            [("queue", 0, 2), ("prefill", 2, 6), ("decode", 6, 9)],
        ),
        (  # asked at once
            [("prefill", 1, 4, 200), ("decode", 1, 6, 200)],
            "",
            [("queue", 0, 1), ("prefill", 1, 4), ("hand-over", 4, 6), ("decode", 6, 9)],
        ),
        (
            [("prefill", 1, None, None), ("decode", 1, 6, 200)],
            "",
            [("queue", 0, 1), ("prefill", 1, 6), ("hand-over", 6, 6), ("decode", 6, 9)],
        ),
    ],
    ids=["queued", "prefills", "whole", "again", "refused", "alone", "at once", "early"],
)
def test_a_waterfall_has_no_gaps(legs, cause, phases):
    now = 100.0
    journal = Journal(lambda: now)
    with journal.of("id", "/v1/completions", {}) as life:
        life.cause = cause
        for role, asked, answered, status in legs:
            now = 100.0 + asked
            leg = life.asked(role, f"http://{role}")
            if answered is not None:
                now = 100.0 + answered
                life.answered(leg, status)
        now = 109.0
    shown = request_view(life, 1000.0)
    assert [(phase.name, phase.from_s, phase.to_s) for phase in shown.phases] == phases


def test_transfers_are_what_grew_between_two_looks():
    first, second = EngineReading(METRICS % (1e6, 1, 0.5)), EngineReading(METRICS % (9e6, 5, 0.502))
    (moved,) = transfers("http://d", first, second)
    assert moved == TransferView(
        second.at_unix_s, "10.0.0.1:5600", "http://d", "staged", 4, 8_000_000, moved.gb_s
    )
    assert moved.gb_s == pytest.approx(4.0)
    assert transfers("http://d", second, second) == []
    (again,) = transfers("http://d", second, first)  # started again meanwhile
    assert (again.nbytes, again.reads) == (1_000_000, 1)


def test_in_tree_connectors_show_their_transfers_too():
    text = (
        "# TYPE vllm:nixl_bytes_transferred histogram\n"
        'vllm:nixl_bytes_transferred_bucket{engine="0",le="+Inf"} %d\n'
        'vllm:nixl_bytes_transferred_sum{engine="0"} %d\n'
        'vllm:nixl_bytes_transferred_count{engine="0"} %d\n'
        "# TYPE vllm:nixl_num_failed_transfers_total counter\n"
        'vllm:nixl_num_failed_transfers_total{engine="0"} 2\n'
    )
    first, second = EngineReading(text % (1, 100, 1)), EngineReading(text % (3, 500, 3))
    (moved,) = transfers("d", first, second)
    assert (moved.source, moved.path, moved.nbytes, moved.reads) == ("", "", 400, 2)
    assert moved.gb_s is None
    assert [(e.cause, e.count) for e in errors("d", second)] == [("transfer failed", 2)]


def test_each_tier_is_rated_by_what_it_was_asked_for():
    reading = EngineReading(METRICS % (0, 0, 0))
    rates = {t.tier: (t.found, t.asked) for t in tiers("d", reading)}
    assert rates == {"device": (250, 1000), "host": (600, 1000), "disk": (100, 400)}
    (block,) = held("d", reading)
    assert (block.cause, block.blocks, block.oldest_s) == ("leased", 42, 9.25)


def test_the_metrics_that_are_read_are_those_that_engines_have():
    known = (ROOT / "docs/metrics.md").read_text()
    source = (ROOT / "kvconnect/proxy/ui/engines.py").read_text()
    read = set(re.findall(r'"(vllm:(?:kvconnect|nixl)_\w+[a-z])"', source))
    read |= {f"vllm:kvconnect_{what}_total" for what in ("read_bytes", "reads", "read_seconds")}
    assert len(read) > 20
    for name in read:
        assert f"`{name.removesuffix('_total').removesuffix('_sum')}`" in known, name
