"""Where this engine stands in its data-parallel group, and which bootstrap endpoint is its own.

As in-tree ``should_launch_bootstrap_server`` and ``get_mooncake_bootstrap_addr`` have it: one
endpoint per group, served by its first engine, on ``VLLM_MOONCAKE_BOOTSTRAP_PORT``.
"""

import os
from typing import Any, NamedTuple

from kvconnect.errors import ConfigError
from kvconnect.vllm.mooncake.allowed import Endpoint
from kvconnect.vllm.mooncake.directory import Sizes

PORT, DEFAULT_PORT = "VLLM_MOONCAKE_BOOTSTRAP_PORT", "8998"  # as in vllm.envs


class Place(NamedTuple):
    """See the module."""

    dp_rank: int
    sizes: Sizes
    registers_at: Endpoint | None
    """None: this engine serves the endpoint itself."""
    port: int
    in_group: bool = False
    """Whether other engines register at the endpoint of this one."""


def place_of(parallel: Any, server_address: str | None) -> Place:
    """From vLLM's parallel config and the option; raises ConfigError."""
    local = bool(getattr(parallel, "local_engines_only", False))  # each node for itself
    dp_rank = (parallel.data_parallel_rank_local if local else parallel.data_parallel_index) or 0
    sizes = Sizes(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    port = _port()
    if server_address is not None:
        return Place(dp_rank, sizes, _endpoint(server_address), port)
    if dp_rank == 0:
        return Place(dp_rank, sizes, None, port, getattr(parallel, "data_parallel_size", 1) > 1)
    if port == 0:
        raise ConfigError(f"{PORT} is 0, but the engines of a data-parallel group must know it")
    host = "127.0.0.1" if local else parallel.data_parallel_master_ip
    return Place(dp_rank, sizes, Endpoint(host, port), port)


def _port() -> int:
    port = os.environ.get(PORT, DEFAULT_PORT)
    if not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"{PORT} is {port!r}, expected a port number, or 0 for a free one")
    return int(port)


def _endpoint(address: str) -> Endpoint:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise ConfigError(f"bootstrap_server_address is {address!r}, expected host:port")
    return Endpoint(host.removeprefix("[").removesuffix("]"), int(port))
