"""On which NUMA nodes memory is wanted, and the wish for it, as the kernel takes it.

* A wish: a node that is full is passed over, and a kernel that refuses is logged, never raised.
* It holds for pages that nobody has touched yet, whichever thread or process touches them. Pages of
  a file in shared memory take it from the file; those of any other file take no notice of it.
* A memory policy that this thread has already stands for what we would find out: of numactl, of
  vLLM's ``--numa-bind``, or of its CPU worker, which binds itself to the node of its first core.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import numpy as np

logger = logging.getLogger(f"vllm.{__name__}")

Nodes = tuple[int, ...]

SYSFS = Path("/sys")
MBIND, GET_MEMPOLICY = {  # by libc's `syscall`: libnuma is not everywhere
    "x86_64": (237, 239),
    "aarch64": (235, 236),
    "riscv64": (235, 236),
    "ppc64le": (259, 260),
    "s390x": (268, 269),
}.get(platform.machine(), (-1, -1))  # which is answered as any unknown call
PREFERRED, INTERLEAVE = 1, 3
NODES = 1024  # the most that a kernel has
Mask = ctypes.c_uint64 * (NODES // 64)

syscall = ctypes.CDLL(None, use_errno=True).syscall
syscall.restype = ctypes.c_long
syscall.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 6


def wanted(device: str | None, sysfs: Path = SYSFS) -> Nodes:
    """Nodes near to the device of this PCI address; of None, to the cores this thread may run on.

    None of them if that is unknown, or the host has but one.
    """
    if len(ids(sysfs / "devices/system/node/online")) < 2:
        return ()
    if chosen := policy_nodes():
        return chosen
    if device is None:
        return of_cores(os.sched_getaffinity(0), sysfs)
    return tuple(ids(sysfs / "bus/pci/devices" / device / "numa_node"))


def of_cores(cores: Iterable[int], sysfs: Path = SYSFS) -> Nodes:
    """Nodes that have any of ``cores``."""
    near = sysfs / "devices/system/node"
    here = set(cores)
    return tuple(
        node for node in ids(near / "online") if here & set(ids(near / f"node{node}/cpulist"))
    )


def prefer(memory: np.ndarray, nodes: Nodes) -> None:
    """Wish the pages of ``memory``, which starts with one, on ``nodes``; in turn if several."""
    if not nodes:
        return
    mask = Mask()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    mode = PREFERRED if len(nodes) == 1 else INTERLEAVE
    # one more than the kernel looks at
    refused = syscall(MBIND, memory.ctypes.data, memory.nbytes, mode, mask, NODES + 1, 0)
    names, size = ", ".join(map(str, nodes)), memory.nbytes / 1e9
    if refused:
        problem = os.strerror(ctypes.get_errno())
        logger.info(
            "kvconnect: %.2f GB of host memory may lie on any NUMA node, though %s would be near: "
            "%s; a container may need the capability SYS_NICE",
            *(size, names, problem),
        )
    else:
        logger.info("kvconnect: %.2f GB of host memory prefer NUMA node %s", size, names)


def policy_nodes() -> Nodes:
    """Nodes that this thread's memory policy names."""
    mask = Mask()
    if syscall(GET_MEMPOLICY, None, mask, NODES + 1, None, 0, 0):
        return ()
    return tuple(node for node in range(NODES) if mask[node // 64] >> node % 64 & 1)


def ids(file: Path) -> list[int]:
    """The numbers in a list of sysfs, ``0-3,8``; none if it cannot be read, or says -1."""
    try:
        spans = [part.split("-") for part in file.read_text().strip().split(",")]
        return [one for span in spans for one in range(int(span[0]), int(span[-1]) + 1)]
    except (OSError, ValueError):
        return []
