"""Host memory and disk of the offloading tier, beside plain copies of the same bytes in one run.

    python benchmarks/stores.py [--json results.json] [--folder DIR] [--mb 256]

``share``: of the rate of the plain copy beside it (numpy's memcpy, or one thread's pwrite and
pread of whole slots with direct I/O). Headers: seconds for a table of 100,000 slots.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kvconnect.ops import load
from kvconnect.testing.geometry import Cache, Model
from kvconnect.tier.store.arena import attach
from kvconnect.tier.store.disk import DiskStore
from kvconnect.tier.store.header import Spec
from kvconnect.tier.store.host import HostStore
from kvconnect.tier.store.lanes import Lanes, SystemFile
from kvconnect.tier.store.neighbours import claim
from kvconnect.tier.store.packing import Packing, slot_bytes
from kvconnect.tier.store.places import Filed, Wrap, mapped
from kvconnect.tier.store.shelf import Shelf
from kvconnect.tier.store.vault import Vault

SLOTS = 100_000
TRIES = 3
# of a block of 16 tokens: 64 KiB a layer, as of Llama-3.1-8B
MODEL = Model(layers=8, heads=8, block_tokens=16, content=256)
PRINT = b"\x01" * 32


@dataclass(frozen=True)
class Row:
    """One operation; the best of TRIES."""

    what: str
    seconds: float
    gb: float = 0.0
    gb_per_s: float = 0.0
    share: float = 0.0


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of TRIES."""
    spent = []
    for _ in range(TRIES):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


def moved(what: str, seconds: float, nbytes: int, beside: float = 0.0) -> Row:
    """A row; ``beside``: seconds of the plain copy."""
    return Row(what, seconds, nbytes / 1e9, nbytes / 1e9 / seconds, beside / seconds)


def again(path: Path, wrap: Wrap) -> None:
    """As an engine does that starts."""
    arena = attach(Spec(SLOTS, 64, PRINT), path, wrap)
    assert len(Shelf(arena)) == SLOTS
    arena.close()


def headers(folder: Path) -> Iterator[Row]:
    """Of an arena that is full."""
    path = folder / "headers"
    wraps: dict[str, Wrap] = {"mapped": mapped, "file": Filed}
    for name, wrap in wraps.items():
        arena = attach(Spec(SLOTS, 64, PRINT), path, wrap)
        for slot in range(SLOTS):
            arena.begin(slot)
            arena.commit(slot, slot.to_bytes(32, "big"), 0, 16, 64, slot)
        arena.close()

        yield Row(f"find {SLOTS} slots again, {name}", best(partial(again, path, wrap)))
        path.unlink()


def stores(folder: Path, nbytes: int) -> Iterator[Row]:
    """Of a cache of about ``nbytes``."""
    block_bytes = MODEL.layers * MODEL.heads * MODEL.block_tokens * MODEL.content * MODEL.itemsize
    count = nbytes // block_bytes
    cache = Cache(MODEL, count)
    packing = Packing(cache.shard, 0, 1, load("cpu"))
    spec = Spec(count, slot_bytes([packing]), PRINT)
    host, _ = claim(folder, spec)
    disk, _ = claim(folder / "disk", spec, Filed)
    vault = Vault(HostStore(Shelf(host), [packing]), DiskStore(Shelf(disk), Lanes(2, 2 * count)))
    keys = [number.to_bytes(32, "big") for number in range(count)]
    total = count * block_bytes

    def settle() -> None:
        while True:
            assert not any(ended.error for ended in vault.poll())
            if not vault.busy:
                return
            time.sleep(0.0002)  # leave the interpreter to the disk's threads

    def save() -> None:
        for key in keys:
            vault.forget(key)
        for number, key in enumerate(keys):
            assert vault.save(number, key, 0, (number,))
            settle()

    def fill() -> None:
        for number, key in enumerate(keys):
            assert vault.load(number, key, 0, (number,))
        settle()

    def spill() -> None:
        for key in keys:
            vault.forget_on_disk(key)
        for number, key in enumerate(keys):
            assert vault.spill(number, key)
        settle()

    def promote() -> None:
        for key in keys:
            vault.forget(key)
        fill()

    source = np.ones(total, np.uint8)
    target = np.zeros(total, np.uint8)
    plain = best(lambda: np.copyto(target, source))
    yield moved("memcpy", plain, total, plain)
    yield moved("save: blocks to memory", best(save), total, plain)
    yield moved("load: memory to blocks, verified", best(fill), total, plain)

    file = SystemFile(disk.place.fd)  # type: ignore[attr-defined]
    page, slots = spec.stride, range(count)
    wrote = best(lambda: [file.write(host.payload(s).data[:page], disk.offset(s)) for s in slots])
    yield moved(f"pwrite, direct: {file.is_direct}", wrote, total, wrote)
    yield moved("spill: memory to disk", best(spill), total, wrote)
    scratch = host.payload(0)
    got = best(lambda: [file.read(scratch.data[:page], disk.offset(s)) for s in slots])
    save()
    yield moved(f"pread, direct: {file.is_direct}", got, total, got)
    yield moved("load: disk to blocks, verified", best(promote), total, got)
    file.close()
    vault.disk.close()  # type: ignore[union-attr]
    host.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--mb", type=int, default=256)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    rows = []
    try:
        for row in (*headers(folder), *stores(folder, options.mb << 20)):
            rows.append(row)
            rates = f"{row.gb_per_s:6.2f} GB/s  share {row.share:.2f}" if row.gb else ""
            print(f"{row.what:40} {row.seconds:7.3f} s  {rates}")
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
