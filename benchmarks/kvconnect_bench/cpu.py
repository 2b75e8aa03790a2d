"""Cores and CPU time of engines: who may run where, and what each thread has used.

Engines that hand over KV are on different machines. On one machine they share cores, and what one
does while it waits slows the other: a measurement that is to show the hand-over gives each a part.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from kvconnect.errors import ConfigError

SPINS = 0.1
"""Of a core, while nothing is asked of it: a thread that uses as much spins."""

Threads = Mapping[tuple[int, int, str], float]
"""CPU seconds so far by (process, thread, thread's name)."""


def halves() -> dict[str, list[int]]:
    """Of this process's cores, prefill's and decode's; raises ConfigError if there is one only."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError(
            f"--own-cores needs two cores, but this process may use {len(cores)}; leave it out"
        )
    half = len(cores) // 2
    return {"prefill": cores[:half], "decode": cores[half:]}


@contextlib.contextmanager
def only_on(cores: Collection[int]) -> Iterator[None]:
    """This thread, and the processes and threads that it starts meanwhile; none: wherever it may.

    What was started stays there; this thread may then run again where it did before.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def threads_of(leader: int) -> Threads:
    """Of all processes of a session."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        name, fields = text[text.index("(") + 1 : text.rindex(")")], text.rpartition(")")[2].split()
        if int(fields[3]) == leader:
            key = (int(stat.parts[2]), int(stat.parts[4]), name)
            found[key] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def spinning(leader: int, seconds: float) -> list[int]:
    """Threads of an idle session that spin, as seen for so long.

    No process's first one is among them: there vLLM computes.
    """
    before = threads_of(leader)
    time.sleep(seconds)
    return [
        thread
        for (process, thread, name), cpu_s in threads_of(leader).items()
        if thread != process and cpu_s - before.get((process, thread, name), 0.0) >= SPINS * seconds
    ]


def yield_cores(threads: Collection[int]) -> None:
    """Let threads run only while a core has nothing else to do: Linux's SCHED_IDLE."""
    for thread in threads:
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def machine_cpu_s(stat: Path = Path("/proc/stat")) -> float:
    """CPU seconds so far of everything on this machine, and what its host took away (steal)."""
    busy = stat.read_text().partition("\n")[0].split()[1:9]
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, busy)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def used(before: Threads, after: Threads) -> dict[str, float]:
    """CPU seconds between the two by "process thread": their names, of which several may be one."""
    mains = {process: name for process, thread, name in after if process == thread}
    by_name: dict[str, float] = {}
    for key, seconds in after.items():
        process, _, name = key
        label = f"{mains.get(process, process)} {name}"
        by_name[label] = by_name.get(label, 0.0) + seconds - before.get(key, 0.0)
    return by_name
