"""All of libkvc_cuda, host side and kernels, over tests/unit/fake_cuda instead of CUDA's runtime.

The fake works its streams off late, so what is reused or freed too early is seen. What only a GPU
can show (shuffles, atomics, fp8 in hardware, speed) is for tests/gpu.
"""

import ctypes
import functools
import itertools
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ops_cases import check_equal, distinct, make_case
from store_bench import Bench, key_of

from kvconnect.errors import ConfigError, GeometryError, TransportError
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.jobs import Fill, Save
from kvconnect.offload.store.pinning import Pinning
from kvconnect.offload.store.runner import TOGETHER_BYTES, Runner
from kvconnect.ops import Copy, Type, load, native
from kvconnect.ops.cuda import CudaKernels

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.slow,  # a compiler runs first
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where libkvc_cuda.so is, made with the fake."""
    made = tmp_path_factory.mktemp("fake-cuda")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-x", "c++"]
    command = [COMPILER, *flags, f"-I{HERE / 'fake_cuda'}", str(CSRC / "kvc_cuda.cu")]
    subprocess.run([*command, "-o", str(made / "libkvc_cuda.so")], check=True)
    return made


@pytest.fixture
def fake(folder, monkeypatch):
    """The library, for the functions of the fake."""
    monkeypatch.setattr(native, "LIB", folder)
    library = ctypes.CDLL(str(folder / "libkvc_cuda.so"))
    library.kvc_fake_reset()
    library.kvc_fake_set_device(0)  # as a thread that has a context on another device than ours
    yield library
    library.kvc_fake_capture(0)
    library.kvc_fake_fail(0)
    assert library.kvc_fake_count(b"memory") == 0, "memory was not freed"
    assert library.kvc_fake_count(b"device") == 0, "another device was left the current one"


@pytest.fixture
def kernels(fake):
    """On the second device, so that a change of the current one shows."""
    made = CudaKernels(1)
    yield made
    made.close()


def blocks(array):
    """All of ``array`` [block, byte] as one copy, and its segments, a unit each."""
    n, nbytes = array.shape
    copy = Copy(array.ctypes.data, nbytes, 0, 16, 1, 1, 16, nbytes // 16, n, Type.RAW1, Type.RAW1)
    return copy, np.array([(i, 0, nbytes // 16, i) for i in range(n)], dtype=np.int32)


def finish(launch):
    while not launch.done():
        pass
    return launch


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_it_equals_the_oracle(kernels, first):
    for seed in range(first, first + 100):
        case = make_case(seed, aligned=True)
        check_equal(kernels, case, "gather")
        check_equal(kernels, distinct(case, random.Random(seed)), "scatter")


def test_elements_at_odd_addresses_are_refused(kernels):
    array = np.zeros((2, 64), dtype=np.uint8)
    copy, segments = blocks(array)
    odd = copy._replace(base=copy.base + 1, kv_type=Type.BF16, wire_type=Type.E4M3, content=8)
    with pytest.raises(GeometryError, match="multiple of its element"):
        kernels.prepare([odd]).move("gather", segments[:1], array.ctypes.data, 64, 2)


def test_launches_under_way_do_not_share_buffers_and_later_ones_do(kernels, fake):
    array = np.random.default_rng(0).integers(0, 256, (4, 4096), dtype=np.uint8)
    copy, segments = blocks(array)
    prepared = kernels.prepare([copy])
    orders = [np.array(o) for o in itertools.permutations(range(4))][:10]
    wires = [np.zeros(array.size, dtype=np.uint8) for _ in orders]

    def start():
        calls = zip(orders, wires, strict=True)
        return [prepared.move("gather", segments[o], w.ctypes.data, w.nbytes, 4) for o, w in calls]

    def check(launches):
        for order, wire, launch in zip(orders, wires, launches, strict=True):
            assert finish(launch).done()
            np.testing.assert_array_equal(wire, array[order].reshape(-1))
            wire[:] = 0
        assert len({tuple(launch.sums.tolist()) for launch in launches}) == len(launches)

    check(start())
    held = fake.kvc_fake_count(b"memory")
    for _ in range(5):
        check(start())
    assert fake.kvc_fake_count(b"memory") == held


def test_a_launch_is_not_done_at_once(kernels):
    array = np.ones((1, 64), dtype=np.uint8)
    copy, segments = blocks(array)
    wire = np.zeros(64, dtype=np.uint8)
    launch = kernels.prepare([copy]).move("gather", segments, wire.ctypes.data, 64, 1)
    assert not wire.any() and not launch.done()
    assert finish(launch).done() and wire.all()


def test_max_ctas_bounds_launches(fake):
    array = np.zeros((64, 65536), dtype=np.uint8)
    copy, segments = blocks(array)
    wire = np.zeros(array.size, dtype=np.uint8)
    seen = []
    for most in (1, 4, 0):
        kernels = load("cuda", max_ctas=most)
        finish(kernels.prepare([copy]).move("gather", segments, wire.ctypes.data, wire.nbytes, 64))
        kernels.close()
        seen.append(fake.kvc_fake_count(b"most_ctas"))
    assert seen == [1, 4, 6]  # of the fake, 2 fit on each of 3 multiprocessors


def test_any_cuda_call_that_fails_is_an_error_and_the_next_launch_is_right(fake):
    array = np.random.default_rng(1).integers(0, 256, (3, 64), dtype=np.uint8)
    copy, segments = blocks(array)
    wire = np.zeros(array.size, dtype=np.uint8)

    def gather(kernels):
        wire[:] = 0
        place = (wire.ctypes.data, wire.nbytes, 3)
        return finish(kernels.prepare([copy]).move("gather", segments, *place))

    failures = 0
    for nth in itertools.count(1):
        fake.kvc_fake_fail(nth)
        try:
            kernels = CudaKernels(1)
        except ConfigError:
            failures += 1
            continue
        try:
            gather(kernels)
            failed = False
        except TransportError:
            failed = True
        failures += failed
        fake.kvc_fake_fail(0)
        gather(kernels)
        np.testing.assert_array_equal(wire, array.reshape(-1))
        kernels.close()
        if not failed and nth > 30:
            break
    assert failures >= 15


def test_launches_that_fail_keep_no_memory(kernels, fake):
    array = np.zeros((1, 64), dtype=np.uint8)
    copy, segments = blocks(array)
    prepared, wire = kernels.prepare([copy]), np.zeros(64, dtype=np.uint8)
    finish(prepared.move("gather", segments, wire.ctypes.data, 64, 1))
    held, failures = fake.kvc_fake_count(b"memory"), 0
    for turn in range(60):
        fake.kvc_fake_fail((3, 4, 5)[turn % 3])  # tables up, kernel, sums down
        try:
            finish(prepared.move("gather", segments, wire.ctypes.data, 64, 1))
        except TransportError:
            failures += 1
        fake.kvc_fake_fail(0)
        finish(prepared.move("gather", segments, wire.ctypes.data, 64, 1))
    assert failures == 60
    # a second slot, for the launch that follows while work before the failure may still run
    assert fake.kvc_fake_count(b"memory") <= held + 2


# ---- threads, devices and captures


def on_a_thread(work):
    """What ``work`` returns on a thread of its own, which has no current device yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(30)


def test_a_thread_makes_a_context_on_our_device_alone(fake):
    """It used to make one on the first GPU too, some hundred megabytes for each rank."""
    fake.kvc_fake_reset()
    array = np.ones((1, 64), dtype=np.uint8)
    copy, segments = blocks(array)
    wire = np.zeros(64, dtype=np.uint8)

    def work():
        kernels = CudaKernels(1)
        with kernels.current():
            pass
        finish(kernels.prepare([copy]).move("gather", segments, wire.ctypes.data, 64, 1))
        kernels.free(kernels.alloc(64, pinned=True), pinned=True)
        assert kernels.register(array.ctypes.data, 64, read_only=False) == 0
        assert kernels.unregister(array.ctypes.data) == 0
        kernels.close()

    on_a_thread(work)
    assert wire.all()
    assert fake.kvc_fake_count(b"contexts") == 1 << 1


def test_asking_whether_a_launch_is_done_makes_no_context_elsewhere(fake):
    fake.kvc_fake_reset()
    array = np.ones((1, 64), dtype=np.uint8)
    copy, segments = blocks(array)
    wire = np.zeros(64, dtype=np.uint8)
    kernels = on_a_thread(lambda: CudaKernels(1))
    prepared = kernels.prepare([copy])
    launch = on_a_thread(lambda: prepared.move("gather", segments, wire.ctypes.data, 64, 1))
    on_a_thread(lambda: finish(launch))
    on_a_thread(kernels.close)
    assert wire.all()
    assert fake.kvc_fake_count(b"contexts") == 1 << 1


def test_a_thread_can_make_the_device_its_own(kernels, fake):
    def work():
        kernels.set_device()
        return fake.kvc_fake_count(b"device")

    assert on_a_thread(work) == 1


def test_the_current_device_stays_what_it_was_where_there_is_a_context(kernels, fake):
    with kernels.current():
        assert fake.kvc_fake_count(b"device") == 1
    assert fake.kvc_fake_count(b"device") == 0


def test_all_of_it_can_be_done_while_another_thread_captures_a_graph(kernels, fake):
    """In CUDA's global mode any other thread's unsafe call fails, and spoils the capture."""
    array = np.ones((64, 65536), dtype=np.uint8)
    copy, segments = blocks(array)
    wire = np.zeros(array.size, dtype=np.uint8)
    fake.kvc_fake_capture(1)
    finish(kernels.prepare([copy]).move("gather", segments, wire.ctypes.data, wire.nbytes, 64))
    kernels.free(kernels.alloc(64, pinned=False), pinned=False)
    pinning = Pinning(wire.ctypes.data, wire.nbytes, register(kernels), kernels.unregister, 4096)
    pinning.start()
    pinning.go_on()
    while pinning.ready < wire.nbytes:
        pass
    pinning.close()
    assert wire.all()
    assert not fake.kvc_fake_count(b"spoilt")


def test_the_fake_refuses_what_is_not_relaxed_during_a_capture(fake):
    """Or the test above could not fail."""
    memory = ctypes.c_void_p()
    fake.kvc_fake_capture(1)
    assert fake.kvc_fake_malloc(ctypes.byref(memory), 64) == 900
    assert fake.kvc_fake_count(b"spoilt")


def test_a_launch_that_needs_more_room_frees_nothing(kernels, fake):
    """cudaFree waits for the device, and with it for the model."""
    array = np.ones((4096, 64), dtype=np.uint8)
    copy, _ = blocks(array)
    wire = np.zeros(array.size, dtype=np.uint8)
    prepared, frees = kernels.prepare([copy]), fake.kvc_fake_count(b"frees")
    for n in (1, 4096):
        segments = np.zeros((n * 4, 4), dtype=np.int32)
        segments[:, 0], segments[:, 1] = np.arange(n * 4) // 4, np.arange(n * 4) % 4
        segments[:, 2] = 1
        finish(prepared.move("gather", segments, wire.ctypes.data, wire.nbytes, 1))
        assert wire[: n * 64].all()
    assert fake.kvc_fake_count(b"frees") == frees


# ---- pinned memory


def register(kernels):
    return functools.partial(kernels.register, read_only=False)


def test_memory_is_pinned_again_where_it_was_unpinned(kernels, fake):
    """A place that closed used to leave it pinned: the next at the same addresses got error 712."""
    memory = np.zeros(1 << 16, dtype=np.uint8)
    for _ in range(2):
        pinning = Pinning(
            memory.ctypes.data, memory.nbytes, register(kernels), kernels.unregister, 1 << 14
        )
        pinning.start()
        pinning.go_on()
        while pinning.ready < memory.nbytes:
            pass
        assert fake.kvc_fake_count(b"registered") == 4
        pinning.close()
        assert fake.kvc_fake_count(b"registered") == 0


def test_pinning_twice_and_unpinning_nothing_are_errors(kernels):
    memory = np.zeros(4096, dtype=np.uint8)
    assert kernels.register(memory.ctypes.data, 4096, read_only=True) == 0
    assert kernels.register(memory.ctypes.data + 100, 8, read_only=True) == 712
    assert kernels.unregister(memory.ctypes.data) == 0
    assert kernels.unregister(memory.ctypes.data) == 713


# ---- code for the device


def test_a_gpu_without_code_is_a_startup_error_that_names_it(fake):
    """Every launch used to fail, of a library that had been opened."""
    fake.kvc_fake_has_code(0)
    with pytest.raises(ConfigError, match=r"is sm_33, .* KVCONNECT_CUDA_ARCHITECTURES=33"):
        load("cuda", index=1)


# ---- stored chunks


def carried_out(runner, numbers):
    """Whether each job went well; at most so many steps as a launch on its own stream takes."""
    found = {}
    for _ in range(8):
        runner.step()
        found |= {done.id: done.error for done in runner.take().done}
    assert found.keys() == set(numbers)
    return not any(found.values())


def test_all_chunks_of_a_step_are_one_launch(kernels, fake, tmp_path):
    """It used to be one for each block."""
    bench = Bench(tmp_path, slots=8, disk_slots=0, kernels=kernels)
    runner = Runner(bench.store, [bench.slot_layout.block_bytes])
    for n in range(8):
        bench.cache.fill((2 * n, 2 * n + 1), n)
    runner.put([Save(n, key_of(n), 0, (2 * n, 2 * n + 1)) for n in range(8)])
    before = fake.kvc_fake_count(b"launches"), fake.kvc_fake_count(b"copies")
    assert carried_out(runner, range(8))
    saved = fake.kvc_fake_count(b"launches"), fake.kvc_fake_count(b"copies")
    assert (saved[0] - before[0], saved[1] - before[1]) == (1, 2)  # tables up, sums down
    bench.cache.fill(range(16), 99)
    fills = [Fill(n, key_of(n), 0, (15 - n, NO_BLOCK if n % 2 else 7 - n)) for n in range(8)]
    runner.put(fills)
    assert carried_out(runner, range(8))
    assert fake.kvc_fake_count(b"launches") - saved[0] == 1
    assert all(bench.holds(fill.number, fill.blocks) for fill in fills)
    bench.close()


def test_more_than_goes_together_is_more_launches(kernels, fake, tmp_path):
    bench = Bench(tmp_path, slots=8, disk_slots=0, kernels=kernels)
    runner = Runner(bench.store, [TOGETHER_BYTES // 4])  # said to be: two blocks a chunk
    runner.put([Save(n, key_of(n), 0, (2 * n, 2 * n + 1)) for n in range(5)])
    before = fake.kvc_fake_count(b"launches")
    assert carried_out(runner, range(5))
    assert fake.kvc_fake_count(b"launches") - before == 3
    bench.close()


# ---- plain runs


@pytest.mark.parametrize(
    ("each", "gap", "shift"),
    [
        (4096, 4096, 0),
        (8200, 56, 8),
        (36, 28, 4),
        (36, 28, 0),
        (33, 31, 0),
        (33, 7, 1),
        (65536, 16, 0),
        (512, 0, 3),
    ],
)
def test_runs_are_copied_and_nothing_else(kernels, each, gap, shift):
    rng = np.random.default_rng(each)
    src = rng.integers(0, 256, 1 << 20, dtype=np.uint8)
    dst = np.zeros_like(src)
    n = min(len(src) // (each + gap) - 1, 100)
    at = np.arange(n, dtype=np.uint64) * np.uint64(each + gap) + np.uint64(shift)
    to = rng.permutation(at) if gap else at
    sizes = np.full(n, each)
    launch = kernels.copy_runs(to + np.uint64(dst.ctypes.data), at + src.ctypes.data, sizes)
    expected = np.zeros_like(dst)
    for a, b in zip(to.tolist(), at.tolist(), strict=True):
        expected[a : a + each] = src[b : b + each]
    assert not finish(launch).sums.size
    np.testing.assert_array_equal(dst, expected)


def test_runs_of_unequal_counts_are_refused(kernels):
    with pytest.raises(GeometryError, match="three equal"):
        kernels.copy_runs(np.zeros(2), np.zeros(2), np.zeros(3))


def test_memory_that_is_not_there_is_an_error(kernels, fake):
    fake.kvc_fake_fail(2)  # after asking for the device
    with pytest.raises(TransportError, match="no 64 bytes of pinned memory"):
        kernels.alloc(64, pinned=True)
