"""Transports by name: those built in, and what other packages offer.

A package offers one by an entry point in the group ``kvconnect.transports`` whose name is the
transport's and whose value is a `Make`; see docs/transports.md. A built-in name cannot be taken.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Transport

GROUP = "kvconnect.transports"
BUILT_IN = {
    "nixl": "kvconnect.transport.nixl",
    "mooncake": "kvconnect.transport.mooncake.transport",
    "nccl": "kvconnect.transport.nccl.transport",
    "ucx": "kvconnect.transport.ucx.transport",
}

Make = Callable[[Sequence[Region], str, Mapping[str, Any]], Transport]
"""(memory, host that peers reach us at, options) → transport; raises ConfigError."""


def names() -> list[str]:
    """All transports that there are here, whether what they need is installed or not."""
    return sorted({*BUILT_IN, *entry_points(group=GROUP).names})


def make_transport(
    name: str, regions: Sequence[Region], host: str, options: Mapping[str, Any]
) -> Transport:
    """The transport of this name; raises ConfigError if there is none, or it cannot start."""
    if name in BUILT_IN:
        make: Make = importlib.import_module(BUILT_IN[name]).make
        return make(regions, host, options)
    found = {e.name: e for e in entry_points(group=GROUP)}
    if name not in found:
        raise ConfigError(
            f"transport is {name!r}, expected one of {', '.join(names())}; is the package that "
            "brings it installed in this environment?"
        )
    try:
        make = found[name].load()
    except (ImportError, AttributeError) as e:
        raise ConfigError(
            f"transport {name!r} of {found[name].value} cannot be loaded: {e}; reinstall the "
            "package that brings it"
        ) from e
    return make(regions, host, options)
