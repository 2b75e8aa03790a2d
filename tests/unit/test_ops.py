"""kvconnect.ops: formats, refusals, conversions and sums, for every implementation here."""

import mmap
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ops_cases import FLOATS, GridKernels, by_torch, every_value

from kvconnect.errors import ConfigError, GeometryError
from kvconnect.ops import Copy, Type, chunk_bytes, load, native, wire_offsets
from kvconnect.ops.native import CpuKernels, copy_table
from kvconnect.ops.plain import PlainKernels

MAKERS = {
    "numpy": PlainKernels,
    "base": lambda: CpuKernels(isa="base"),
    "avx2": lambda: CpuKernels(isa="avx2"),
    "avx512": lambda: CpuKernels(isa="avx512"),
    "grid": GridKernels,
}


@pytest.fixture(params=MAKERS)
def kernels(request):
    try:
        return MAKERS[request.param]()
    except OSError as error:
        pytest.skip(str(error))


def dense(cache, kv_type, wire_type, factor=1.0):
    """All of ``cache`` [block, token, content], one head."""
    blocks, tokens, content = cache.shape
    return Copy(
        cache.ctypes.data, *(cache.strides[0], 0, *cache.strides[1:]), 1, content, tokens, blocks,
        kv_type, wire_type, factor,
    )  # fmt: skip


def whole(blocks, tokens, unit=lambda i: 0):
    ids = range(blocks) if isinstance(blocks, int) else blocks
    return np.array([(b, 0, tokens, unit(i)) for i, b in enumerate(ids)], dtype=np.int32)


def gathered(kernels, copies, segments, units=1):
    """(wire, sums)"""
    wire = np.zeros(chunk_bytes(copies, int(segments[:, 2].sum())), dtype=np.uint8)
    launch = kernels.prepare(copies).move("gather", segments, wire.ctypes.data, wire.nbytes, units)
    return wire, launch.sums


@pytest.mark.slow
@pytest.mark.parametrize("dst", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("src", FLOATS, ids=lambda t: t.name)
def test_conversions_are_torchs_bit_for_bit(kernels, src, dst):
    for factor in (1.0, 0.3):
        values = every_value(src)
        if src == dst and factor == 1:
            continue
        cache = values.reshape(1, -1, 8)
        wire, _ = gathered(kernels, [dense(cache, src, dst, factor)], whole(1, cache.shape[1]))
        found, (expected, nan) = wire.view(f"u{dst.itemsize}"), by_torch(values, src, dst, factor)
        np.testing.assert_array_equal(found[~nan], expected[~nan])
        as_float = torch.from_numpy(wire).view(getattr(torch, dst.torch_name)).float()
        assert as_float.isnan().numpy()[nan].all()
        if dst.itemsize == 1:  # torch's NaN is the same in all its code paths
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dst", FLOATS, ids=lambda t: t.name)
def test_scatter_converts_as_gather_does(kernels, dst):
    src, factor = Type.E4M3, 0.3
    values = every_value(src).reshape(2, 8, 16)
    expected, _ = gathered(kernels, [dense(values, src, dst, factor)], whole(2, 8))
    cache = np.zeros((2, 8, 16), dtype=f"u{dst.itemsize}")
    copy = dense(cache, dst, src, factor)
    kernels.prepare([copy]).move("scatter", whole(2, 8), values.ctypes.data, values.nbytes, 1)
    np.testing.assert_array_equal(cache.reshape(-1), expected.view(cache.dtype))


def test_nan_keeps_its_sign(kernels):
    cache = np.array([0x7FC1, 0xFFC1, 0x7F81, 0xFF81] * 2, dtype=np.uint16).reshape(1, 1, 8)
    wire, _ = gathered(kernels, [dense(cache, Type.BF16, Type.E4M3)], whole(1, 1))
    assert wire.tolist() == [0x7F, 0xFF] * 4


def test_copies_begin_at_multiples_of_256():
    cache = np.zeros((4, 3, 5), dtype=np.uint8)
    copy = dense(cache, Type.RAW1, Type.RAW1)
    assert wire_offsets([copy, copy, copy], 3) == [0, 256, 512, 527]
    assert chunk_bytes([copy], 18) == 90 and chunk_bytes([copy, copy], 60) == 512 + 300
    assert chunk_bytes([], 5) == 0


@pytest.mark.parametrize("verb", ["gather", "scatter"])
def test_many_chunks_in_one_call_are_as_many_calls(kernels, verb):
    rng = np.random.default_rng(5)
    cache = rng.integers(0, 256, (6, 4, 96), dtype=np.uint8)
    given = rng.integers(0, 256, (3, 1024), dtype=np.uint8)
    segments = whole([4, 0, 5, 1, 3, 2], 4, unit=lambda i: i)
    found = []
    for together in (True, False):
        mine, wires = cache.copy(), given.copy()
        halves = (mine[:, :, :48], mine[:, :, 48:])
        prepared = kernels.prepare([dense(x, Type.RAW1, Type.RAW1) for x in halves])
        at = [wires[i].ctypes.data for i in (2, 0, 1)]
        size = 1024
        if together:
            sums = prepared.move(verb, segments, at, size, 6).sums
        else:
            calls = zip(np.split(segments, 3), at, strict=True)
            sums = sum(
                prepared.move(verb, some, [address], size, 6).sums for some, address in calls
            )
        found.append((mine, wires, sums))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (found[0][0] != cache).any() or (found[0][1] != given).any()


def test_types_are_the_same_on_both_sides_of_the_c_abi():
    csrc = Path(__file__).parents[2] / "csrc/kvc"
    listed = re.search(r"enum kvc_type \{(.*?)\};", (csrc / "abi.h").read_text(), re.DOTALL)[1]
    codes, code = {}, 0
    for name, given in re.findall(r"KVC_(\w+)(?: = (\d+))?,", listed):
        codes[name] = code = int(given or code + 1)
    assert codes == {kind.name: kind.value for kind in Type}
    rows = re.findall(r"ROW\((\w+), (\d+)\)", (csrc / "types.h").read_text())
    assert {name: int(nbytes) for name, nbytes in rows} == {k.name: k.itemsize for k in Type}


# ---- sums


def chunk(kernels, blocks=(2, 0, 1), content=48):
    """A small gathered chunk, one unit per block: (cache, copies, segments, wire, sums)."""
    rng = np.random.default_rng(1)
    cache = rng.integers(0, 256, (4, 4, content), dtype=np.uint8)
    copies = [dense(cache, Type.RAW1, Type.RAW1)] * 2
    segments = whole(blocks, 4, unit=lambda i: i)
    wire, sums = gathered(kernels, copies, segments, units=len(blocks))
    return SimpleNamespace(
        cache=cache, copies=copies, segments=segments, wire=wire, sums=sums, content=content
    )


def scattered_sums(kernels, c):
    into = np.zeros_like(c.cache)
    copies = [copy._replace(base=into.ctypes.data) for copy in c.copies]
    prepared = kernels.prepare(copies)
    return prepared.move("scatter", c.segments, c.wire.ctypes.data, c.wire.nbytes, len(c.sums)).sums


@pytest.mark.parametrize("content", [48, 33, 3])
def test_sums_of_scatter_are_those_of_gather(kernels, content):
    c = chunk(kernels, content=content)
    np.testing.assert_array_equal(scattered_sums(kernels, c), c.sums)
    assert len(set(c.sums.tolist())) == 3


def test_any_flipped_bit_changes_the_sum_of_its_unit_only(kernels):
    c = chunk(kernels)
    unit_of = np.repeat(np.arange(3), 4 * c.content)
    for at in range(0, 3 * 4 * c.content, 7):
        c.wire[at] ^= 1 << at % 8
        changed = np.flatnonzero(scattered_sums(kernels, c) != c.sums)
        assert changed.tolist() == [unit_of[at]]
        c.wire[at] ^= 1 << at % 8


def test_two_swapped_blocks_change_both_sums(kernels):
    c = chunk(kernels)
    n = 4 * c.content
    c.wire[:n], c.wire[n : 2 * n] = c.wire[n : 2 * n].copy(), c.wire[:n].copy()
    assert (scattered_sums(kernels, c) != c.sums).tolist() == [True, True, False]


def test_bytes_between_copies_are_not_summed(kernels):
    c = chunk(kernels, content=33)
    assert wire_offsets(c.copies, 12)[1] > 12 * 33
    c.wire[12 * 33] ^= 1
    np.testing.assert_array_equal(scattered_sums(kernels, c), c.sums)


# ---- refusals

BAD_SEGMENTS = {
    "block -1": [(0, 0, 4, 0), (-1, 0, 4, 0)],
    "block 4": [(4, 0, 4, 0)],
    "first token -1": [(0, -1, 2, 0)],
    "end 5": [(0, 2, 3, 0)],
    "token count -1": [(0, 2, -1, 0)],
    "token count 2147483647": [(0, 2, 2147483647, 0)],
    "unit 1": [(0, 0, 4, 0), (1, 0, 4, 1)],
    "unit -1": [(0, 0, 4, -1)],
    "wire has 4096 bytes": [(0, 0, 4, 0)] * 100,
}


@pytest.mark.parametrize("verb", ["gather", "scatter"])
@pytest.mark.parametrize("message", BAD_SEGMENTS)
def test_what_cannot_be_is_refused_before_a_byte_is_written(kernels, verb, message):
    cache, wire = np.full((4, 4, 16), 7, dtype=np.uint8), np.full(4096, 9, dtype=np.uint8)
    segments = np.array(BAD_SEGMENTS[message], dtype=np.int32)
    prepared = kernels.prepare([dense(cache, Type.RAW1, Type.RAW1)])
    with pytest.raises(GeometryError, match=message):
        prepared.move(verb, segments, wire.ctypes.data, wire.nbytes, 1)
    assert (cache == 7).all() and (wire == 9).all()


@pytest.mark.parametrize("counts", [(4, 4, 4), (3, 4, 1), (4, 4, 4, 3), (2, 4, 2)], ids=str)
@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("verb", ["gather", "scatter"])
def test_chunks_that_are_not_filled_equally_are_refused(kernels, verb, counts, chunks):
    cache, wires = np.full((4, 4, 16), 7, dtype=np.uint8), np.full((2, 1024), 9, dtype=np.uint8)
    segments = np.array([(i, 0, count, 0) for i, count in enumerate(counts)], dtype=np.int32)
    prepared = kernels.prepare([dense(cache, Type.RAW1, Type.RAW1)])
    at = [wire.ctypes.data for wire in wires][:chunks]
    with pytest.raises(GeometryError, match=f"do not fill {chunks} chunks equally"):
        prepared.move(verb, segments, at, 1024, 1)
    assert (cache == 7).all() and (wires == 9).all()


@pytest.mark.parametrize(
    "segments",
    [np.zeros((2, 3), np.int32), np.zeros(4, np.int32), np.zeros((1, 4), np.float32)],
    ids=["three columns", "one dimension", "floats"],
)
def test_segments_of_another_shape_are_refused(kernels, segments):
    prepared = kernels.prepare([])
    with pytest.raises(GeometryError, match="expected int32"):
        prepared.move("gather", segments, 0, 0, 1)


def test_a_block_id_beyond_int32_is_not_wrapped_around(kernels):
    with pytest.raises(GeometryError, match="beyond int32"):
        kernels.prepare([]).move("gather", np.array([[1 << 32, 0, 0, 0]]), 0, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "counts"),
        ({"num_blocks": 1 << 31}, "counts"),
        ({"token_tile": 3}, "must divide 4"),
        ({"content_tile": -1}, "must divide 16"),
        ({"kv_type": 255}, "is no type"),
        ({"wire_type": Type.RAW2}, "RAW types"),
        ({"factor": 2.0}, "RAW types"),
        ({"kv_type": Type.BF16, "wire_type": Type.FP16, "factor": float("nan")}, "finite"),
        ({"kv_type": Type.BF16, "wire_type": Type.FP16, "factor": 0.0}, "finite"),
        ({"token_stride": -1}, "strides"),
        ({"block_stride": 1 << 61}, "strides"),
    ],
)
def test_copies_that_cannot_be_are_refused(kernels, change, message):
    copy = dense(np.zeros((4, 4, 16), dtype=np.uint8), Type.RAW1, Type.RAW1)._replace(**change)
    with pytest.raises(GeometryError, match=message):
        kernels.prepare([copy])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"heads": 0}, -2),
        ({"token_tile": 3}, -2),
        ({"block_stride": 1 << 61}, -2),
        ({"kv_type": 255}, -1),
        ({"wire_type": Type.RAW2}, -1),
        ({"factor": float("inf")}, -7),
    ],
)
def test_the_library_checks_copies_too(change, error):
    kernels = MAKERS["base"]()
    copy = dense(np.zeros((4, 4, 16), dtype=np.uint8), Type.RAW1, Type.RAW1)
    copy = copy._replace(token_tile=4, content_tile=16)._replace(**change)
    table = copy_table([copy])
    assert kernels.call("gather", table.ctypes.data, 1, *(None, 0) * 2, 0, None, 0) == error
    assert kernels.explain(error) not in ("no error", "unknown error")


# ---- sizes and places


@pytest.mark.slow
def test_offsets_beyond_4_gib(kernels):
    """Only touched pages of the cache take memory."""
    stride, blocks = (3 << 30) + 32, 4
    with mmap.mmap(-1, stride * blocks) as memory:
        cache = np.frombuffer(memory, dtype=np.uint8)
        rng = np.random.default_rng(2)
        rows = rng.integers(0, 256, (blocks, 2, 32), dtype=np.uint8)
        for b in range(blocks):
            cache[b * stride : b * stride + 64] = rows[b].reshape(-1)
        copy = Copy(cache.ctypes.data, stride, 0, 32, 1, 1, 32, 2, blocks, Type.RAW1, Type.RAW1)
        wire, _ = gathered(kernels, [copy], whole([3, 0, 2], 2))
        np.testing.assert_array_equal(wire, rows[[3, 0, 2]].reshape(-1))
        kernels.prepare([copy]).move(
            "scatter", whole([1, 3, 0], 2), wire.ctypes.data, wire.nbytes, 1
        )
        np.testing.assert_array_equal(cache[stride : stride + 64], rows[3].reshape(-1))
        np.testing.assert_array_equal(cache[3 * stride : 3 * stride + 64], rows[0].reshape(-1))
        del cache, copy


@pytest.mark.slow
@pytest.mark.parametrize("wire_type", [Type.BF16, Type.E4M3], ids=lambda t: t.name)
def test_large_chunks_are_the_same(wire_type):
    """Above 1 MiB the library writes past the cache."""
    rng = np.random.default_rng(3)
    cache = rng.integers(0, 1 << 14, (40, 32, 1088), dtype=np.uint16)
    copies = [dense(cache, Type.BF16, wire_type, 0.5 if wire_type == Type.E4M3 else 1)]
    segments = whole(rng.permutation(40), 32, unit=lambda i: i % 3)
    expected, sums = gathered(PlainKernels(), copies, segments, units=3)
    wire, found = gathered(CpuKernels(), copies, segments, units=3)
    np.testing.assert_array_equal(wire, expected)
    np.testing.assert_array_equal(found, sums)


def test_many_runs_that_touch_are_one_but_units_stay_apart(kernels):
    cache = np.random.default_rng(4).integers(0, 256, (300, 2, 8), dtype=np.uint8)
    copies = [dense(cache, Type.RAW1, Type.RAW1)]
    segments = whole(300, 2, unit=lambda i: i % 2)
    wire, sums = gathered(kernels, copies, segments, units=2)
    np.testing.assert_array_equal(wire, cache.reshape(-1))
    _, expected = gathered(PlainKernels(), copies, segments, units=2)
    np.testing.assert_array_equal(sums, expected)


# ---- loading


def test_without_a_library_numpy_does_it_and_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(native, "LIB", tmp_path)
    native.say_fallback.cache_clear()
    assert load().name == "numpy" == load().name
    assert len(caplog.records) == 1 and "C++ compiler" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_asking_for_cuda_is_a_startup_error():
    with pytest.raises(ConfigError, match="CUDA"):
        load("cuda")
