"""The kernels of libkvc_cuda (csrc/kvc_cuda.cu) with the interface of `copies`.

A `CudaKernels` works on a stream of its own, of the greatest priority; calls return at once. A
launch holds buffers until `CudaLaunch.done` was seen to be true, so each must be polled until then.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from kvconnect.errors import ConfigError, GeometryError, TransportError
from kvconnect.ops.copies import (
    Copy,
    Verb,
    Wires,
    as_segments,
    as_wires,
    check_segments,
    checked,
)
from kvconnect.ops.native import copy_table, open_library

NO_DEVICE, DEVICE_FAILED, NO_MEMORY, NO_CODE = -9, -10, -8, -13  # csrc/kvc/abi.h


class CudaLaunch:
    """A launch under way."""

    def __init__(self, kernels: "CudaKernels", handle: int, units: int) -> None:
        self._kernels = kernels
        self._handle: int | None = handle
        self._units = units
        self._sums = np.empty(0, dtype=np.uint64)

    def done(self) -> bool:
        """Whether all bytes are written; raises TransportError if the device failed."""
        if self._handle is None:
            return True
        state = self._kernels.state(self._handle)
        if state:
            if self._units:
                self._sums = self._kernels.take_sums(self._handle, self._units)
            self._kernels.release(self._handle)
            self._handle = None
        return state

    @property
    def sums(self) -> np.ndarray:
        """uint64 ``[units]``; valid once done."""
        assert self._handle is None, "sums are there once done() is true"
        return self._sums


class CudaPrepared:
    """Copies as libkvc_cuda wants them; see `kvconnect.ops.Prepared`."""

    def __init__(self, kernels: "CudaKernels", copies: Sequence[Copy]) -> None:
        self._kernels = kernels
        self._copies = [checked(copy) for copy in copies]
        self._table = copy_table(self._copies)

    def move(
        self, verb: Verb, segments: np.ndarray, wires: Wires, wire_bytes: int, units: int
    ) -> CudaLaunch:
        """See `kvconnect.ops.Prepared`."""
        found, at = as_segments(segments), as_wires(wires)
        table = (self._table.ctypes.data, len(self._table), found.ctypes.data, len(found))
        try:
            return self._kernels.launch(
                (verb == "gather", *table, at.ctypes.data, len(at), wire_bytes, units), units
            )
        except GeometryError:
            # says what was wrong
            check_segments(self._copies, found, len(at), wire_bytes, units)
            raise


class CudaKernels:
    """The kernels of libkvc_cuda on one device; see `kvconnect.ops.Kernels`."""

    name = "cuda"
    fast = True

    def __init__(self, device: int = 0, max_ctas: int = 0) -> None:
        """``max_ctas`` bounds every launch, so that compute goes on beside it; 0: no bound."""
        try:
            self._library = open_library("kvc_cuda")
        except OSError as error:
            raise ConfigError(
                f"no CUDA kernels: {error}; reinstall kvconnect where nvcc is on PATH"
            ) from error
        self._declare()
        self._device = device
        self._context = ctypes.c_void_p()
        failed = self._library.kvc_cuda_open(device, max_ctas, ctypes.byref(self._context))
        if failed == NO_CODE:
            number = self._library.kvc_cuda_architecture(device)
            raise ConfigError(
                f"CUDA device {device} is sm_{number}, for which libkvc_cuda was built without "
                f"code; reinstall kvconnect with KVCONNECT_CUDA_ARCHITECTURES={number} set and an "
                "nvcc on PATH that knows it"
            )
        if failed:
            count = self._library.kvc_cuda_device_count()
            raise ConfigError(f"CUDA device {device} of {count}: {self._explain(failed)}")

    def prepare(self, copies: Sequence[Copy]) -> CudaPrepared:
        """Check ``copies`` and put them in a table."""
        return CudaPrepared(self, copies)

    def copy_runs(self, dst: np.ndarray, src: np.ndarray, nbytes: np.ndarray) -> CudaLaunch:
        """Copy plain runs, uint64 ``[n]`` each, of device or pinned memory; has no sums."""
        arrays = [np.ascontiguousarray(a, dtype=np.uint64) for a in (dst, src, nbytes)]
        if len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 1:
            raise GeometryError(f"runs of {[a.shape for a in arrays]}, expected three equal [n]")
        call = (*(a.ctypes.data for a in arrays), len(arrays[0]))
        return self._begin(self._library.kvc_cuda_copy_runs, call, 0)

    def set_device(self) -> None:
        """Make this device the thread's current one for good: the first thing a thread does."""
        if self._library.kvc_cuda_make_current(self._device) < 0:
            self._fail(NO_DEVICE)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this device the thread's current one, for libraries that go by that."""
        before = self._library.kvc_cuda_make_current(self._device)
        if before < 0:
            self._fail(before)
        try:
            yield
        finally:
            self._library.kvc_cuda_restore(before)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> int:
        """Pin host memory that somebody else has mapped; returns CUDA's error, or 0."""
        return int(self._library.kvc_cuda_register(self._context, address, nbytes, read_only))

    def unregister(self, address: int) -> int:
        """Undo `register`, before the memory is unmapped; returns CUDA's error, or 0."""
        return int(self._library.kvc_cuda_unregister(self._context, address))

    @property
    def stream(self) -> int:
        """Handle of the stream on which everything runs."""
        return int(self._library.kvc_cuda_stream(self._context))

    def alloc(self, nbytes: int, *, pinned: bool) -> int:
        """Address of new host memory that is pinned, or of device memory; raises TransportError."""
        address = self._library.kvc_cuda_alloc(self._context, pinned, nbytes)
        if address is None:
            raise TransportError(f"no {nbytes} bytes of {'pinned' if pinned else 'device'} memory")
        return int(address)

    def free(self, address: int, *, pinned: bool) -> None:
        """Give back what `alloc` gave."""
        self._library.kvc_cuda_free(self._context, pinned, address)

    def close(self) -> None:
        """Wait for all launches, then give everything back. Idempotent."""
        self._library.kvc_cuda_close(self._context)
        self._context = ctypes.c_void_p()

    def launch(self, call: tuple[int, ...], units: int) -> CudaLaunch:
        """Start a gather or scatter; ``call`` as kvc_cuda_move has it."""
        return self._begin(self._library.kvc_cuda_move, call, units)

    def state(self, handle: int) -> bool:
        """Whether a launch is done."""
        state = self._library.kvc_cuda_done(handle)
        if state < 0:
            self._fail(state)
        return bool(state)

    def take_sums(self, handle: int, units: int) -> np.ndarray:
        """A copy of a launch's sums."""
        found = self._library.kvc_cuda_sums(handle)
        return np.ctypeslib.as_array(found, shape=(units,)).copy()

    def release(self, handle: int) -> None:
        """Let a launch's buffers be used again."""
        self._library.kvc_cuda_release(self._context, handle)

    def _begin(self, function: Any, arguments: tuple[int, ...], units: int) -> CudaLaunch:
        handle = ctypes.c_void_p()
        error = function(self._context, *arguments, ctypes.byref(handle))
        if error:
            self._fail(error)
        assert handle.value is not None
        return CudaLaunch(self, handle.value, units)

    def _fail(self, error: int) -> NoReturn:
        failed = error in (DEVICE_FAILED, NO_MEMORY, NO_DEVICE)
        raise (TransportError if failed else GeometryError)(self._explain(error))

    def _explain(self, error: int) -> str:
        return str(self._library.kvc_strerror(error).decode())

    def _declare(self) -> None:
        pointer, u32, u64, flag = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
        library, out = self._library, ctypes.POINTER(pointer)
        library.kvc_cuda_open.argtypes = (flag, flag, out)
        library.kvc_cuda_stream.argtypes = (pointer,)
        library.kvc_cuda_stream.restype = u64
        library.kvc_cuda_alloc.argtypes = (pointer, flag, u64)
        library.kvc_cuda_alloc.restype = pointer
        library.kvc_cuda_free.argtypes = (pointer, flag, pointer)
        library.kvc_cuda_close.argtypes = (pointer,)
        library.kvc_cuda_register.argtypes = (pointer, pointer, u64, flag)
        library.kvc_cuda_unregister.argtypes = (pointer, pointer)
        table = (pointer, u32) * 3
        library.kvc_cuda_move.argtypes = (pointer, flag, *table, u64, u32, out)
        library.kvc_cuda_copy_runs.argtypes = (*(pointer,) * 4, u64, out)
        library.kvc_cuda_done.argtypes = (pointer,)
        library.kvc_cuda_sums.argtypes = (pointer,)
        library.kvc_cuda_sums.restype = ctypes.POINTER(ctypes.c_uint64)
        library.kvc_cuda_release.argtypes = (pointer, pointer)
