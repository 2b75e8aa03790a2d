"""Engines that come and go by themselves: names that DNS resolves, pods that Kubernetes labels.

Does not know what engines are asked. What it finds it puts into a pool; what is no longer found
drains: it gets no new requests, and those that it has come to their end.

- ``dns+http://NAME:PORT``: every address of the name, such as a headless service's, is an engine.
- ``k8s://NAMESPACE/LABEL=VALUE,…:PORT``: every pod that is ready; without a namespace those of our
  own. Asked of the API server with the pod's service account, which may list pods.
- A source that cannot be asked changes nothing: an outage of DNS is none of the engines'.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit

import aiohttp
import msgspec

from kvconnect.errors import ConfigError
from kvconnect.proxy.engines.pool import Pool

logger = logging.getLogger(f"vllm.{__name__}")

SCHEMES = ("dns+http", "k8s")
"""Of URLs that name no engine, but where engines are looked for."""
LOOK_EVERY_S = 5.0
_TIMEOUT_S = 10.0
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Find = Callable[[], Awaitable[set[str]]]
"""URLs of the engines that are there; OSError or aiohttp.ClientError if that cannot be told."""


class _Condition(msgspec.Struct):
    type: str
    status: str


class _PodStatus(msgspec.Struct):
    podIP: str = ""  # noqa: N815  # Kubernetes' name
    conditions: list[_Condition] = []


class _PodMeta(msgspec.Struct):
    deletionTimestamp: str | None = None  # noqa: N815


class _Pod(msgspec.Struct):
    metadata: _PodMeta
    status: _PodStatus


class _Pods(msgspec.Struct):
    items: list[_Pod] = []


class Discovery:
    """Keeps one pool as the sources of its role say."""

    def __init__(self, pool: Pool, finds: Sequence[Find]) -> None:
        """``finds``: who is asked again and again; what they find joins what ``pool`` has."""
        self._pool = pool
        self._finds = finds
        self._found: list[set[str]] = [set() for _ in finds]
        self._failing = [False for _ in finds]

    async def watch(self) -> None:
        """Look every `LOOK_EVERY_S`, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Ask all sources once."""
        before = set().union(*self._found)
        for number, find in enumerate(self._finds):
            try:
                self._found[number] = await find()
                self._failing[number] = False
            except (OSError, aiohttp.ClientError, ValueError) as error:
                if not self._failing[number]:
                    logger.warning("engines cannot be looked for, those known stay: %s", error)
                self._failing[number] = True
        now = set().union(*self._found)
        for url in sorted(now):
            # what was known before may have been drained by an operator, and stays so
            if url not in before and self._pool.put(url):
                logger.info("%s is there", url)
        for url in sorted(before - now):
            if self._pool.drain(url):
                logger.info("%s is gone: it gets no more requests", url)


def finder(url: str) -> Find:
    """The source that a URL of `SCHEMES` names; ConfigError says what is wrong."""
    try:
        parts = urlsplit(url)
        found = _finder(parts)
    except ValueError:
        found = None
    if found is None:
        raise ConfigError(
            f"{url!r} names no engines; write dns+http://NAME:PORT or "
            "k8s://NAMESPACE/LABEL=VALUE:PORT"
        )
    return found


def _finder(parts: SplitResult) -> Find | None:
    if parts.scheme == "dns+http":
        host, port = parts.hostname, parts.port
        if host is None or port is None or parts.path.strip("/"):
            return None
        return lambda: _resolve(host, port)
    labels, _, text = parts.path.strip("/").rpartition(":")
    if not labels or not text.isdigit() or parts.query:
        return None
    return lambda: _pods(parts.netloc, labels, int(text))


async def _resolve(host: str, port: int) -> set[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {_url(str(address[0]), port) for *_, address in found}


def _url(ip: str, port: int) -> str:
    bracketed = f"[{ip}]" if ipaddress.ip_address(ip).version == 6 else ip
    return f"http://{bracketed}:{port}"


async def _pods(namespace: str, labels: str, port: int) -> set[str]:
    """Pods that are ready, asked of the API server that a pod's environment names."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if host is None:
        raise OSError("this is no pod of Kubernetes: KUBERNETES_SERVICE_HOST is not set")
    account = Path(os.environ.get("KVCONNECT_SERVICE_ACCOUNT", _ACCOUNT))
    # read each time: both are renewed while we run
    token = (account / "token").read_text().strip()
    trusted = ssl.create_default_context(cafile=str(account / "ca.crt"))
    own = namespace or (account / "namespace").read_text().strip()
    server = f"[{host}]" if ":" in host else host
    url = (
        f"https://{server}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
        f"/api/v1/namespaces/{quote(own)}/pods?labelSelector={quote(labels)}"
    )
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session,
        session.get(url, headers={"Authorization": f"Bearer {token}"}, ssl=trusted) as answer,
    ):
        body = await answer.read()
    if answer.status != 200:
        raise OSError(f"{url} says {answer.status}: may the service account list pods?")
    return {
        _url(pod.status.podIP, port)
        for pod in msgspec.json.decode(body, type=_Pods).items
        if pod.status.podIP
        and pod.metadata.deletionTimestamp is None
        and any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions)
    }
