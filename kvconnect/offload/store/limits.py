"""How much memory this process may use: the host's, or less by a limit of its control group.

A container's limit is its group's. What goes beyond it ends the process, or another of the group.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")


class MemoryLimit(NamedTuple):
    """``nbytes`` of memory, by the word of ``source``."""

    nbytes: int
    source: str


def memory_room(root: Path = ROOT) -> MemoryLimit:
    """The least of all limits; ``root`` is where /proc and /sys are."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([MemoryLimit(pages, "the host's memory"), *_limits(root)])


def _limits(root: Path) -> Iterator[MemoryLimit]:
    """What our control group and all that it is in may use, by version 2 and by version 1.

    A path that is of the host, and not there in the container, leaves the mount's own file.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there; "max": none
                limit = folder / name
                yield MemoryLimit(
                    int(limit.read_text()), f"the limit in /{limit.relative_to(root)}"
                )
            if folder == mount:
                break
