"""A router as vLLM's example for P2pNcclConnector was until 0.23: pings, and ids that name engines.

``xpyd_router.py PORT DISCOVERY_PORT PREFILL DECODE``; healthy once so many engines of each kind
have pinged within the last five seconds. Every prefill engine is paired with every decode engine.
"""

import asyncio
import itertools
import sys
import time
import uuid

import msgspec
import zmq.asyncio
from aiohttp import ClientSession, ClientTimeout, web

PORT, DISCOVERY_PORT, *WANTED = map(int, sys.argv[1:])
FORGOTTEN_S = 5.0


class Router:
    def __init__(self) -> None:
        self.heard: dict[str, dict[str, tuple[str, float]]] = {"P": {}, "D": {}}
        self.count = itertools.count()

    async def listen(self) -> None:
        socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        socket.bind(f"tcp://127.0.0.1:{DISCOVERY_PORT}")
        while True:
            _, message = await socket.recv_multipart()
            ping = msgspec.msgpack.decode(message)
            until = time.monotonic() + FORGOTTEN_S
            self.heard[ping["type"]][ping["http_address"]] = ping["zmq_address"], until

    def here(self, kind: str) -> list[tuple[str, str]]:
        """HTTP and ZMQ addresses."""
        now = time.monotonic()
        return sorted((http, at) for http, (at, until) in self.heard[kind].items() if until > now)

    async def health(self, _: web.Request) -> web.Response:
        seen = [len(self.here(kind)) for kind in "PD"]
        return web.Response(status=200 if seen == WANTED else 503)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body, number = await request.json(), next(self.count)
        prefills, decodes = self.here("P"), self.here("D")
        prefill, prefill_zmq = prefills[number % len(prefills)]
        decode, decode_zmq = decodes[number // len(prefills) % len(decodes)]
        named = f"___prefill_addr_{prefill_zmq}___decode_addr_{decode_zmq}_{uuid.uuid4().hex}"
        headers = {"X-Request-Id": named}
        async with ClientSession(timeout=ClientTimeout(total=300)) as session:
            one = body | {"max_tokens": 1}
            async with session.post(
                f"http://{prefill}{request.path}", json=one, headers=headers
            ) as first:
                await first.read()
            async with session.post(
                f"http://{decode}{request.path}", json=body, headers=headers
            ) as second:
                whole = await second.read()
                return web.Response(
                    status=second.status, body=whole, content_type=second.content_type
                )


async def main() -> None:
    router = Router()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/health", router.health)
    app.router.add_post("/v1/completions", router.answer)
    app.router.add_post("/v1/chat/completions", router.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", PORT).start()
    await router.listen()


asyncio.run(main())
