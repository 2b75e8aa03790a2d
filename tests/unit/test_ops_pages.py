"""Huge pages: contents stay, and where the machine has them, memory gets them."""

import mmap
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from kvconnect.ops.pages import HUGE_BYTES, use_huge_pages

LINUX = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2])
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib(address):
    """KiB of huge pages of the mapping at ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="no transparent huge pages"
)
def test_memory_gets_huge_pages_and_keeps_its_contents():
    with mmap.mmap(-1, 8 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # as if it were in use with small pages
        cells = np.frombuffer(memory, dtype=np.uint32)
        cells[:] = expected = np.arange(len(cells), dtype=np.uint32)
        middle = cells.ctypes.data + 5 * HUGE_BYTES
        assert huge_kib(middle) == 0
        if not use_huge_pages(cells.ctypes.data, cells.nbytes):
            pytest.skip("the kernel declines")
        if LINUX >= (6, 1):  # which can collapse pages at once
            assert huge_kib(middle) >= 2048
        np.testing.assert_array_equal(cells, expected)
        del cells


def test_less_than_a_huge_page_is_left_alone():
    assert not use_huge_pages(HUGE_BYTES + 4096, HUGE_BYTES)
