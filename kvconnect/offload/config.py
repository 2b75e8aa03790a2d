"""Options of ``KVConnectOffloading``; parsed by `kvconnect.config.parse`.

In-tree names keep their meaning (vLLM ``kv_connector/v1/offloading``, 0.32).
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec

Bytes = Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 50)]


class OffloadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the offloading connector."""

    inert: ClassVar[Mapping[str, str]] = {
        "spec_name": "there is one kind of host memory here",
        "lazy_offload": "KV is saved as soon as it is computed",
    }

    cpu_bytes_to_use: Bytes
    """Host memory for KV, in bytes, over all ranks together."""
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    """Tokens that are stored and loaded together; a multiple of the engine's block size, which is
    the default."""
    eviction_policy: Literal["lru", "arc", "s3fifo"] = "lru"
    """What goes when there is no room."""
    store_threshold: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """How many requests must have had a chunk before it is stored; 0 and 1: the first one."""
    disk_path: str | None = None
    """Folder for a disk tier behind host memory."""
    disk_bytes: Bytes | None = None
    """Room on disk, over all ranks together; reserved at the start."""
    write_policy: Literal["write-through", "write-back"] = "write-through"
    """Whether disk gets what is stored in memory, or what is evicted from it."""
    persist: bool = False
    """Find KV again after a restart, or a crash; host memory is a file in ``memory_path`` then."""
    share: bool = False
    """Read what other engines of the same model and shape have stored in the same folders."""
    memory_path: str | None = None
    """Folder for host memory that persists or is shared; by default one in /dev/shm."""

    def __post_init__(self) -> None:
        if (self.disk_path is None) != (self.disk_bytes is None):
            raise ValueError("disk_path and disk_bytes belong together: give both, or none")
        if self.memory_path is not None and not (self.persist or self.share):
            raise ValueError("memory_path is given, but neither persist nor share, which it is for")
