"""Opens a rank's store: its arenas, the stores over them, and the thread that works on them."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Union

from kvconnect.errors import Reason, StoreError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.store.arena import Arena, make
from kvconnect.offload.store.backing import FileBacking, Wrap, mapped
from kvconnect.offload.store.header import HEAD_BYTES, SLOT, ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.limits import memory_room
from kvconnect.offload.store.neighbours import Neighbours, claim, other_paths
from kvconnect.offload.store.numa import Nodes
from kvconnect.offload.store.runner import Runner
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, slot_bytes
from kvconnect.offload.store.tiered_store import TieredStore

if TYPE_CHECKING:  # each is loaded where an option, or the device, asks for it
    from kvconnect.offload.store.disk import DiskStore
    from kvconnect.offload.store.pinning import Pinning

logger = logging.getLogger(f"vllm.{__name__}")

PASSING_SLOTS = 8  # for what is on neighbours' disks alone; the scheduler has the others
SHARED_MEMORY = "/dev/shm/kvconnect-{}"  # noqa: S108 - ours alone: `_own_folder` looks


Pin = Callable[[Arena, bool], Union["Pinning", None]]
"""(memory, ours to write?) → what pins it, which was started; raises StoreError."""


def no_device(_memory: Arena, _to_write: bool) -> None:
    """`Pin` of engines on CPUs."""


class Closes(Protocol):
    """Whatever holds memory or files."""

    def close(self) -> None:
        """Idempotent."""


class LeaderInfo(NamedTuple):
    """What replicas must know of the rank that stores for them."""

    path: str
    identity: bytes
    slots: int
    disk_slots: int
    keys: tuple[list[bytes], list[bytes]]


class OpenStore(NamedTuple):
    """A rank's store, ready to serve."""

    runner: Runner
    memory: Arena
    """What is loaded from: this rank's, or its leader's."""
    stores: bool
    """Whether it is this rank's."""
    lead: LeaderInfo
    """What it can hold, and held from before."""
    parts: tuple[Closes, ...]
    """To be closed in this order, after the thread has stopped."""
    pinning: "Pinning | None" = None
    """What makes its memory known to the device, piece by piece."""

    def engine_runs(self) -> None:
        """The engine's first step begins: nothing captures graphs any more."""
        if self.pinning is not None:
            self.pinning.go_on()

    def close(self) -> None:
        """Stop the thread, let go of memory and files. Idempotent."""
        if self.runner.close():  # else the thread may still write there
            for part in self.parts:
                part.close()


def open_store(
    config: OffloadConfig,
    copies: int,
    fingerprint: bytes,
    slot_layouts: Sequence[SlotLayout],
    pin: Pin = no_device,
    nodes: Nodes = (),
    followed: bool = False,
) -> OpenStore:
    """This rank's share of memory and disk. Without the disk, memory serves alone.

    ``copies``: how many ranks have one each; ``nodes``: near to this one; ``followed``: whether
    others read this one's. Raises StoreError if there is no memory.
    """
    nbytes = slot_bytes(slot_layouts)
    spec = _spec(config.cpu_bytes_to_use // copies, nbytes, fingerprint, "cpu_bytes_to_use")
    if config.memory_path is None:
        _check_memory(spec.nbytes)
    neighbours = None
    if config.persist or config.share:
        folder = _memory_folder(config)
        arena, path = claim(folder, spec, functools.partial(mapped, nodes=nodes))
        neighbours = _neighbours(config, folder, fingerprint, path, mapped)
    else:
        arena = make(spec, followed, nodes)
    try:
        pinning = pin(arena, True)
    except StoreError:
        arena.close()
        raise
    host = HostStore(SlotIndex(arena, _ready(arena, pinning)), slot_layouts, neighbours)
    disk = None
    try:
        disk = _open_disk(config, copies, fingerprint, nbytes)
    except StoreError as e:
        if e.reason is not Reason.FULL:  # a folder that cannot be used is the operator's error
            host.index.arena.close()
            raise
        logger.error("kvconnect: KV is kept in memory only, not on disk: %s", e)
    tiers = TieredStore(host, disk)
    keys = tiers.keys(on_disk=False), tiers.keys(on_disk=True)
    if not config.persist:
        for key in keys[0]:
            tiers.forget(key)
        for key in keys[1]:
            tiers.forget_on_disk(key)
        keys = [], []

    def counts() -> Counter[str]:
        stores = [store for store in (host, disk) if store]
        seen = [store.neighbours for store in stores if store.neighbours]
        return sum((one.counts for one in [*stores, *seen]), Counter())

    runner = Runner(tiers, [slot_layout.block_bytes for slot_layout in slot_layouts], counts)
    disk_slots = disk.index.arena.spec.slots if disk else 0
    passing = min(PASSING_SLOTS, spec.slots // 2) if config.share and disk else 0
    lead = LeaderInfo(str(arena.path), arena.identity, spec.slots - passing, disk_slots, keys)
    parts = [part for part in (disk, neighbours, pinning, arena) if part is not None]
    return OpenStore(runner, arena, True, lead, tuple(parts), pinning)


def open_replica(
    config: OffloadConfig,
    lead: LeaderInfo,
    fingerprint: bytes,
    slot_layouts: Sequence[SlotLayout],
    pin: Pin = no_device,
) -> OpenStore:
    """A store that loads what another rank of this host stores; raises StoreError."""
    from kvconnect.offload.store.replica import ReplicaReader

    paths = [Path(lead.path)]
    if config.share:  # the leader's own file is among them
        paths = other_paths(_memory_folder(config), fingerprint, None)
    neighbours = Neighbours(paths, fingerprint)
    neighbours.refresh()
    memory = neighbours.arena_of(lead.identity)
    if memory is None:
        neighbours.close()
        raise StoreError(Reason.FOREIGN, f"{lead.path} is not there, or another arena")
    try:
        pinning = pin(memory, False)
    except StoreError:
        neighbours.close()
        raise
    replica = ReplicaReader(neighbours, slot_layouts, lead.keys, ready=_ready(memory, pinning))

    def counts() -> Counter[str]:
        return replica.host.counts + neighbours.counts

    each = [slot_layout.block_bytes for slot_layout in slot_layouts]
    runner = Runner(replica, each, counts)
    parts = (replica,) if pinning is None else (pinning, replica)
    return OpenStore(runner, memory, False, lead, parts, pinning)


def _ready(arena: Arena, pinning: "Pinning | None") -> Callable[[], int] | None:
    """How many of its slots the device can use by now; None: all."""
    if pinning is None:
        return None
    return lambda: (pinning.ready - arena.spec.payload_offset) // arena.spec.stride


def _open_disk(
    config: OffloadConfig, copies: int, fingerprint: bytes, nbytes: int
) -> "DiskStore | None":
    if config.disk_path is None or config.disk_bytes is None:
        return None
    from kvconnect.offload.store.disk import DiskStore
    from kvconnect.offload.store.io_threads import IoThreads

    folder, wrap = Path(config.disk_path), _filed
    spec = _spec(config.disk_bytes // copies, nbytes, fingerprint, "disk_bytes")
    arena, path = claim(folder, spec, wrap)
    return DiskStore(
        SlotIndex(arena), IoThreads(), _neighbours(config, folder, fingerprint, path, wrap)
    )


def _neighbours(
    config: OffloadConfig, folder: Path, fingerprint: bytes, own: Path, wrap: Wrap
) -> Neighbours | None:
    if not config.share:
        return None
    return Neighbours(other_paths(folder, fingerprint, own), fingerprint, wrap)


_filed: Wrap = FileBacking


def _spec(room: int, nbytes: int, fingerprint: bytes, option: str) -> ArenaSpec:
    """As many slots as fit into ``room`` bytes."""
    one = ArenaSpec(1, nbytes, fingerprint)
    slots = (room - HEAD_BYTES - one.table_bytes) // (one.stride + SLOT.itemsize)
    if slots < 1:
        raise StoreError(
            Reason.FULL,
            f"{option} leaves {room} bytes to a rank, where one chunk of KV has {one.stride}; "
            "give more, or a smaller block_size",
        )
    return ArenaSpec(slots, nbytes, fingerprint)


def _check_memory(nbytes: int) -> None:
    """More than there is would end this process, or others, when it is touched."""
    room = memory_room()
    if nbytes > room.nbytes:
        raise StoreError(
            Reason.FULL,
            f"cpu_bytes_to_use is {nbytes} bytes on this rank, more than {room.source}, "
            f"{room.nbytes} bytes; give less",
        )


def remove_unused_arenas(config: OffloadConfig) -> None:
    """From the folders of memory and disk, once all ranks have opened theirs."""
    from kvconnect.offload.store.unused import remove_unused

    if config.persist or config.share:
        remove_unused(_memory_folder(config), config.remove_after_days)
    if config.disk_path is not None:
        remove_unused(Path(config.disk_path), config.remove_after_days)


def _memory_folder(config: OffloadConfig) -> Path:
    if config.memory_path is not None:
        return Path(config.memory_path)
    folder = Path(SHARED_MEMORY.format(os.getuid()))
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as e:
        raise StoreError(Reason.FAILED, f"{folder}: {e.strerror}") from e
    # anybody may make a folder there: what is not ours alone could be read or forged
    if found.st_uid != os.getuid() or found.st_mode & 0o077:  # a link has mode 0777
        raise StoreError(Reason.FOREIGN, f"{folder} is not a folder of ours alone; remove it")
    return folder
