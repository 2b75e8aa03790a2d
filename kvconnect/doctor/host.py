"""What the host lets an engine have: limits, memory, RDMA devices and how near they are to GPUs.

``root`` is where /proc, /sys and /dev are.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from kvconnect.control.channel import FILES
from kvconnect.doctor.finding import Finding, Verdict
from kvconnect.offload.store import numa
from kvconnect.offload.store.limits import memory_room

ROOT = Path("/")
SHM = "/dev/shm"  # noqa: S108 - looked at only
LEAST_SHM_BYTES = 1 << 30
NVIDIA = "0x10de"
RDMA = "sys/class/infiniband"


def size(nbytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    raise AssertionError("a unit was returned")


def memlock(limit: int, wanted: int, root: Path = ROOT) -> Iterator[Finding]:
    """``limit`` on locked memory; RDMA locks the ``wanted`` bytes that a rank registers."""
    told = "unlimited" if limit == resource.RLIM_INFINITY else size(limit)
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        yield Finding("memlock", told)
    elif not rdma_devices(root):  # NVIDIA's driver pins memory beside this limit
        yield Finding("memlock", f"{told}; only RDMA needs more, and there is none")
    else:
        yield Finding(
            "memlock",
            f"{told}, less than the {size(wanted)} that a rank registers",
            Verdict.FAULT,
            "`ulimit -l unlimited`; containers: --ulimit memlock=-1, or the capability IPC_LOCK",
        )


def files(hard: int) -> Iterator[Finding]:
    """Open files; engines raise the soft limit by themselves."""
    few = hard != resource.RLIM_INFINITY and hard < FILES
    verdict = Verdict.WARNING if few else Verdict.OK
    remedy = f"`ulimit -Hn {FILES}`; a peer's rank takes five" if few else ""
    yield Finding("open files", f"at most {hard}", verdict, remedy)


def huge_pages(root: Path = ROOT) -> Iterator[Finding]:
    """Transparent ones, which staging memory asks for."""
    switch = root / "sys/kernel/mm/transparent_hugepage/enabled"
    chosen = _read(switch).partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        yield Finding("huge pages", chosen)
    else:
        fix = "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`: gathers of small rows"
        yield Finding(
            "huge pages", chosen or "not told", Verdict.WARNING, f"{fix} are slower without"
        )


def nodes(root: Path = ROOT) -> Iterator[Finding]:
    """NUMA nodes that this process may run on."""
    there = numa.ids(root / "sys/devices/system/node/online")
    near = numa.of_cores(os.sched_getaffinity(0), root / "sys")
    if len(there) < 2 or len(near) == 1 or numa.policy_nodes():
        on = ", ".join(map(str, near))
        yield Finding("NUMA", f"this process is on node {on} of {max(len(there), 1)}")
    else:
        yield Finding(
            "NUMA",
            f"{len(there)} nodes, and cores of {len(near)} of them are allowed",
            Verdict.WARNING,
            "start engines with vLLM's --numa-bind, or numactl, on the node of their GPU and NIC",
        )


def shared_memory(root: Path = ROOT, least: int = LEAST_SHM_BYTES) -> Iterator[Finding]:
    """What UCX, vLLM's own processes and persistent host memory use."""
    room = os.statvfs(root / SHM[1:])
    total, free = room.f_frsize * room.f_blocks, room.f_frsize * room.f_bavail
    enough = free >= least
    yield Finding(
        SHM,
        f"{size(free)} free of {size(total)}" + ("" if enough else f", wanted {size(least)}"),
        Verdict.OK if enough else Verdict.WARNING,
        "" if enough else "Docker: --shm-size 8g; Kubernetes: an emptyDir with medium Memory",
    )


def memory(wanted: int, root: Path = ROOT) -> Iterator[Finding]:
    """What this process and its group may use; ``wanted`` by the configuration."""
    limit = memory_room(root)
    if wanted < limit.nbytes:
        yield Finding("memory", f"{size(limit.nbytes)} can be pinned, by {limit.source}")
    else:
        yield Finding(
            "memory",
            f"{size(limit.nbytes)} by {limit.source}, the configuration wants {size(wanted)}",
            Verdict.FAULT,
            "lower cpu_bytes_to_use (of all ranks together) or staging_bytes, or raise the limit",
        )


def rdma(root: Path = ROOT) -> Iterator[Finding]:
    """RDMA devices and whether a port is up."""
    found, known = rdma_devices(root), sorted(path.name for path in (root / RDMA).glob("*"))
    if not known:
        yield Finding("RDMA", "no device here: KV crosses by TCP, or shared memory on one host")
    elif not found:
        yield Finding(
            "RDMA",
            f"the host has {', '.join(known)}, but there is no /dev/infiniband/uverbs* to open",
            Verdict.WARNING,
            "Docker: --device /dev/infiniband; Kubernetes: the resource of its RDMA device plugin; "
            "else `modprobe ib_uverbs`",
        )
    for device in found:
        states = [_read(state) for state in sorted(device.glob("ports/*/state"))]
        up = any("ACTIVE" in state for state in states)
        yield Finding(
            f"RDMA {device.name}",
            "ports: " + (", ".join(states) or "none"),
            Verdict.OK if up else Verdict.WARNING,
            "" if up else "see `ibv_devinfo`: cable, switch, and subnet manager or RoCE address",
        )


def gpu_direct(root: Path = ROOT) -> Iterator[Finding]:
    """Whether NICs reach GPU memory, and how far each GPU is from the nearest of them."""
    cards, nics = gpus(root), rdma_devices(root)
    if not cards or not nics:
        return
    driver = _read(root / "proc/driver/nvidia/version")
    if (root / "sys/module/nvidia_peermem").exists():
        yield Finding("GPU memory by RDMA", "nvidia-peermem is loaded")
    elif "Open Kernel Module" in driver:
        yield Finding("GPU memory by RDMA", "dmabuf, by the open kernel module")
    else:
        yield Finding(
            "GPU memory by RDMA",
            "neither nvidia-peermem nor the open kernel module, which has dmabuf",
            Verdict.FAULT,
            "`modprobe nvidia-peermem`; else UCX copies by way of host memory, without a word",
        )
    for card in cards:
        distance, nic = min((_distance(card, (n / "device").resolve()), n.name) for n in nics)
        far = distance == len(DISTANCES) - 1
        remedy = "pin the engine to a GPU near a NIC, or name the NIC in UCX_NET_DEVICES"
        yield Finding(
            f"GPU {card.name}",
            f"nearest RDMA device {nic}: {DISTANCES[distance]}",
            Verdict.WARNING if far else Verdict.OK,
            remedy if far else "",
        )


DISTANCES = "the same PCIe switch", "the same root complex", "the same node", "another NUMA node"


def _distance(card: Path, nic: Path) -> int:
    common = [a for a, b in zip(card.parts, nic.parts, strict=False) if a == b]
    roots = [part for part in common if part.startswith("pci")]
    if roots and len(common) > common.index(roots[0]) + 1:
        return 0
    if roots:
        return 1
    return 2 if _read(card / "numa_node") == _read(nic / "numa_node") else 3


def rdma_devices(root: Path = ROOT) -> list[Path]:
    """Folders of sysfs; none where the devices themselves are kept from this container."""
    opened = any((root / "dev/infiniband").glob("uverbs*"))
    return sorted((root / RDMA).glob("*")) if opened else []


def gpus(root: Path = ROOT) -> list[Path]:
    """NVIDIA's, as folders of sysfs."""
    devices = (path.resolve() for path in (root / "sys/bus/pci/devices").glob("*"))
    return sorted(
        path
        for path in devices
        if _read(path / "vendor") == NVIDIA and _read(path / "class").startswith("0x03")
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
