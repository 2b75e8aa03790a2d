"""What decode lends, at the end of vLLM's streams."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from kvconnect.vllm import _compat, streamed_params

PARAMS = {"do_remote_decode": True, "remote_block_ids": [[1, 2]]}


def test_vllm_has_both_kinds_of_streams():
    assert [name for _, name in _compat.stream_methods()] == [
        "chat_completion_stream_generator",
        "completion_stream_generator",
    ]


class Server:
    """As vLLM's: an event of each output, the usage, and the end."""

    closed = False

    async def chat_stream(self, request, result_generator, request_id):
        yield 'data: {"role": "assistant"}\n\n'
        try:
            async for result in result_generator:
                output = result[1] if isinstance(result, tuple) else result
                yield f'data: {{"text": "{request}{output.text}"}}\n\n'
            yield 'data: {"usage": 3}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            self.closed = True


@pytest.fixture
def serving(monkeypatch):
    class Serving(Server):
        pass

    monkeypatch.setattr(_compat, "stream_methods", lambda: [(Serving, "chat_stream")])
    assert streamed_params.watch()
    changed = Serving.chat_stream
    assert streamed_params.watch() and Serving.chat_stream is changed, "once"
    return Serving()


async def outputs(params, numbered):
    for text in ("a", "b", "c"):
        told = params if text == "c" else None
        output = SimpleNamespace(text=text, kv_transfer_params=told)
        yield (0, output) if numbered else output


async def events(serving, params=PARAMS, numbered=False):
    made = serving.chat_stream("x", request_id="r", result_generator=outputs(params, numbered))
    return [event async for event in made]


@pytest.mark.parametrize("numbered", [True, False])
def test_the_last_output_tells_them_once(serving, numbered):
    told = asyncio.run(events(serving, numbered=numbered))
    assert told[-1] == "data: [DONE]\n\n"
    parsed = [json.loads(event.removeprefix("data: ")) for event in told[:-1]]
    assert [one.get("kv_transfer_params") for one in parsed] == [None] * 3 + [PARAMS, None]
    assert [one.get("text") for one in parsed] == [None, "xa", "xb", "xc", None]


def test_a_stream_without_params_is_as_it_was(serving):
    plain = [
        'data: {"role": "assistant"}\n\n',
        *(f'data: {{"text": "x{t}"}}\n\n' for t in "abc"),
        'data: {"usage": 3}\n\n',
        "data: [DONE]\n\n",
    ]
    assert asyncio.run(events(serving, params=None)) == plain


def test_a_stream_that_is_given_up_is_closed(serving):
    async def give_up():
        made = serving.chat_stream("x", outputs(PARAMS, False), "r")
        await anext(made)
        await anext(made)
        await made.aclose()
        return serving.closed

    assert asyncio.run(give_up())


def test_a_vllm_whose_streams_are_not_known_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(_compat, "stream_methods", list)
    assert not streamed_params.watch()
    assert "only answers that are not streamed" in caplog.text
