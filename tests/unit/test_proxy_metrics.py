"""What the proxy tells Prometheus, and whom."""

import asyncio
import re

import aiohttp
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from test_proxy_app import TEXT, Dead, Engine, answers, breaks_in_body, prefills, rig, run, waits

from kvconnect.cli import main
from kvconnect.proxy.engines.pool import ENGINE_STATES, Pool
from kvconnect.proxy.operators.metrics import PREFIX, PROXY, ProxyMetrics
from kvconnect.proxy.requests.admission import QueueState
from kvconnect.proxy.requests.counters import ProxyCounters
from kvconnect.proxy.requests.life import Journal
from kvconnect.testing import FakeClock


def samples(text):
    """Those that are not 0, by name and labels' values in the order of the labels' names."""
    return {
        (name.removeprefix(PREFIX), *(labels[label] for label in sorted(labels))): value
        for family in text_string_to_metric_families(text)
        for name, labels, value, *_ in family.samples
        if value and not name.endswith(("_bucket", "_created"))
    }


async def told(r, **headers):
    async with r.session.get("/metrics", headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        return samples(await response.text())


def a_proxy(journal):
    return ProxyMetrics(journal, dict, ProxyCounters, lambda: QueueState(0, 0.0, 0))


def test_all_that_is_counted_is_told_and_the_other_way_round():
    plain = {one.name for one in PROXY if one.kind == "counter" and not one.labels}
    assert plain == set(ProxyCounters.__struct_fields__)
    text = a_proxy(Journal(FakeClock())).text().decode()
    there = {one.name: one.type for one in text_string_to_metric_families(text)}
    told = {PREFIX + one.name: one.kind for one in PROXY}
    assert {name: kind for name, kind in there.items() if not name.endswith("_created")} == told


def test_options_that_a_metric_names_are_the_proxys_or_vllms():
    said = " ".join(f"{metric.help} {metric.advice}" for metric in PROXY)
    proxy = typer.main.get_command(main).commands["proxy"]
    options = {name for option in proxy.params for name in option.opts}
    assert set(re.findall(r"--[a-z-]+", said)) - options == {"--kv-transfer-config"}


def test_requests_are_counted_by_how_they_ended_and_how_long_they_took():
    async def scenario() -> None:
        d = Engine(answers, breaks_in_body)
        async with rig([Engine(prefills)], [d]) as r:
            await r.ask()
            with pytest.raises(aiohttp.ClientPayloadError):
                await r.ask()
            async with r.session.post(TEXT, data=b"no JSON") as response:
                assert response.status == 400
            seen = await told(r)
            assert seen["requests_total",] == 3
            assert (seen["ended_total", "ok"], seen["ended_total", "broken"]) == (1, 1)
            for name in ("prefill_seconds", "first_byte_seconds", "request_seconds"):
                assert seen[f"{name}_count",] == 2
            assert ("queue_seconds_count",) not in seen, "nobody has to wait"

    run(scenario())


def test_engines_and_who_waits_for_them():
    async def scenario() -> None:
        gone, d = Dead(), Engine(waits, answers)
        limit = {"max_requests_per_engine": 1, "policy": "round-robin"}
        async with rig([Engine(prefills), gone], [d], **limit) as r:
            first = asyncio.create_task(r.ask(prompt="p" * 400))
            await d.reached.wait()
            second = asyncio.create_task(r.ask())
            while ("waiting",) not in (seen := await told(r)):
                await asyncio.sleep(0.01)
            assert seen["in_flight", d.url, "decode"] == 1
            assert seen["in_flight_tokens", d.url, "decode"] > 64
            assert seen["engines", "decode", "not heard of"] == 1
            r.clock.advance(4.0)
            assert (await told(r))["waiting_oldest_seconds",] == 4.0
            d.go_on.set()
            await asyncio.gather(first, second)
            seen = await told(r)
            assert seen["engines", "decode", "up"] == seen["engines", "prefill", "up"] == 1
            assert seen["engines", "prefill", "down"] == 1, "the second one asked it first"
            assert (seen["queue_seconds_count",], seen["queue_seconds_sum",]) == (2, 4.0)

    run(scenario())


@pytest.mark.parametrize(
    "keys", [{"api_key": "clients", "admin_key": "operators"}, {"api_key": "clients"}], ids=str
)
def test_who_may_not_see_addresses_may_not_read_metrics(keys):
    async def scenario() -> None:
        async with rig([Engine(prefills)], [Engine(answers)], **keys) as r:
            for wrong in ({}, {"Authorization": "Bearer others"}):
                async with r.session.get("/metrics", headers=wrong) as response:
                    assert response.status == 401
                    assert "127.0.0.1" not in await response.text()
            for key in keys.values():
                assert await told(r, Authorization=f"Bearer {key}")

    run(scenario())


def test_a_request_does_not_fail_because_it_cannot_be_counted():
    journal = Journal(FakeClock())
    metrics = a_proxy(journal)
    with journal.of("r", TEXT, {}) as life:
        life.outcome = "of the future"
    assert journal.recent[-1] is life
    assert ("ended_total",) not in samples(metrics.text().decode())


def test_two_proxies_share_no_metric():
    one, other = Journal(FakeClock()), Journal(FakeClock())
    metrics, others = a_proxy(one), a_proxy(other)
    with one.of("r", TEXT, {}) as life:
        life.outcome = "ok"
    assert samples(metrics.text().decode())["ended_total", "ok"] == 1
    assert ("ended_total", "ok") not in samples(others.text().decode())


def test_an_engine_is_one_thing_at_a_time():
    pool = Pool(("http://d:1",), FakeClock())

    def state():
        (engine,) = pool.states()
        return engine.state

    seen = [state()]
    pool.succeeded("http://d:1")
    seen.append(state())
    pool.failed("http://d:1")
    seen.append(state())
    with pool.busy("http://d:1"):
        pool.drain("http://d:1")
        seen.append(state())
    assert seen == ["not heard of", "up", "down", "draining"]
    assert set(seen) < set(ENGINE_STATES)
