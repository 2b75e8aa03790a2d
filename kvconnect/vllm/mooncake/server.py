"""The bootstrap endpoint of a prefill engine: ``GET /query``, ``POST /register``.

Routers ask it which engines there are, decode engines where their ranks are, and the other
engines of a data-parallel group register here.

* Answers anybody: what it tells are names and addresses. With a secret, answers are proved to those
  who send a nonce, and registrations must be proved; without one they must come from an address
  that `Allowed` permits.
* Nothing that arrives ends it: bounded in bytes and connections, the oldest of which goes first.
"""

import asyncio
import logging
import secrets
import socket
from typing import Any

import msgspec
from aiohttp import web

from kvconnect.errors import ConfigError
from kvconnect.vllm.mooncake.allowed import Allowed
from kvconnect.vllm.mooncake.directory import MAX_REGISTRATION_BYTES, Directory, Registration
from kvconnect.vllm.mooncake.loop import LoopThread
from kvconnect.vllm.mooncake.proof import (
    CHALLENGE,
    NONCE,
    NONCE_CHARS,
    PROOF,
    agree,
    is_nonce,
    prove_answer,
    prove_registration,
)

logger = logging.getLogger(f"vllm.{__name__}")

THREAD_NAME = "kvconnect-bootstrap"
MAX_CONNECTIONS = 256
KEEPALIVE_S = 60.0
START_TIMEOUT_S = 30.0


class _Bounded(web.Server):
    """The oldest connection goes when there are too many."""

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        for oldest in self.connections[:-MAX_CONNECTIONS]:
            oldest.force_close()


class BootstrapServer:
    """Serves from construction to `close`, on a thread of its own."""

    def __init__(
        self, port: int, directory: Directory, allowed: Allowed, secret: bytes | None
    ) -> None:
        """``port`` 0 takes a free one. Raises ConfigError if it cannot be had."""
        self._directory = directory
        self._allowed = allowed
        self._secret = secret
        self._challenge = secrets.token_hex(NONCE_CHARS // 2)
        self._socket = _bind(port)
        self.port: int = self._socket.getsockname()[1]
        self._closed = False
        self._thread = LoopThread(THREAD_NAME)
        self._thread.submit(self._serve()).result(START_TIMEOUT_S)

    def close(self) -> None:
        """Stop serving. Idempotent."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._stop()).result(START_TIMEOUT_S)
            self._thread.close()

    async def _serve(self) -> None:
        self._server = _Bounded(self._handle, access_log=None, keepalive_timeout=KEEPALIVE_S)
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(self._server, sock=self._socket)

    async def _stop(self) -> None:
        self._listening.close()
        await self._server.shutdown(timeout=0)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        match (request.method, request.path):
            case ("GET", "/query"):
                return self._query(request)
            case ("POST", "/register"):
                return await self._register(request)
        return web.json_response({"detail": "Not Found"}, status=404)

    def _query(self, request: web.BaseRequest) -> web.Response:
        body, headers = self._directory.answer(), {}
        nonce = request.headers.get(NONCE, "")
        if self._secret and is_nonce(nonce):
            headers[PROOF] = prove_answer(self._secret, nonce, body)
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def _register(self, request: web.BaseRequest) -> web.Response:
        if (request.content_length or MAX_REGISTRATION_BYTES) > MAX_REGISTRATION_BYTES:
            return _refuse(413, f"more than {MAX_REGISTRATION_BYTES} bytes")
        try:
            body = await request.content.readexactly(request.content_length or 0)
            new = msgspec.json.decode(body, type=Registration)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            return _refuse(422, str(e))
        except asyncio.IncompleteReadError:
            return _refuse(400, "the body broke off")
        if self._secret:
            expected = prove_registration(self._secret, self._challenge, body)
            if not agree(request.headers.get(PROOF), expected):
                headers = {CHALLENGE: self._challenge}
                return _refuse(401, "who registers must prove the auth_secret_file", headers)
        elif not self._allowed.permits("", request.remote or ""):
            return _refuse(403, "registrations are not accepted from this address")
        if why := self._directory.register(new):
            logger.warning("bootstrap: a registration was refused: %s", why)
            return _refuse(400, why)
        return web.json_response({"status": "ok"})


def _refuse(status: int, why: str, headers: Any = None) -> web.Response:
    return web.json_response({"detail": why}, status=status, headers=headers)


def _bind(port: int) -> socket.socket:
    """A listening socket on all addresses; raises ConfigError."""
    both = socket.has_dualstack_ipv6()
    try:
        if both:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except (OSError, OverflowError) as e:
        raise ConfigError(
            f"the Mooncake bootstrap endpoint cannot listen on port {port} ({e}); set "
            "VLLM_MOONCAKE_BOOTSTRAP_PORT to another port for this engine, or to 0 for a free one"
        ) from e
