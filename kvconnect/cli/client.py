"""A client of engines and proxies: greedy completions, chats, and an engine's counters."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import msgspec

from kvconnect.cli.counters import EngineCounters, read_counters
from kvconnect.errors import KvConnectError

_ANSWER_TIMEOUT_S = 180.0
_COUNTED_TIMEOUT_S = 10.0
_SAVED_TIMEOUT_S = 30.0
_POLL_S = 0.05


class AskError(KvConnectError):
    """An engine or a proxy did not answer as it should."""


@dataclass(frozen=True)
class CompletionRequest:
    """What is asked, greedily; a chat is streamed."""

    text: str
    max_tokens: int
    chat: bool = False
    params: Any = None
    """kv_transfer_params."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        """The request's body."""
        common = {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        if self.params is not None:
            common["kv_transfer_params"] = self.params
        if not self.chat:
            return common | {"prompt": self.text}
        messages = [{"role": "user", "content": self.text}]
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return common | stream | {"messages": messages}


@dataclass(frozen=True)
class Completion:
    """All of it, streamed or not."""

    text: str
    prompt_tokens: int
    params: Any = None
    """kv_transfer_params; not of a streamed one."""


class CompletionClient:
    """One model's prompts; an async context."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        # a connection for each request: what was kept alive may be a killed engine's
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(total=_ANSWER_TIMEOUT_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, url: str, prompt: CompletionRequest) -> Completion:
        """The answer of the engine or proxy at ``url``; raises AskError."""
        try:
            async with self._session.post(
                url + prompt.path, json=prompt.body(self._model)
            ) as response:
                if response.status != 200:
                    raise AskError(f"{url} answered {response.status}: {await response.text()}")
                if prompt.chat:
                    return await _streamed(url, response)
                whole = await response.json()
                text, tokens = whole["choices"][0]["text"], whole["usage"]["prompt_tokens"]
                return Completion(text, tokens, whole.get("kv_transfer_params"))
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            raise AskError(f"{url} did not answer: {type(error).__name__} {error}") from error

    async def ask_all(self, url: str, prompts: list[CompletionRequest]) -> list[Completion]:
        """The answers to prompts asked at once, in their order."""
        return await asyncio.gather(*(self.ask(url, prompt) for prompt in prompts))

    async def metrics(self, url: str) -> str:
        """The engine's metrics in Prometheus' text form."""
        try:
            async with self._session.get(f"{url}/metrics") as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise AskError(f"{url}/metrics cannot be read: {error}") from error

    async def forget(self, url: str) -> None:
        """Empty the engine's own prefix cache, which it refuses while blocks are being saved."""
        deadline = time.monotonic() + _SAVED_TIMEOUT_S
        while time.monotonic() < deadline:
            async with self._session.post(f"{url}/reset_prefix_cache") as response:
                if response.status == 200 and '"success":true' in await response.text():
                    return
            await asyncio.sleep(4 * _POLL_S)
        raise AskError(f"{url} does not empty its prefix cache within {_SAVED_TIMEOUT_S:.0f} s")


class CounterReader:
    """What one engine counts between two calls; ``metrics`` as for `read_counters`."""

    def __init__(
        self, client: CompletionClient, url: str, transfer_metrics: str, others: Sequence[str] = ()
    ) -> None:
        self._client = client
        self._url = url
        self._names = transfer_metrics, others
        self._before: EngineCounters | None = None

    async def after(self, requests: int) -> EngineCounters:
        """What was counted since the last call, once this many requests more have been.

        An engine counts a request a little after it has answered it. The first call counts from
        when the engine started.
        """
        before = self._before or read_counters("", *self._names)
        deadline = time.monotonic() + _COUNTED_TIMEOUT_S
        while True:
            self._before = read_counters(await self._client.metrics(self._url), *self._names)
            seen = self._before - before
            if seen.finished >= requests:
                return seen
            if time.monotonic() > deadline:
                raise AskError(
                    f"{self._url} counts {seen.finished:.0f} requests, expected {requests}"
                )
            await asyncio.sleep(_POLL_S)


async def _streamed(url: str, response: aiohttp.ClientResponse) -> Completion:
    text, prompt_tokens = "", 0
    async for event in _events(response):
        if "error" in event:
            raise AskError(f"{url} broke off its answer: {event['error']}")
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
        if usage := event.get("usage"):
            prompt_tokens = usage["prompt_tokens"]
            return Completion(text, prompt_tokens)
    raise AskError(f"{url} ended its stream without a usage after {text!r}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield msgspec.json.decode(line.removeprefix(b"data: "))
