"""The proxy with `AtOnce`: decode is asked while prefill computes; in turn where that fails."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from test_proxy_app import (
    ANSWER,
    CHAT,
    DONE,
    LOAD_FAILED,
    TEXT,
    TOKENS,
    Dead,
    Engine,
    answers,
    breaks,
    breaks_in_body,
    hangs,
    keeps_nothing,
    rig,
    run,
    says,
    streams,
    then,
)

from kvconnect.proxy.config import make_config
from kvconnect.proxy.policy import read_body
from kvconnect.proxy.requests import legs
from kvconnect.proxy.requests.budget import RESERVE
from kvconnect.proxy.requests.legs import LegRequest, Legs
from kvconnect.proxy.requests.life import LegTry, RequestLife
from kvconnect.testing import FakeClock

WHERE = {"remote_engine_id": "P", "remote_host": "10.0.0.1", "remote_port": 5600}
TICKET = {"do_remote_prefill": True, "kvconnect": "ticket", **WHERE}


STEPS = {"step_tokens": 50}


async def prefills(engine: Engine, request: web.Request) -> web.StreamResponse:
    """As our prefill engine: says how many tokens it computes in a step, and says a name back."""
    asked = (await request.json())["kv_transfer_params"]
    name = {"transfer_id": asked["transfer_id"]} if "transfer_id" in asked else {}
    return web.json_response({"id": "p", "kv_transfer_params": TICKET | STEPS | name})


async def prefills_when_told(engine: Engine, request: web.Request) -> web.StreamResponse:
    engine.reached.set()
    await engine.go_on.wait()
    return await prefills(engine, request)


def params(engine: Engine, at: int = -1) -> dict[str, Any]:
    return engine.bodies[at].get("kv_transfer_params") or {}


def test_both_are_asked_at_once_when_prefill_has_said_that_it_can():
    async def scenario() -> None:
        p, d = Engine(prefills, prefills_when_told), Engine(answers, hangs_until(answers))
        async with rig([p], [d], at_once="always") as r:
            assert await r.ask() == (200, ANSWER)
            assert params(d)["kvconnect"] == "ticket", "the first request finds out"
            asked = asyncio.create_task(r.ask())
            await asyncio.gather(p.reached.wait(), d.reached.wait())
            assert params(d) == {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "transfer_id": params(p)["transfer_id"],
                "kvconnect_engine": "ticket",
                **WHERE,
            }
            assert "transfer_id" not in params(p, 0), "who cannot be read early is told no name"
            p.go_on.set()
            d.go_on.set()
            assert await asked == (200, ANSWER)
            assert await r.counters() == {"requests": 2, "at_once": 1}

    run(scenario())


def hangs_until(behaviour):
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        engine.reached.set()
        await engine.go_on.wait()
        return await behaviour(engine, request)

    return behave


@pytest.mark.parametrize("at_once", [False, True])
def test_without_the_option_or_without_a_word_of_prefill_they_are_asked_in_turn(at_once):
    async def scenario() -> None:
        silent = says(json.dumps({"kv_transfer_params": TICKET}).encode())
        p, d = Engine(silent if at_once else prefills), Engine(answers)
        async with rig([p], [d], at_once="always" if at_once else "never") as r:
            for _ in range(3):
                assert await r.ask() == (200, ANSWER)
                assert params(d) == (TICKET if at_once else TICKET | STEPS)
            assert "transfer_id" not in params(p)
            assert await r.counters() == {"requests": 3}

    run(scenario())


@pytest.mark.parametrize("status", [400, 422, 429, 500, 503])
def test_prefill_that_refuses_frees_the_waiting_decode_request(status):
    async def scenario() -> None:
        p = Engine(prefills, refuses_when_told(status))
        d = Engine(answers, hangs, answers)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            asked = asyncio.create_task(r.ask())
            await d.reached.wait()
            p.go_on.set()
            await d.aborted.wait()
            assert await asked == (200, ANSWER)
            assert params(d) == {}, "decode works alone"
            counters = await r.counters()
            assert counters["decode_alone"] == 1
            assert (counters.get("refused"), counters.get("no_prefill")) == (
                (1, None) if status < 500 else (None, 1)
            )

    run(scenario())


def refuses_when_told(status):
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        await engine.go_on.wait()
        return web.Response(status=status)

    return behave


async def breaks_when_told(engine: Engine, request: web.Request) -> web.StreamResponse:
    await engine.go_on.wait()
    return await breaks(engine, request)


def prefills_as(engine_id, port=WHERE["remote_port"]):
    """As `prefills_when_told`, by the engine of this name."""

    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        await engine.go_on.wait()
        asked = (await request.json())["kv_transfer_params"]
        who = {"remote_engine_id": engine_id, "remote_port": port}
        told = TICKET | STEPS | who | {"transfer_id": asked["transfer_id"]}
        return web.json_response({"id": "p", "kv_transfer_params": told})

    return behave


@pytest.mark.parametrize("other", [("Q",), ("P", 5601)])
def test_decode_that_waits_at_another_engine_than_answers_is_asked_anew_with_the_ticket(other):
    """Decode used to wait for a minute, at the wrong rank or at what was there before a restart."""

    async def scenario() -> None:
        p, d = Engine(prefills, prefills_as(*other)), Engine(answers, hangs, answers)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            asked = asyncio.create_task(r.ask())
            await d.reached.wait()
            p.go_on.set()
            await d.aborted.wait()
            assert await asked == (200, ANSWER)
            assert params(d)["kvconnect"] == "ticket"
            assert params(d)["remote_engine_id"] == other[0]
            assert await r.counters() == {"requests": 2, "at_once": 1}

    run(scenario())


async def answers_when_aborted(engine: Engine, request: web.Request) -> web.StreamResponse:
    """What it was asked before holds its blocks until then."""
    await engine.aborted.wait()
    return await answers(engine, request)


def test_prefill_that_kept_nothing_frees_the_waiting_decode_request():
    async def scenario() -> None:
        p = Engine(prefills, keeps_nothing)
        d = Engine(answers, hangs, answers_when_aborted)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            assert await r.ask() == (200, ANSWER)
            assert params(d) == {}

    run(scenario())


@pytest.mark.parametrize("others", ["Q", "QR", "QRS"])
def test_several_engines_behind_one_address_are_asked_in_turn(others):
    """Ranks of a data-parallel engine: which of them a request goes to, it does not say."""

    async def scenario() -> None:
        ranks = [prefills_as(name) for name in (*others, "P")]
        p = Engine(prefills, *ranks, prefills)
        d = Engine(answers, *[hangs, answers] * len(ranks))
        async with rig([p], [d], at_once="always") as r:
            p.go_on.set()
            for _ in range(len(ranks) + 3):
                assert await r.ask() == (200, ANSWER)
            assert (await r.counters())["at_once"] == len(ranks)

    run(scenario())


def test_one_engine_where_several_were_before_it_failed_is_asked_at_once_again():
    async def scenario() -> None:
        ranks = [prefills_as(name) for name in ("Q", "P")]
        p = Engine(prefills, *ranks, keeps_nothing, prefills)
        d = Engine(answers, hangs, answers, hangs, answers)
        async with rig([p], [d], at_once="always") as r:
            p.go_on.set()
            for at_once in (0, 1, 2, 2, 2, 3):
                assert await r.ask() == (200, ANSWER)
                assert (await r.counters()).get("at_once", 0) == at_once

    run(scenario())


def test_an_engine_that_was_started_again_and_again_is_no_several():
    async def scenario() -> None:
        p = Engine(prefills, *(prefills_as(name) for name in ("Q", "R", "R")))
        d = Engine(answers, hangs, answers, hangs, answers)
        async with rig([p], [d], at_once="always") as r:
            p.go_on.set()
            for _ in range(4):
                assert await r.ask() == (200, ANSWER)
            assert (await r.counters())["at_once"] == 3

    run(scenario())


def test_prefill_that_breaks_off_is_replaced_by_another():
    async def scenario() -> None:
        p, other = Engine(prefills, breaks_when_told, prefills), Engine(prefills)
        d = Engine(answers, answers, hangs, answers)
        async with rig([p, other], [d], at_once="always") as r:
            await r.ask()
            await r.ask()
            assert len(p.bodies) == len(other.bodies) == 1
            asked = asyncio.create_task(r.ask())
            await d.reached.wait()
            p.go_on.set()
            await d.aborted.wait()
            assert await asked == (200, ANSWER)
            assert params(d)["kvconnect"] == "ticket"
            assert len(other.bodies) == 2
            assert await r.counters() == {"requests": 3, "at_once": 1, "retries": 1}
            r.clock.advance(20.0)
            assert await r.ask() == (200, ANSWER)
            assert len(p.bodies) == 3 and (await r.counters())["at_once"] == 1, (
                "it is asked in turn until it has said again where it is"
            )

    run(scenario())


def test_prefill_that_keeps_nothing_leaves_it_to_decode():
    async def scenario() -> None:
        p = Engine(prefills, keeps_nothing)
        d = Engine(answers)
        async with rig([p], [d], at_once="always") as r:
            for _ in range(3):
                assert await r.ask() == (200, ANSWER)
            assert params(d) == {}, "and it is not asked at once any more"

    run(scenario())


def test_decode_that_cannot_be_reached_is_replaced_and_gets_the_ticket():
    async def scenario() -> None:
        p, dead, d = Engine(prefills), Dead(), Engine(answers)
        async with rig([p], [d, dead], at_once="always") as r:
            for _ in range(3):
                assert await r.ask() == (200, ANSWER)
            tickets = [params(d, at).get("kvconnect") for at in range(3)]
            assert tickets == ["ticket", "ticket", None], "it was asked at once, after the dead one"
            assert params(d)["transfer_id"]

    run(scenario())


@pytest.mark.parametrize("fault", [breaks, says(b"no", 500), streams(LOAD_FAILED)])
def test_decode_that_fails_is_asked_once_more_without_kv(fault):
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers, fault, streams(*TOKENS, DONE))
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            status, body = await r.ask(stream=True)
            assert (status, body) == (200, b"".join((*TOKENS, DONE)))
            assert params(d) == {}

    run(scenario())


def test_decode_is_not_asked_once_more_without_budget():
    """Where both were asked at once, what decode broke off used to cost no budget."""

    async def scenario() -> None:
        fails = says(b"no", 500)
        d = Engine(answers, *[fails, answers] * int(RESERVE), fails)
        async with rig([Engine(prefills)], [d], at_once="always", retry_ratio=0.0) as r:
            for _ in range(1 + int(RESERVE)):
                assert await r.ask() == (200, ANSWER)
            assert await r.ask() == (500, b"no"), "what the engine said; it was 503 of our own"
            counters = await r.counters()
            assert (counters["retries"], counters["unretried"]) == (RESERVE, 1)

    run(scenario())


def refuses_early(status):
    """As a decode engine that has no room for what is computed still."""

    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        if "kvconnect_engine" in params(engine):
            return web.Response(status=status, body=b"not here")
        return await answers(engine, request)

    return behave


def test_another_decode_engine_is_not_asked_without_budget():
    """Where both were asked at once, what decode refused used to cost no budget."""

    async def scenario() -> None:
        ds = [Engine(refuses_early(429)) for _ in range(2)]
        async with rig([Engine(prefills)], ds, at_once="always", retry_ratio=0.0) as r:
            for _ in range(1 + int(RESERVE)):
                assert await r.ask() == (200, ANSWER)
            assert await r.ask() == (429, b"not here")
            counters = await r.counters()
            assert (counters["retries"], counters["unretried"]) == (RESERVE, 1)

    run(scenario())


@pytest.mark.parametrize("status", [404, 413, 429])
def test_the_only_decode_engine_is_not_asked_again_what_it_refused(status):
    """It used to be, without the KV that was not the reason."""

    async def scenario() -> None:
        d = Engine(refuses_early(status))
        async with rig([Engine(prefills)], [d], at_once="always") as r:
            assert await r.ask() == (200, ANSWER)
            assert await r.ask() == (status, b"not here")
            assert len([body for body in d.bodies if "max_tokens" not in body]) == 2

    run(scenario())


def test_who_refused_a_prompt_is_not_taken_to_hold_it():
    async def scenario() -> None:
        ds = [Engine(refuses_early(400)) for _ in range(2)]
        async with rig([Engine(prefills)], ds, at_once="always", policy="kv-aware") as r:
            assert await r.ask(prompt="finds out where prefill is") == (200, ANSWER)
            asked = [len(d.bodies) for d in ds]
            for _ in range(4):
                assert await r.ask(prompt="refused" * 100) == (400, b"not here")
            assert all(len(d.bodies) > n for d, n in zip(ds, asked, strict=True))

    run(scenario())


def test_decodes_word_is_final_and_prefill_is_told_to_stop():
    async def scenario() -> None:
        p, d = Engine(prefills, hangs), Engine(answers, says(b"bad", 400))
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            assert await r.ask() == (400, b"bad")
            await p.aborted.wait()

    run(scenario())


def test_what_only_decode_refuses_lets_go_of_what_prefill_has_computed():
    async def scenario() -> None:
        refuses = hangs_until(says(b"bad", 400))
        p, d = Engine(prefills), Engine(answers, refuses, answers)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            asked = asyncio.create_task(r.ask())
            await d.reached.wait()
            while len(p.bodies) < 2 or (await r.health())["prefill"][0]["in_flight"]:
                await asyncio.sleep(0.01)
            d.go_on.set()
            assert await asked == (400, b"bad")
            while len(d.bodies) < 3:
                await asyncio.sleep(0.01)
            assert params(d)["kvconnect"] == "ticket"
            assert await r.counters() == {"requests": 2, "at_once": 1, "released": 1}

    run(scenario())


@pytest.mark.parametrize("status", [404, 413, 429])
@pytest.mark.parametrize("computed", [False, True])
def test_where_another_decode_engine_may_do_it_is_asked_without_the_kv(status, computed):
    """The one that refused lets go of what it was offered."""

    async def scenario() -> None:
        p = Engine(prefills, prefills if computed else hangs)
        refuses = hangs_until(says(b"not here", status))

        async def answers_after_prefill(engine: Engine, request: web.Request) -> web.StreamResponse:
            if not computed:  # is told to stop, and not only once decode has answered
                await p.aborted.wait()
            return await answers(engine, request)

        first, other = Engine(answers, refuses, answers), Engine(answers, answers_after_prefill)
        async with rig([p], [first, other], at_once="always") as r:
            await r.ask()
            await r.ask(TEXT, n=2)  # decode alone: it is the first one's turn again
            asked = asyncio.create_task(r.ask())
            await first.reached.wait()
            while len(p.bodies) < 2 or (await r.health())["prefill"][0]["in_flight"] == computed:
                await asyncio.sleep(0.01)
            first.go_on.set()
            assert await asked == (200, ANSWER)
            assert (len(other.bodies), params(other)) == (2, {})
            if computed:
                while len(first.bodies) < 3:
                    await asyncio.sleep(0.01)
                assert params(first)["kvconnect"] == "ticket", "and so it is let go"

    run(scenario())


def test_responses_are_asked_in_turn():
    """vLLM begins their stream before it has computed anything: that is no sign that KV is read."""

    async def scenario() -> None:
        created = b"event: response.created\ndata: {}\n\n"
        p, d = Engine(prefills), Engine(streams(created, *TOKENS))
        async with rig([p], [d], at_once="always") as r:
            for _ in range(2):
                status, body = await r.ask("/v1/responses", stream=True, input="p", prompt=None)
                assert (status, body) == (200, created + b"".join(TOKENS))
                assert params(d).get("kvconnect") == "ticket"
            assert await r.counters() == {"requests": 2}

    run(scenario())


def test_a_client_that_goes_ends_both():
    async def scenario() -> None:
        p, d = Engine(prefills, hangs), Engine(answers, hangs)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            asked = asyncio.create_task(r.ask())
            await asyncio.gather(p.reached.wait(), d.reached.wait())
            asked.cancel()
            await asyncio.gather(p.aborted.wait(), d.aborted.wait())

    run(scenario())


class LeavingClient(RequestLife):
    """The life of a request whose client goes as decode begins to answer."""

    asking: asyncio.Task[None]

    def answered(self, leg: LegTry, status: int) -> None:
        super().answered(leg, status)
        if leg.role == "decode":
            self.asking.cancel()


def test_what_decode_begins_to_answer_to_a_client_that_goes_is_closed():
    """Nobody else would: it counted as in flight for ever, and its connection stayed open."""

    async def ask(on: Legs, life: RequestLife) -> None:
        request = LegRequest(TEXT, read_body(b'{"prompt": "p"}'), {"X-Request-Id": "r"}, life)
        answer = await on.decode(request, split=True)
        assert answer is not None
        answer.close()

    async def scenario() -> None:
        clock = FakeClock()
        p, d = Engine(prefills, hangs), Engine(answers)
        async with p.serving(), d.serving():
            on = Legs(make_config(prefill=[p.url], decode=[d.url], at_once="always"), clock)
            await ask(on, RequestLife("r", TEXT, 0.0, 0.0, clock))
            leaving = LeavingClient("r", TEXT, 0.0, 0.0, clock)
            leaving.asking = asyncio.create_task(ask(on, leaving))
            with pytest.raises(asyncio.CancelledError):
                await leaving.asking
            assert [len(engine.bodies) for engine in (p, d)] == [2, 2]
            assert [state.in_flight for state in on.decoders.states()] == [0]
            await on.close()

    run(scenario())


def test_what_cannot_be_split_goes_whole_to_decode():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            assert await r.ask(TEXT, n=2) == (200, ANSWER)
            assert len(p.bodies) == 1 and params(d) == {}

    run(scenario())


# --- what usage tells as cached is prefill's, as in turn ------------------------------------------


def tells(cached: int | None, **more: Any) -> bytes:
    """As decode: that it loaded nearly the whole prompt; ``cached``: what is told instead."""
    details = {"cached_tokens": 1984 if cached is None else cached}
    told = {"prompt_tokens": 2000, "prompt_tokens_details": details}
    return json.dumps({"choices": []} | more | {"usage": told}, separators=(",", ":")).encode()


def prefills_with(cached: int | None, when_told=False):
    """As our prefill engine, of a prompt of which it had this much cached."""

    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        if when_told:
            await engine.go_on.wait()
        asked = (await request.json())["kv_transfer_params"]
        name = {"transfer_id": asked.get("transfer_id")}
        told = {} if cached is None else {"remote_prefill_cached_tokens": cached}
        return web.json_response({"id": "p", "kv_transfer_params": TICKET | STEPS | name | told})

    return behave


def usage_stream(cached: int | None) -> list[bytes]:
    return [*TOKENS, b"data: " + tells(cached) + b"\n\n", DONE]


def in_pieces(*chunks: bytes):
    """A stream that comes in pieces of a few bytes."""
    data = b"".join(chunks)
    return streams(*(data[at : at + 37] for at in range(0, len(data), 37)))


ANSWERS = {
    "json": (says(tells(None)), tells),
    "stream": (streams(*usage_stream(None)), lambda cached: b"".join(usage_stream(cached))),
    "pieces": (in_pieces(*usage_stream(None)), lambda cached: b"".join(usage_stream(cached))),
    "one event": (
        streams(b"data: " + tells(None)),
        lambda cached: b"data: " + tells(cached),
    ),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("cached", [0, 48, 2000, None])
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_usage_tells_what_prefill_had_cached(kind, cached, path):
    """It told all that decode loaded: who bills by it charged too little."""

    async def scenario() -> None:
        answer, right = ANSWERS[kind]
        p, d = Engine(prefills, prefills_with(cached)), Engine(answers, answer)
        async with rig([p], [d], at_once="always") as r:
            await r.ask(path)
            assert await r.ask(path) == (200, right(cached))
            assert (await r.counters())["at_once"] == 1

    run(scenario())


def test_usage_waits_for_prefill_where_decode_overtook_it():
    async def scenario() -> None:
        p, d = (
            Engine(prefills, prefills_with(48, when_told=True)),
            Engine(answers, ANSWERS["json"][0]),
        )
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            asked = asyncio.create_task(r.ask())
            while not (await r.health())["decode"][0]["in_flight"] or len(d.bodies) < 2:
                await asyncio.sleep(0.01)
            p.go_on.set()
            assert await asked == (200, tells(48))

    run(scenario())


def test_tokens_do_not_wait_for_prefill_and_usage_does():
    async def scenario() -> None:
        answer, right = ANSWERS["stream"]
        p, d = Engine(prefills, prefills_with(48, when_told=True)), Engine(answers, answer)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            posted = r.session.post(TEXT, json={"prompt": "p", "stream": True})
            async with posted as response:
                first = await response.content.readexactly(len(b"".join(TOKENS)))
                assert first == b"".join(TOKENS), "before prefill has said anything"
                p.go_on.set()
                assert first + await response.read() == right(48)

    run(scenario())


@pytest.mark.parametrize("kind", ["json", "stream"])
def test_usage_is_decodes_where_prefill_does_not_answer_and_prefill_is_told_to_stop(
    kind, monkeypatch
):
    async def scenario() -> None:
        monkeypatch.setattr(legs, "LATE_PREFILL_S", 0.1)
        answer, right = ANSWERS[kind]
        p, d = Engine(prefills, hangs), Engine(answers, answer)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            assert await r.ask() == (200, right(None))
            await p.aborted.wait()

    run(scenario())


def test_a_client_that_goes_while_decode_answers_ends_prefill():
    async def scenario() -> None:
        p, d = Engine(prefills, hangs), Engine(answers, then(streams(TOKENS[0]), hangs))
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            posted = r.session.post(TEXT, json={"prompt": "p", "stream": True})
            async with posted as response:
                assert await response.content.readexactly(len(TOKENS[0])) == TOKENS[0]
                await p.reached.wait()
            await asyncio.gather(p.aborted.wait(), d.aborted.wait())

    run(scenario())


def test_usage_in_turn_is_passed_byte_for_byte():
    async def scenario() -> None:
        spaced = b" " + tells(None).replace(b",", b" ,  ")
        p, d = Engine(prefills_with(48)), Engine(says(spaced))
        async with rig([p], [d], at_once="never") as r:
            assert await r.ask() == (200, spaced)
            assert params(d)["remote_prefill_cached_tokens"] == 48, "decode is told itself"

    run(scenario())


def test_decode_that_breaks_off_its_whole_answer_is_asked_once_more():
    """All of it is read before any is passed on: nothing is lost by another try."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers, breaks_in_body, answers)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            assert await r.ask() == (200, ANSWER)
            assert params(d) == {}

    run(scenario())


# --- auto: whoever says that it can, and whatever gains by it -------------------------------------

METRIC = b"vllm:kvconnect_num_streamed_transfers_total{} 0.0\n"
LONG = "x" * 300
"""In bytes: more than one step of prefill's."""


def with_metrics(text: bytes, behaviour=answers, status=200):
    async def behave(engine: Engine, request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            engine.reached.set()
            return web.Response(body=text, status=status)
        return await behaviour(engine, request)

    return behave


async def known(r, *decoders: Engine) -> None:
    """Ask until prefill has said that it can, and each decode engine was asked if it can."""
    for _ in range(2 * len(decoders)):
        assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)
    await asyncio.gather(*(d.reached.wait() for d in decoders))


async def asked_at_once_until_it_breaks(r, decoder: Engine, number: int) -> None:
    """It has been asked at once, or may have been, and is down then."""
    while not (await r.counters()).get("at_once"):
        await r.ask(TEXT, prompt=LONG)
    decoder.behaviours[:] = [breaks]
    while (await r.health())["decode"][number]["up"]:
        assert (await r.ask(TEXT, n=2))[0] == 200


def test_by_default_both_are_asked_at_once_where_they_say_that_they_can():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(with_metrics(METRIC))
        async with rig([p], [d]) as r:
            assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)
            assert params(d)["kvconnect"] == "ticket", "nobody has said anything yet"
            while "kvconnect" in params(d):  # in turn, until decode has been looked at
                assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)
            early = {"do_remote_prefill": True, "do_remote_decode": False, **WHERE}
            early["kvconnect_engine"] = "ticket"
            assert params(d) == early | {"transfer_id": params(p)["transfer_id"]}
            looks = [head for head in d.heads if head.path == "/metrics"]
            assert len(looks) == 1

    run(scenario())


def test_auto_asks_in_turn_for_what_prefill_computes_in_one_step():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(with_metrics(METRIC))
        async with rig([p], [d], at_once="auto") as r:
            while not (await r.counters()).get("at_once"):
                await r.ask(TEXT, prompt=LONG)
            assert await r.ask(TEXT, prompt="x" * 100) == (200, ANSWER)
            assert params(d)["kvconnect"] == "ticket"
            assert (await r.counters())["at_once"] == 1

    run(scenario())


@pytest.mark.parametrize(("text", "status"), [(b"vllm:another 1.0\n", 200), (METRIC, 404)])
@pytest.mark.parametrize("others", [0, 1])
def test_auto_asks_in_turn_where_a_decode_engine_does_not_say_that_it_can(text, status, others):
    """Whichever of them a request goes to: that is decided later."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(with_metrics(text, status=status))
        more = [Engine(with_metrics(METRIC)) for _ in range(others)]
        async with rig([p], [d, *more], at_once="auto") as r:
            await known(r, d, *more)
            for _ in range(3):
                assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)
            assert "at_once" not in await r.counters()

    run(scenario())


def test_auto_asks_no_decode_engine_at_once_that_was_not_looked_at_since_it_was_down():
    """Where it is tried again, there may be another, which cannot be asked so."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(with_metrics(METRIC))
        other = Engine(with_metrics(METRIC))
        async with rig([p], [d, other], at_once="auto") as r:
            await asked_at_once_until_it_breaks(r, other, 1)
            other.behaviours[:] = [answers]
            before = len(other.bodies)
            r.clock.advance(20.0)
            assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)
            assert len(other.bodies) == before + 1
            assert params(other)["kvconnect"] == "ticket"

    run(scenario())


def test_auto_looks_anew_at_a_decode_engine_that_could_not_say():
    """A 503 while it starts says nothing of what it can."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(with_metrics(b"", status=503))
        async with rig([p], [d], at_once="auto") as r:
            await known(r, d)
            d.behaviours[:] = [with_metrics(METRIC)]
            while not (await r.counters()).get("at_once"):
                assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)

    run(scenario())


def test_auto_looks_anew_at_a_decode_engine_that_was_down():
    """Another may have been started in its place."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(with_metrics(METRIC))
        other = Engine(with_metrics(METRIC))
        async with rig([p], [d, other], at_once="auto") as r:
            await asked_at_once_until_it_breaks(r, d, 0)
            assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER), "at the other one"
            d.behaviours[:] = [with_metrics(b"")]
            r.clock.advance(20.0)
            while not (await r.health())["decode"][0]["up"]:
                assert (await r.ask(TEXT, n=2))[0] == 200
            before = (await r.counters())["at_once"]
            for _ in range(4):
                assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER)
            assert (await r.counters())["at_once"] == before
            assert sum(head.path == "/metrics" for head in d.heads) >= 2

    run(scenario())


def test_a_decode_engine_that_hangs_when_looked_at_holds_up_nobody():
    async def scenario() -> None:
        async def hangs_at_metrics(engine: Engine, request: web.Request) -> web.StreamResponse:
            return await (hangs if request.path == "/metrics" else answers)(engine, request)

        p, d = Engine(prefills), Engine(hangs_at_metrics)
        async with rig([p], [d], at_once="auto") as r:
            for _ in range(5):
                assert await r.ask(TEXT, prompt=LONG) == (200, ANSWER), "nobody waits for a look"
            await d.reached.wait()
            assert sum(head.path == "/metrics" for head in d.heads) == 1
        await d.aborted.wait()

    run(scenario())


def test_prefill_that_is_dead_frees_the_waiting_decode_request():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(answers, hangs, answers)
        async with rig([p], [d], at_once="always") as r:
            await r.ask()
            p.behaviours[:] = [breaks]
            assert await r.ask() == (200, ANSWER)
            await d.aborted.wait()
            assert params(d) == {}, "decode works alone"

    run(scenario())
