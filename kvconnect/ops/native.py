"""`load`, and the kernels of libkvc_cpu (csrc/kvc_cpu.cpp) with the interface of `copies`."""

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
    DoneLaunch,
    Kernels,
    Verb,
    Wires,
    as_segments,
    as_wires,
    check_segments,
    checked,
)

logger = logging.getLogger(f"vllm.{__name__}")

LIB = Path(__file__).parents[1] / "lib"
ABI_VERSION = 4

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

# kvc_move of csrc/kvc_cpu.cpp
MOVE_ARGUMENTS = (
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_uint32) * 3,
    *(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32),
)


def load(device: Literal["cpu", "cuda"] = "cpu", *, index: int = 0, max_ctas: int = 0) -> Kernels:
    """The best kernels for memory of ``device``: compiled ones, else numpy and torch for CPU.

    ``index`` is that of the CUDA device, whose launches take at most ``max_ctas`` CTAs (0: as
    many as fit). Raises ConfigError if it cannot be used.
    """
    if device == "cuda":
        from kvconnect.ops.cuda import CudaKernels

        return CudaKernels(index, max_ctas)
    try:
        return CpuKernels()
    except OSError as error:
        from kvconnect.ops.plain import PlainKernels

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

    def move(
        self, verb: Verb, segments: np.ndarray, wires: Wires, wire_bytes: int, units: int
    ) -> DoneLaunch:
        """See `kvconnect.ops.Prepared`."""
        found, at = as_segments(segments), as_wires(wires)
        sums = np.empty(units, dtype=np.uint64)
        error = self._kernels.call(
            verb,
            *(self._table.ctypes.data, len(self._table)),
            *(found.ctypes.data, len(found)),
            *(at.ctypes.data, len(at), wire_bytes),
            *(sums.ctypes.data, units),
        )
        if error:
            # says what was wrong
            check_segments(self._copies, found, len(at), wire_bytes, units)
            raise GeometryError(self._kernels.explain(error))
        return DoneLaunch(sums)


class CpuKernels:
    """The kernels of libkvc_cpu; see `kvconnect.ops.Kernels`."""

    fast = True

    def __init__(self, isa: str | None = None) -> None:
        """``isa`` names an instruction set; the best one of this CPU is taken without."""
        self._library = open_library("kvc_cpu")
        self._library.kvc_move.argtypes = MOVE_ARGUMENTS
        self._library.kvc_isa.restype = ctypes.c_char_p
        if isa is not None and self._library.kvc_use_isa(isa.encode()):
            raise OSError(f"this CPU has no {isa}")
        self.name = f"cpu:{self._library.kvc_isa().decode()}"

    def prepare(self, copies: Sequence[Copy]) -> CpuPrepared:
        """Check ``copies`` and put them in a table."""
        return CpuPrepared(self, copies)

    def call(self, verb: Verb, *arguments: int) -> int:
        """Call the library's kvc_move; its error or 0."""
        return int(self._library.kvc_move(verb == "gather", *arguments))

    def explain(self, error: int) -> str:
        """What an error of `call` means."""
        return str(self._library.kvc_strerror(error).decode())
