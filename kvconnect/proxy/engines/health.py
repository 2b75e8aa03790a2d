"""Whether engines live: those that are silent, hang, or are not up are asked for their health.

An engine that is waited for and says nothing is asked every second. One that does not answer that
either hangs: it counts as down, and all that waits for it ends. So does one that is stuck: its API
server answers, but its engine says nothing while others do. That one is asked for a token.
"""

import asyncio
import contextlib
import logging

from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.engines.session import LOST, EngineSession
from kvconnect.proxy.policy import TEXT, one_token_body

logger = logging.getLogger(f"vllm.{__name__}")

LOOK_EVERY_S = 1.0
# Its API server may be busy with tokenizing, or with a page of logs, but not for so long.
HEALTH_TIMEOUT_S = 5.0
# A gateway in front of an engine says with these that it did not reach it.
_UNREACHED = (502, 504)


class HealthWatch:
    """Of the engines of both pools."""

    def __init__(
        self,
        prefillers: Pool,
        decoders: Pool,
        session: EngineSession,
        connect_timeout_s: float,
    ) -> None:
        self._prefillers = prefillers
        self._decoders = decoders
        self._session = session
        self._connect_timeout_s = connect_timeout_s

    async def watch(self) -> None:
        """Ask, every second, whoever is silent or hangs; until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for pool in (self._prefillers, self._decoders):
                for url in pool.stuck():
                    logger.warning("%s is stuck: it says nothing while others answer", url)
                    pool.failed(url)
                    pool.give_up(url, stuck=True)
            doubtful = [(self._prefillers, url) for url in self._doubtful_prefill()]
            doubtful += [(self._decoders, url) for url in self._doubtful_decode()]
            await asyncio.gather(*(self._ask_whether_alive(*one) for one in doubtful))

    def _doubtful_prefill(self) -> set[str]:
        return {*self._prefillers.silent(), *self._prefillers.hanging()}

    def _doubtful_decode(self) -> set[str]:
        """The last decode engine is never given up: nobody could take over from it."""
        silent = self._decoders.silent()
        others = any(state.up and state.url not in silent for state in self._decoders.states())
        return {*(silent if others else ()), *self._decoders.hanging()}

    async def _ask_whether_alive(self, pool: Pool, url: str) -> None:
        stuck = pool.is_stuck(url)
        method, target = ("POST", TEXT) if stuck else ("GET", "/health")
        body = one_token_body() if stuck else None
        try:
            upstream, _ = await self._session.whole(
                method, url, target, HEALTH_TIMEOUT_S, body=body
            )
            if stuck and upstream.status >= 500:
                raise OSError(f"it answers {upstream.status} in place of a token")
        except LOST:
            if url not in pool.hanging():
                logger.warning("%s hangs: it does not answer /health either", url)
            pool.give_up(url)
        else:
            pool.lives(url)

    async def look(self, pool: Pool) -> None:
        """Asks engines that are not up for their health, so that one may count as up.

        Not those that are stuck: they answer, and only a token shows that they work again.
        """

        async def look(url: str) -> None:
            with contextlib.suppress(*LOST):
                upstream, _ = await self._session.whole(
                    "GET", url, "/health", self._connect_timeout_s
                )
                if upstream.status == 200:
                    report_status(pool, url, 200)

        await asyncio.gather(
            *(look(state.url) for state in pool.states() if not (state.up or state.stuck))
        )


def report_lost(pool: Pool, url: str, error: BaseException) -> None:
    """An engine could not be reached, or broke off."""
    if pool.failed(url):
        logger.warning("%s is down: %s", url, str(error) or type(error).__name__)


def report_status(pool: Pool, url: str, status: int) -> None:
    """An engine, or a gateway in front of it, answered."""
    if status in _UNREACHED:
        if pool.failed(url):
            logger.warning("%s is down: status %d", url, status)
    elif pool.succeeded(url):
        logger.warning("%s is up again", url)
