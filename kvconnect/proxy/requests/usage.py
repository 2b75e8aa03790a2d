"""What a request's usage says was cached: prefill's figure, where both engines are asked at once.

Does not know engines or HTTP. In turn decode is told the figure in prefill's params, and reports it
(vLLM 0.32, `vllm/v1/engine/output_processor.py:741`). Asked at once, it is asked before that is
known, and reports all that it loaded: nearly the whole prompt.

- Prefill's answer has it in its params (`vllm/v1/core/sched/scheduler.py:2239`), and in its usage
  where `--enable-prompt-tokens-details` is set. If neither tells it, decode's figure stays.
- Only an object with a name of the figure in it is parsed; inside a string of the answer's the name
  would have backslashes. All else passes byte for byte.
- Of a stream only a line that has not ended is held: whoever reads events can do nothing with it.
"""

import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated

import msgspec

MAX_HELD_BYTES = 256 * 1024
"""Of one line. A longer one passes as it is."""

_NAMES = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)"')
_LINE_END = re.compile(rb"[\r\n]")
_DATA = b"data:"
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Params(msgspec.Struct):
    remote_prefill_cached_tokens: _Count | None = None


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    kv_transfer_params: _Params | None = None
    usage: _Usage | None = None

    def told(self) -> Iterator[int | None]:
        if self.kv_transfer_params:
            yield self.kv_transfer_params.remote_prefill_cached_tokens
        if self.usage and self.usage.prompt_tokens_details:
            yield self.usage.prompt_tokens_details.cached_tokens


_ANSWER = msgspec.json.Decoder(_Answer)


def cached_tokens(answer: bytes) -> int | None:
    """How many of the prompt's tokens prefill had cached, by its whole answer; None: it is silent.

    A message's usage is not looked at: its params are the same.
    """
    try:
        found = _ANSWER.decode(answer)
    except ValueError:
        return None
    return next((tokens for tokens in found.told() if tokens is not None), None)


def tells_cached(data: bytes) -> bool:
    """Whether ``data`` may have a figure to be replaced."""
    return _NAMES.search(data) is not None


def with_cached(answer: bytes, tokens: int) -> bytes:
    """A JSON answer, or an event's, with ``tokens`` as what was cached.

    Byte for byte as it was if it tells no figure, or is no such JSON.
    """
    try:
        fields = _OBJECT.decode(answer)
        usage = _OBJECT.decode(fields["usage"])
        changed = _message_usage(usage, tokens) or _openai_usage(usage, tokens)
    except (KeyError, ValueError, RecursionError):
        return answer
    return msgspec.json.encode(fields | {"usage": usage | changed})


def events_with_cached(events: bytes, tokens: int) -> bytes:
    """`with_cached` of each event whose data is one line, as vLLM's are."""
    return b"".join(_line_with(line, tokens) for line in events.splitlines(keepends=True))


def _line_with(line: bytes, tokens: int) -> bytes:
    if not (line.startswith(_DATA) and tells_cached(line)):
        return line
    event = line[len(_DATA) :].strip()
    changed = with_cached(event, tokens)
    ending = line[len(line.rstrip(b"\r\n")) :]
    return line if changed is event else _DATA + b" " + changed + ending


def _openai_usage(usage: dict[str, msgspec.Raw], tokens: int) -> dict[str, object]:
    """KeyError or ValueError if it tells no figure."""
    details = _OBJECT.decode(usage["prompt_tokens_details"])
    int(bytes(details["cached_tokens"]))
    return {"prompt_tokens_details": details | {"cached_tokens": tokens}}


def _message_usage(usage: dict[str, msgspec.Raw], tokens: int) -> dict[str, object]:
    """Of `/v1/messages`, whose ``input_tokens`` are those that were not cached; {}: it is none."""
    if "cache_read_input_tokens" not in usage:
        return {}
    total = sum(int(bytes(usage[key])) for key in ("input_tokens", "cache_read_input_tokens"))
    read = min(tokens, total)
    return {"input_tokens": total - read, "cache_read_input_tokens": read}


def has_line(data: bytes) -> bool:
    """Whether a stream that begins so has a line that has ended, or one that is not held."""
    return len(data) > MAX_HELD_BYTES or _LINE_END.search(data) is not None


class UsageStream:
    """An answer's events, as they pass. ``told`` waits for prefill's figure while it may come."""

    def __init__(self, told: Callable[[], Awaitable[int | None]]) -> None:
        self._told = told
        self._held = b""

    async def passed(self, data: bytes) -> bytes:
        """What may go on after the next bytes; empty ones are the end, and nothing is held then."""
        whole, self._held = self._held + data, b""
        end = 1 + max(whole.rfind(b"\n"), whole.rfind(b"\r"))
        if data and len(whole) - end <= MAX_HELD_BYTES:
            whole, self._held = whole[:end], whole[end:]
        if not tells_cached(whole) or (tokens := await self._told()) is None:
            return whole
        return events_with_cached(whole, tokens)
