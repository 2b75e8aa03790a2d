"""Host memory and disk of one rank, beside plain copies of the same bytes in the same round.

Plain copies: numpy's memcpy of all of it, and one thread's pwrite and pread of whole slots, with
direct I/O where the filesystem has it. No engine runs: jobs go to a runner, as an engine gives
them, and its steps are made here. A plain copy again, beside itself, says what means nothing here.
"""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvconnect.offload.jobs import Fill, Forget, Job, Save, Spill
from kvconnect.offload.store.arena import Written, attach, make
from kvconnect.offload.store.backing import FileBacking, Wrap, anonymous, mapped
from kvconnect.offload.store.disk import DiskStore
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.io_threads import IoThreads, SystemFile
from kvconnect.offload.store.neighbours import claim
from kvconnect.offload.store.runner import BUSY_PAUSE_S, Runner
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, slot_bytes
from kvconnect.offload.store.tiered_store import TieredStore
from kvconnect.ops import load
from kvconnect_bench.caches import Cache, Model
from kvconnect_bench.results import Spread

HEADERS = 100_000
# of a block of 16 tokens: 64 KiB a layer and 2 MiB in all, as of Llama-3.1-8B in bf16
MODEL = Model(layers=32, heads=8, block_tokens=16, content=256)
CHUNK_MB = 2.0
FINGERPRINT = b"\x01" * 32


@dataclass(frozen=True)
class TierRow:
    """One operation, over the rounds."""

    operation: str
    beside: str
    """The plain copy that it is compared with; itself if it is one."""
    mb: int
    chunk_mb: float
    rounds: int
    rate: Spread
    ratio: Spread
    """Its rate divided by the plain copy's in the same round."""
    cpu_ratio: Spread | None
    """The same by CPU time of the thread, which other processes disturb less; only in memory."""


@dataclass(frozen=True)
class Restart:
    """Seconds until all slots of a full arena are found again; the best of the rounds."""

    place: str
    slots: int
    seconds: float


class StoringRank:
    """A rank's store and cache, all of whose blocks fit into memory and on disk."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        block_bytes = MODEL.layers * MODEL.heads * MODEL.block_tokens * MODEL.content
        count = nbytes // (block_bytes * MODEL.itemsize)
        cache = Cache(MODEL, count)
        slot_layout = SlotLayout(cache.shard, 0, 1, load("cpu"))
        spec = ArenaSpec(count, slot_bytes([slot_layout]), FINGERPRINT)
        self.nbytes = count * block_bytes * MODEL.itemsize
        self._cache = cache  # which the slot_layout points into
        self._host = make(spec)
        arena, _ = claim(folder, spec, FileBacking)
        disk = DiskStore(SlotIndex(arena), IoThreads(2, 2 * count))
        vault = TieredStore(HostStore(SlotIndex(self._host), [slot_layout]), disk)
        self._runner = Runner(vault, [slot_layout.block_bytes])
        self._numbers = itertools.count(1)
        self._close_disk = disk.close
        self._keys = [number.to_bytes(32, "big") for number in range(count)]
        self._piece = spec.stride
        self._source = np.ones(count * self._piece, np.uint8)
        self._target = anonymous(count * self._piece).bytes  # in whole pages, for direct I/O
        self._file, self._fd = _plain_file(folder / "plain", self._target)
        self._save()
        self._spill()

    def operations(self) -> dict[str, tuple[str, Callable[[], None], Callable[[], None]]]:
        """What is timed, by name: what it is compared with, what has to be done first, itself."""
        keys = self._keys

        def nothing() -> None:
            """Needs nothing."""

        def copied() -> None:
            np.copyto(self._target, self._source)

        def forget() -> None:
            self._done([Forget(key, False) for key in keys])

        def forget_on_disk() -> None:
            self._done([Forget(key, True) for key in keys])

        pwrite, pread = "pwrite, one thread", "pread, one thread"
        return {
            "memcpy": ("memcpy", nothing, copied),
            "memcpy again": ("memcpy", nothing, copied),
            "save: blocks to memory": ("memcpy", forget, self._save),
            "load: memory to blocks": ("memcpy", nothing, self._fill),
            pwrite: (pwrite, nothing, lambda: self._plainly(self._file.write)),
            "spill: memory to disk": (pwrite, forget_on_disk, self._spill),
            pread: (pread, nothing, lambda: self._plainly(self._file.read)),
            "load: disk to blocks": (pread, forget, self._fill),
        }

    def close(self) -> None:
        """Stop the disk's threads, let go of the memory."""
        self._file.close()
        os.close(self._fd)
        self._close_disk()
        self._host.close()

    def _save(self) -> None:
        self._done([Save(next(self._numbers), k, 0, (n,)) for n, k in enumerate(self._keys)])

    def _fill(self) -> None:
        self._done([Fill(next(self._numbers), k, 0, (n,)) for n, k in enumerate(self._keys)])

    def _spill(self) -> None:
        self._done([Spill(next(self._numbers), key) for key in self._keys])

    def _plainly(self, move: Callable[[memoryview, int], int]) -> None:
        for start in range(0, len(self._target), self._piece):
            move(self._target[start : start + self._piece].data, start)

    def _done(self, jobs: Sequence[Job]) -> None:
        """Give jobs, and make the runner's steps until all that are answered have ended."""
        self._runner.put(jobs)
        open_jobs = sum(not isinstance(job, Forget) for job in jobs)
        while True:
            moved = self._runner.step()
            found = self._runner.take()
            assert not any(one.error for one in found.done) and not found.lost
            open_jobs -= len(found.done)
            if not moved:
                if not open_jobs:
                    return
                time.sleep(BUSY_PAUSE_S)


def _plain_file(path: Path, content: np.ndarray) -> tuple[SystemFile, int]:
    """A file that holds ``content``, with its room reserved; and its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.posix_fallocate(fd, 0, content.nbytes)
    file = SystemFile(fd)
    file.write(content.data, 0)
    return file, fd


def tiers(folder: Path | None, mb: int, rounds: int) -> list[TierRow]:
    """Rates of a rank with ``mb`` MiB of KV; the disk is in ``folder``, or where temporary files
    are."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        rank = StoringRank(place, mb << 20)
        operations = rank.operations()
        seconds: dict[str, list[float]] = {name: [] for name in operations}
        cpu_s: dict[str, list[float]] = {name: [] for name in operations}
        for turn in range(rounds + 1):
            for name, (_, prepare, run) in operations.items():
                prepare()
                started, cpu = time.perf_counter(), time.thread_time()
                run()
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
                    cpu_s[name].append(time.thread_time() - cpu)
        rank.close()
    finally:
        shutil.rmtree(place)
    return [
        _row(
            *(name, beside, rank.nbytes, seconds[name], seconds[beside]),
            _ratio(cpu_s[name], cpu_s[beside], beside) if beside == "memcpy" else None,
        )
        for name, (beside, _, _) in operations.items()
    ]


def restarts(folder: Path | None, rounds: int) -> Iterator[Restart]:
    """Restarts over a full arena of HEADERS slots, in a mapped file and in one that is not."""
    place = Path(tempfile.mkdtemp(dir=folder))
    spec = ArenaSpec(HEADERS, 64, FINGERPRINT)
    wraps: dict[str, Wrap] = {"mapped file": mapped, "file": FileBacking}
    try:
        for name, wrap in wraps.items():
            path = place / name
            arena = attach(spec, path, wrap)
            for slot in range(HEADERS):
                arena.begin(slot)
                arena.commit([Written(slot, slot.to_bytes(32, "big"), 0, 16, 64, slot)])
            arena.close()
            yield Restart(name, HEADERS, min(_found_again(spec, path, wrap, rounds)))
    finally:
        shutil.rmtree(place)


def _found_again(spec: ArenaSpec, path: Path, wrap: Wrap, rounds: int) -> Iterator[float]:
    for _ in range(rounds):
        started = time.perf_counter()
        arena = attach(spec, path, wrap)
        found = len(SlotIndex(arena))
        yield time.perf_counter() - started
        assert found == spec.slots
        arena.close()


def _row(
    name: str,
    beside: str,
    nbytes: int,
    own: list[float],
    plain: list[float],
    cpu_ratio: Spread | None,
) -> TierRow:
    rate = Spread.of("GB/s", [nbytes / 1e9 / one for one in own])
    ratio = _ratio(own, plain, beside)
    assert rate and ratio
    return TierRow(name, beside, nbytes >> 20, CHUNK_MB, len(own), rate, ratio, cpu_ratio)


def _ratio(own: list[float], plain: list[float], beside: str) -> Spread | None:
    return Spread.of(f"of {beside}", [p / o for o, p in zip(own, plain, strict=True)])
