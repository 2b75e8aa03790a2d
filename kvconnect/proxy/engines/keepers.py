"""Which decode engine keeps a response, for who goes on from it (``previous_response_id``)."""

import asyncio
import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from kvconnect.proxy.engines.session import LOST, EngineSession
from kvconnect.proxy.policy import RESPONSES

REMEMBERED_RESPONSES = 65_536
_LOOK_TIMEOUT_S = 2.0
_RESPONSE_ID = re.compile(rb'"id":\s?"(resp_[\w-]{1,100})"')


class ResponseKeepers:
    """Those that this proxy has seen made, the newest; engines are asked for the others."""

    def __init__(self, session: EngineSession) -> None:
        self._session = session
        self._keepers: OrderedDict[str, str] = OrderedDict()  # response id → its engine

    def remember(self, url: str, head: bytes) -> None:
        """An engine's answer begins with ``head``, which names the response."""
        if found := _RESPONSE_ID.search(head):
            self._keepers[found[1].decode()] = url
            if len(self._keepers) > REMEMBERED_RESPONSES:
                self._keepers.popitem(last=False)

    async def find(
        self, response_id: str, headers: Mapping[str, str], engines: tuple[str, ...]
    ) -> str | None:
        """Its engine; ``engines`` are asked if another proxy passed it on, or this one before."""
        if known := self._keepers.get(response_id):
            return known
        return await self._ask(response_id, headers, engines) if len(engines) > 1 else None

    async def _ask(
        self, response_id: str, headers: Mapping[str, str], engines: Iterable[str]
    ) -> str | None:
        async def keeps(url: str) -> str | None:
            target = f"{RESPONSES}/{quote(response_id, safe='')}"
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(_LOOK_TIMEOUT_S):
                    with await self._session.ask("GET", url, target, headers) as upstream:
                        return url if upstream.status == 200 else None
            return None

        found = await asyncio.gather(*map(keeps, engines))
        return next((url for url in found if url is not None), None)
