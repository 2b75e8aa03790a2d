"""Mooncake's TransferEngine: started as asked or not at all. See `mooncake` for what it does."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region

HANDSHAKE = "P2PHANDSHAKE"  # Mooncake's word for: no metadata server


class MooncakeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to start the engine. ``host`` must be reachable for peers."""

    host: str = "127.0.0.1"
    protocol: Literal["tcp", "rdma"] = "tcp"
    device_name: str = ""
    """RDMA devices to use, with commas between; all if empty."""
    metadata_server: str = HANDSHAKE
    """Or ``etcd://host:port``, ``http://host:port/metadata``: where engines find each other."""


class Started(NamedTuple):
    """An engine and the names that peers know it by; ``incarnation`` is never used again."""

    engine: Any
    segment: str
    incarnation: str


def start(make: Any, regions: Sequence[Region], options: MooncakeOptions) -> Started:
    """Start an engine with the class ``make`` and register memory; raises ConfigError."""
    engine, incarnation = make(), uuid.uuid4().hex
    name = options.host
    if options.metadata_server != HANDSHAKE:
        name = f"{options.host}-{incarnation}"  # must be nobody else's there
    if options.protocol == "rdma" and not _rdma_devices(engine, options.device_name):
        raise ConfigError(
            f"protocol is rdma, but Mooncake finds no RDMA device {options.device_name or 'here'}; "
            "is libibverbs' driver for it installed? For none, protocol is tcp"
        )
    with _steered(options):
        failed = engine.initialize(
            name, options.metadata_server, options.protocol, options.device_name
        )
    if failed:
        raise ConfigError(
            f"Mooncake cannot start at {options.host} with metadata_server "
            f"{options.metadata_server!r}; its log says why. Is the server up?"
        )
    for region in regions:
        if engine.register_memory(region.address, region.nbytes):
            raise ConfigError(
                f"Mooncake cannot register {region.nbytes} bytes of {region.kind} memory; its "
                "log says why. Is the memlock limit (`ulimit -l`) high enough?"
            )
    if options.metadata_server == HANDSHAKE:
        name = f"{options.host}:{engine.get_rpc_port()}"
    return Started(engine, name, incarnation)


def import_mooncake() -> Any:
    """Mooncake's class of engines; raises ConfigError."""
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
    """Mooncake's environment while it starts: whatever ``protocol`` says, it takes RDMA if there
    is a device and TCP if not, without a word; and TCP without its pool opens a connection a span.
    """
    wanted = {"MC_FORCE_TCP": "1"} if options.protocol == "tcp" else {}
    wanted["MC_TCP_ENABLE_CONNECTION_POOL"] = "1"
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            del os.environ[name]
