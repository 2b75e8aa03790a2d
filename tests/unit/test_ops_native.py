"""libkvc_cpu, with every instruction set here, against the numpy and torch oracle."""

import random

import numpy as np
import pytest
from ops_cases import GUARD, distinct, make_case

from kvconnect.ops.native import LIB, CpuKernels, GridKernels
from kvconnect.ops.plain import PlainKernels

pytestmark = pytest.mark.skipif(
    not (LIB / "libkvc_cpu.so").exists(), reason="built without a C++ compiler"
)
CASES = 150


@pytest.fixture(scope="module", params=["base", "avx2", "avx512"])
def kernels(request):
    try:
        yield CpuKernels(isa=request.param)
    except OSError as error:
        pytest.skip(str(error))
    CpuKernels(isa="base")


def buffers(case, seed):
    rng = np.random.default_rng(seed)
    cache = rng.integers(0, 256, case.nbytes, dtype=np.uint8)
    wire = rng.integers(0, 256, GUARD + case.wire_bytes + GUARD, dtype=np.uint8)
    return cache, wire


def run(kernels, case, verb, cache, wire):
    """Sums; ``cache`` and ``wire`` are changed in place."""
    prepared = kernels.prepare(case.at(cache.ctypes.data))
    call = getattr(prepared, verb)
    launch = call(case.segments, wire.ctypes.data + GUARD, case.wire_bytes, case.units)
    assert launch.done()
    return launch.sums


def check_equal(kernels, case, verb):
    cache, wire = buffers(case, case.seed)
    expected_cache, expected_wire = cache.copy(), wire.copy()
    expected = run(PlainKernels(), case, verb, expected_cache, expected_wire)
    sums = run(kernels, case, verb, cache, wire)
    np.testing.assert_array_equal(wire, expected_wire)
    np.testing.assert_array_equal(cache, expected_cache)
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, 50))
def test_gather_equals_the_oracle(kernels, first):
    for seed in range(first, first + 50):
        check_equal(kernels, make_case(seed), "gather")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CASES, 50))
def test_scatter_equals_the_oracle_and_writes_nothing_else(kernels, first):
    for seed in range(first, first + 50):
        check_equal(kernels, distinct(make_case(seed), random.Random(seed)), "scatter")


@pytest.mark.slow
def test_the_cuda_grid_run_on_the_cpu_equals_the_oracle():
    grid = GridKernels()
    for seed in range(400):
        case = make_case(seed, aligned=True)
        check_equal(grid, case, "gather")
        check_equal(grid, distinct(case, random.Random(seed)), "scatter")
    assert grid.paths[0] == (1 << 9) - 1, "not every path was taken"
