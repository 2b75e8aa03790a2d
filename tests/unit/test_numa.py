"""Memory near to a rank: which nodes those are, and that the kernel knows before it has pages."""

import ctypes
import functools
import os
import platform
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from kvconnect.offload.store import numa
from kvconnect.offload.store.arena import attach, look, make
from kvconnect.offload.store.backing import mapped
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.numa import of_cores, prefer, wanted

SPEC = ArenaSpec(slots=8, slot_bytes=1 << 18, fingerprint=b"\x07" * 32)
DEFAULT, PREFERRED, BIND, INTERLEAVE = range(4)
OF_ADDRESS, PAGE_S_NODE = 2, 1
SET_MEMPOLICY = numa.GET_MEMPOLICY + (-1 if platform.machine() == "x86_64" else 1)
GPU = "0000:dc:00.0"
PAGE = 4096
HERE = numa.ids(numa.SYSFS / "devices/system/node/online")


def ask(memory=None, flags=0):
    """(policy, mask of nodes) of this thread, or of the memory; or the node of its first page."""
    mode, mask = ctypes.c_int(-1), numa.Mask()
    address = None
    if memory is not None:
        address, flags = memory.ctypes.data, flags | OF_ADDRESS
    answer = ctypes.byref(mode), mask, numa.NODES + 1, address, flags, 0
    if numa.syscall(numa.GET_MEMPOLICY, *answer):
        pytest.skip("no NUMA in this kernel, or a container that does not let us ask")
    return mode.value if flags & PAGE_S_NODE else (mode.value, mask[0])


def on_a_thread(act):
    """What ``act`` returns on a thread, which takes its memory policy away with it."""
    found = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join(10)
    return found[0]


@pytest.fixture
def shm():
    """A folder in shared memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(params=["private", "followed", "file"])
def new(request, shm):
    """Makes an arena."""
    if request.param == "file":
        return lambda nodes: attach(SPEC, shm / "arena", functools.partial(mapped, nodes=nodes))
    return lambda nodes: make(SPEC, request.param == "followed", nodes)


# -- which nodes -------------------------------------------------------------------------------


@pytest.fixture
def sysfs(tmp_path, monkeypatch):
    """Two sockets of eight cores, a node of memory alone, and a GPU at the second socket."""
    monkeypatch.setattr(numa, "policy_nodes", lambda: ())
    said = {
        "devices/system/node/online": "0-1,3",
        "devices/system/node/node0/cpulist": "0-3,8-11",
        "devices/system/node/node1/cpulist": "4-7,12-15",
        "devices/system/node/node3/cpulist": "",
        f"bus/pci/devices/{GPU}/numa_node": "1",
    }
    for name, text in said.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("cores", "nodes"), [({2}, (0,)), ({8, 11}, (0,)), ({3, 4}, (0, 1)), ({99}, ()), ((), ())]
)
def test_of_cores_their_nodes(sysfs, monkeypatch, cores, nodes):
    assert of_cores(cores, sysfs) == nodes
    monkeypatch.setattr(numa.os, "sched_getaffinity", lambda _: cores)
    assert wanted(None, sysfs) == nodes


def test_of_a_device_its_node_whatever_cores_there_are(sysfs):
    assert wanted(GPU, sysfs) == (1,)


@pytest.mark.parametrize("said", ["-1", "", "what?", None])
def test_of_a_device_that_is_not_known_none(sysfs, said):
    node = sysfs / "bus/pci/devices" / GPU / "numa_node"
    node.unlink() if said is None else node.write_text(f"{said}\n")
    assert wanted(GPU, sysfs) == ()


@pytest.mark.parametrize("online", ["0", "", None])
def test_on_a_host_of_one_node_or_without_numa_none(sysfs, online):
    file = sysfs / "devices/system/node/online"
    file.unlink() if online is None else file.write_text(f"{online}\n")
    assert wanted(GPU, sysfs) == wanted(None, sysfs) == ()


def test_who_was_told_where_to_have_memory_stays_there(sysfs, monkeypatch):
    """By numactl or vLLM: the device is at node 1, and this thread is bound to node 0."""
    monkeypatch.undo()
    ask()

    def bound():
        assert numa.syscall(SET_MEMPOLICY, BIND, numa.Mask(1), numa.NODES + 1, 0, 0, 0) == 0
        return wanted(GPU, sysfs)

    assert on_a_thread(bound) == (0,)
    assert on_a_thread(lambda: wanted(GPU, sysfs)) == (1,)


# -- what the kernel was told ------------------------------------------------------------------


def test_all_of_a_new_arena_is_wished_near_before_it_has_pages(new, shm, monkeypatch):
    pages = []

    def spy(memory, nodes):
        told = np.zeros(-(-memory.nbytes // PAGE), np.uint8)
        address, nbytes = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
        assert ctypes.CDLL(None).mincore(address, nbytes, ctypes.c_void_p(told.ctypes.data)) == 0
        reserved = sum(file.stat().st_blocks * 512 // PAGE for file in shm.iterdir())
        pages.append(max(int((told & 1).sum()), reserved))
        prefer(memory, nodes)

    monkeypatch.setattr(numa, "prefer", spy)
    arena = new((0,))
    assert len(pages) == 1
    assert pages[0] <= 1, "more than the header of a file was there before"
    for at in (0, SPEC.nbytes - 1):
        assert ask(arena.backing.bytes[at:]) == (PREFERRED, 1)
    arena.close()


def test_a_file_in_shared_memory_keeps_the_wish(shm):
    attach(SPEC, shm / "arena", functools.partial(mapped, nodes=(0,))).close()
    reader = look(shm / "arena", SPEC.fingerprint)
    assert ask(reader.backing.bytes) == (PREFERRED, 1)
    reader.close()


def test_what_another_has_filled_stays_where_it_is(shm):
    attach(SPEC, shm / "arena").close()
    arena = attach(SPEC, shm / "arena", functools.partial(mapped, nodes=(0,)))
    assert not arena.new
    assert ask(arena.backing.bytes) == (DEFAULT, 0)
    arena.close()


def test_without_nodes_nothing_is_wished_nor_told(new, caplog):
    caplog.set_level("DEBUG")
    arena = new(())
    assert ask(arena.backing.bytes) == (DEFAULT, 0)
    assert caplog.text == ""
    arena.close()


def test_several_nodes_have_pages_in_turn():
    arena = make(SPEC, nodes=(0, 5))  # the kernel leaves out what is not there
    mode, mask = ask(arena.backing.bytes)
    assert (mode, mask & 1) == (INTERLEAVE, 1)
    arena.close()


@pytest.mark.parametrize("why", ["unknown call", "no such node"])
def test_a_kernel_that_refuses_is_survived_and_told(new, why, monkeypatch, caplog):
    caplog.set_level("INFO")
    if why == "unknown call":
        monkeypatch.setattr(numa, "MBIND", -1)
    arena = new((1000,))
    arena.payload(7)[:] = 7
    assert ("not implemented" if why == "unknown call" else "Invalid argument") in caplog.text
    arena.close()


@pytest.mark.skipif(len(HERE) < 2, reason="a host of one NUMA node has nowhere else for a page")
@pytest.mark.parametrize("far", [False, True], ids=["from near", "from far"])
def test_pages_lie_where_they_are_wished_whoever_touches_them(new, far):
    """Of `tests/unit` alone this needs two nodes; a virtual machine has them if it is told to."""
    near, other = HERE[:2]
    arena = new((near,))

    def touch():
        toucher = numa.SYSFS / f"devices/system/node/node{other if far else near}/cpulist"
        os.sched_setaffinity(0, numa.ids(toucher))
        memory = arena.backing.bytes
        memory[PAGE:] = 1
        return {ask(memory[at:], PAGE_S_NODE) for at in range(PAGE, memory.nbytes, PAGE)}

    assert on_a_thread(touch) == {near}
    arena.close()
