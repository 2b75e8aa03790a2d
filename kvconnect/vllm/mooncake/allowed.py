"""Which bootstrap endpoints may be asked: their addresses come from clients.

Names are resolved first and what they resolve to is checked, and nothing else is connected to.
"""

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from kvconnect.errors import ConfigError, OfferError

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_URL_CHARS = 300
OPTION = "allowed_bootstrap_addresses"


class Endpoint(NamedTuple):
    """Where one listens."""

    host: str
    port: int


def parse_endpoint(url: object) -> Endpoint:
    """The endpoint in ``http://host[:port]``; raises OfferError for anything else."""
    if not isinstance(url, str) or len(url) > MAX_URL_CHARS or not url.isascii():
        raise OfferError("remote_bootstrap_addr is no URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise OfferError(f"remote_bootstrap_addr is {url!r}: {e}") from e
    plain = parts.scheme == "http" and parts.path in ("", "/") and "@" not in parts.netloc
    named = bool(host) and all(c.isalnum() or c in ".-_:" for c in host or "")
    if not plain or not named or parts.query or parts.fragment or port == 0:
        raise OfferError(f"remote_bootstrap_addr is {url!r}, expected http://host:port")
    assert host is not None
    return Endpoint(host, 80 if port is None else port)


class Allowed:
    """``entries``: host names, addresses and networks; None: see `_is_near`."""

    def __init__(self, entries: Sequence[str] | None) -> None:
        self._any_near = entries is None
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in entries or ():
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError as e:
                if not entry or not all(c.isalnum() or c in ".-_" for c in entry):
                    raise ConfigError(
                        f"{OPTION} holds {entry!r}, expected a host name, an address or a "
                        "network like 10.0.0.0/8, without scheme and port"
                    ) from e
                self._names.add(entry.lower())

    def permits(self, host: str, resolved: str) -> bool:
        """Whether to connect to ``resolved``, an address of ``host``."""
        try:
            address: IP = ipaddress.ip_address(resolved)
        except ValueError:  # with a zone, for one
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        if self._any_near:
            return _is_near(address)
        return host.lower() in self._names or any(address in n for n in self._networks)


def _is_near(address: IP) -> bool:
    """Whether it is this host or in a private network: never the Internet, and never link-local,
    where clouds keep the credentials of their machines."""
    apart = address.is_link_local or address.is_multicast or address.is_unspecified
    return not (address.is_global or apart or (address.version == 4 and address.is_reserved))
