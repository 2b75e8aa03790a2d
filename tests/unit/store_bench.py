"""A store over a real cache, folder and disk threads, as tests want one."""

import time

import numpy as np
from faulty_file import FaultyFile

from kvconnect.offload.store.backing import FileBacking, mapped
from kvconnect.offload.store.disk import DiskStore, system_file
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.io_threads import IoThreads
from kvconnect.offload.store.neighbours import Neighbours, claim, other_paths
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, slot_bytes
from kvconnect.offload.store.tiered_store import TieredStore
from kvconnect.ops import load
from kvconnect_bench.caches import Cache, Model

FINGERPRINT = b"\x05" * 32
MODEL = Model(layers=2, heads=2, block_tokens=4, content=32)
CHUNK, BLOCKS = 2, 24


def key_of(seed):
    return seed.to_bytes(32, "big")


def neighbours_of(folder, path, wrap):
    return Neighbours(other_paths(folder, FINGERPRINT, path), FINGERPRINT, wrap)


class Bench:
    """One rank: ``store`` over ``cache``; its arenas are in two folders of ``folder``."""

    def __init__(
        self,
        folder,
        slots=4,
        disk_slots=8,
        layout="LBHNC",
        faulty=True,
        share=False,
        most_jobs=8,
        model=MODEL,
        kernels=None,
        cache=None,
    ):
        self.cache = cache or Cache(model, BLOCKS, layout)
        self.slot_layout = SlotLayout(self.cache.shard, 0, CHUNK, kernels or load("cpu"))
        nbytes = slot_bytes([self.slot_layout])
        host, path = claim(folder / "host", ArenaSpec(slots, nbytes, FINGERPRINT))
        beside = neighbours_of(folder / "host", path, mapped) if share else None
        self.host = HostStore(SlotIndex(host), [self.slot_layout], beside)
        self.neighbours = [beside] if share else []
        self.disk = None
        self.now = 0.0
        self.files = []
        """Of our own arena on disk, and then of neighbours', as they were opened."""
        self.open_error = None
        """Raised by whoever opens a file."""
        if disk_slots:
            spec = ArenaSpec(disk_slots, nbytes, FINGERPRINT)
            disk, path = claim(folder / "disk", spec, FileBacking)
            beside = neighbours_of(folder / "disk", path, FileBacking) if share else None
            self.neighbours += [beside] if share else []
            threads = IoThreads(2, most_jobs, self.clock)
            self.disk = DiskStore(SlotIndex(disk), threads, beside, self.open_file)
        self.store = TieredStore(self.host, self.disk, self.clock)
        self.tickets = 0

    def clock(self):
        return self.now

    def open_file(self, arena):
        if self.open_error is not None:
            raise self.open_error
        self.files.append(FaultyFile(system_file(arena)))
        return self.files[-1]

    @property
    def file(self):
        """Of our own arena on disk."""
        return self.files[0] if self.files else None

    def ticket(self):
        self.tickets += 1
        return self.tickets

    def until_held(self, count, after=0):
        """Wait for so many operations to be held, once others have ended."""
        deadline = time.monotonic() + 60
        while (self.file.operations, self.file.held) != (after, count):
            assert time.monotonic() < deadline, "threads of the disk take nothing"
            time.sleep(0.0005)

    def settle(self):
        """All that ends now: ticket → error."""
        found = {}
        for _ in range(10_000):
            found |= {ended.id: ended.error for ended in self.store.poll()}
            if not self.store.busy:
                return found
            time.sleep(0.0005)  # threads of the disk
        raise AssertionError("it does not end")

    def save(self, seed, blocks=(0, 1)):
        """Whether KV of ``seed`` is held afterwards."""
        self.cache.fill(blocks, seed)
        ticket = self.ticket()
        return self.store.save(ticket, key_of(seed), 0, blocks) and not self.settle()[ticket]

    def spill(self, seed):
        ticket = self.ticket()
        return self.store.spill(ticket, key_of(seed)) and not self.settle()[ticket]

    def load(self, seed, blocks=(10, 11)):
        """Whether it was loaded; wrong content is an error."""
        self.cache.fill([b for b in blocks if b >= 0], 999)
        ticket = self.ticket()
        if not self.store.load(ticket, key_of(seed), 0, blocks):
            return False
        if self.settle()[ticket]:
            return False
        assert self.holds(seed, blocks), f"{seed}: wrong KV"
        return True

    def holds(self, seed, blocks):
        return self.cache.holds_fill([(i, b) for i, b in enumerate(blocks) if b >= 0], seed)

    def flip(self, arena, seed, at=0):
        """Damage the payload of ``seed``, in memory or on disk."""
        index = (self.disk if isinstance(arena.backing, FileBacking) else self.host).index
        entry = index.use(key_of(seed))
        index.done(entry)
        if isinstance(arena.backing, FileBacking):
            file = system_file(arena)
            page = np.zeros(4096, np.uint8)
            place = arena.offset(entry.slot) + at // 4096 * 4096
            file.read(page.data, place)
            page[at % 4096] ^= 1
            file.write(page.data, place)
            file.close()
        else:
            arena.payload(entry.slot)[at] ^= 1

    def close(self):
        if self.disk:
            if self.file:
                self.file.let_go()
            self.disk.close()
        for neighbours in self.neighbours:
            neighbours.close()
        self.host.index.arena.close()
