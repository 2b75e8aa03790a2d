"""Operators add, drain and remove engines while the proxy runs, over HTTP with a key of its own.

    GET    /admin/engines                                            all engines
    POST   /admin/engines  {"role": "decode", "url": "http://…"}     add, or end a drain
    POST   /admin/engines  {"role": …, "url": …, "drain": true}      no new requests; gone when idle
    DELETE /admin/engines?role=decode&url=http://…                   gone; its requests go elsewhere

Not served at all without ``admin_key``. What is added is forgotten when the proxy ends.
"""

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from aiohttp import web

from kvconnect.errors import ConfigError
from kvconnect.proxy.config import engine_url
from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.http import has_key, json_error

PATH = "/admin/engines"

Role = Literal["prefill", "decode"]
_Handle = Callable[[web.Request], Awaitable[web.Response]]


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    role: Role
    url: str
    drain: bool = False


class Admin:
    """The handlers of `PATH`."""

    def __init__(self, key: str, pools: Callable[[], dict[Role, Pool]]) -> None:
        """``key``: what must be sent as a bearer token; ``pools``: those of the running proxy."""
        self._key = key
        self._pools = pools

    def routes(self) -> list[web.RouteDef]:
        """For an application's router."""
        return [
            web.get(PATH, self._guarded(self._show)),
            web.post(PATH, self._guarded(self._put)),
            web.delete(PATH, self._guarded(self._remove)),
        ]

    def _guarded(self, handle: _Handle) -> _Handle:
        async def guarded(request: web.Request) -> web.Response:
            if not has_key(request, self._key):
                return json_error(401, "the admin key is missing or wrong")
            try:
                return await handle(request)
            except (ConfigError, ValueError) as error:
                return json_error(400, str(error))

        return guarded

    async def _show(self, _request: web.Request) -> web.Response:
        states = {role: pool.states() for role, pool in self._pools().items()}
        return web.Response(body=msgspec.json.encode(states), content_type="application/json")

    async def _put(self, request: web.Request) -> web.Response:
        order = msgspec.json.decode(await request.read(), type=_Order)
        pool, url = self._pools()[order.role], engine_url(order.role, order.url)
        if not order.drain:
            pool.put(url)
        elif not pool.has(url):
            return json_error(404, f"{url} is no {order.role} engine of this proxy")
        else:
            pool.drain(url)
        return await self._show(request)

    async def _remove(self, request: web.Request) -> web.Response:
        order = msgspec.convert(dict(request.query), _Order)
        if not self._pools()[order.role].remove(engine_url(order.role, order.url)):
            return json_error(404, f"{order.url} is no {order.role} engine of this proxy")
        return await self._show(request)
