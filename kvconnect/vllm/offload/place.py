"""Opens a rank's place for stored KV: arenas, vault, and the thread that works on them."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvconnect.errors import Reason, StoreError
from kvconnect.tier.config import OffloadConfig
from kvconnect.tier.store.arena import Arena, make
from kvconnect.tier.store.disk import DiskStore
from kvconnect.tier.store.hand import Hand
from kvconnect.tier.store.header import HEAD_BYTES, SLOT, Spec
from kvconnect.tier.store.host import HostStore
from kvconnect.tier.store.lanes import Lanes
from kvconnect.tier.store.neighbours import Neighbours, claim
from kvconnect.tier.store.packing import Packing, slot_bytes
from kvconnect.tier.store.places import Filed, Wrap
from kvconnect.tier.store.runner import Runner
from kvconnect.tier.store.shelf import Shelf
from kvconnect.tier.store.vault import Vault

logger = logging.getLogger("vllm.kvconnect")

SHARED_MEMORY = "/dev/shm/kvconnect-{}"  # noqa: S108 - ours alone: `_own_folder` looks


class Opened(NamedTuple):
    """A rank's place, ready to serve."""

    runner: Runner
    arena: Arena
    host: HostStore
    disk: DiskStore | None
    keys: tuple[list[bytes], list[bytes]]
    """In memory and on disk, from before; empty unless they persist."""

    def close(self) -> None:
        """Stop the thread, let go of memory and files. Idempotent."""
        if not self.runner.close():
            return  # the thread may still write there
        if self.disk:
            self.disk.close()
        if self.host.neighbours:
            self.host.neighbours.close()
        self.arena.close()


def open_place(
    config: OffloadConfig, ranks: int, fingerprint: bytes, packings: Sequence[Packing]
) -> Opened:
    """This rank's share of memory and disk. Without the disk, memory serves alone.

    Raises StoreError if there is no memory.
    """
    nbytes = slot_bytes(packings)
    spec = _spec(config.cpu_bytes_to_use // ranks, nbytes, fingerprint, "cpu_bytes_to_use")
    beside = None
    if config.persist or config.share:
        folder = _memory_folder(config)
        arena, path = claim(folder, spec)
        beside = Neighbours(folder, fingerprint, path) if config.share else None
    else:
        arena = make(spec)
    host = HostStore(Shelf(arena), packings, beside)
    disk = None
    try:
        disk = _open_disk(config, ranks, fingerprint, nbytes)
    except StoreError as e:
        logger.error("kvconnect: KV is kept in memory only, not on disk: %s", e)
    vault = Vault(host, disk)
    hand = Hand(vault)
    keys = hand.found()
    if not config.persist:
        for key in keys[0]:
            vault.forget(key)
        for key in keys[1]:
            vault.forget_on_disk(key)
        keys = [], []

    def counts() -> Counter[str]:
        found = Counter({f"host_{name}": n for name, n in host.counts.items()})
        if disk:
            found.update({f"disk_{name}": n for name, n in disk.counts.items()})
        return found

    runner = Runner(hand, [packing.block_bytes for packing in packings], counts)
    return Opened(runner, arena, host, disk, keys)


def _open_disk(
    config: OffloadConfig, ranks: int, fingerprint: bytes, nbytes: int
) -> DiskStore | None:
    if config.disk_path is None or config.disk_bytes is None:
        return None
    folder, wrap = Path(config.disk_path), _filed
    spec = _spec(config.disk_bytes // ranks, nbytes, fingerprint, "disk_bytes")
    arena, path = claim(folder, spec, wrap)
    beside = Neighbours(folder, fingerprint, path, wrap) if config.share else None
    return DiskStore(Shelf(arena), Lanes(), beside)


_filed: Wrap = Filed


def _spec(room: int, nbytes: int, fingerprint: bytes, option: str) -> Spec:
    """As many slots as fit into ``room`` bytes."""
    one = Spec(1, nbytes, fingerprint)
    slots = (room - HEAD_BYTES - one.table_bytes) // (one.stride + SLOT.itemsize)
    if slots < 1:
        raise StoreError(
            Reason.FULL,
            f"{option} leaves {room} bytes to a rank, where one chunk of KV has {one.stride}; "
            "give more, or a smaller block_size",
        )
    return Spec(slots, nbytes, fingerprint)


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
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise StoreError(Reason.FOREIGN, f"{folder} is not a folder of ours alone; remove it")
    return folder
