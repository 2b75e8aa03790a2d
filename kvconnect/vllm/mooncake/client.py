"""Asks bootstrap endpoints, whose addresses come from clients, and registers at one.

Connects only to what `Allowed` permits, follows no redirect, reads no more than an answer may
have, and with a secret believes only an answer that is proved. What goes wrong with a query is an
OfferError with the reason.
"""

import asyncio
import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Mapping

import aiohttp
import msgspec

from kvconnect.errors import ConfigError, OfferError
from kvconnect.vllm.mooncake.allowed import OPTION, Allowed, Endpoint
from kvconnect.vllm.mooncake.directory import MAX_ANSWER_BYTES, Registration
from kvconnect.vllm.mooncake.proof import (
    CHALLENGE,
    NONCE,
    NONCE_CHARS,
    PROOF,
    agree,
    prove_answer,
    prove_registration,
)

RETRY_S = 0.5


class Client:
    """Its coroutines run on a `LoopThread`; each ends within ``timeout_s``."""

    def __init__(self, allowed: Allowed, secret: bytes | None, timeout_s: float) -> None:
        self._allowed = allowed
        self._secret = secret
        self._timeout_s = timeout_s

    async def query(self, endpoint: Endpoint) -> bytes:
        """The endpoint's answer to a query; raises OfferError."""
        nonce = secrets.token_hex(NONCE_CHARS // 2)
        sent = {NONCE: nonce} if self._secret else {}
        try:
            async with asyncio.timeout(self._timeout_s):
                last: OfferError | None = None
                for address in await self._addresses(endpoint):
                    try:
                        status, answer, headers = await _request("GET", address, "/query", sent)
                        break
                    except OfferError as e:
                        last = e
                else:
                    assert last is not None
                    raise last
        except TimeoutError as e:
            raise OfferError(f"{_name(endpoint)} did not answer in {self._timeout_s:g} s") from e
        if status != 200:
            raise OfferError(f"{_name(endpoint)} answered {status}")
        if self._secret:
            expected = prove_answer(self._secret, nonce, answer)
            if not agree(headers.get(PROOF), expected):
                raise OfferError(
                    f"{_name(endpoint)} did not prove its answer; has its engine the same "
                    "auth_secret_file as this one?"
                )
        return answer

    async def register(self, endpoint: Endpoint, ranks: list[Registration]) -> None:
        """Make ranks of ours known at the operator's endpoint, which may not be up yet.

        Raises ConfigError.
        """
        waiting, why = list(ranks), ""
        try:
            async with asyncio.timeout(self._timeout_s):
                while waiting:
                    try:
                        await self._register(endpoint, msgspec.json.encode(waiting[0]))
                        del waiting[0]
                    except OfferError as e:
                        why = str(e)
                        await asyncio.sleep(RETRY_S)
        except TimeoutError as e:
            raise ConfigError(
                f"this engine could not register at the Mooncake bootstrap endpoint in "
                f"{self._timeout_s:g} s: {why}"
            ) from e

    async def _register(self, endpoint: Endpoint, body: bytes) -> None:
        sent: dict[str, str] = {"Content-Type": "application/json"}
        for _ in range(2):
            status, answer, headers = await _request("POST", endpoint, "/register", sent, body)
            challenge = headers.get(CHALLENGE)
            if status != 401 or not self._secret or not challenge:
                break
            sent[PROOF] = prove_registration(self._secret, challenge, body)
        if status != 200:
            why = answer[:300].decode(errors="replace")
            raise ConfigError(f"{_name(endpoint)} refused to register this engine: {status} {why}")

    async def _addresses(self, endpoint: Endpoint) -> list[Endpoint]:
        """What its name stands for, as far as that may be connected to."""
        addresses = await _resolve(endpoint)
        permitted = [a for a in addresses if self._allowed.permits(endpoint.host, a)]
        if not permitted:
            raise OfferError(
                f"{_name(endpoint)} is not an address that bootstrap endpoints may have; "
                f"{OPTION} says which are allowed"
            )
        return [Endpoint(address, endpoint.port) for address in permitted]


async def _resolve(endpoint: Endpoint) -> list[str]:
    """The addresses of a name; raises OfferError."""
    with contextlib.suppress(ValueError):  # an address needs none of the few threads for names
        return [str(ipaddress.ip_address(endpoint.host))]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(*endpoint, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise OfferError(f"{_name(endpoint)} is no address: {e}") from e
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


async def _request(
    method: str, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes = b""
) -> tuple[int, bytes, Mapping[str, str]]:
    """Status, answer and headers; raises OfferError."""
    sent = {**headers, "Accept-Encoding": "identity"}
    try:
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                method,
                f"{_name(endpoint)}{path}",
                headers=sent,
                data=body or None,
                allow_redirects=False,
            ) as response,
        ):
            answer = b""
            async for chunk in response.content.iter_chunked(1 << 16):
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    raise OfferError(f"{_name(endpoint)} answered with too many bytes")
            return response.status, answer, response.headers
    except (aiohttp.ClientError, OSError, ValueError) as e:
        raise OfferError(f"{_name(endpoint)} cannot be asked: {e or type(e).__name__}") from e


def _name(endpoint: Endpoint) -> str:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return f"http://{host}:{endpoint.port}"
