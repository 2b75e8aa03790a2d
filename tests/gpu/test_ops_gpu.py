"""The kernels of libkvc_cuda on a GPU against the oracle, with the vectors of the CPU's tests."""

import random

import numpy as np
import pytest
import torch
from ops_cases import FLOATS, by_torch, check_equal, distinct, every_value, make_case

from kvconnect.errors import GeometryError
from kvconnect.ops import Copy, Type, load

CASES = 400


class DeviceMemory:
    """Buffers on the GPU."""

    def __init__(self, array):
        self.tensor = torch.from_numpy(array).cuda()
        torch.cuda.synchronize()  # the kernels' stream does not wait for torch's
        self.address = self.tensor.data_ptr()

    def read(self):
        """What is there now."""
        return self.tensor.cpu().numpy()


@pytest.fixture(params=[0, 2], ids=["all CTAs", "2 CTAs"])
def kernels(request):
    made = load("cuda", max_ctas=request.param)
    yield made
    made.close()


@pytest.fixture
def plain_kernels():
    made = load("cuda")
    yield made
    made.close()


def finish(launch):
    while not launch.done():
        pass
    return launch


def whole(copy, ids):
    """Segments of whole blocks, a unit each."""
    return np.array([(b, 0, copy.block_tokens, i) for i, b in enumerate(ids)], dtype=np.int32)


@pytest.mark.parametrize("verb", ["gather", "scatter"])
@pytest.mark.parametrize("first", range(0, CASES, 100))
def test_every_case_equals_the_oracle(kernels, verb, first):
    for seed in range(first, first + 100):
        case = make_case(seed, aligned=True)
        if verb == "scatter":
            case = distinct(case, random.Random(seed))
        check_equal(kernels, case, verb, DeviceMemory)


@pytest.mark.parametrize("dst", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("src", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_conversions_are_torchs_bit_for_bit(plain_kernels, src, dst, factor):
    """In hardware where there is hardware for it; torch's are those of its CPU."""
    if src == dst and factor == 1:
        pytest.skip("nothing is converted")
    values = every_value(src)
    cache = DeviceMemory(values.view(np.uint8))
    wire = DeviceMemory(np.zeros(values.size * dst.itemsize, dtype=np.uint8))
    tokens, item = len(values) // 8, src.itemsize
    copy = Copy(cache.address, 0, 0, 8 * item, item, 1, 8, tokens, 1, src, dst, factor)
    place = (wire.address, values.size * dst.itemsize, 1)
    finish(plain_kernels.prepare([copy]).move("gather", whole(copy, [0]), *place))
    found, (expected, nan) = (
        wire.read().view(f"u{dst.itemsize}"),
        by_torch(values, src, dst, factor),
    )
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    if dst.itemsize == 1:
        np.testing.assert_array_equal(found, expected)


def test_offsets_beyond_4_gib(plain_kernels):
    stride, blocks = (2 << 30) + 32, 4
    if torch.cuda.mem_get_info()[0] < stride * blocks + (1 << 30):
        pytest.skip("needs 9 GiB of device memory")
    cache = torch.empty(stride * blocks, dtype=torch.uint8, device="cuda")
    rows = torch.randint(0, 256, (blocks, 64), dtype=torch.uint8)
    for b in range(blocks):
        cache[b * stride : b * stride + 64] = rows[b].cuda()
    torch.cuda.synchronize()
    copy = Copy(cache.data_ptr(), stride, 0, 32, 1, 1, 32, 2, blocks, Type.RAW1, Type.RAW1)
    wire = DeviceMemory(np.zeros(3 * 64, dtype=np.uint8))
    prepared = plain_kernels.prepare([copy])
    finish(prepared.move("gather", whole(copy, [3, 0, 2]), wire.address, 192, 3))
    np.testing.assert_array_equal(wire.read(), rows[[3, 0, 2]].numpy().reshape(-1))
    finish(prepared.move("scatter", whole(copy, [1, 3, 0]), wire.address, 192, 3))
    assert torch.equal(cache[stride : stride + 64].cpu(), rows[3])
    assert torch.equal(cache[3 * stride : 3 * stride + 64].cpu(), rows[0])


def test_what_cannot_be_is_refused_before_a_byte_is_written(plain_kernels):
    cache, wire = DeviceMemory(np.full(256, 7, np.uint8)), DeviceMemory(np.full(256, 9, np.uint8))
    copy = Copy(cache.address, 64, 0, 16, 1, 1, 16, 4, 4, Type.RAW1, Type.RAW1)
    prepared = plain_kernels.prepare([copy])
    for segment in ((4, 0, 4, 0), (-1, 0, 4, 0), (0, 2, 3, 0), (0, 0, 4, 1)):
        with pytest.raises(GeometryError):
            prepared.move("gather", np.array([segment], dtype=np.int32), wire.address, 256, 1)
    assert (wire.read() == 9).all()


@pytest.mark.parametrize(("each", "gap"), [(4096, 512), (40, 8), (33, 7)])
@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("from_host", [False, True])
def test_plain_runs_in_every_direction(plain_kernels, from_host, to_host, each, gap):
    """Between host memory, which is pinned, and the device."""
    src = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    dst = torch.zeros_like(src)
    source = src.pin_memory() if from_host else src.cuda()
    target = dst.pin_memory() if to_host else dst.cuda()
    torch.cuda.synchronize()
    n = len(src) // (each + gap)
    at = np.arange(n, dtype=np.uint64) * np.uint64(each + gap)
    to = np.random.default_rng(0).permutation(at)
    ends = (to + np.uint64(target.data_ptr()), at + np.uint64(source.data_ptr()))
    finish(plain_kernels.copy_runs(*ends, np.full(n, each, dtype=np.uint64)))
    for a, b in zip(to.tolist(), at.tolist(), strict=True):
        dst[a : a + each] = src[b : b + each]
    assert torch.equal(target.cpu(), dst)
