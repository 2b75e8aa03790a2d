"""`load`, and the kernels of libkvc_cpu (csrc/kvc_cpu.cpp) behind the interface of `copies`."""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from kvconnect.errors import GeometryError
from kvconnect.ops.copies import (
    Copy,
    Kernels,
    Wires,
    as_segments,
    as_wires,
    check_segments,
    checked,
)
from kvconnect.ops.plain import PlainKernels, PlainLaunch

logger = logging.getLogger(f"vllm.{__name__}")

LIB = Path(__file__).parents[1] / "lib"
ABI_VERSION = 3

# kvc_copy of csrc/kvc/abi.h
COPY = np.dtype(
    [("base", "u8")]
    + [(name, "i8") for name in ("block_stride", "head_stride")]
    + [(name, "i8") for name in ("token_stride", "token_outer")]
    + [(name, "i8") for name in ("content_stride", "content_outer")]
    + [(name, "u4") for name in ("token_tile", "content_tile", "heads", "content")]
    + [(name, "u4") for name in ("block_tokens", "num_blocks", "kv_type", "wire_type")]
    + [("factor", "f4"), ("reserved", "u4")]
)


def load(
    device: Literal["cpu", "cuda"] = "cpu",
    *,
    index: int = 0,
    threads: int = 1,
    max_ctas: int = 0,
    stream: int | None = None,
) -> Kernels:
    """The best kernels for memory of ``device``: compiled ones, else numpy and torch for CPU.

    ``threads`` are those of a CPU call; ``index`` is that of the CUDA device, whose launches
    take at most ``max_ctas`` CTAs (0: as many as fit) and go to ``stream``, or one of their own.
    Raises ConfigError if it cannot be used.
    """
    if device == "cuda":
        from kvconnect.ops.cuda import CudaKernels

        return CudaKernels(index, max_ctas, stream)
    try:
        return CpuKernels(threads)
    except OSError as error:
        say_fallback(str(error))
        return PlainKernels()


@functools.cache
def say_fallback(error: str) -> None:
    logger.warning(
        "KV is gathered by numpy, which is many times slower: %s; "
        "reinstall kvconnect where a C++ compiler is",
        error,
    )


def open_library(name: str) -> ctypes.CDLL:
    """A library of this package; raises OSError if it is absent or does not fit."""
    path = LIB / f"lib{name}.so"
    library = ctypes.CDLL(os.fspath(path))
    if library.kvc_abi_version() != ABI_VERSION:
        raise OSError(f"{path.name} has ABI {library.kvc_abi_version()}, expected {ABI_VERSION}")
    library.kvc_strerror.restype = ctypes.c_char_p
    return library


def copy_table(copies: Sequence[Copy]) -> np.ndarray:
    """``copies``, which were `checked`, as the C ABI wants them."""
    table = np.zeros(len(copies), COPY)
    for name in Copy._fields:
        table[name] = [getattr(copy, name) for copy in copies]
    return table


class CpuPrepared:
    """Copies as libkvc_cpu wants them; see `kvconnect.ops.Prepared`."""

    def __init__(self, kernels: "CpuKernels", copies: Sequence[Copy]) -> None:
        self._kernels = kernels
        self._copies = [checked(copy) for copy in copies]
        self._table = copy_table(self._copies)

    def gather(
        self,
        segments: np.ndarray,
        wires: Wires,
        wire_bytes: int,
        units: int,
        *,
        checksum: bool = True,
        after: int | None = None,  # noqa: ARG002 - nothing to wait for
    ) -> PlainLaunch:
        """Cache → wire."""
        return self._call("gather", as_segments(segments), wires, wire_bytes, units, checksum)

    def scatter(
        self,
        segments: np.ndarray,
        wires: Wires,
        wire_bytes: int,
        units: int,
        *,
        checksum: bool = True,
        after: int | None = None,  # noqa: ARG002 - nothing to wait for
    ) -> PlainLaunch:
        """Wire → cache."""
        return self._call("scatter", as_segments(segments), wires, wire_bytes, units, checksum)

    def _call(
        self,
        verb: str,
        segments: np.ndarray,
        wires: Wires,
        wire_bytes: int,
        units: int,
        checksum: bool,
    ) -> PlainLaunch:
        at = as_wires(wires)
        sums = np.empty(units if checksum else 0, dtype=np.uint64)
        error = self._kernels.call(
            verb,
            *(self._table.ctypes.data, len(self._table)),
            *(segments.ctypes.data, len(segments)),
            *(at.ctypes.data, len(at), wire_bytes),
            *(sums.ctypes.data if checksum else None, units),
        )
        if error:
            # says what was wrong
            check_segments(self._copies, segments, len(at), wire_bytes, units)
            raise GeometryError(self._kernels.explain(error))
        return PlainLaunch(sums)


class CpuKernels:
    """The kernels of libkvc_cpu; see `kvconnect.ops.Kernels`."""

    def __init__(self, threads: int = 1, isa: str | None = None) -> None:
        self._library = open_library("kvc_cpu")
        self._threads = threads
        pointer, u32, u64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
        common = (*(pointer, u32) * 3, u64, pointer, u32)
        for verb in ("gather", "scatter"):
            getattr(self._library, f"kvc_{verb}").argtypes = (*common, ctypes.c_int)
            getattr(self._library, f"kvc_grid_{verb}").argtypes = (*common, u32, pointer)
        self._library.kvc_isa.restype = ctypes.c_char_p
        if isa is not None and self._library.kvc_use_isa(isa.encode()):
            raise OSError(f"this CPU has no {isa}")
        self.name = f"cpu:{self._library.kvc_isa().decode()}"

    def prepare(self, copies: Sequence[Copy]) -> CpuPrepared:
        """Check ``copies`` and put them in a table."""
        return CpuPrepared(self, copies)

    def call(self, verb: str, *arguments: int | None) -> int:
        """Call the library's ``verb``; its error or 0."""
        return int(getattr(self._library, f"kvc_{verb}")(*arguments, self._threads))

    def explain(self, error: int) -> str:
        """What an error of `call` means."""
        return str(self._library.kvc_strerror(error).decode())


class GridKernels(CpuKernels):
    """The CUDA kernels' code, run on the CPU lane after lane; for tests, and slow."""

    def __init__(self, warps: int = 5) -> None:
        super().__init__()
        self._warps = warps
        self.name = "grid"
        self.paths = np.zeros(1, dtype=np.uint32)
        """Bit n is set once a call took path n of csrc/kvc/grid.h."""

    def call(self, verb: str, *arguments: int | None) -> int:
        """Call the library's grid of ``verb``; its error or 0."""
        function = getattr(self._library, f"kvc_grid_{verb}")
        return int(function(*arguments, self._warps, self.paths.ctypes.data))
