"""What this process has in use, to the byte, and by how much that grows.

Resident memory is more than that: glibc and Python's allocator keep what was freed, and give a
page back only when nothing in its neighbourhood is used. It rises with the largest burst so far and
with the holes that bursts leave, which is no leak; and a leak of 10 bytes a transfer is lost in it
for 100,000s of them. So a leak is looked for in what is in use.
"""

import ctypes
import gc
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_C = ctypes.CDLL(None)
_C.mallinfo2.restype = _Mallinfo2
_BLOCKS = re.compile(r"# bytes in allocated blocks\s*=\s*([\d,]+)")


class Held(NamedTuple):
    """Bytes, and open files."""

    in_use: int
    """What Python's allocator and malloc, of which numpy's arrays are, were asked for."""
    resident: int
    files: int


def held():
    """What is held now, garbage aside."""
    gc.collect()
    malloc = _C.mallinfo2()  # of all of its arenas
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    in_use = malloc.uordblks + malloc.hblkhd + _of_small_objects()
    return Held(in_use, resident, len(os.listdir("/proc/self/fd")))


def _of_small_objects():
    """What Python's allocator has given out; it takes its own memory by mmap, not from malloc."""
    with tempfile.TemporaryFile() as told:
        kept = os.dup(2)
        try:
            os.dup2(told.fileno(), 2)
            sys._debugmallocstats()  # prints
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        told.seek(0)
        (found,) = _BLOCKS.findall(told.read().decode())
    return int(found.replace(",", ""))


def slope(points):
    """By how much y grows for each x, and that guess's standard error: least squares."""
    n = len(points)
    middle = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - middle[0]) ** 2 for x, _ in points)
    each = sum((x - middle[0]) * (y - middle[1]) for x, y in points) / spread
    rest = sum((y - middle[1] - each * (x - middle[0])) ** 2 for x, y in points)
    return each, (rest / (n - 2) / spread) ** 0.5
