"""Huge pages for memory that kernels read and write at random places.

A copy of scattered rows asks for a new page at nearly every row, and on a CPU whoever asks waits
for the translation. With 4 KiB pages that shows at rows of up to 32 KiB (docs/perf-log.md).
"""

import ctypes
import mmap

HUGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25  # Linux 6.1: pages that exist already, at once


def use_huge_pages(address: int, nbytes: int) -> bool:
    """Ask the kernel to back memory with huge pages; whether it agreed to.

    Changes no contents and never fails: where there are none, memory stays as it is. Only whole
    huge pages within the range can change. Memory that is in use already is collapsed, which takes
    about as long as copying it.
    """
    first = -(-address // HUGE_BYTES) * HUGE_BYTES
    last = (address + nbytes) // HUGE_BYTES * HUGE_BYTES
    if last <= first or not hasattr(mmap, "MADV_HUGEPAGE"):  # no Linux
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(first, last - first, MADV_HUGEPAGE):
        return False
    madvise(first, last - first, MADV_COLLAPSE)  # else khugepaged does it, in its own time
    return True
