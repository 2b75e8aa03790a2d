"""Request ids that name two engines, as the routers of vLLM's P2pNcclConnector make them.

``___prefill_addr_{host:port}___decode_addr_{host:port}_{uuid}``, sent as X-Request-Id to both
engines. vLLM puts ``cmpl-`` or ``chatcmpl-`` before it, ``-0`` (which prompt) after it, and for
``n`` answers ``0_`` (which answer) before all, alike in both; and ``-`` and 8 random hex digits
at the end, which differ. The rest is the name under which the two engines know the request.

Ids may be a client's: whatever is in one, it is a `Pairing`, None or an OfferError.
"""

import re
from typing import NamedTuple

from kvconnect.control.wire import Address
from kvconnect.errors import OfferError
from kvconnect.vllm.params import shared_name

MARK = "___prefill_addr_"
_PAIRING = re.compile(
    r"___prefill_addr_(.{1,257}?):([0-9]{1,5})___decode_addr_(.{1,257}?):([0-9]{1,5})_."
)
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:]+):([0-9]{1,5})")


class Pairing(NamedTuple):
    """Where the control channels of both engines' first ranks are, and what is handed over."""

    prefill: Address
    decode: Address
    name: str


def parse_pairing(request_id: str) -> Pairing | None:
    """The engines that an id names; None if it names none. Raises OfferError."""
    if MARK not in request_id:
        return None
    name = shared_name(request_id)
    if (found := _PAIRING.search(name)) is None:
        raise OfferError(f"request id {name[:200]!r} names no prefill and decode engine")
    prefill_host, prefill_port, decode_host, decode_port = found.groups()
    return Pairing(_address(prefill_host, prefill_port), _address(decode_host, decode_port), name)


def parse_address(text: str) -> Address:
    """``host:port`` or ``[host]:port``; raises OfferError."""
    if (found := _ADDRESS.fullmatch(text)) is None:
        raise OfferError(f"{text[:80]!r} is no host:port")
    return _address(*found.groups())


def _address(host: str, port: str) -> Address:
    bare = host.removeprefix("[").removesuffix("]")
    if not 0 < len(bare) <= 255 or not 0 < int(port) <= 65_535:
        raise OfferError(f"{host[:80]}:{port} is no address")
    return Address(bare, int(port))
