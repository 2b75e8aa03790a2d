"""Which engines may be asked at once, and for which requests: `AtOnce` is how that is decided.

* A prefill engine says with each answer where it can be read while it computes, and how many tokens
  it computes in a step. One that fails, or does not say so again, is asked in turn.
* A decode engine that can read so exports a metric, which nothing else does. It is looked for once,
  while the requests that come meanwhile go in turn, and anew after the engine was down.
* What prefill computes in one step gains nothing but a round trip, and would hold blocks at decode
  meanwhile.
* Decode has blocks for a whole prompt while prefill computes it. Where that fills an engine whose
  blocks other requests need to read what prefill has computed, both wait for each other: so all
  that is asked early at once fits half of the smallest decode engine. Who else asks is not known.
* Knows no tokenizer: how many tokens a request has is guessed from its bytes. A wrong guess costs
  what the other way costs, and no answer.
"""

import asyncio
import contextlib
import re
from collections.abc import Iterator, Sequence

import aiohttp
import msgspec

from kvconnect.proxy.config import AtOnce
from kvconnect.proxy.policy import Body, EngineAddress, read_early_at
from kvconnect.proxy.pool import Pool
from kvconnect.proxy.session import LOST

READS_EARLY = b"vllm:kvconnect_num_streamed_transfers"
"""A metric of decode engines that read what is still computed."""
_BLOCKS = tuple(
    re.compile(rb'^vllm:cache_config_info\{[^\n]*\b%b="(\d+)"' % name, re.MULTILINE)
    for name in (b"block_size", b"num_gpu_blocks")
)
BYTES_PER_TOKEN = 4
LOOK_TIMEOUT_S = 10.0


class EarlyEngines:
    """What the engines of both pools have said."""

    def __init__(self, decoders: Pool, session: aiohttp.ClientSession, at_once: AtOnce) -> None:
        self._decoders = decoders
        self._session = session
        self._at_once = at_once
        self._prefill: dict[str, EngineAddress] = {}  # prefill engine → where it can be read
        self._room: dict[str, int] = {}  # decode engine → tokens that it may hold early
        self._held = 0  # tokens of requests that decode was asked for early, and has not begun
        self._looking: dict[str, asyncio.Task[None]] = {}

    @property
    def wanted(self) -> bool:
        """Whether prefill engines are to be asked if they can be read early."""
        return self._at_once != "never"

    async def close(self) -> None:
        """Look no further. Idempotent."""
        looking = list(self._looking.values())
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)

    def answered(self, url: str, params: msgspec.Raw | None, transfer_id: str | None) -> None:
        """A prefill engine that was given this name has answered with these params."""
        self.failed(url)
        if transfer_id is not None and (address := read_early_at(params, transfer_id)):
            self._prefill[url] = address

    def failed(self, url: str) -> None:
        """A prefill engine could not be reached, or broke off."""
        self._prefill.pop(url, None)

    def address(self, prefiller: str, body: Body) -> EngineAddress | None:
        """Where a prefill engine is read that is asked together with decode; None: in turn."""
        address = self._prefill.get(prefiller)
        if address is None or self._at_once == "always":
            return address
        tokens = _tokens(body)
        if tokens <= address.step_tokens:
            return None
        return address if self._held + tokens <= self._least_room() else None

    def may_ask(self, decoder: str) -> bool:
        """Not one that is not up: that is tried, and nobody has looked at what is there now."""
        return self._at_once == "always" or self._room.get(decoder, 0) > 0

    @contextlib.contextmanager
    def holding(self, body: Body) -> Iterator[None]:
        """Decode is asked early for this request, and has not begun to answer."""
        tokens = _tokens(body)
        self._held += tokens
        try:
            yield
        finally:
            self._held -= tokens

    def _least_room(self) -> int:
        """Of those that are up: which of them a request goes to is decided later."""
        up: Sequence[str] = [state.url for state in self._decoders.states() if state.up]
        for state in self._decoders.states():
            if not state.up:  # another may be started in its place
                self._room.pop(state.url, None)
        for url in up:
            if url not in self._room and url not in self._looking:
                self._looking[url] = asyncio.create_task(self._look(url))
        return min((self._room.get(url, 0) for url in up), default=0)

    async def _look(self, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT_S)
        try:
            async with self._session.get(
                f"{url}/metrics", timeout=timeout, allow_redirects=False
            ) as upstream:
                text = await upstream.read()
        except LOST:
            return  # whoever asks next looks again
        finally:
            self._looking.pop(url, None)
        if upstream.status not in (200, 404):
            return  # it may be starting
        can = upstream.status == 200 and READS_EARLY in text
        size, blocks = (int(found[1]) if (found := of.search(text)) else 0 for of in _BLOCKS)
        self._room[url] = size * blocks // 2 if can else 0


def _tokens(body: Body) -> int:
    return sum(map(len, body.values())) // BYTES_PER_TOKEN
