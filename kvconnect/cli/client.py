"""A client of engines and proxies: greedy completions, chats, and an engine's counters."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import msgspec

from kvconnect.cli.counters import Counters, read_counters
from kvconnect.errors import KvConnectError

_ANSWER_TIMEOUT_S = 180.0
_COUNTED_TIMEOUT_S = 10.0
_POLL_S = 0.05


class AskError(KvConnectError):
    """An engine or a proxy did not answer as it should."""


@dataclass(frozen=True)
class Prompt:
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
class Answer:
    """All of it, streamed or not."""

    text: str
    prompt_tokens: int
    params: Any = None
    """kv_transfer_params; not of a streamed one."""


class Client:
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

    async def ask(self, url: str, prompt: Prompt) -> Answer:
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
                return Answer(text, tokens, whole.get("kv_transfer_params"))
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            raise AskError(f"{url} did not answer: {type(error).__name__} {error}") from error

    async def ask_all(self, url: str, prompts: list[Prompt]) -> list[Answer]:
        """The answers to prompts asked at once, in their order."""
        return await asyncio.gather(*(self.ask(url, prompt) for prompt in prompts))

    async def counters(self, url: str, transfer_metrics: str) -> Counters:
        """What the engine has counted by now."""
        return read_counters(await self.metrics(url), transfer_metrics)

    async def metrics(self, url: str) -> str:
        """The engine's metrics in Prometheus' text form."""
        try:
            async with self._session.get(f"{url}/metrics") as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise AskError(f"{url}/metrics cannot be read: {error}") from error

    async def counters_after(self, url: str, transfer_metrics: str, finished: float) -> Counters:
        """The same once ``finished`` requests are counted, a little after they were answered."""
        deadline = time.monotonic() + _COUNTED_TIMEOUT_S
        while (counters := await self.counters(url, transfer_metrics)).finished < finished:
            if time.monotonic() > deadline:
                raise AskError(
                    f"{url} counts {counters.finished:.0f} requests, expected {finished:.0f}"
                )
            await asyncio.sleep(_POLL_S)
        return counters


async def _streamed(url: str, response: aiohttp.ClientResponse) -> Answer:
    text, prompt_tokens = "", 0
    async for event in _events(response):
        if "error" in event:
            raise AskError(f"{url} broke off its answer: {event['error']}")
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
        if usage := event.get("usage"):
            prompt_tokens = usage["prompt_tokens"]
            return Answer(text, prompt_tokens)
    raise AskError(f"{url} ended its stream without a usage after {text!r}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield msgspec.json.decode(line.removeprefix(b"data: "))
