"""Which engines may be asked at once, and for which requests: `AtOnce` is how that is decided.

* A prefill engine says with each answer where it can be read while it computes, and how many tokens
  it computes in a step. One that breaks off, or does not say so again, is asked in turn; one that
  answers with an error has said nothing of it.
* Ranks of a data-parallel engine answer at one address, each as an engine of its own. Which of them
  a request will go to nobody knows: they are asked in turn.
* A decode engine that can read so exports a metric, which nothing else does. It is looked for once,
  while the requests that come meanwhile go in turn, and anew after the engine was down.
* What prefill computes in one step gains nothing but a round trip, and would hold blocks at decode
  meanwhile.
* How many are asked early at once does not matter: decode engines leave half of their blocks to
  what prefill has computed (`kvconnect.vllm.early_loads`).
* Knows no tokenizer: how many tokens a request has is guessed from its bytes. A wrong guess costs
  what the other way costs, and no answer.
"""

import asyncio
from collections.abc import Hashable

import msgspec

from kvconnect.proxy.config import AtOnce
from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.engines.session import LOST, EngineSession
from kvconnect.proxy.policy import Body, EngineAddress, guessed_tokens, read_early_at

READS_EARLY = b"vllm:kvconnect_num_streamed_transfers"
"""A metric of decode engines that read what is still computed."""
LOOK_TIMEOUT_S = 10.0


class EarlyEngines:
    """What the engines of both pools have said."""

    def __init__(self, decoders: Pool, session: EngineSession, at_once: AtOnce) -> None:
        self._decoders = decoders
        self._session = session
        self._at_once = at_once
        self._prefill: dict[str, EngineAddress] = {}  # prefill engine → where it can be read
        self._before: dict[str, set[Hashable]] = {}  # the same → engines that answered there before
        self._several: set[str] = set()  # prefill engines of which several answer
        self._reads_early: dict[str, bool] = {}  # decode engine → whether it can
        self._looking: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Look no further. Idempotent."""
        looking = list(self._looking.values())
        for task in looking:
            task.cancel()
        await asyncio.gather(*looking, return_exceptions=True)

    def answered(self, url: str, params: msgspec.Raw | None) -> EngineAddress | None:
        """A prefill engine has answered with these params; where it is, if it can be read early."""
        address = None if self._at_once == "never" else read_early_at(params)
        if address is None:
            self.failed(url)
            return None
        last, before = self._prefill.get(url, address), self._before.setdefault(url, set())
        if last.engine != address.engine:
            before.add(last.engine)
            if address.engine in before:  # no restart brings it back
                self._several.add(url)
        self._prefill[url] = address
        return address

    def failed(self, url: str) -> None:
        """A prefill engine could not be reached, broke off, or is none that can be read early."""
        self._prefill.pop(url, None)
        self._before.pop(url, None)
        self._several.discard(url)

    def address(self, prefiller: str, body: Body) -> EngineAddress | None:
        """Where a prefill engine is read that is asked together with decode; None: in turn."""
        address = None if prefiller in self._several else self._prefill.get(prefiller)
        if address is None or self._at_once == "always":
            return address
        gains = guessed_tokens(body) > address.step_tokens
        return address if gains and self._all_read_early() else None

    def may_ask(self, decoder: str) -> bool:
        """Not one that is not up: that is tried, and nobody has looked at what is there now."""
        return self._at_once == "always" or self._reads_early.get(decoder, False)

    def _all_read_early(self) -> bool:
        """Of those that are up: which of them a request goes to is decided later."""
        up = [state.url for state in self._decoders.states() if state.up]
        for url in self._reads_early.keys() - set(up):  # another may be started in its place
            del self._reads_early[url]
        for url in up:
            if url not in self._reads_early and url not in self._looking:
                self._looking[url] = asyncio.create_task(self._look(url))
        return bool(up) and all(self._reads_early.get(url) for url in up)

    async def _look(self, url: str) -> None:
        try:
            upstream, text = await self._session.whole("GET", url, "/metrics", LOOK_TIMEOUT_S)
        except LOST:
            return  # whoever asks next looks again
        finally:
            self._looking.pop(url, None)
        if upstream.status not in (200, 404):
            return  # it may be starting
        self._reads_early[url] = upstream.status == 200 and READS_EARLY in text
