"""Options of ``KVConnectP2pNccl``: its own, and those of vLLM's P2pNcclConnector.

docs/p2p.md says key by key what the old ones mean here. Numbers may be text, as they were in every
example: ``"proxy_port": "30001"``, ``"kv_buffer_size": "8e9"``.
"""

import logging
import math
from typing import Any, ClassVar, Literal

from msgspec.structs import force_setattr

from kvconnect.config import PeerConfig
from kvconnect.errors import ConfigError, OfferError
from kvconnect.vllm.p2p.ids import parse_address

logger = logging.getLogger(f"vllm.{__name__}")

GIB = 1 << 30
LEAST_STAGING_BYTES = 1 << 20

Number = int | float | str


class P2pNcclConfig(PeerConfig, frozen=True, kw_only=True):
    """Options of ``KVConnectP2pNccl``."""

    at_kv_port: ClassVar[bool] = True

    backend: Literal["auto", "nccl", "ucx"] = "auto"
    """What carries KV: NCCL between GPUs, or UCX. ``auto``: NCCL where it can be had."""
    proxy_ip: str = ""
    """Host of a router that is to be told of this engine; none if empty."""
    proxy_port: Number = ""
    """Port of that router's service discovery; none if empty."""
    http_port: Number | None = None
    """Port of this engine's API server, for that router."""
    prefill_address: str = ""
    """``host:port`` of the one prefill engine, its kv_port, on both engines of a pair: for a router
    that sends both the same X-Request-Id and nothing else."""
    send_type: Literal["PUT", "PUT_ASYNC", "GET"] = "PUT_ASYNC"
    """Accepted; all three hand over alike: decode asks, prefill does not wait."""
    nccl_num_channels: Number = 8
    """CTAs (thread blocks) that a transfer by NCCL may take on a GPU."""
    mem_pool_size_gb: Number | None = None
    """GiB of memory that KV on its way may take: ``staging_bytes`` is no more."""
    kv_buffer_size: Number | None = None
    """``mem_pool_size_gb`` in bytes. Less than 1 MiB (``1e1`` in vLLM's examples) is ignored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.proxy_ip) and self.proxy_port != "":
            _set_port(self, "proxy_port")
            if self.http_port is None:
                raise ValueError(
                    "proxy_ip and proxy_port are given without http_port, the port that this "
                    'engine\'s API server listens on: `--port 8000` goes with "http_port": 8000'
                )
            _set_port(self, "http_port")
        if self.prefill_address:
            try:
                parse_address(self.prefill_address)
            except OfferError as e:
                raise ValueError(f"prefill_address is no address ({e}), expected host:port") from e
        force_setattr(
            self, "nccl_num_channels", _whole("nccl_num_channels", self.nccl_num_channels)
        )
        limits = [
            _number("mem_pool_size_gb", self.mem_pool_size_gb) * GIB,
            _number("kv_buffer_size", self.kv_buffer_size),
        ]
        most = min([self.staging_bytes, *(b for b in limits if b >= LEAST_STAGING_BYTES)])
        force_setattr(self, "staging_bytes", int(most))

    @property
    def proxy(self) -> str:
        """``host:port`` of the router to be told of this engine; "": none."""
        if not self.proxy_ip or self.proxy_port == "":
            return ""
        host = f"[{self.proxy_ip}]" if ":" in self.proxy_ip else self.proxy_ip
        return f"{host}:{self.proxy_port}"

    def chosen_transport(self, device: str) -> tuple[str, dict[str, Any]]:
        if self.transport is not None:
            return super().chosen_transport(device)
        nccl = "nccl", {"nccl_num_channels": self.nccl_num_channels}
        if self.backend == "nccl":
            return nccl
        return nccl if self.backend == "auto" and _has_nccl(device) else ("ucx", {})


def _has_nccl(device: str) -> bool:
    if device != "cuda":
        return False
    from kvconnect.transport.nccl import library as nccl_library

    try:
        nccl_library.find()
    except ConfigError as e:
        logger.warning("NCCL cannot be used, UCX is tried: %s", e)
        return False
    return True


def _number(name: str, value: Number | None) -> float:
    """0 for None; raises ValueError."""
    try:
        number = float(value or 0)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number")
    return number


def _whole(name: str, value: Number | None, largest: int = 64) -> int:
    number = _number(name, value)
    if number != int(number) or not 1 <= number <= largest:
        raise ValueError(f"{name} is {value!r}, expected a number from 1 to {largest}")
    return int(number)


def _set_port(config: P2pNcclConfig, name: str) -> None:
    force_setattr(config, name, _whole(name, getattr(config, name), 65_535))
