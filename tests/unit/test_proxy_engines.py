"""The proxy in production: stuck engines, budgets, deadlines, policies, engines that come, go."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
import yarl
from aiohttp import web
from test_proxy_app import (
    ANSWER,
    CHAT,
    TEXT,
    TOKENS,
    Dead,
    Engine,
    Rig,
    answers,
    breaks,
    hangs,
    impatient,
    keeps_nothing,
    prefills,
    rig,
    run,
    says,
    streams,
    then,
)

from kvconnect.proxy.engines import health, keepers, pool
from kvconnect.proxy.requests.budget import RESERVE


async def until(holds: Callable[[], Awaitable[bool]] | Callable[[], bool]) -> None:
    """Waits for something that comes to pass, however long this machine takes."""
    while True:
        found = holds()
        if found if isinstance(found, bool) else await found:
            return
        await asyncio.sleep(0.01)


# --- stuck engines -----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_whose_api_server_lives_and_whose_engine_says_nothing_is_left_out(monkeypatch):
    """Its /health used to be enough: half of all requests hung for as long as it was stuck."""
    impatient(monkeypatch)
    working = False

    async def stuck_engine(engine: Engine, request: web.Request) -> web.StreamResponse:
        if request.method == "GET" or working:
            return await answers(engine, request)
        return await hangs(engine, request)

    async def scenario() -> None:
        nonlocal working
        stuck, well = Engine(stuck_engine), Engine(answers)
        async with rig([Engine(prefills)], [stuck, well]) as r:
            hung = asyncio.create_task(r.ask())
            await stuck.reached.wait()
            r.clock.advance(11)
            assert await r.ask() == (200, ANSWER)
            assert await hung == (200, ANSWER)
            state = (await r.health())["decode"][0]
            assert (state["stuck"], state["up"]) == (True, False)

            r.clock.advance(60)  # its backoff is over; a live request is no probe of it
            asked = len(well.bodies)
            for _ in range(3):
                assert await r.ask() == (200, ANSWER)
            assert len(well.bodies) == asked + 3

            working = True  # the token that it is asked for comes

            async def works() -> bool:
                return not (await r.health())["decode"][0]["stuck"]

            await until(works)
            assert {"prompt": [0], "max_tokens": 1} in stuck.bodies

    run(scenario())


@pytest.mark.slow
def test_what_is_stuck_is_up_again_by_a_token_alone(monkeypatch):
    """`/health`, asked by anybody, and an error in place of the token used to be enough."""
    impatient(monkeypatch)
    asked = 0

    async def stuck_engine(engine: Engine, request: web.Request) -> web.StreamResponse:
        nonlocal asked
        if request.method == "GET":
            return web.Response()
        if (await request.json())["prompt"] == [0]:
            asked += 1
            return web.Response(status=503)
        return await hangs(engine, request)

    async def scenario() -> None:
        stuck, well = Engine(stuck_engine), Engine(answers, answers, breaks)
        async with rig([Engine(prefills)], [stuck, well]) as r:
            hung = asyncio.create_task(r.ask())
            await stuck.reached.wait()
            r.clock.advance(11)
            assert await r.ask() == (200, ANSWER)
            assert await hung == (200, ANSWER)
            before = asked
            await until(lambda: asked >= before + 2)
            assert (await r.health())["decode"][0]["stuck"], "an error is no token"
            well.behaviours = [breaks]
            asking = asyncio.create_task(r.ask())
            await until(lambda: well.behaviours == [breaks] and len(well.bodies) >= 3)
            state = await r.health()
            assert (state["code"], state["decode"][0]["stuck"]) == (503, True)
            asking.cancel()

    run(scenario())


@pytest.mark.slow
def test_a_stream_of_an_engine_that_hangs_ends_in_an_error(monkeypatch):
    impatient(monkeypatch)

    async def hangs_in_its_stream(engine: Engine, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return await hangs(engine, request)
        return await then(streams(TOKENS[0]), hangs)(engine, request)

    async def scenario() -> None:
        d, other, got = Engine(hangs_in_its_stream), Engine(answers), bytearray()

        async def read_all() -> None:
            async with r.session.post(TEXT, json={"prompt": "p", "stream": True}) as response:
                async for chunk in response.content.iter_any():
                    got.extend(chunk)

        async with rig([Engine(prefills)], [d, other]) as r:
            reading = asyncio.create_task(read_all())
            await until(lambda: len(got) >= len(TOKENS[0]))
            assert await r.ask() == (200, ANSWER)
            r.clock.advance(3)
            with pytest.raises(aiohttp.ClientPayloadError):
                await reading
            assert b"broke off" in got
            assert len(other.bodies) == 1, "a stream that began is not begun again"

    run(scenario())


ENGINE_ALONE = """
import asyncio
from aiohttp import web

async def answer(request):
    await request.read()
    return web.Response(body=b'{"choices":[{"text":" Paris"}]}', content_type="application/json")

async def serve():
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


@pytest.mark.slow
def test_a_process_that_is_stopped_delays_only_what_it_had(monkeypatch):
    """Its kernel goes on to accept connections for it, and answers nobody."""
    impatient(monkeypatch)
    monkeypatch.setattr(health, "HEALTH_TIMEOUT_S", 2.0)
    monkeypatch.setattr(pool, "QUIET_S", 0.1)

    async def scenario(stopped: subprocess.Popen[str]) -> None:
        assert stopped.stdout is not None
        url = f"http://127.0.0.1:{stopped.stdout.readline().strip()}"
        well, p = Engine(answers), Engine(prefills)
        at_once = asyncio.Semaphore(4)

        async def one(r: Rig) -> int:
            async with at_once:
                return (await r.ask())[0]

        async with rig([p], [well], admin_key="k") as r:
            order = {"role": "decode", "url": url}
            key = {"Authorization": "Bearer k"}
            async with r.session.post("/admin/engines", json=order, headers=key) as response:
                assert response.status == 200
            await asyncio.gather(*(one(r) for _ in range(8)))
            r.journal.recent.clear()
            stopped.send_signal(signal.SIGSTOP)

            async def time_passes() -> None:
                while True:
                    await asyncio.sleep(0.1)
                    r.clock.advance(0.1)

            passing = asyncio.create_task(time_passes())
            assert await asyncio.gather(*(one(r) for _ in range(20))) == [200] * 20
            asked = sum(leg.url == url for life in r.journal.recent for leg in life.tries)
            assert 1 <= asked <= 4, "those that were on it when it stopped, and nobody after them"
            passing.cancel()

    with subprocess.Popen(
        [sys.executable, "-c", ENGINE_ALONE], stdout=subprocess.PIPE, text=True
    ) as stopped:
        try:
            run(scenario(stopped))
        finally:
            stopped.kill()


# --- budgets and deadlines ---------------------------------------------------------------------


def test_retries_end_with_their_budget():
    """Every request used to be sent to each engine of a role, in an outage too."""

    async def scenario() -> None:
        ds = [Engine(says(b"oops", 500)) for _ in range(2)]
        async with rig([Engine(keeps_nothing)], ds, retry_ratio=0.0) as r:
            asked = int(RESERVE) + 5
            for _ in range(asked):
                assert await r.ask() == (500, b"oops")
            assert sum(len(d.bodies) for d in ds) == asked + RESERVE
            counters = await r.counters()
            assert (counters["retries"], counters["unretried"]) == (RESERVE, 5)

    run(scenario())


def test_every_request_of_a_client_earns_its_share_of_retries():
    async def scenario() -> None:
        ds = [Engine(says(b"oops", 500)) for _ in range(2)]
        async with rig([Engine(keeps_nothing)], ds, retry_ratio=1.0) as r:
            asked = int(RESERVE) + 5
            for _ in range(asked):
                assert await r.ask() == (500, b"oops")
            counters = await r.counters()
            assert counters["retries"] == asked and "unretried" not in counters

    run(scenario())


def test_without_budget_prefill_is_not_asked_again_and_decode_works_alone():
    async def scenario() -> None:
        ps, d = [Engine(says(b"oops", 500)) for _ in range(2)], Engine(answers)
        async with rig(ps, [d], retry_ratio=0.0) as r:
            for _ in range(int(RESERVE) + 2):
                assert await r.ask() == (200, ANSWER)
            assert sum(len(p.bodies) for p in ps) == 2 * RESERVE + 2

    run(scenario())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_engines_that_refuse_connections_cost_no_budget(role):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        dead = [Dead() for _ in range(int(RESERVE) + 5)]
        ps, ds = ([*dead, p], [d]) if role == "prefill" else ([p], [*dead, d])
        async with rig(ps, ds, retry_ratio=0.0) as r:
            assert await r.ask() == (200, ANSWER)
            assert (len(p.bodies), len(d.bodies)) == (1, 1)
            assert "unretried" not in await r.counters()

    run(scenario())


@pytest.mark.parametrize("who", ["operator", "client"])
def test_a_request_that_takes_too_long_gets_504_and_its_engine_stops(who):
    async def scenario() -> None:
        d = Engine(hangs)
        limits = {"deadline_s": 0.5} if who == "operator" else {"deadline_s": 600.0}
        headers = {} if who == "operator" else {"X-Request-Timeout-S": "0.5"}
        async with rig([Engine(prefills)], [d], **limits) as r:
            async with r.session.post(TEXT, json={"prompt": "p"}, headers=headers) as response:
                assert response.status == 504
                assert (await response.json())["error"]["code"] == 504
            await asyncio.wait_for(d.aborted.wait(), 60)
            (life,) = r.journal.recent
            assert (life.outcome, life.cause) == ("error", "no answer within the deadline")

    run(scenario())


def test_a_stream_that_takes_too_long_ends_in_an_error():
    async def scenario() -> None:
        d, got = Engine(then(streams(TOKENS[0]), hangs)), bytearray()

        async def read_all() -> None:
            async with r.session.post(TEXT, json={"prompt": "p", "stream": True}) as response:
                async for chunk in response.content.iter_any():
                    got.extend(chunk)

        async with rig([Engine(prefills)], [d], deadline_s=1.0) as r:
            with pytest.raises(aiohttp.ClientPayloadError):
                await read_all()
            assert b"longer than its deadline" in got
            await asyncio.wait_for(d.aborted.wait(), 60)
            assert (await r.counters())["late"] == 1

    run(scenario())


@pytest.mark.parametrize("odd", ["nan", "inf", "-1", "0", "soon", ""])
def test_a_deadline_that_is_none_is_left_alone(odd):
    async def scenario() -> None:
        async with rig([Engine(prefills)], [Engine(answers)]) as r:
            headers = {"X-Request-Timeout-S": odd}
            async with r.session.post(TEXT, json={"prompt": "p"}, headers=headers) as response:
                assert response.status == 200

    run(scenario())


# --- policies ----------------------------------------------------------------------------------


def conversation(number: int, turns: int) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "be kind"}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn} of {number}"})
        messages.append({"role": "assistant", "content": "so it is"})
    return messages[:-1]


class Cache:
    """An engine that knows which conversations it has seen, as a prefix cache does."""

    def __init__(self) -> None:
        self.hits = 0
        self.seen: set[str] = set()

    async def __call__(self, engine: Engine, request: web.Request) -> web.StreamResponse:
        texts = [message["content"] for message in (await request.json())["messages"]]
        self.hits += json.dumps(texts[:-2]) in self.seen
        self.seen.add(json.dumps(texts))
        return await prefills(engine, request)


async def hit_rate(policy: str) -> float:
    caches = [Cache() for _ in range(3)]
    async with rig([Engine(cache) for cache in caches], [Engine(answers)], policy=policy) as r:
        for turns in range(1, 4):
            for number in range(10):
                assert (await r.ask(CHAT, messages=conversation(number, turns)))[0] == 200
    return sum(cache.hits for cache in caches) / 20


@pytest.mark.slow
def test_conversations_find_their_prefix_where_policy_goes_by_it():
    """10 conversations of 3 turns, 3 engines: every later turn where the earlier ones are."""

    async def scenario() -> None:
        assert await hit_rate("prefix") == await hit_rate("kv-aware") == 1.0
        assert await hit_rate("round-robin") < 0.7

    run(scenario())


def test_a_session_stays_with_its_engines():
    async def scenario() -> None:
        ps, ds = [Engine(prefills) for _ in range(3)], [Engine(answers) for _ in range(3)]
        async with rig(ps, ds) as r:
            for number in range(6):
                headers = {"X-Session-ID": "mine"}
                body = {"prompt": f"another {number}"}
                async with r.session.post(TEXT, json=body, headers=headers) as response:
                    assert response.status == 200
            assert sorted(len(p.bodies) for p in ps) == [0, 0, 6]
            assert sorted(len(d.bodies) for d in ds) == [0, 0, 6]

    run(scenario())


def test_short_prompts_go_to_decode_alone_where_that_is_chosen():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d], min_prefill_tokens=100) as r:
            await r.ask(prompt="short")
            assert p.bodies == []
            await r.ask(prompt="x" * 500)
            assert len(p.bodies) == 1
            assert await r.counters() == {"requests": 2, "decode_alone": 1, "short": 1}

    run(scenario())


# --- keys --------------------------------------------------------------------------------------


def test_engines_get_the_proxys_own_key_and_not_the_clients():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d], api_key="clients", engine_api_key="engines") as r:
            headers = {"Authorization": "Bearer clients"}
            async with r.session.post(TEXT, json={"prompt": "p"}, headers=headers) as response:
                assert response.status == 200
            for engine in (p, d):
                assert engine.heads[0].headers["Authorization"] == "Bearer engines"

    run(scenario())


# --- responses that are kept -------------------------------------------------------------------


def test_the_keeper_of_a_response_that_this_worker_never_saw_is_found():
    """With several workers, or after a restart, it used to be asked of any engine."""

    async def keeps(engine: Engine, request: web.Request) -> web.StreamResponse:
        status = 404 if request.method == "GET" and engine is not keeper else 200
        return web.Response(body=ANSWER, status=status)

    async def scenario() -> None:
        others = [Engine(keeps) for _ in range(2)]
        async with rig([Engine(prefills)], [others[0], keeper, others[1]]) as r:
            await r.ask("/v1/responses", input="and?", previous_response_id="resp_of_another")
            assert [len(engine.bodies) for engine in (keeper, *others)] == [1, 0, 0]

    keeper = Engine(keeps)
    run(scenario())


def test_a_keeper_that_was_removed_is_not_asked():
    async def scenario() -> None:
        made = says(b'{"id":"resp_7f", "output":[]}')
        keeper, other = Engine(made), Engine(answers)
        async with rig([Engine(prefills)], [keeper, other], admin_key="k") as r:
            await r.ask("/v1/responses", prompt=None, input="q")
            engine = {"role": "decode", "url": keeper.url}
            key = {"Authorization": "Bearer k"}
            async with r.session.delete("/admin/engines", params=engine, headers=key) as response:
                assert response.status == 200
            went_on = await r.ask("/v1/responses", input="and?", previous_response_id="resp_7f")
            assert went_on == (200, ANSWER)
            assert len(keeper.heads) == 1
            assert "retries" not in await r.counters()

    run(scenario())


def test_where_an_engine_sends_a_client_the_proxy_does_not_go():
    async def scenario() -> None:
        inner = Engine(answers)
        async with inner.serving():
            elsewhere = says(b"", 307, Location=f"{inner.url}/secret")
            async with rig([Engine(elsewhere)], [Engine(elsewhere)]) as r:
                body = {"prompt": "p"}
                async with r.session.post(TEXT, json=body, allow_redirects=False) as response:
                    assert response.status == 307
                assert inner.heads == []

    run(scenario())


def test_so_many_keepers_are_remembered(monkeypatch):
    monkeypatch.setattr(keepers, "REMEMBERED_RESPONSES", 2)

    async def scenario() -> None:
        made = [says(b'{"id":"resp_%d"}' % number) for number in range(3)]
        d, other = Engine(*made, answers), Engine(answers)
        async with rig([Engine(prefills)], [d, other]) as r:
            for _ in made:
                # one engine makes them all: it alone is asked for what goes on from its own
                body = (
                    {"input": "q", "previous_response_id": "resp_0"} if d.heads else {"input": "q"}
                )
                await r.ask("/v1/responses", prompt=None, **body)
            assert [head.method for head in (*d.heads, *other.heads)] == ["POST"] * 3
            for response_id, looked in (("resp_2", 0), ("resp_0", 2)):
                before = len(d.heads) + len(other.heads)
                await r.ask("/v1/responses", input="q", previous_response_id=response_id)
                assert len(d.heads) + len(other.heads) - before == 1 + looked

    run(scenario())


# --- what vLLM serves --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/cohere/v2/chat", "/v1/systemone"])
def test_what_generates_and_is_not_split_carries_no_transfer_params_either(path):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            evil = {"do_remote_prefill": True, "remote_host": "10.6.6.6"}
            assert await r.ask(path, kv_transfer_params=evil) == (200, ANSWER)
            assert d.bodies == [{"prompt": "p"}]
            assert p.heads == []
            assert await r.counters() == {"requests": 1, "decode_alone": 1, "not_splittable": 1}

    run(scenario())


class TakesForms(Engine):
    """Its bodies are no JSON."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.heads.append(request)
        return web.Response()


@pytest.mark.parametrize(
    "name",
    [
        b'name="vllm_xargs"',
        b"name=vllm_xargs",
        b"name*=utf-8''vllm%5Fxargs",
        b'name*0="vllm_"; name*1="xargs"',
        b'NAME *="x"',
    ],
)
def test_no_form_carries_transfer_params(name):
    """vLLM copies them from a transcription's form to where a connector reads them."""

    async def scenario() -> None:
        d = TakesForms()
        field = b'--b\r\nContent-Disposition: form-data; %s\r\n\r\n{"kv_transfer_params": "x"}\r\n'
        plain = (
            b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename*=utf-8''n\r\n\r\na\r\n"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        async with rig([Engine(prefills)], [d]) as r:
            for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
                for data, status in (
                    (plain + field % name + b"--b--", 400),
                    (plain + b"--b--", 200),
                ):
                    async with r.session.post(path, data=data, headers=kind) as response:
                        assert response.status == status, await response.text()
            assert len(d.heads) == 2

    run(scenario())


@pytest.mark.parametrize(
    "response_id", ["..%2F..%2Fsleep%3F", "a%3Fb", "%2E%2E", "a%20HTTP", "a%0D%0AX:%20y", "a%25b"]
)
def test_a_responses_id_names_no_other_path_of_the_engine(response_id):
    """It used to go to the engine decoded: `../../sleep?` is another endpoint, by way of nginx."""

    async def scenario() -> None:
        d = Engine(answers)
        async with rig([Engine(prefills)], [d]) as r:
            for method, end in (("GET", ""), ("POST", "/cancel")):
                path = yarl.URL(f"/v1/responses/{response_id}{end}", encoded=True)
                async with r.session.request(method, path) as response:
                    assert response.status in (404, 405)
            assert d.heads == []

    run(scenario())


def test_a_body_that_is_nested_too_deep_is_the_clients_fault():
    async def scenario() -> None:
        deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        async with (
            rig([Engine(prefills)], [Engine(answers)]) as r,
            r.session.post(TEXT, data=deep) as response,
        ):
            assert response.status == 400
            assert "nested" in (await response.json())["error"]["message"]

    run(scenario())


def test_decode_is_told_how_much_prefill_had_cached():
    """vLLM's decode engine then reports prefill's cached tokens, and not all that it loaded."""

    async def scenario() -> None:
        params = {"do_remote_prefill": True, "remote_prefill_cached_tokens": 48}
        answer = says(json.dumps({"id": "p", "kv_transfer_params": params}).encode())
        d = Engine(answers)
        async with rig([Engine(answer)], [d]) as r:
            await r.ask()
            assert d.bodies[0]["kv_transfer_params"] == params

    run(scenario())


def test_the_tests_that_the_documentation_names_exist():
    root = Path(__file__).parents[2]
    table = (root / "docs/proxy.md").read_text()
    sources = [*root.glob("tests/unit/test_proxy_*.py"), root / "tests/vllm/test_proxy_routes.py"]
    defined = set(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in sources)))
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 20
    assert named <= defined
