"""Chats that go on: prefill is told what the decode engine lends that answered the turn before."""

import json
from typing import Any

import msgspec
import pytest
from test_proxy_app import Engine, breaks, prefills, rig, run, says, streams

from kvconnect.proxy.policy import CHAT, TEXT, read_body
from kvconnect.proxy.requests.conversations import (
    KEPT_BYTES,
    REMEMBERED,
    REMEMBERED_S,
    AnswerEnding,
    Conversations,
    chat_keys,
)
from kvconnect.testing import FakeClock

LENDS = {"do_remote_decode": True, "do_remote_prefill": False, "remote_host": "d", "kvconnect": "t"}
TURN = [{"role": "user", "content": "a"}]
NEXT = [*TURN, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
WHOLE = json.dumps({"choices": [], "kv_transfer_params": LENDS}, separators=(",", ":")).encode()
EVENTS = b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n', b"data: " + WHOLE + b"\n\n"


def keys(messages: Any, model: str = "m", path: str = CHAT) -> tuple[bytes, ...]:
    return chat_keys(path, read_body(json.dumps({"model": model, "messages": messages}).encode()))


def ending(*chunks: bytes) -> AnswerEnding:
    heard = AnswerEnding()
    for chunk in chunks:
        heard.hear(chunk)
    return heard


# --- what is known of a chat -------------------------------------------------------------------


def test_a_turn_begins_as_the_one_before():
    assert keys(NEXT)[:1] == keys(TURN) and len(keys(NEXT)) == 3
    spaced = read_body(b'{"model":"m","messages":[ {"role":"user","content":  "\\u0061"} ]}')
    assert chat_keys(CHAT, spaced) == keys(TURN), "another client's way to write it"


def test_a_chat_of_another_cache_salt_is_another_chat():
    """One tenant's turn used to take what decode held of another's, which then was computed."""
    bodies = [{"messages": TURN, "cache_salt": salt} for salt in ("a", "b")]
    first, second = (chat_keys(CHAT, read_body(json.dumps(body).encode())) for body in bodies)
    assert first and not set(first) & set(second)


@pytest.mark.parametrize(
    ("messages", "model", "path"),
    [(NEXT[1:], "m", CHAT), (TURN, "n", CHAT), (TURN, "m", TEXT), ("no list", "m", CHAT)],
)
def test_what_begins_otherwise_is_another_chat(messages: Any, model: str, path: str):
    assert not set(keys(TURN)) & set(keys(messages, model, path))


@pytest.mark.parametrize("messages", [b"null", b"[[", b"[" * 5000, b"[" * 5000 + b"]" * 5000])
def test_what_is_no_chat_has_no_turns(messages: bytes):
    assert chat_keys(CHAT, {"messages": msgspec.Raw(messages)}) == chat_keys(CHAT, {}) == ()


@pytest.mark.parametrize(
    ("chunks", "found"),
    [
        ((WHOLE,), True),
        (EVENTS, True),
        ((WHOLE[:20], WHOLE[20:-5], WHOLE[-5:]), True),
        ((b"x" * 3 * KEPT_BYTES, WHOLE), True),
        ((WHOLE, b"x" * 3 * KEPT_BYTES), False),
        ((WHOLE[:-9],), False),
        ((json.dumps({"content": WHOLE.decode()}).encode(),), False),
        ((WHOLE.replace(b'"kvconnect"', b'"unknown"'),), False),
        ((WHOLE.replace(b"true", b"false"),), False),
        ((b'{"kv_transfer_params":null}',), False),
    ],
)
def test_what_an_answer_says_that_it_lends(chunks: tuple[bytes, ...], found: bool):
    """In-tree's params, too, would be believed, and have no digests that keep prefill right."""
    assert ending(*chunks).params() == (LENDS if found else None)


def test_what_is_lent_is_taken_once_and_in_time():
    clock = FakeClock()
    held = Conversations(clock)
    held.remember(keys(TURN), "d", ending(WHOLE))
    assert held.take(keys([{"role": "user", "content": "z"}])) is None
    taken = held.take(keys(NEXT))
    assert taken is not None and (taken.url, taken.params) == ("d", LENDS)
    assert held.take(keys(NEXT)) is None
    held.remember(keys(TURN), "d", ending(WHOLE))
    clock.advance(REMEMBERED_S)
    assert held.take(keys(NEXT)) is None


def test_so_many_chats_are_remembered():
    held = Conversations(FakeClock())
    for n in range(REMEMBERED + 1):
        held.remember((b"%d" % n,), "d", ending(WHOLE))
    assert held.take((b"0",)) is None and held.take((b"1",)) is not None


# --- between the engines -----------------------------------------------------------------------


@pytest.mark.parametrize("answer", [says(WHOLE), streams(*EVENTS, b"data: [DONE]\n\n")])
def test_the_next_turn_is_prefilled_with_what_decode_lends(answer: Any):
    async def scenario() -> None:
        p, d, other = Engine(prefills), Engine(answer), Engine(answer)
        async with rig([p], [d, other]) as r:
            for messages in (TURN, NEXT):
                status, body = await r.ask(CHAT, messages=messages)
                assert status == 200 and WHOLE in body
            first, second = [body["kv_transfer_params"] for body in p.bodies]
            assert first["remote_host"] is None
            assert {**second, **LENDS} == second and second["do_remote_decode"]
            answered = d if d.bodies else other
            assert len(answered.bodies) == 2, "by the engine that has it in its cache"
            assert (await r.counters())["gone_on"] == 1

    run(scenario())


def test_a_turn_that_stays_at_decode_lets_go_of_what_decode_lent():
    """Nobody used to read it, and decode kept its blocks until the lease had run out."""

    async def scenario() -> None:
        p, d = Engine(prefills), Engine(says(WHOLE))
        async with rig([p], [d], min_prefill_tokens=100) as r:
            long = [{"role": "user", "content": "a" * 800}]
            await r.ask(CHAT, messages=long)
            await r.ask(CHAT, messages=[*long, *NEXT[1:]])
            assert len(p.bodies) == 1
            given = d.bodies[1]["kv_transfer_params"]
            reads = {"do_remote_prefill": True, "do_remote_decode": False}
            assert given == LENDS | reads

    run(scenario())


def test_a_decode_engine_that_is_down_lends_nothing():
    async def scenario() -> None:
        p, d = Engine(prefills), Engine(says(WHOLE), breaks, says(WHOLE))
        async with rig([p], [d]) as r:
            await r.ask(CHAT, messages=TURN)
            assert (await r.ask(TEXT))[0] == 503
            assert (await r.ask(CHAT, messages=NEXT))[0] == 200
            assert p.bodies[-1]["kv_transfer_params"]["remote_host"] is None

    run(scenario())
