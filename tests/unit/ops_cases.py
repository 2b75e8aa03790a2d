"""Random KV caches and segments, for the tests of kvconnect.ops on CPU and GPU.

A `Case` says where the parts of a cache are, relative to one buffer; buffers are made by whoever
runs it. Its repr is its seed.
"""

import ctypes
import functools
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvconnect.ops import NUMBERS, Copy, Type, chunk_bytes
from kvconnect.ops.copies import checked, span
from kvconnect.ops.native import MOVE_ARGUMENTS, CpuKernels
from kvconnect.ops.plain import PlainKernels

FLOATS = tuple(NUMBERS.values())
RAWS = tuple(kind for kind in Type if kind.is_raw)
LAYOUTS = ("BHNC", "BNHC", "HBNC", "BHCN", "HNBC", "NBHC", "amx K", "amx V")
GUARD = 64


@dataclass
class Case:
    """Copies whose bases are offsets into a buffer of ``nbytes``, and segments."""

    seed: int
    copies: list[Copy]
    nbytes: int
    segments: np.ndarray
    units: int
    chunks: int = 1

    def __repr__(self):
        return f"make_case({self.seed})"

    def at(self, address):
        """The copies of a cache whose buffer is at ``address``."""
        return [c._replace(base=c.base + address) for c in self.copies]

    @property
    def wire_bytes(self):
        """Of a chunk."""
        return chunk_bytes(self.copies, int(self.segments[:, 2].sum()) // self.chunks)

    @property
    def stride(self):
        """From one chunk's wire to the next one's: with a guard, and aligned as the first."""
        return -(-self.wire_bytes // GUARD) * GUARD + GUARD


def make_case(seed, *, aligned=False, layouts=LAYOUTS):
    """A case out of everything that a call may be; ``aligned``: elements at their multiples."""
    rng = random.Random(seed)
    num_blocks, block_tokens = rng.randint(1, 9), rng.choice((1, 2, 16, 16, 32, 48, 64))
    copies, at = [], GUARD
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        copy = _one_copy(rng, num_blocks, block_tokens, rng.choice(layouts))
        if aligned:
            at = -(-at // 16) * 16
        elif rng.random() < 0.3:
            at += rng.randrange(16)
        copy = copy._replace(base=at)
        at += span(checked(copy)) + rng.choice((0, 1, 16, 64)) * (not aligned)
        copies.append(_sliced(rng, copy))
    units = rng.randint(1, 4)
    segments, chunks = make_segments(rng, num_blocks, block_tokens, units), 1
    if rng.random() < 0.3:
        segments, chunks = make_chunks(rng, num_blocks, block_tokens, units)
    return Case(seed, copies, at + GUARD, segments, units, chunks)


def make_rows(row_bytes, order, *, heads=8, first=0, v_first=False):
    """K and V side by side in each token, a megabyte of them: blocks whole, cut, and in sequence.

    ``order``: HND or NHD; ``first``: where K begins, from a multiple of 64; ``v_first``: of the
    two on the wire.
    """
    rng = random.Random(row_bytes)
    tokens, both = 16, 2 * row_bytes
    block = tokens * heads * both
    num_blocks = (2 << 20) // block
    head, token = (tokens * both, both) if order == "HND" else (both, heads * both)
    shape = (2, heads, row_bytes // 2, tokens, num_blocks, Type.RAW2, Type.RAW2)
    k = Copy(GUARD + first, block, head, token, *shape)
    v = k._replace(base=k.base + row_bytes)
    ids = rng.sample(range(num_blocks), num_blocks // 2)
    ids += sorted(set(range(num_blocks)) - set(ids))
    cuts = [(one, *rng.choice([(0, tokens), (0, tokens), (0, 5), (7, 9)])) for one in ids]
    segments = np.array([(*cut, i % 3) for i, cut in enumerate(cuts)], dtype=np.int32)
    copies = [v, k] if v_first else [k, v]
    return Case(row_bytes, copies, num_blocks * block + 3 * GUARD, segments, 3)


def _one_copy(rng, num_blocks, block_tokens, layout):
    kv_type, wire_type, factor = rng.choice(FLOATS), rng.choice(FLOATS), rng.choice((1, 0.5, 3.7))
    if rng.random() < 0.5:
        kv_type = wire_type = rng.choice(RAWS)
        factor = 1
    item, heads = kv_type.itemsize, rng.choice((1, 1, 2, 3, 8))
    content = rng.choice((1, 2, 3, 7, 8, 16, 33, 64, 80, 128, 576))
    more = {}
    if layout.startswith("amx"):
        return _amx(layout, rng, kv_type, wire_type, (num_blocks, block_tokens, factor))
    sizes = {"B": num_blocks, "H": heads, "N": block_tokens, "C": content}
    strides, step = {}, item
    for dim in reversed(layout):
        if dim != layout[-1]:
            step += rng.choice((0, 0, 0, item, 3 * item))  # rows need not touch
        strides[dim] = step
        step *= sizes[dim]
    return Copy(
        *(0, strides["B"], strides["H"], strides["N"], strides["C"]),
        *(heads, content, block_tokens, num_blocks, kv_type, wire_type, factor),
        **more,
    )


def _amx(layout, rng, kv_type, wire_type, rest):
    """As vLLM packs K and V for Intel AMX: rows of 64 bytes, `ways` elements to 4 bytes."""
    num_blocks, block_tokens, factor = rest
    item = kv_type.itemsize
    ways = max(4 // item, 1)
    content = rng.choice((16, 32, 64)) * ways
    tokens = block_tokens
    if layout == "amx K":
        tile, more = 16 if tokens % 16 == 0 else 1, {"content_tile": ways}
        token = (ways * item, tile * content * item)
        of = (item, tile * ways * item)
    else:
        tile, more = ways if tokens % ways == 0 else 1, {"content_tile": 16}
        token = (item, 16 * tile * item)
        of = (tile * item, 16 * tokens * item)
    head = tokens * content * item
    heads = rng.choice((1, 3))
    return Copy(
        *(0, heads * head, head, token[0], of[0], heads, content, tokens, num_blocks),
        *(kv_type, wire_type, factor, tile, token[1]),
        **more,
        content_outer=of[1],
    )


def _sliced(rng, copy):
    """Only some heads."""
    first = rng.randrange(copy.heads)
    return copy._replace(
        base=copy.base + first * copy.head_stride, heads=rng.randint(1, copy.heads - first)
    )


def make_segments(rng, num_blocks, block_tokens, units, *, repeat=True):
    """Whole blocks, slices of blocks, and nothing; without ``repeat`` no token twice."""
    ids = [rng.randrange(num_blocks) for _ in range(rng.choice((0, 1, 2, 5, 9)))]
    if not repeat or rng.random() < 0.5:
        ids = rng.sample(range(num_blocks), min(len(ids), num_blocks))
    if rng.random() < 0.3:
        ids.sort()
    segments = []
    for block in ids:
        token, count = 0, block_tokens
        if rng.random() < 0.4:
            token = rng.randrange(block_tokens)
            count = rng.randint(0, block_tokens - token)
        segments.append((block, token, count, rng.randrange(units)))
    return np.array(segments, dtype=np.int32).reshape(-1, 4)


def make_chunks(rng, num_blocks, block_tokens, units):
    """Segments of several chunks, and how many: some blocks each, cut in two; no token twice."""
    each = rng.randint(1, num_blocks)
    chunks, ids = num_blocks // each, rng.sample(range(num_blocks), num_blocks)
    segments = []
    for chunk in range(chunks):
        found = []
        for block in ids[chunk * each : (chunk + 1) * each]:
            cut = rng.choice((0, block_tokens, rng.randint(0, block_tokens)))
            for token, count in ((0, cut), (cut, block_tokens - cut)):
                found.append((block, token, count, rng.randrange(units)))
        segments += rng.sample(found, len(found))
    return np.array(segments, dtype=np.int32), chunks


def distinct(case, rng):
    """The same case, but no token twice: scatter's result does not depend on an order."""
    if not case.copies or case.chunks > 1:
        return case
    first = case.copies[0]
    segments = make_segments(rng, first.num_blocks, first.block_tokens, case.units, repeat=False)
    return Case(case.seed, case.copies, case.nbytes, segments, case.units)


@functools.cache
def grid_library():
    """tests/unit/kvc_grid_cpu.cpp as a library; raises OSError without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler")
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "libkvc_grid.so"
        flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off")
        include = f"-I{here.parents[1] / 'csrc'}"
        source = str(here / "kvc_grid_cpu.cpp")
        subprocess.run([compiler, *flags, include, source, "-o", str(made)], check=True)
        return ctypes.CDLL(str(made))


class GridKernels(CpuKernels):
    """The CUDA kernels' code, run on the CPU lane after lane. Slow."""

    def __init__(self, warps=5):
        super().__init__()
        self.name = "grid"
        self._move = grid_library().kvc_grid_move
        self._move.argtypes = (*MOVE_ARGUMENTS, ctypes.c_uint32, ctypes.c_void_p)
        self._warps = warps
        self.paths = np.zeros(1, dtype=np.uint32)
        """Bit n is set once a call took path n of csrc/kvc/grid.h."""

    def call(self, verb, *arguments):
        return self._move(verb == "gather", *arguments, self._warps, self.paths.ctypes.data)


class HostMemory:
    """Buffers where the CPU's kernels want them."""

    def __init__(self, array):
        self.array = array.copy()
        self.address = self.array.ctypes.data

    def read(self):
        """What is there now."""
        return self.array


class AlignedMemory(HostMemory):
    """The same, at a multiple of 64 bytes, as torch's."""

    def __init__(self, array):
        whole = np.empty(array.nbytes + GUARD, np.uint8)
        start = -whole.ctypes.data % GUARD
        self.array = whole[start : start + array.nbytes]
        self.array[:] = array
        self.address = self.array.ctypes.data


def check_equal(kernels, case, verb, memory=HostMemory):
    """``kernels`` do what the oracle does, and write nothing else."""
    rng = np.random.default_rng(case.seed)
    cache = rng.integers(0, 256, case.nbytes, dtype=np.uint8)
    wire = rng.integers(0, 256, GUARD + case.chunks * case.stride, dtype=np.uint8)
    mine = memory(cache), memory(wire)
    theirs = HostMemory(cache), HostMemory(wire)
    found = _run(kernels, case, verb, *mine)
    expected = _run(PlainKernels(), case, verb, *theirs)
    for ours, oracle, what in zip(mine, theirs, ("cache", "wire"), strict=True):
        np.testing.assert_array_equal(ours.read(), oracle.read(), f"{case!r}: {what}")
    np.testing.assert_array_equal(found, expected, f"{case!r}: sums")


def _run(kernels, case, verb, cache, wire):
    wires = [wire.address + GUARD + i * case.stride for i in range(case.chunks)][::-1]
    prepared = kernels.prepare(case.at(cache.address))
    launch = prepared.move(verb, case.segments, wires, case.wire_bytes, case.units)
    while not launch.done():
        pass
    return launch.sums


def every_value(kind):
    """All bit patterns of a type, or many of a wide one, the special ones too."""
    if kind is not Type.FP32:
        return np.arange(1 << (8 * kind.itemsize), dtype=f"u{kind.itemsize}")
    rng = np.random.default_rng(0)
    special = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001])
    # around every tie and limit of the small types: the upper half with lower halves near a tie
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    near = [upper | np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    some = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    found = np.concatenate([special.astype(np.uint32), special.astype(np.uint32) | 1 << 31, *near])
    found = np.concatenate([found, some])
    return found[: len(found) // 8 * 8].astype(np.uint32)


def by_torch(bits, src, dst, factor):
    """(bits, isnan) as the issue defines a conversion."""
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[src.itemsize]
    value = torch.from_numpy(bits.view(signed)).view(getattr(torch, src.torch_name)).float()
    value = value * torch.tensor(factor, dtype=torch.float32)
    value = value.clamp(-dst.largest, dst.largest)
    into = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dst.itemsize]
    made = value.to(getattr(torch, dst.torch_name)).view(into).numpy().view(f"u{dst.itemsize}")
    return made, value.isnan().numpy()
