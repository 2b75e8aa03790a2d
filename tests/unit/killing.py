"""Engines that store until they are killed -9 at a random moment, and what is found afterwards.

    python tests/unit/killing.py --times 200 [--share] [--folder /dev/shm/...]

One process at a time stores to memory (a file in the folder) and to disk, without pause. After
each kill everything that is found is loaded and compared. With ``--share`` another engine lives
all the while: it stores as well, and loads what the dying ones hold, while they write it.
Prints one line of JSON; exits with 1 if a single block was wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from store_bench import BLOCKS, CHUNK, Bench, key_of

from kvconnect_bench.caches import Cache, Model

MODEL = Model(layers=4, heads=2, block_tokens=16, content=256)  # 128 KiB a chunk
SEEDS = BLOCKS // CHUNK - 1  # each has its blocks in the cache; the last two are to load into
TARGET = (BLOCKS - 2, BLOCKS - 1)
SLOTS, DISK_SLOTS = 5, 7  # fewer than seeds, so that slots are written again and again


@dataclass
class Report:
    """What was seen, over all kills."""

    kills: int = 0
    stores: int = 0
    """That had been committed in memory when their process was killed."""
    found: int = 0
    """Keys found in memory or on disk by the next process."""
    wrong: int = 0
    half_written: int = 0
    """Slots that were recognised as such."""
    misses: int = 0
    """Keys that were found and could not be loaded."""
    kills_in_a_store: int = 0
    neighbour_loads: int = 0
    neighbour_misses: int = 0
    """Loads of what another process overwrote meanwhile."""
    problems: list[str] = field(default_factory=list)


def blocks_of(seed):
    return CHUNK * seed, CHUNK * seed + 1


def full_cache():
    cache = Cache(MODEL, BLOCKS)
    for seed in range(SEEDS):
        cache.fill(blocks_of(seed), seed)
    return cache


def open_bench(folder, cache, share=False):
    return Bench(folder, SLOTS, DISK_SLOTS, cache=cache, model=MODEL, share=share)


def store_for_ever(bench, rng, committed=lambda: None):
    """As a busy engine does: store, spill, forget, in any order, as fast as it goes."""
    store = bench.store
    while True:
        seed = rng.randrange(SEEDS)
        store.save(bench.ticket(), key_of(seed), 0, blocks_of(seed))
        if store.poll():
            committed()
        store.spill(bench.ticket(), key_of(seed))
        store.forget(key_of(rng.randrange(SEEDS)))
        store.forget_on_disk(key_of(rng.randrange(SEEDS)))


def in_child(run):
    """Run in a forked process that never comes back; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def kill_one(folder, cache, rng, share, report):
    """Fork an engine, let it store for a moment, kill it."""
    read, write = os.pipe()
    seed = rng.random()

    def run():
        bench = open_bench(folder, cache, share)
        store_for_ever(bench, random.Random(seed), lambda: os.write(write, b"."))

    pid = in_child(run)
    os.close(write)
    for _ in range(30):
        os.read(read, 1)  # it has stored something, however slow the machine is
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"
    while more := os.read(read, 1 << 16):
        report.stores += len(more)
    os.close(read)
    report.kills += 1


def check(bench, report):
    """Load everything that is there into blocks of its own, and compare."""
    damaged = Counter(bench.host.counts)["host_half_written_discarded"]
    damaged += bench.disk.counts["disk_half_written_discarded"]
    report.half_written += damaged
    report.kills_in_a_store += damaged > 0
    keys = [*bench.host.index.keys(), *bench.disk.index.keys()]
    for key in keys:  # those in memory first: each makes room for one of the disk's
        report.found += 1
        try:
            report.misses += not bench.load(int.from_bytes(key, "big"), TARGET)
        except AssertionError as e:
            report.wrong += 1
            report.problems.append(str(e))
        bench.store.forget(key)


def beside(folder, cache, stop, report):
    """The engine that lives: loads what others hold, stores its own."""
    bench, rng = open_bench(folder, cache, share=True), random.Random(7)
    mine = [0, 1, 2]
    for seed in mine:
        bench.save(seed, blocks_of(seed))
        bench.spill(seed)
    while not stop.exists():
        for neighbours in bench.neighbours:
            neighbours.refresh()
        keys = set().union(*(n.found() for n in bench.neighbours)) - {key_of(s) for s in mine}
        for key in [key_of(rng.choice(mine)), *sorted(keys)]:
            seed = int.from_bytes(key, "big")
            try:
                well = bench.load(seed, TARGET)
            except AssertionError as e:
                report.wrong += 1
                report.problems.append(str(e))
                continue
            if seed in mine and not well:
                report.problems.append(f"our own {seed} is lost")
            elif seed not in mine:
                report.neighbour_loads += well
                report.neighbour_misses += not well
            bench.store.forget(key) if seed not in mine else None  # what was promoted
    bench.close()


def run(folder, times, share, seed):
    """Kill ``times`` engines; what was found."""
    rng, report, cache = random.Random(seed), Report(), full_cache()
    stop, told = folder / "stop", folder / "told"
    living = 0
    if share:

        def live():
            own = Report()
            beside(folder, cache, stop, own)
            told.write_text(json.dumps(asdict(own)))

        living = in_child(live)
        while not list((folder / "host").glob("*.kvarena")):
            time.sleep(0.01)
    for _ in range(times):
        kill_one(folder, cache, rng, share, report)
        bench = open_bench(folder, cache)
        check(bench, report)
        bench.close()
    if living:
        stop.touch()
        os.waitpid(living, 0)
        own = json.loads(told.read_text())
        for name in ("wrong", "neighbour_loads", "neighbour_misses", "problems"):
            setattr(report, name, getattr(report, name) + own[name])
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        report = run(folder, options.times, options.share, options.seed)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(asdict(report)))
    sys.exit(1 if report.wrong or report.problems else 0)


if __name__ == "__main__":
    main()
