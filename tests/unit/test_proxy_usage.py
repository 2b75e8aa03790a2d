"""Prefill's figure of cached tokens in decode's usage, however the answer is cut into pieces."""

import asyncio
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.proxy.requests.usage import (
    MAX_HELD_BYTES,
    UsageStream,
    cached_tokens,
    has_line,
    with_cached,
)

OURS, THEIRS = 48, 1234
QUOTING = '{"usage":{"prompt_tokens_details":{"cached_tokens":1234}}} data: "cached_tokens":1234'
"""A text that looks like a usage."""


def usage(tokens: int | None) -> dict[str, object]:
    details = {"cached_tokens": tokens, "created_cache_tokens": 7}
    return {"prompt_tokens": 2000, "completion_tokens": 3, "prompt_tokens_details": details}


def message_usage(tokens: int) -> dict[str, int]:
    return {"input_tokens": 2000 - tokens, "output_tokens": 3, "cache_read_input_tokens": tokens}


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(value: object, end: bytes = b"\n\n") -> bytes:
    return b"data: " + compact(value) + end


def stream(tokens: int, text: str, end: bytes, each: bool = False) -> bytes:
    """As vLLM's; ``each``: usage is in each event."""
    told = {"usage": usage(tokens)} if each else {}
    events = [event({"choices": [{"delta": {"content": t}}]} | told, end) for t in ("a", text)]
    last = event({"id": "é", "choices": [], "usage": usage(tokens)}, end)
    message = event({"type": "message_delta", "usage": message_usage(tokens)}, end)
    named = b"event: message_delta" + end[: len(end) // 2] + message
    return b"".join((*events, last, named, b": a comment" + end, b"data: [DONE]" + end))


async def passed(pieces: list[bytes], told: int | None = OURS) -> list[bytes]:
    async def tell() -> int | None:
        return told

    one = UsageStream(tell)
    return [await one.passed(piece) for piece in (*pieces, b"")]


TEXTS = st.sampled_from(["", "data: b\n\n", QUOTING, f"\r\n\r\ndata: {QUOTING}\n\n"])
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])
CUTS = st.lists(st.integers(0, 2000), max_size=12)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({c % len(data) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@given(TEXTS, ENDS, st.booleans(), CUTS)
def test_a_streams_usage_is_prefills_wherever_it_is_cut(text, end, each, cuts):
    pieces = cut(stream(THEIRS, text, end, each), cuts)
    shown = asyncio.run(passed(pieces))
    assert b"".join(shown) == stream(OURS, text, end, each)


@given(TEXTS, ENDS, CUTS)
def test_an_event_that_has_ended_is_not_held(text, end, cuts):
    pieces, sent, shown = cut(stream(THEIRS, text, end), cuts), b"", b""
    for piece, out in zip(pieces, asyncio.run(passed(pieces)), strict=False):
        sent, shown = sent + piece, shown + out
        assert shown.count(end) == sent.count(end)


@given(TEXTS, ENDS, CUTS)
def test_a_stream_is_decodes_where_prefill_tells_nothing(text, end, cuts):
    pieces = cut(stream(THEIRS, text, end), cuts)
    assert b"".join(asyncio.run(passed(pieces, None))) == b"".join(pieces)


def test_a_stream_that_ends_in_a_line_is_right_to_its_end():
    ended = event({"usage": usage(THEIRS)}, b"")
    assert asyncio.run(passed([ended])) == [b"", event({"usage": usage(OURS)}, b"")]


def test_a_line_that_is_too_long_is_not_held():
    first, rest = b"data: " + b"x" * MAX_HELD_BYTES, b"\n\n" + event({"usage": usage(THEIRS)})
    shown = asyncio.run(passed([first, rest]))
    assert shown == [first, b"\n\n" + event({"usage": usage(OURS)}), b""]
    assert has_line(first) and not has_line(first[:100]) and has_line(b"data: 1\r")


@pytest.mark.parametrize("make", [usage, message_usage])
def test_all_but_the_figure_stays(make):
    answer = {"id": "é", "choices": [{"text": QUOTING, "logprobs": 1e-7}], "usage": make(THEIRS)}
    changed = with_cached(compact(answer), OURS)
    assert changed == compact(answer | {"usage": make(OURS)})


def test_a_messages_figure_is_never_more_than_its_prompt():
    changed = json.loads(with_cached(compact({"usage": message_usage(THEIRS)}), 5000))
    assert changed == {"usage": message_usage(2000)}


@pytest.mark.parametrize(
    "answer",
    [
        compact({"choices": [{"text": QUOTING}]}),
        compact({"text": QUOTING, "usage": {"prompt_tokens_details": None}}),
        compact({"cached_tokens": 1, "usage": usage(None)}),
        compact({"usage": {"cached_tokens": 1}}),
        compact({"usage": {"cache_read_input_tokens": 1}}),
        compact([usage(1)]),
        b'{"usage":{"prompt_tokens_details":{"cached_tokens":1',
        b'{"usage":{"prompt_tokens_details":{"cached_tokens":1.5}}}',
        b'{"cached_tokens":' + b"[" * 100_000,
        b"\x00",
    ],
)
def test_what_tells_no_figure_stays_byte_for_byte(answer):
    assert with_cached(answer, OURS) == answer


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"kv_transfer_params": {"remote_prefill_cached_tokens": 0}, "usage": usage(5)}, 0),
        ({"kv_transfer_params": {"remote_prefill_cached_tokens": 48}}, 48),
        ({"kv_transfer_params": {"remote_port": 1}, "usage": usage(5)}, 5),
        ({"kv_transfer_params": None, "usage": usage(5)}, 5),
        ({"kv_transfer_params": {}, "usage": message_usage(5)}, None),
        ({"usage": usage(None)}, None),
        ({"usage": {"prompt_tokens_details": None}}, None),
        ({"kv_transfer_params": {"remote_prefill_cached_tokens": -1}}, None),
        ({"kv_transfer_params": {"remote_prefill_cached_tokens": "9"}}, None),
        ([], None),
    ],
)
def test_prefills_figure_is_in_its_params_or_else_in_its_usage(answer, told):
    assert cached_tokens(compact(answer)) == told
