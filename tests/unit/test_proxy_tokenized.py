"""Prompts that are tokenized once: which, what decode is asked, and what is left as it was."""

import json
from typing import Any

import pytest
from test_proxy_app import ANSWER, CHAT, PARAMS, TEXT, Engine, answers, prefills, rig, run, says

from kvconnect.proxy.policy import MESSAGES, read_body
from kvconnect.proxy.requests.tokenized import takes_ids

IDS = [5, 6, 7]
MESSAGE = [{"role": "user", "content": "q"}]


def returns(**answer: Any) -> Engine:
    return Engine(says(json.dumps({"id": "p", "kv_transfer_params": PARAMS} | answer).encode()))


def body(**fields: Any):
    return read_body(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"suffix": "s"},
        {"truncate_prompt_tokens": 5},
        {"prompt_logprobs": 1},
        {"return_prompt_text": True},
        {"prompt": [1, 2]},
        {"prompt": ["a"]},
    ],
)
def test_what_needs_its_text_keeps_it(fields: dict[str, Any]):
    assert takes_ids(TEXT, body(prompt="p", echo=False, suffix=None))
    assert not takes_ids(TEXT, body(**{"prompt": "p"} | fields))


def test_messages_of_more_than_text_keep_it():
    media = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]
    assert takes_ids(CHAT, body(messages=MESSAGE))
    assert not takes_ids(CHAT, body(messages=media))
    assert not takes_ids(MESSAGES, body(messages=MESSAGE))


def test_decode_gets_a_texts_tokens_in_its_place():
    async def scenario() -> None:
        p, d = returns(choices=[{"prompt_token_ids": IDS}]), Engine(answers)
        async with rig([p], [d], tokenize_once=True) as r:
            assert await r.ask(prompt="text", max_tokens=9) == (200, ANSWER)
            assert p.bodies[0]["return_token_ids"] is True and p.bodies[0]["prompt"] == "text"
            assert d.bodies == [{"prompt": IDS, "max_tokens": 9, "kv_transfer_params": PARAMS}]

    run(scenario())


def test_decode_gets_a_chats_tokens_beside_its_params():
    async def scenario() -> None:
        p, d = returns(choices=[{}], prompt_token_ids=IDS), Engine(answers)
        async with rig([p], [d], tokenize_once=True) as r:
            await r.ask(CHAT, messages=MESSAGE)
            assert d.bodies[0]["messages"] == MESSAGE
            assert d.bodies[0]["kv_transfer_params"] == PARAMS | {"prompt_token_ids": IDS}

    run(scenario())


@pytest.mark.parametrize(
    ("prefill", "settings", "fields"),
    [
        (returns(choices=[{}]), {"tokenize_once": True}, {}),
        (returns(choices=[{"prompt_token_ids": [-1]}]), {"tokenize_once": True}, {}),
        (returns(choices=[{"prompt_token_ids": IDS}]), {"tokenize_once": True}, {"echo": True}),
        (returns(choices=[{"prompt_token_ids": IDS}]), {}, {}),
        (
            returns(choices=[{"prompt_token_ids": IDS}]),
            {"kv_events": ["1"], "policy": "kv-aware"},
            {},
        ),
        (Engine(prefills), {"tokenize_once": True}, {}),
    ],
)
def test_a_text_stays_where_its_tokens_are_not_known_to_do(
    prefill: Engine, settings: dict[str, Any], fields: dict[str, Any]
):
    async def scenario() -> None:
        d = Engine(answers)
        async with rig([prefill], [d], **settings) as r:
            await r.ask(prompt="text", **fields)
            assert d.bodies[0]["prompt"] == "text"
            assert d.bodies[0]["kv_transfer_params"] == PARAMS

    run(scenario())


def test_what_is_tried_again_without_kv_is_a_text_again():
    async def scenario() -> None:
        p, d = returns(choices=[{"prompt_token_ids": IDS}]), Engine(says(b"{}", 500), answers)
        async with rig([p], [d], tokenize_once=True) as r:
            assert await r.ask(prompt="text") == (200, ANSWER)
            assert [asked["prompt"] for asked in d.bodies] == [IDS, "text"]
            assert "kv_transfer_params" not in d.bodies[1]

    run(scenario())


def test_a_lease_that_is_let_go_of_needs_no_tokens():
    async def scenario() -> None:
        p, d = returns(choices=[{}], prompt_token_ids=IDS), Engine(says(b"{}", 400), answers)
        async with rig([p], [d], tokenize_once=True) as r:
            await r.ask(CHAT, messages=MESSAGE)
            while len(d.bodies) < 2:
                await r.health()
            assert d.bodies[1]["kv_transfer_params"] == PARAMS

    run(scenario())
