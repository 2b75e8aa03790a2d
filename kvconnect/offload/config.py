"""Options of ``KVConnectOffloading``; parsed by `kvconnect.config.parse`.

In-tree names keep their meaning (vLLM ``kv_connector/v1/offloading``, 0.32).
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from kvconnect.config import number_of_bytes
from kvconnect.errors import ConfigError

logger = logging.getLogger(f"vllm.{__name__}")

DISK_TIMES_MEMORY = 4  # what a disk gets for which nobody said how much
Bytes = Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 50)]


class OffloadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the offloading connector."""

    inert: ClassVar[Mapping[str, str]] = {
        "spec_name": "there is one kind of host memory here",
        "spec_module_path": "there is one kind of host memory here",
        "lazy_offload": "KV is saved as soon as it is computed",
        "self_describing_kv_events": "KV events always say what tokens they are of",
        "canonical_layout": "KV is kept as the ranks that stored it have it",
        "sync_load_budget_bytes": "no load holds up a step",
        "max_tracker_size": "what store_threshold counts has a bound of its own",
        "cache_policy_module_path": "eviction_policy names one that is here",
        "backpressure": "a disk that is behind gets no more until its queue has room",
        "tier_poll_interval_s": "a thread of its own watches the disk",
    }

    cpu_bytes_to_use: Bytes
    """Host memory for KV, in bytes, over all ranks together."""
    block_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None = None
    """Tokens that are stored and loaded together; a multiple of the engine's block size, which is
    the default."""
    blocks_per_chunk: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | None = None
    """``block_size`` in blocks of the engine."""
    offload_prompt_only: bool = False
    """Store what was prefilled, and not what was generated after it. (In-tree: true by default.)"""
    eviction_policy: Literal["lru", "arc", "s3fifo"] = "lru"
    """What goes when there is no room. ``s3fifo`` was cut: ``arc`` keeps as much."""
    store_threshold: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """How many requests must have had a chunk before it is stored; 0 and 1: the first one."""
    disk_path: str | None = None
    """Folder for a disk tier: it takes what host memory stored or evicted."""
    disk_bytes: Bytes | None = None
    """Room on disk, over all ranks together; reserved at the start."""
    write_policy: Literal["write-through", "write-back"] = "write-through"
    """Whether disk gets what is stored in memory, or what is evicted from it."""
    persist: bool = False
    """Find KV again after a restart, or a crash; host memory is a file in ``memory_path`` then."""
    share: bool = False
    """Read what other engines of the same model and shape have stored in the same folders."""
    model_id: str | None = None
    """Name of the weights, where they cannot be known by their files: KV of one name is one's."""
    memory_path: str | None = None
    """Folder for host memory that persists or is shared; by default one in /dev/shm."""
    remove_after_days: Annotated[float, msgspec.Meta(ge=0, le=36_500)] = 7
    """Days after which files of other configurations, which no engine has open, are removed from
    the folders for memory and disk; 0: never."""

    def __post_init__(self) -> None:
        if self.block_size is not None and self.blocks_per_chunk is not None:
            raise ValueError("block_size and blocks_per_chunk say the same thing: give one of them")
        if self.eviction_policy == "s3fifo":
            raise ValueError("eviction_policy is 's3fifo', which was cut; use 'arc' in its place")
        if (self.disk_path is None) != (self.disk_bytes is None):
            raise ValueError("disk_path and disk_bytes belong together: give both, or none")
        if self.memory_path is not None and not (self.persist or self.share):
            raise ValueError("memory_path is given, but neither persist nor share, which it is for")

    @classmethod
    def translated(cls, options: Mapping[str, Any], connector: str) -> dict[str, Any]:
        """In-tree's ``secondary_tiers``: the first of files becomes ours, with its ``root_dir``.
        ExampleConnector's ``shared_storage_path``: the folder of a disk that is shared and kept.
        """
        ours = dict(options)
        if (shared := ours.pop("shared_storage_path", None)) is not None:
            kept = {"cpu_bytes_to_use": 1 << 30, "persist": True, "share": True}
            others = ours.get("secondary_tiers") or []
            first = {"type": "fs", "root_dir": shared}
            ours = kept | ours | {"secondary_tiers": [first, *others]}
            logger.warning(
                "%s: shared_storage_path is disk_path here, with persist, share and, unless given, "
                "a cpu_bytes_to_use of 1 GiB; what ExampleConnector stored there is not read",
                connector,
            )
        tiers = ours.pop("secondary_tiers", None) or ()
        if not isinstance(tiers, list | tuple) or not all(isinstance(t, Mapping) for t in tiers):
            raise ConfigError(
                f"{connector}: secondary_tiers is {tiers!r}, expected a list of tiers"
            )
        for tier in tiers:
            kind, folder = tier.get("type"), tier.get("root_dir")
            if kind != "fs" or not isinstance(folder, str) or "disk_path" in ours:
                logger.warning(
                    "%s: the secondary tier of type %r has no effect: there is one, of files, with "
                    "a root_dir (here disk_path and disk_bytes)",
                    connector,
                    kind,
                )
                continue
            ours["disk_path"] = folder
            memory = number_of_bytes(ours.get("cpu_bytes_to_use"))
            if "disk_bytes" not in ours and isinstance(memory, int):
                ours["disk_bytes"] = DISK_TIMES_MEMORY * memory
                logger.warning(
                    "%s: the secondary tier in %s may have %d times what memory has, reserved at "
                    "the start; disk_bytes says otherwise",
                    connector,
                    folder,
                    DISK_TIMES_MEMORY,
                )
        return ours
