"""Connections to engines: pooled, kept alive, quick to notice that an engine is gone.

Does not know what is sent over them.
"""

import socket

import aiohttp

LOST = (aiohttp.ClientError, TimeoutError, OSError)
"""The engine, or the way to it, is gone."""
# uvicorn, under vLLM, closes connections after 5 idle seconds; we have to be first, or a request
# is written into a closing connection and a healthy engine looks dead.
_KEEPALIVE_S = 3.0


def engine_session(
    connect_timeout_s: float, silence_timeout_s: float | None, api_key: str | None = None
) -> aiohttp.ClientSession:
    """A client without limits on connections, or on how long an engine may generate.

    ``api_key``: what engines are sent where a request does not bring its client's.
    """
    # byte for byte: an engine must not compress what the client did not ask to have so
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0, keepalive_timeout=_KEEPALIVE_S, socket_factory=watched_socket
        ),
        timeout=aiohttp.ClientTimeout(
            total=None, connect=connect_timeout_s, sock_read=silence_timeout_s
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers=headers,
    )


def watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that notices within 30 s when its peer's host has gone without a word.

    Nothing else would: generation has no time limit, and a dead host sends no reset.
    """
    family, kind, protocol, *_ = address
    watched = socket.socket(family, kind, protocol)
    watched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere; the system's defaults are hours
            watched.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return watched
