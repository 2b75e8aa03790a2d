"""Serves `/ui`: the page to everybody, what it shows to whoever has the admin key.

Not served at all without ``admin_key``, like engines' administration. A browser sends no key when
it opens a page, so the page asks for it, and reads the events itself.
"""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping
from importlib import resources
from itertools import takewhile

import msgspec
from aiohttp import web

from kvconnect.proxy.engines.pool import EngineState, Pool
from kvconnect.proxy.http import has_key, json_error
from kvconnect.proxy.operators.admin import Role
from kvconnect.proxy.requests.counters import ProxyCounters
from kvconnect.proxy.requests.life import Journal, RequestLife
from kvconnect.proxy.ui.engines import EngineWatch, errors, held, tiers
from kvconnect.proxy.ui.view import ErrorView, UiSnapshot, engine_view, request_view

PATH, EVENTS = "/ui", "/ui/events"
EVERY_S = 1.0
# What the proxy counts of what went wrong, in words.
_CAUSES = {
    "retries": "engine asked again",
    "local_retries": "decode asked again without prefill's KV",
    "no_prefill": "no prefill engine",
    "no_params": "prefill kept nothing",
    "refused": "refused by prefill",
    "released": "refused by decode, KV let go",
    "unretried": "budget for retries spent",
    "late": "deadline missed",
    "queue_full": "queue full",
    "unavailable": "no decode engine",
    "broken": "answer broken off by an engine",
    "aborted": "given up by the client",
}


def read_page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run its script and style alone."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")

    def allowed(tag: str) -> str:
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    return page, (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


class Ui:
    """The page and its events."""

    def __init__(
        self,
        key: str,
        journal: Journal,
        clock: Callable[[], float],
        pools: Callable[[], Mapping[Role, Pool]],
        counters: Callable[[], ProxyCounters],
    ) -> None:
        """``pools`` by role, and what the proxy counted, are those of the running proxy.

        ``clock`` is the journal's; ``key``: what must be sent as a bearer token to see events.
        """
        self._key = key
        self._journal = journal
        self._clock = clock
        self._pools = pools
        self._counters = counters
        self._watch = EngineWatch(lambda: [state.url for _, state in self._engines()])
        self._stopping = asyncio.Event()
        self._page, self._policy = read_page()

    def add_to(self, app: web.Application) -> None:
        """Serve both; whoever looks does not keep the application from ending."""
        app.router.add_get(PATH, self._show)
        app.router.add_get(EVENTS, self._events)
        app.on_shutdown.append(self._stop)

    async def _stop(self, _app: web.Application) -> None:
        self._stopping.set()

    async def _show(self, _request: web.Request) -> web.Response:
        headers = {
            "Content-Security-Policy": self._policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if not has_key(request, self._key):
            return json_error(401, "the admin key is missing or wrong")
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        seen = None
        with self._watch.looked_at(), contextlib.suppress(ConnectionError):
            while not self._stopping.is_set():
                event = msgspec.json.encode(self.snapshot(seen))
                seen = self._journal.recent[-1] if self._journal.recent else None
                await response.write(b"data: " + event + b"\n\n")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), EVERY_S)
        return response

    def _engines(self) -> list[tuple[Role, EngineState]]:
        return [(role, one) for role, pool in self._pools().items() for one in pool.states()]

    def snapshot(self, seen: RequestLife | None) -> UiSnapshot:
        """What there is to see now; ``seen`` is the last request that has been sent as ended."""
        now, watch = self._clock(), self._watch
        new = [*takewhile(lambda life: life is not seen, reversed(self._journal.recent))][::-1]
        counts = {cause: getattr(self._counters(), name) for name, cause in _CAUSES.items()}
        counted = [ErrorView("proxy", cause, count) for cause, count in counts.items() if count]
        readings = [
            (state.url, watch.readings[state.url])
            for _, state in self._engines()
            if state.url in watch.readings
        ]
        return UiSnapshot(
            first=seen is None,
            engines=[
                engine_view(role, state, watch.fault(state.url)) for role, state in self._engines()
            ],
            running=[
                request_view(life, now)
                for life in sorted(self._journal.running, key=lambda life: life.began_s)
            ],
            recent=[request_view(life, now) for life in new],
            transfers=list(watch.transfers),
            held=[one for url, reading in readings for one in held(url, reading)],
            tiers=[one for url, reading in readings for one in tiers(url, reading)],
            errors=counted + [one for url, reading in readings for one in errors(url, reading)],
        )
