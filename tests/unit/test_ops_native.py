"""libkvc_cpu, with every instruction set here, against the numpy and torch oracle."""

import random

import pytest
from ops_cases import (
    AlignedMemory,
    GridKernels,
    check_equal,
    distinct,
    make_case,
    make_rows,
)

from kvconnect.ops.native import LIB, CpuKernels

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
@pytest.mark.parametrize("order", ["HND", "NHD"])
@pytest.mark.parametrize("row_bytes", [256, 512, 192, 160])
def test_rows_past_the_cache_equal_the_oracle(kernels, row_bytes, order):
    """Rows of one part between those of another, where whole vectors fit and where none do."""
    at = {"first": 0}, {"first": 16}, {"first": 6}, {"v_first": True}, {"heads": 1}
    for how in at:
        case = make_rows(row_bytes, order, **how)
        for verb in ("gather", "scatter"):
            check_equal(kernels, case, verb, AlignedMemory)


@pytest.mark.slow
def test_the_cuda_grid_run_on_the_cpu_equals_the_oracle():
    grid = GridKernels()
    for seed in range(600):
        case = make_case(seed, aligned=True)
        check_equal(grid, case, "gather")
        check_equal(grid, distinct(case, random.Random(seed)), "scatter")
    assert grid.paths[0] == (1 << 9) - 1, "not every path was taken"
