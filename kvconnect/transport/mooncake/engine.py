"""Mooncake's TransferEngine: started as asked or not at all. See `mooncake` for what it does."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvconnect.config import MooncakeOptions
from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region

HANDSHAKE = "P2PHANDSHAKE"  # Mooncake's word for: no metadata server


class Started(NamedTuple):
    """An engine and the names that peers know it by; ``incarnation`` is never used again."""

    engine: Any
    segment: str
    incarnation: str


def start(make: Any, regions: Sequence[Region], host: str, options: MooncakeOptions) -> Started:
    """Start an engine with the class ``make``, that peers reach at ``host``, and register memory.

    Raises ConfigError.
    """
    engine, incarnation = make(), uuid.uuid4().hex
    name = host = f"[{host}]" if ":" in host else host
    if options.metadata_server != HANDSHAKE:
        name = f"{host}-{incarnation}"  # must be nobody else's there
    if options.mooncake_protocol == "rdma" and not _rdma_devices(engine, options.device_name):
        raise ConfigError(
            "mooncake_protocol is rdma, but Mooncake finds no RDMA device "
            f"{options.device_name or 'here'}; is libibverbs' driver for it installed? Without "
            "any, mooncake_protocol is tcp"
        )
    with _steered(options):
        failed = engine.initialize(
            name, options.metadata_server, options.mooncake_protocol, options.device_name
        )
    if failed:
        raise ConfigError(
            f"Mooncake cannot start at {host} with metadata_server "
            f"{options.metadata_server!r}; its log says why. Is the server up?"
        )
    for region in regions:
        if engine.register_memory(region.address, region.nbytes):
            raise ConfigError(
                f"Mooncake cannot register {region.nbytes} bytes of {region.kind} memory; its "
                "log says why. Is the memlock limit (`ulimit -l`) high enough?"
            )
    if options.metadata_server == HANDSHAKE:
        name = f"{host}:{engine.get_rpc_port()}"
    return Started(engine, name, incarnation)


def import_mooncake(host: str = "") -> Any:
    """Mooncake's class of engines, for one reached at ``host``; raises ConfigError."""
    if ":" in host:  # it finds no peer by an IPv6 address unless this is there when it is loaded
        os.environ.setdefault("MC_USE_IPV6", "1")
    try:
        from mooncake.engine import TransferEngine
    except ImportError as e:
        raise ConfigError(
            f"the mooncake transport needs Mooncake, which cannot be imported ({e}); run `pip "
            "install mooncake-transfer-engine` (-non-cuda, -cuda13: other builds), and install "
            "libibverbs1 if that is what is missing"
        ) from e
    return TransferEngine


def _rdma_devices(engine: Any, wanted: str) -> set[str]:
    topology = json.loads(engine.get_local_topology(wanted))  # location → preferred, others
    return {device for lists in topology.values() for devices in lists for device in devices}


@contextlib.contextmanager
def _steered(options: MooncakeOptions) -> Iterator[None]:
    """Mooncake's environment while it starts: whatever the protocol is, it takes RDMA if there
    is a device and TCP if not, without a word; and TCP without its pool opens a connection a span.
    """
    wanted = {"MC_FORCE_TCP": "1"} if options.mooncake_protocol == "tcp" else {}
    wanted["MC_TCP_ENABLE_CONNECTION_POOL"] = "1"
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
