"""The proxy over loopback: real HTTP on both sides, engines that answer as vLLM does."""

import asyncio
import contextlib
import gzip
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner

from kvconnect.cli.proxy import proxy
from kvconnect.proxy.app import PROXY, loop_factory, start
from kvconnect.proxy.config import make_config
from kvconnect.proxy.engines import health, session
from kvconnect.proxy.requests import legs
from kvconnect.proxy.requests.life import Journal, RequestLife
from kvconnect.testing import FakeClock

PARAMS = {"do_remote_prefill": True, "remote_request_id": "r-1", "remote_port": 5600}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKENS = [b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % i for i in range(3)]
DONE = b"data: [DONE]\n\n"
LOAD_FAILED = b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
ANSWER = b'{"id": "x",  "choices":[{"text":" Paris"}],"kv_transfer_params":null}'

Behaviour = Callable[["Engine", web.Request], Awaitable[web.StreamResponse]]


class Engine:
    """An HTTP peer that remembers what it was asked and behaves as it is told, in turn."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.behaviours = list(behaviours)
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[web.Request] = []
        self.peers: set[Any] = set()
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.aborted = asyncio.Event()
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.heads.append(request)
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        if request.method == "POST":
            self.bodies.append(await request.json())
        behave = self.behaviours[0] if len(self.behaviours) == 1 else self.behaviours.pop(0)
        try:
            return await behave(self, request)
        except asyncio.CancelledError:
            self.aborted.set()
            raise

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[None]:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{any:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()


class Dead(Engine):
    """An address that refuses connections: its port is taken, and nobody listens."""

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[None]:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one may listen later
            taken.bind(("127.0.0.1", port))
            self.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
            yield


class Swallows(Engine):
    """An address whose packets go nowhere: its queue of connections is full."""

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[None]:
        with contextlib.ExitStack() as stack:
            full = stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=0))
            self.url = f"http://127.0.0.1:{full.getsockname()[1]}"
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            yield


def says(
    body: bytes, status: int = 200, kind: str = "application/json", **headers: str
) -> Behaviour:
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, content_type=kind, headers=headers)

    return behave


def streams(*chunks: bytes) -> Behaviour:
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.002)  # so that each arrives by itself
        return response

    return behave


def then(first: Behaviour, after: Behaviour) -> Behaviour:
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        await first(engine, request)
        return await after(engine, request)

    return behave


async def hangs(engine: Engine, request: web.Request) -> web.StreamResponse:
    engine.reached.set()
    await asyncio.Event().wait()
    raise AssertionError


async def waits(engine: Engine, request: web.Request) -> web.StreamResponse:
    engine.reached.set()
    await engine.go_on.wait()
    return web.Response()


async def breaks(engine: Engine, request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def breaks_in_body(engine: Engine, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = 100
    await response.prepare(request)
    await response.write(b'{"half":')
    await asyncio.sleep(0.02)  # reaches the peer before the reset can overtake it
    return await breaks(engine, request)


def stream_that_breaks(*chunks: bytes) -> Behaviour:
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        await asyncio.sleep(0.02)
        return await breaks(engine, request)

    return behave


def impatient_with(behaviour: Behaviour, kind: type[Engine]) -> dict[str, float]:
    """Limits only where one has to run out: a busy machine makes good engines slow, too."""
    if kind is Swallows:
        return {"connect_timeout_s": 1.5}
    return {"silence_timeout_s": 1.5} if kind is Engine and behaviour is hangs else {}


prefills = says(json.dumps({"id": "p", "choices": [], "kv_transfer_params": PARAMS}).encode())
keeps_nothing = says(b'{"id":"p","choices":[],"kv_transfer_params":null}')
answers = says(ANSWER)


class Rig:
    def __init__(self, session: aiohttp.ClientSession, clock: FakeClock, journal: Journal) -> None:
        self.session = session
        self.clock = clock
        self.journal = journal

    async def ask(self, path: str = TEXT, **fields: Any) -> tuple[int, bytes]:
        async with self.session.post(path, json={"prompt": "p"} | fields) as response:
            return response.status, await response.read()

    async def health(self) -> dict[str, Any]:
        async with self.session.get("/health") as response:
            return {"code": response.status} | await response.json()

    async def counters(self) -> dict[str, int]:
        counted = (await self.health())["counters"]
        return {name: count for name, count in counted.items() if count}


@contextlib.asynccontextmanager
async def rig(prefill: list[Engine], decode: list[Engine], **settings: Any) -> AsyncIterator[Rig]:
    clock = FakeClock()
    async with contextlib.AsyncExitStack() as stack:
        for engine in (*prefill, *decode):
            await stack.enter_async_context(engine.serving())
        config = make_config(
            prefill=[engine.url for engine in prefill],
            decode=[engine.url for engine in decode],
            **settings,
        )
        runner = await start(config, "127.0.0.1", 0, clock)
        stack.push_async_callback(runner.cleanup)
        session = aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await stack.enter_async_context(session)
        yield Rig(session, clock, runner.app[PROXY].journal)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 100))


# --- the walk ----------------------------------------------------------------------------------


def test_prefill_computes_and_decode_answers():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            headers = {
                "Authorization": "Bearer k",
                "traceparent": "00-1-2-01",
                "X-Request-Id": "me",
            }
            async with r.session.post(
                TEXT, json={"prompt": "p", "max_tokens": 9}, headers=headers
            ) as response:
                assert (response.status, await response.read()) == (200, ANSWER)
                assert response.headers["X-Request-Id"] == "me"
            assert p.bodies[0]["max_tokens"] == 1
            assert p.bodies[0]["kv_transfer_params"]["do_remote_decode"] is True
            assert d.bodies == [{"prompt": "p", "max_tokens": 9, "kv_transfer_params": PARAMS}]
            for engine in (p, d):
                assert engine.heads[0].path == TEXT
                for name, value in headers.items():
                    assert engine.heads[0].headers[name] == value
            assert await r.counters() == {"requests": 1}

    run(scenario())


def test_a_chat_with_its_own_limit_makes_one_token_at_prefill():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(streams(ROLE, *TOKENS, DONE))
        async with rig([p], [d]) as r:
            chat = {"messages": [{"role": "user", "content": "q"}], "max_completion_tokens": 50}
            status, body = await r.ask(CHAT, stream=True, **chat)
            assert (status, body) == (200, b"".join((ROLE, *TOKENS, DONE)))
            assert p.bodies[0]["max_completion_tokens"] == p.bodies[0]["max_tokens"] == 1
            assert p.bodies[0]["stream"] is False
            assert d.bodies[0]["max_completion_tokens"] == 50
            assert d.bodies[0]["stream"] is True
            assert p.heads[0].path == d.heads[0].path == CHAT

    run(scenario())


def test_both_legs_carry_one_fresh_id_where_the_client_has_none_that_is_safe():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            steering = "___decode_addr_10.6.6.6:1_x"
            for headers in ({}, {"X-Request-Id": steering}):
                async with r.session.post(TEXT, json={"prompt": "p"}, headers=headers) as response:
                    shown = response.headers["X-Request-Id"]
                assert p.heads[-1].headers["X-Request-Id"] == shown
                assert d.heads[-1].headers["X-Request-Id"] == shown != steering
            assert len({head.headers["X-Request-Id"] for head in p.heads}) == 2

    run(scenario())


def test_headers_that_could_not_be_sent_on_do_not_fail_the_request():
    async def scenario() -> None:
        d = Engine(answers)
        async with rig([Engine(prefills)], [d]) as r:
            async with r.session.get("/health") as response:
                port = response.url.port
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
                b"X-Request-Id: \xff\r\ntraceparent: \xff\xfe\r\nConnection: close\r\n\r\n{}"
            )
            assert b"200 OK" in await reader.readline()
            assert "traceparent" not in d.heads[0].headers
            writer.close()

    run(scenario())


def test_events_pass_one_by_one_as_they_come():
    async def scenario() -> None:
        d = Engine(then(streams(TOKENS[0]), waits))
        stream = {"prompt": "p", "stream": True}
        async with rig([Engine(prefills)], [d]) as r, r.session.post(TEXT, json=stream) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert await response.content.readany() == TOKENS[0]
            d.go_on.set()

    run(scenario())


def test_status_headers_and_bytes_of_an_answer_are_the_engines():
    async def scenario() -> None:
        d = Engine(says(b"\x00 tea", 418, "text/x-odd", **{"X-Own": "1", "Keep-Alive": "9"}))
        one = {"prompt": "p"}
        async with rig([Engine(prefills)], [d]) as r, r.session.post(TEXT, json=one) as response:
            assert (response.status, await response.read()) == (418, b"\x00 tea")
            assert response.headers["Content-Type"] == "text/x-odd"
            assert response.headers["X-Own"] == "1"
            assert response.headers["Content-Length"] == "5"
            assert "Keep-Alive" not in response.headers

    run(scenario())


def test_an_answer_is_neither_asked_for_compressed_nor_unpacked():
    async def scenario() -> None:
        d = Engine(says(gzip.compress(ANSWER), **{"Content-Encoding": "gzip"}))
        async with rig([Engine(prefills)], [d]) as r:
            assert await r.ask() == (200, ANSWER)  # unpacked by the client, from gzip bytes
            assert d.heads[0].headers["Accept-Encoding"] == "identity"

    run(scenario())


def test_connections_to_engines_are_kept():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(streams(*TOKENS))
        async with rig([p], [d]) as r:
            for _ in range(3):
                await r.ask(stream=True)
            assert len(p.peers) == len(d.peers) == 1

    run(scenario())


def test_a_large_body_reaches_both_engines():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            prompt = "x" * (3 * 2**20)
            body = io.BytesIO(json.dumps({"prompt": prompt}).encode())
            async with r.session.post(TEXT, data=body) as response:
                assert response.status == 200
            assert p.bodies[0]["prompt"] == d.bodies[0]["prompt"] == prompt

    run(scenario())


def test_engines_of_each_role_take_turns():
    async def scenario() -> None:
        ps, ds = [Engine(prefills) for _ in range(2)], [Engine(answers) for _ in range(3)]
        async with rig(ps, ds) as r:
            for _ in range(6):
                await r.ask()
            assert [len(p.bodies) for p in ps] == [3, 3]
            assert [len(d.bodies) for d in ds] == [2, 2, 2]

    run(scenario())


# --- what a client may not do, and what is not split -------------------------------------------


@pytest.mark.parametrize("kind", [Engine, Dead], ids=["with prefill", "decode alone"])
def test_a_clients_own_transfer_params_reach_no_engine(kind):
    async def scenario() -> None:
        p, d = kind(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            evil = {"do_remote_prefill": True, "remote_host": "169.254.169.254"}
            await r.ask(
                kv_transfer_params=evil,
                ec_transfer_params=evil,
                vllm_xargs={"kv_transfer_params": "169.254.169.254"},
            )
            for body in (*p.bodies, *d.bodies):
                assert "169.254" not in json.dumps(body)
            assert d.bodies[0].get("kv_transfer_params") == (PARAMS if p.bodies else None)

    run(scenario())


@pytest.mark.parametrize(
    "fields", [{"prompt": ["a", "b"]}, {"n": 2}, {"prompt_logprobs": 1}, {"best_of": 2}], ids=str
)
def test_what_one_lease_cannot_feed_goes_to_decode_alone(fields):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            assert await r.ask(**fields) == (200, ANSWER)
            assert p.bodies == []
            assert d.bodies == [{"prompt": "p"} | fields]
            assert await r.counters() == {"requests": 1, "decode_alone": 1, "not_splittable": 1}

    run(scenario())


# --- prefill engines fail ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "behaviour", "still_up"),
    [
        (Dead, hangs, False),
        pytest.param(Swallows, hangs, False, marks=pytest.mark.slow),
        (Engine, breaks, False),
        (Engine, breaks_in_body, False),
        pytest.param(Engine, hangs, False, marks=pytest.mark.slow),
        (Engine, says(b"gateway", 502), False),
        (Engine, says(b"queue full", 503), True),
        (Engine, says(b"oops", 500), True),
    ],
    ids=["refused", "swallowed", "reset", "reset in body", "silent", "502", "503", "500"],
)
def test_a_prefill_engine_that_fails_is_followed_by_the_next(kind, behaviour, still_up):
    """Only one that could not be reached is out of turn: 503 is a full queue, not an outage."""

    async def scenario() -> None:
        broken, good, d = kind(behaviour), Engine(prefills), Engine(answers)
        async with rig([broken, good], [d], **impatient_with(behaviour, kind)) as r:
            assert await r.ask() == (200, ANSWER)
            assert d.bodies[0]["kv_transfer_params"] == PARAMS
            health = await r.health()
            assert [state["up"] for state in health["prefill"]] == [still_up, True]
            assert await r.counters() == {"requests": 1, "retries": 1}

    run(scenario())


def test_a_prefill_engine_is_tried_again_after_its_backoff():
    async def scenario() -> None:
        flaky, good = Engine(breaks, prefills), Engine(prefills)
        async with rig([flaky, good], [Engine(answers)]) as r:
            for _ in range(3):
                await r.ask()
            assert (len(flaky.bodies), len(good.bodies)) == (1, 3)
            r.clock.advance(1.1)
            await r.ask()
            assert (len(flaky.bodies), len(good.bodies)) == (2, 3)
            assert all(state["up"] for state in (await r.health())["prefill"])

    run(scenario())


def test_without_any_prefill_engine_decode_works_alone():
    async def scenario() -> None:
        d = Engine(answers)
        async with rig([Dead(), Engine(breaks)], [d]) as r:
            assert await r.ask(max_tokens=7) == (200, ANSWER)
            assert d.bodies == [{"prompt": "p", "max_tokens": 7}]
            health = await r.health()
            assert (health["code"], health["status"]) == (200, "decode alone")
            assert await r.counters() == {
                "requests": 1,
                "retries": 1,
                "decode_alone": 1,
                "no_prefill": 1,
            }

    run(scenario())


@pytest.mark.parametrize("answer", [keeps_nothing, says(b"<html>")], ids=["null", "not JSON"])
def test_a_prefill_engine_that_kept_nothing_leaves_decode_alone(answer):
    async def scenario() -> None:
        d = Engine(answers)
        async with rig([Engine(answer)], [d]) as r:
            assert await r.ask() == (200, ANSWER)
            assert d.bodies == [{"prompt": "p"}]
            assert await r.counters() == {"requests": 1, "decode_alone": 1, "no_params": 1}

    run(scenario())


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429])
def test_what_prefill_refuses_decode_may_still_serve(status):
    """Prefill's 4xx used to be the client's answer, though decode could have served it."""

    async def scenario() -> None:
        p, d = Engine(says(b'{"error": {"message": "too long"}}', status)), Engine(answers)
        async with rig([p], [d]) as r:
            assert await r.ask() == (200, ANSWER)
            assert "kv_transfer_params" not in d.bodies[0]
            assert (await r.health())["prefill"][0]["up"]
            assert await r.counters() == {"requests": 1, "refused": 1, "decode_alone": 1}

    run(scenario())


@pytest.mark.parametrize(("status", "asks_another"), [(400, False), (404, True), (429, True)])
def test_another_prefill_engine_is_asked_where_only_this_one_cannot(status, asks_another):
    async def scenario() -> None:
        p, other, d = Engine(says(b"{}", status)), Engine(prefills), Engine(answers)
        async with rig([p, other], [d]) as r:
            assert await r.ask() == (200, ANSWER)
            assert len(other.bodies) == asks_another
            assert ("kv_transfer_params" in d.bodies[0]) == asks_another

    run(scenario())


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_only_decode_refuses_lets_go_of_prefills_kv(status):
    """Its blocks used to stay with prefill until their lease ran out."""

    async def scenario() -> None:
        said = b'{"error": {"message": "bad stop"}}'
        p, d = Engine(prefills), Engine(says(said, status), answers)
        async with rig([p], [d]) as r:
            assert await r.ask(stop=5) == (status, said)
            while len(d.bodies) < 2:
                await asyncio.sleep(0.01)
            assert d.bodies[1] == {"prompt": [0], "max_tokens": 1, "kv_transfer_params": PARAMS}
            assert d.heads[1].path == TEXT
            assert await r.counters() == {"requests": 1, "released": 1}

    run(scenario())


def test_another_decode_engine_is_asked_where_only_this_one_cannot():
    async def scenario() -> None:
        d, other = Engine(says(b"busy", 429), answers), Engine(answers)
        async with rig([Engine(prefills)], [d, other]) as r:
            assert await r.ask() == (200, ANSWER)
            assert "kv_transfer_params" not in other.bodies[0]  # the first may have let go of it

    run(scenario())


# --- requests of other kinds -------------------------------------------------------------------


def test_a_response_and_a_message_are_split():
    async def scenario() -> None:
        for path, limit in (("/v1/responses", "max_output_tokens"), ("/v1/messages", "max_tokens")):
            p, d = Engine(prefills), Engine(answers)
            async with rig([p], [d]) as r:
                sent = {"input": "q", limit: 50, "stream": False}
                async with r.session.post(path, json=sent) as response:
                    assert (response.status, await response.read()) == (200, ANSWER)
                assert p.heads[0].path == d.heads[0].path == path
                assert p.bodies[0][limit] == 1
                assert p.bodies[0]["kv_transfer_params"]["do_remote_decode"] is True
                assert p.bodies[0].get("store", False) is False
                assert d.bodies[0] == sent | {"kv_transfer_params": PARAMS}

    run(scenario())


def test_who_goes_on_from_a_response_asks_the_engine_that_keeps_it():
    async def scenario() -> None:
        first = says(b'{"id":"resp_7f", "output":[]}')
        p, d, other = Engine(prefills), Engine(first, answers), Engine(answers)
        async with rig([p], [d, other]) as r:
            await r.ask("/v1/responses", prompt=None, input="q")
            for _ in range(3):
                await r.ask("/v1/responses", input="and?", previous_response_id="resp_7f")
            async with r.session.get("/v1/responses/resp_7f") as response:
                assert response.status == 200
            assert [head.path for head in d.heads] == ["/v1/responses"] * 4 + [
                "/v1/responses/resp_7f"
            ]
            assert other.heads == []
            assert len(p.heads) == 1, "only decode has the prompt of a response that goes on"

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/v1/embeddings")),
        *(("POST", "/v1/messages/count_tokens"), ("POST", "/v1/rerank"), ("GET", "/version")),
    ],
)
def test_what_is_not_split_goes_to_decode_as_it_is(method, path):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            body = b'{"input":  "as it is"}' if method == "POST" else None
            async with r.session.request(method, path + "?a=%20b", data=body) as response:
                assert (response.status, await response.read()) == (200, ANSWER)
            assert (d.heads[0].method, d.heads[0].raw_path) == (method, path + "?a=%20b")
            assert p.heads == []

    run(scenario())


@pytest.mark.parametrize("path", ["/version", "/v1/responses/resp_1"])
def test_engines_are_never_asked_for_heads_alone(path):
    """As vLLM has it. Their answers tell a length that does not follow: who waits for it gives up
    engines that are well."""

    async def scenario() -> None:
        d = Engine(answers)
        async with rig([Engine(prefills)], [d], silence_timeout_s=1.5) as r:
            async with r.session.head(path) as response:
                assert (response.status, response.headers["Allow"]) == (405, "GET")
            assert d.heads == []

    run(scenario())


def test_a_stream_of_events_with_names_that_begins_with_a_failure_is_asked_again():
    async def scenario() -> None:
        begun = b'event: message_start\ndata: {"type":"message_start"}\n\n'
        failed = b'event: error\ndata: {"type":"error"}\n\n'
        good = b"event: content_block_start\ndata: {}\n\n"
        d = Engine(streams(begun, failed), streams(begun, good))
        async with rig([Engine(prefills)], [d]) as r:
            status, body = await r.ask("/v1/messages", stream=True)
            assert (status, body) == (200, begun + good)
            assert "kv_transfer_params" not in d.bodies[1]

    run(scenario())


def test_headers_that_engines_act_on_go_to_the_leg_that_they_are_for():
    """Priorities, sessions and data-parallel ranks used to be dropped."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        both = {"X-Vllm-Priority": "-5", "X-Session-ID": "s"}
        decode = {"X-data-parallel-rank": "1", "endpoint-load-metrics-format": "JSON"}
        async with rig([p], [d]) as r:
            async with r.session.post(TEXT + "?q=1", json={}, headers=both | decode) as response:
                assert response.status == 200
            assert both.items() <= dict(p.heads[0].headers).items()
            assert not decode.keys() & p.heads[0].headers.keys()
            assert (both | decode).items() <= dict(d.heads[0].headers).items()
            assert p.heads[0].query_string == d.heads[0].query_string == "q=1"

    run(scenario())


def test_a_clients_harmless_transfer_wishes_pass_and_its_addresses_do_not():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d]) as r:
            wishes = {"max_load_tokens": 0, "max_offload_tokens": 256}
            hostile = {"remote_host": "10.6.6.6", "remote_engine_id": "x"}
            await r.ask(kv_transfer_params=wishes | hostile)
            assert d.bodies[0]["kv_transfer_params"] == PARAMS | wishes
            assert p.bodies[0]["kv_transfer_params"]["remote_host"] is None
            assert wishes.items() <= p.bodies[0]["kv_transfer_params"].items()
            for bad in ({"max_load_tokens": "1"}, {"max_load_tokens": -1}, [], "x", 3):
                await r.ask(kv_transfer_params=bad)
                assert d.bodies[-1]["kv_transfer_params"] == PARAMS

    run(scenario())


def test_a_page_of_another_origin_may_ask():
    async def scenario() -> None:
        d = Engine(answers)
        async with rig([Engine(prefills)], [d], api_key="key") as r:
            origin = {"Origin": "https://a.page"}
            asks = {"Access-Control-Request-Method": "POST"}
            asks["Access-Control-Request-Headers"] = "authorization,content-type"
            async with r.session.options(CHAT, headers=origin | asks) as response:
                assert response.status == 200
                assert response.headers["Access-Control-Allow-Origin"] == "*"
                assert "POST" in response.headers["Access-Control-Allow-Methods"]
                allowed = response.headers["Access-Control-Allow-Headers"]
                assert allowed == asks["Access-Control-Request-Headers"]
            headers = origin | {"Authorization": "Bearer key"}
            async with r.session.post(TEXT, json={}, headers=headers) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert len(d.bodies) == 1

    run(scenario())


async def hangs_alive(engine: Engine, request: web.Request) -> web.StreamResponse:
    """Works on something long; its API server answers meanwhile."""
    if request.method == "GET":
        return web.Response()
    return await hangs(engine, request)


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(health, "HEALTH_TIMEOUT_S", 1.0)


def test_an_engine_that_hangs_loses_its_requests_to_another(monkeypatch):
    """They used to wait for it without end, and it went on to get its share."""
    impatient(monkeypatch)

    async def scenario() -> None:
        stuck, well, p = Engine(hangs), Engine(answers), Engine(prefills)
        async with rig([p], [stuck, well]) as r:
            hung = [asyncio.create_task(r.ask()) for _ in range(2)]
            await stuck.reached.wait()
            assert await r.ask() == (200, ANSWER)  # the other one is known to be up
            r.clock.advance(3)
            assert [await task for task in hung] == [(200, ANSWER)] * 2
            r.clock.advance(60)  # no live request is a probe of it, either
            for _ in range(4):
                assert await r.ask() == (200, ANSWER)
            assert len(stuck.bodies) == 1
            stuck.behaviours = [answers]
            while (await r.health())["decode"][0]["retry_in_s"] or len(stuck.bodies) == 1:
                await r.ask()
            assert (await r.health())["decode"][0]["up"]

    run(scenario())


def test_a_prefill_engine_that_hangs_is_left_out(monkeypatch):
    impatient(monkeypatch)

    async def scenario() -> None:
        p, d = Engine(hangs), Engine(answers)
        async with rig([p], [d]) as r:
            hung = asyncio.create_task(r.ask())
            await p.reached.wait()
            r.clock.advance(3)
            assert await hung == (200, ANSWER)
            assert "kv_transfer_params" not in d.bodies[0]

    run(scenario())


@pytest.mark.parametrize("slow", [Engine(hangs_alive), Engine(hangs)], ids=["alive", "the last"])
def test_an_engine_that_is_only_slow_or_the_last_one_is_waited_for(slow, monkeypatch):
    impatient(monkeypatch)

    async def scenario() -> None:
        is_last = slow.behaviours == [hangs]
        others = [] if is_last else [Engine(answers)]
        async with rig([Engine(prefills)], [slow, *others]) as r:
            waiting = asyncio.create_task(r.ask())
            await slow.reached.wait()
            if not is_last:
                await r.ask()
            r.clock.advance(3)
            await asyncio.sleep(1.5)
            assert not waiting.done()
            waiting.cancel()

    run(scenario())


def test_the_least_busy_engine_is_asked_first():
    """By turns alone, an engine that hangs used to get every second request for ever."""

    async def scenario() -> None:
        stuck, well = Engine(hangs), Engine(answers)
        async with rig([Engine(prefills)], [stuck, well]) as r:
            hung = asyncio.create_task(r.ask())
            await stuck.reached.wait()
            for _ in range(4):
                assert await r.ask() == (200, ANSWER)
            assert (len(stuck.bodies), len(well.bodies)) == (1, 4)
            hung.cancel()

    run(scenario())


# --- decode engines fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "behaviour", "asked"),
    [
        (Dead, hangs, False),
        pytest.param(Swallows, hangs, False, marks=pytest.mark.slow),
        (Engine, breaks, True),
        (Engine, stream_that_breaks(), True),
        pytest.param(Engine, hangs, True, marks=pytest.mark.slow),
    ],
    ids=["refused", "swallowed", "reset", "reset before the first byte", "silent"],
)
def test_a_decode_engine_that_fails_before_its_answer_is_followed_by_the_next(
    kind, behaviour, asked
):
    """The KV is offered again only if the first engine cannot have read and released it."""

    async def scenario() -> None:
        broken, good = kind(behaviour), Engine(streams(*TOKENS))
        async with rig([Engine(prefills)], [broken, good], **impatient_with(behaviour, kind)) as r:
            assert await r.ask(stream=True) == (200, b"".join(TOKENS))
            assert ("kv_transfer_params" in good.bodies[0]) is not asked
            assert not (await r.health())["decode"][0]["up"]
            counters = await r.counters()
            assert counters.pop("local_retries", 0) == asked
            assert counters == {"requests": 1, "retries": 1}

    run(scenario())


def test_without_any_decode_engine_the_answer_is_503_at_once():
    async def scenario() -> None:
        p = Engine(prefills)
        async with rig([p], [Dead(), Dead()]) as r:
            async with r.session.post(TEXT, json={"prompt": "p"}) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "1"
                error = (await response.json())["error"]
                assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
            health = await r.health()
            assert (health["code"], health["status"]) == (503, "unavailable")
            assert health["counters"]["unavailable"] == 1

    run(scenario())


def test_a_decode_engine_that_is_back_is_asked_when_there_is_no_other():
    """Also before its backoff has passed: a refused request is worse than a try."""

    async def scenario() -> None:
        d = Engine(breaks, answers)
        async with rig([Engine(prefills)], [d]) as r:
            assert (await r.ask())[0] == 503
            assert await r.ask() == (200, ANSWER)

    run(scenario())


@pytest.mark.parametrize("status", [500, 503])
def test_a_5xx_of_decode_is_asked_again_without_kv_elsewhere(status):
    async def scenario() -> None:
        failing, good = Engine(says(b"load failed", status)), Engine(answers)
        async with rig([Engine(prefills)], [failing, good]) as r:
            assert await r.ask() == (200, ANSWER)
            assert failing.bodies == [{"prompt": "p", "kv_transfer_params": PARAMS}]
            assert good.bodies == [{"prompt": "p"}]
            assert (await r.health())["decode"][0]["up"]
            assert await r.counters() == {"requests": 1, "retries": 1, "local_retries": 1}

    run(scenario())


@pytest.mark.parametrize(
    ("path", "failing", "good"),
    [
        (TEXT, says(b"load failed", 500), answers),
        (TEXT, streams(LOAD_FAILED, DONE), streams(*TOKENS, DONE)),
        (CHAT, streams(ROLE, LOAD_FAILED, DONE), streams(ROLE, *TOKENS, DONE)),
        (CHAT, streams(ROLE[:9], ROLE[9:], LOAD_FAILED[:9], LOAD_FAILED[9:]), streams(*TOKENS)),
    ],
    ids=["status", "first event", "event after the role", "events in pieces"],
)
def test_a_failed_kv_load_is_asked_again_without_kv_where_it_failed(path, failing, good):
    """vLLM reports it in a stream of status 200: a client used to see the error."""

    async def scenario() -> None:
        d = Engine(failing, good)
        async with rig([Engine(prefills)], [d]) as r:
            status, body = await r.ask(path, messages=[])
            assert status == 200
            assert b"error" not in body
            assert b"choices" in body
            assert ["kv_transfer_params" in body for body in d.bodies] == [True, False]
            assert await r.counters() == {"requests": 1, "retries": 1, "local_retries": 1}

    run(scenario())


@pytest.mark.parametrize(
    ("prefill", "failing", "tries"),
    [
        (prefills, says(b"broken model", 500), 2),
        (prefills, streams(LOAD_FAILED, DONE), 2),
        (keeps_nothing, says(b"broken model", 500), 1),
        (keeps_nothing, streams(LOAD_FAILED, DONE), 1),
    ],
    ids=["status", "event", "status, no KV", "event, no KV"],
)
def test_an_error_that_is_not_the_kvs_is_passed_on(prefill, failing, tries):
    async def scenario() -> None:
        d = Engine(failing)
        async with rig([Engine(prefill)], [d]) as r:
            status, body = await r.ask()
            assert (status, body) in [(500, b"broken model"), (200, LOAD_FAILED + DONE)]
            assert len(d.bodies) == tries

    run(scenario())


def test_a_5xx_is_asked_again_once():
    async def scenario() -> None:
        ds = [Engine(says(b"broken model", 500)) for _ in range(3)]
        async with rig([Engine(keeps_nothing)], ds) as r:
            assert await r.ask() == (500, b"broken model")
            assert sum(len(d.bodies) for d in ds) == 2

    run(scenario())


def test_an_answer_that_is_given_up_is_closed():
    async def scenario() -> None:
        failing, good = Engine(then(streams(LOAD_FAILED), hangs)), Engine(answers)
        async with rig([Engine(prefills)], [failing, good]) as r:
            assert await r.ask() == (200, ANSWER)
            await asyncio.wait_for(failing.aborted.wait(), 60)
            assert [state["in_flight"] for state in (await r.health())["decode"]] == [0, 0]

    run(scenario())


def test_a_role_is_not_held_back_while_the_engine_thinks(monkeypatch):
    monkeypatch.setattr(legs, "MAX_HELD_S", 0.02)

    async def scenario() -> None:
        d, stream = Engine(then(streams(ROLE), hangs)), {"messages": [], "stream": True}
        async with rig([Engine(prefills)], [d]) as r, r.session.post(CHAT, json=stream) as response:
            assert await response.content.readany() == ROLE
            response.close()

    run(scenario())


@pytest.mark.slow
def test_an_engine_that_falls_silent_while_its_answer_is_held_back_is_down(monkeypatch):
    monkeypatch.setattr(legs, "MAX_HELD_S", 5)

    async def scenario() -> None:
        silent, good = Engine(then(streams(ROLE), hangs)), Engine(answers)
        async with rig([Engine(prefills)], [silent, good], silence_timeout_s=2.0) as r:
            assert await r.ask(CHAT) == (200, ANSWER)
            assert not (await r.health())["decode"][0]["up"]

    run(scenario())


def test_a_4xx_of_decode_is_the_clients_answer():
    async def scenario() -> None:
        d = Engine(says(b"too many tokens", 400))
        async with rig([Engine(prefills)], [d]) as r:
            assert await r.ask() == (400, b"too many tokens")
            assert len(d.bodies) == 1

    run(scenario())


@pytest.mark.parametrize("border", [b"", b'data: {"cut'], ids=["between events", "in an event"])
def test_a_stream_that_breaks_ends_in_an_error_and_a_broken_connection(border):
    async def scenario() -> None:
        d, other = Engine(stream_that_breaks(TOKENS[0], border)), Engine(answers)
        async with rig([Engine(prefills)], [d, other]) as r:
            got = bytearray()

            async def read_all() -> None:
                async with r.session.post(TEXT, json={"prompt": "p", "stream": True}) as response:
                    async for chunk in response.content.iter_any():
                        got.extend(chunk)

            with pytest.raises(aiohttp.ClientPayloadError):
                await read_all()
            events = bytes(got).split(b"\n\n")
            assert events[:-2] == [TOKENS[0].strip(), *([border] if border else [])]
            assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == 502
            assert other.bodies == []
            assert (await r.counters())["broken"] == 1

    run(scenario())


def test_an_answer_cut_short_is_cut_short_for_the_client():
    async def scenario() -> None:
        d = Engine(breaks_in_body)
        async with rig([Engine(prefills)], [d]) as r:
            with pytest.raises(aiohttp.ClientPayloadError):
                await r.ask()
            assert (await r.counters())["broken"] == 1

    run(scenario())


# --- the client goes ---------------------------------------------------------------------------


def test_a_client_that_goes_during_prefill_ends_it():
    async def scenario() -> None:
        p, d = Engine(hangs), Engine(answers)
        async with rig([p], [d]) as r:
            asking = asyncio.create_task(r.ask())
            await p.reached.wait()
            assert (await r.health())["prefill"][0]["in_flight"] == 1
            asking.cancel()
            await asyncio.wait_for(p.aborted.wait(), 60)
            assert d.bodies == []
            assert await r.counters() == {"requests": 1, "aborted": 1}
            assert (await r.health())["prefill"][0]["in_flight"] == 0

    run(scenario())


@pytest.mark.parametrize(
    "behaviour", [hangs, then(streams(ROLE), hangs)], ids=["no answer yet", "held back"]
)
def test_a_client_that_goes_before_decode_answered_ends_it(behaviour):
    async def scenario() -> None:
        d = Engine(behaviour)
        async with rig([Engine(prefills)], [d]) as r:
            asking = asyncio.create_task(r.ask(CHAT, stream=True))
            await d.reached.wait()
            asking.cancel()
            await asyncio.wait_for(d.aborted.wait(), 60)
            assert await r.counters() == {"requests": 1, "aborted": 1}
            assert (await r.health())["decode"][0]["in_flight"] == 0

    run(scenario())


def test_a_client_that_goes_amid_the_answer_ends_it():
    async def scenario() -> None:
        d = Engine(then(streams(TOKENS[0]), hangs))
        async with rig([Engine(prefills)], [d]) as r:
            async with r.session.post(TEXT, json={"prompt": "p", "stream": True}) as response:
                await response.content.readany()
                assert (await r.health())["decode"][0]["in_flight"] == 1
                response.close()
            await asyncio.wait_for(d.aborted.wait(), 60)
            assert (await r.health())["decode"][0]["in_flight"] == 0
            assert await r.counters() == {"requests": 1, "aborted": 1}
            assert (await r.health())["decode"][0]["up"]

    run(scenario())


# --- everything else a client may ask ----------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", TEXT, b"{", 400, "not valid JSON"),
        ("POST", CHAT, b"[1]", 400, "not a JSON object"),
        ("POST", TEXT, b'"' + b"x" * 3000, 413, "larger than 2048 bytes"),
        ("POST", "/v1/else", b"{}", 404, "/v1/else is not served"),
        ("GET", "/", b"", 404, "not served"),
        ("GET", TEXT, b"", 405, "Method Not Allowed"),
    ],
)
def test_a_request_that_cannot_be_served_gets_openais_error(method, path, body, status, said):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d], max_body_bytes=2048) as r:
            async with r.session.request(method, path, data=body) as response:
                assert response.status == status
                assert response.content_type == "application/json"
                assert response.headers.get("Allow") == ("POST" if status == 405 else None)
                error = (await response.json())["error"]
            assert (said in error["message"], error["code"]) == (True, status)
            assert p.heads == d.heads == []

    run(scenario())


def test_models_are_those_of_the_first_engine_that_answers():
    async def scenario() -> None:
        p, sick = Engine(says(b'{"data":[1]}')), Engine(says(b"starting", 503))
        async with rig([p], [Dead(), sick]) as r:
            headers = {"Authorization": "Bearer k"}
            async with r.session.get("/v1/models", headers=headers) as response:
                assert (response.status, await response.json()) == (200, {"data": [1]})
            assert p.heads[0].headers["Authorization"] == "Bearer k"

    run(scenario())


def test_models_of_no_engine_are_503():
    async def scenario() -> None:
        async with rig([Dead()], [Dead()]) as r, r.session.get("/v1/models") as response:
            assert response.status == 503

    run(scenario())


@pytest.mark.parametrize(
    ("prefill", "decode", "code", "status"),
    [
        (Dead(hangs), Dead(hangs), 503, "unavailable"),
        (Engine(answers), Dead(hangs), 503, "unavailable"),
        (Dead(hangs), Engine(answers), 200, "decode alone"),
        (Engine(answers), Engine(says(b"loading", 503)), 503, "unavailable"),
        (Engine(answers), Engine(answers), 200, "ok"),
    ],
)
def test_health_asks_engines_that_have_not_answered_yet(prefill, decode, code, status):
    """It used to be 200 before anybody listened: traffic came while models were loading."""

    async def scenario() -> None:
        async with rig([prefill], [decode]) as r:
            health = await r.health()
            assert (health["code"], health["status"]) == (code, status)

    run(scenario())


def test_health_finds_a_decode_engine_that_is_back():
    """With traffic turned away because of a 503 here, no request would ever find it."""

    async def scenario() -> None:
        d = Dead()
        async with rig([Engine(prefills)], [d]) as r:
            await r.ask()
            assert (await r.health())["code"] == 503
            port = int(d.url.rsplit(":")[-1])
            for engine, code in ((Engine(says(b"", 503)), 503), (Engine(says(b"")), 200)):
                async with engine.serving(port):
                    assert (await r.health())["code"] == code
                    assert [head.path for head in engine.heads] == ["/health"]

    run(scenario())


def test_with_an_api_key_only_those_who_have_it_are_served():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d], api_key="secret") as r:
            for key in (None, "Bearer wrong", "Basic secret", "secret", "Bearer "):
                headers = {"Authorization": key} if key else {}
                async with r.session.post(TEXT, json={"prompt": "p"}, headers=headers) as refused:
                    assert (refused.status, refused.content_type) == (401, "application/json")
                for path in ("/v1/models", "/version", "/v1/responses/resp_1"):
                    async with r.session.get(path, headers=headers) as refused:
                        assert refused.status == 401
            assert p.heads == d.heads == []
            health = await r.health()
            assert (health["code"], set(health)) == (200, {"code", "status"})
            headers = {"Authorization": "Bearer secret"}
            async with r.session.post(TEXT, json={"prompt": "p"}, headers=headers) as served:
                assert served.status == 200
            async with r.session.get("/health", headers=headers) as response:
                assert "counters" in await response.json()

    run(scenario())


# --- the life of a request ---------------------------------------------------------------------


def test_the_life_of_a_request_tells_its_times_and_its_engines():
    async def scenario() -> None:
        async def after_a_second(engine: Engine, request: web.Request) -> web.StreamResponse:
            r.clock.advance(1)
            return await prefills(engine, request)

        p, d, ended = Engine(after_a_second), Engine(breaks, waits, answers), list[RequestLife]()
        async with rig([p], [d, d2 := Engine(waits)]) as r:
            r.journal.on_end.append(ended.append)
            asking = asyncio.create_task(r.ask())
            await d2.reached.wait()
            (life,) = r.journal.running
            assert (life.outcome, life.path, life.ended_s) == ("running", TEXT, None)
            r.clock.advance(5)
            d2.go_on.set()
            await asking
            assert ended == list(r.journal.recent) == [life]
            assert r.journal.running == set()
            assert [(leg.role, leg.url, leg.status) for leg in life.tries] == [
                ("prefill", p.url, 200),
                ("decode", d.url, None),
                ("decode", d2.url, 200),
            ]
            began = life.began_s
            assert [leg.answered_s for leg in life.tries] == [began + 1, None, began + 6]
            assert life.leg("decode") is life.tries[2]
            assert (life.outcome, life.status, life.ended_s) == ("ok", 200, began + 6)

    run(scenario())


@pytest.mark.parametrize(
    ("prefill", "decode", "outcome", "status", "cause"),
    [
        (prefills, answers, "ok", 200, ""),
        (keeps_nothing, answers, "ok", 200, "prefill kept nothing"),
        (breaks, answers, "ok", 200, "no prefill engine"),
        (says(b"{}", 400), answers, "ok", 200, "prefill refused it"),
        (prefills, says(b"{}", 400), "error", 400, ""),
        (prefills, breaks, "error", 503, "no decode engine can be reached; try again"),
        (prefills, stream_that_breaks(TOKENS[0]), "broken", 200, "the engine broke off its answer"),
    ],
)
def test_the_life_of_a_request_tells_its_outcome(prefill, decode, outcome, status, cause):
    async def scenario() -> None:
        async with rig([Engine(prefill)], [Engine(decode)]) as r:
            with contextlib.suppress(aiohttp.ClientPayloadError):
                await r.ask()
            (life,) = r.journal.recent
            assert (life.outcome, life.status, life.cause) == (outcome, status, cause)

    run(scenario())


def test_the_life_of_a_request_that_is_given_up_ends():
    async def scenario() -> None:
        d = Engine(hangs)
        async with rig([Engine(prefills)], [d]) as r:
            asking = asyncio.create_task(r.ask())
            await d.reached.wait()
            asking.cancel()
            while not r.journal.recent:
                await asyncio.sleep(0.01)
            assert (r.journal.recent[0].outcome, r.journal.recent[0].status) == ("aborted", None)

    run(scenario())


# --- the command -------------------------------------------------------------------------------


def test_a_host_that_dies_without_a_word_is_noticed(monkeypatch):
    """Nothing else ends a read from it: generation has no time limit."""
    made: list[socket.socket] = []
    watched_socket = session.watched_socket
    monkeypatch.setattr(
        session, "watched_socket", lambda address: made.append(watched_socket(address)) or made[-1]
    )

    async def scenario() -> None:
        d = Engine(then(streams(TOKENS[0]), hangs))
        async with d.serving():
            with (
                contextlib.closing(session.EngineSession(1, None)) as engines,
                await engines.ask("GET", d.url, "/"),
            ):
                (watched,) = made
                assert watched.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                if hasattr(socket, "TCP_KEEPIDLE"):
                    assert watched.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 30
                assert watched.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    run(scenario())


def test_a_setting_that_cannot_work_is_said_before_anything_starts():
    app = typer.Typer()
    app.command()(proxy)
    result = CliRunner().invoke(app, ["--prefill", "localhost:1", "--decode", "http://d"])
    assert result.exit_code == 2
    assert "write http://HOST:PORT" in " ".join(result.output.replace("│", " ").split())


def test_the_event_loop_is_uvloops_where_there_is_one(monkeypatch):
    import uvloop

    assert loop_factory() is uvloop.new_event_loop
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_factory() is None


def test_an_address_that_is_taken_is_said():
    app = typer.Typer()
    app.command()(proxy)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(
            app, ["--prefill", "http://p", "--decode", "http://d", "--port", port]
        )
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--admin-key", "operator"]], ids=["plain", "with a page"])
def test_the_command_announces_itself_and_stops_when_told(more):
    program = (
        "import sys, typer; from kvconnect.cli.proxy import proxy;"
        "assert 'aiohttp' not in sys.modules, 'kvconnect --help would pay for it';"
        "typer.run(proxy)"
    )
    engines = ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *engines, "--port", "0", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline().decode()
        assert said.startswith("kvconnect proxy listens on http://127.0.0.1:"), (
            said or process.stderr.read().decode()
        )
        page = ", with a page at /ui" if more else ""
        assert said.rstrip().endswith(f"(1 prefill, 1 decode){page}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
