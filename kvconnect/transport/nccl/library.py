"""libnccl by ctypes: which one, whether it will do, and a communicator of it (see `nccl`).

* The libnccl that this process has loaded already, torch's as a rule, so that there are never
  two; `find` says which, or why NCCL cannot be used.
* Communicators never block: what NCCL has begun is asked for with `Communicator.ready`. Only
  `Communicator.abort` waits, for kernels and NCCL's own threads: call it from a thread of its own.
* NCCL's results are translated here: what fails is a TransportError.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from kvconnect.errors import ConfigError, TransportError
from kvconnect.ops import native

NEEDED = 2_17_00  # the first with ncclConfig_t.maxCTAs; NCCL_VERSION_CODE before 2.9 was shorter
SUCCESS, IN_PROGRESS = 0, 7
UINT8 = 1
MAGIC = 0xCAFEBEEF
UNSET = -(1 << 31)
VARIABLES = ("KVCONNECT_NCCL_LIBRARY", "VLLM_NCCL_SO_PATH")
SONAME = "libnccl.so.2"


def spelt(code: int) -> str:
    """A version as NCCL's releases are called."""
    return f"{code // 10_000}.{code // 100 % 100}.{code % 100}"


class _Id(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_uint8 * 128),)


class _Config(ctypes.Structure):
    """ncclConfig_t as NCCL 2.17 had it; later ones only added fields, and go by ``size``."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


_PTR, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_MOVE = (_PTR, _SIZE, _INT, _INT, _PTR, _PTR)  # buffer, count, type, peer, communicator, stream
_SIGNATURES = {
    "ncclGetVersion": (ctypes.POINTER(_INT),),
    "ncclGetUniqueId": (ctypes.POINTER(_Id),),
    "ncclCommInitRankConfig": (ctypes.POINTER(_PTR), _INT, _Id, _INT, ctypes.POINTER(_Config)),
    "ncclCommGetAsyncError": (_PTR, ctypes.POINTER(_INT)),
    "ncclCommAbort": (_PTR,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": _MOVE,
    "ncclRecv": _MOVE,
    "ncclGetErrorString": (_INT,),
    "ncclGetLastError": (_PTR,),
}
_TEXTS = ("ncclGetErrorString", "ncclGetLastError")


Buffer = tuple[int, int]
"""(address, bytes) of device memory."""


class Nccl:
    """A libnccl that has what is needed; raises ConfigError if this one has not."""

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as e:
            raise ConfigError(f"NCCL cannot be loaded from {path}: {e}") from e
        missing = [name for name in _SIGNATURES if not hasattr(self._library, name)]
        if missing:
            raise ConfigError(f"{path} is no NCCL that will do: it lacks {', '.join(missing)}")
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_char_p if name in _TEXTS else _INT
        code = _INT()
        self.check(self._library.ncclGetVersion(ctypes.byref(code)), "ncclGetVersion")
        self.version = code.value
        if code.value < NEEDED:
            raise ConfigError(
                f"{path} is NCCL {spelt(code.value)}, expected at least {spelt(NEEDED)}; install "
                "a later torch, or point VLLM_NCCL_SO_PATH to a later libnccl"
            )

    def unique_id(self) -> bytes:
        """What both ranks of a new communicator are to be told; good for one."""
        made = _Id()
        self.check(self._library.ncclGetUniqueId(ctypes.byref(made)), "ncclGetUniqueId")
        return bytes(made.internal)

    def communicator(
        self, unique_id: bytes, rank: int, ranks: int = 2, max_ctas: int | None = None
    ) -> "Communicator":
        """Begin to make one on the thread's current device; raises TransportError."""
        config = _Config(ctypes.sizeof(_Config), MAGIC, NEEDED, 0, UNSET, UNSET, UNSET, None)
        if max_ctas is not None:
            config.min_ctas, config.max_ctas = 1, max_ctas
        handle, given = _PTR(), _Id.from_buffer_copy(unique_id)
        result = self._library.ncclCommInitRankConfig(
            ctypes.byref(handle), ranks, given, rank, ctypes.byref(config)
        )
        made = Communicator(self, self._library, handle)
        if result not in (SUCCESS, IN_PROGRESS):
            made.abort()
        self.check(result, "ncclCommInitRankConfig")
        return made

    def check(self, result: int, doing: str) -> None:
        """Raise TransportError unless NCCL says that it worked, or has begun."""
        if result in (SUCCESS, IN_PROGRESS):
            return
        says = self._library.ncclGetErrorString(result).decode(errors="replace")
        last = (self._library.ncclGetLastError(None) or b"").decode(errors="replace")
        raise TransportError(f"{doing}: {says}{f' ({last})' if last else ''}")


class Communicator:
    """One rank's end. One call at a time; the next only once `ready`."""

    def __init__(self, nccl: Nccl, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._nccl, self._library, self._handle = nccl, library, handle

    def ready(self) -> bool:
        """Whether what was begun is in place: the communicator itself, or work on its stream.

        Raises TransportError once something failed, whenever that shows.
        """
        state = _INT()
        asked = self._library.ncclCommGetAsyncError(self._handle, ctypes.byref(state))
        self._nccl.check(asked, "ncclCommGetAsyncError")
        self._nccl.check(state.value, "NCCL")
        return state.value == SUCCESS

    def move(self, stream: int, peer: int, send: Buffer | None, receive: Buffer | None) -> None:
        """Begin to send, to receive, or both at once, in ``stream``; raises TransportError."""
        self._nccl.check(self._library.ncclGroupStart(), "ncclGroupStart")
        try:
            for function, buffer in (("ncclSend", send), ("ncclRecv", receive)):
                if buffer is not None:
                    call = (*buffer, UINT8, peer, self._handle, stream)
                    self._nccl.check(getattr(self._library, function)(*call), function)
        finally:
            ended = self._library.ncclGroupEnd()
        self._nccl.check(ended, "ncclGroupEnd")

    def abort(self) -> None:
        """End it with all that is under way; kernels have left when this returns. Idempotent."""
        handle, self._handle = self._handle, _PTR()
        if handle:
            self._library.ncclCommAbort(handle)


def find(library: str = "") -> str:
    """Path of the libnccl to use; raises ConfigError with the reason if NCCL cannot be used.

    ``library`` if given; what a variable of `VARIABLES` names; what is loaded; that of the
    nvidia-nccl wheel; what the loader finds.
    """
    try:
        devices = native.open_library("kvc_cuda").kvc_cuda_device_count()
    except OSError as e:
        raise ConfigError(
            f"NCCL cannot be used without CUDA kernels: {e}; reinstall kvconnect where nvcc is "
            "on PATH"
        ) from e
    if not devices:
        raise ConfigError("NCCL cannot be used: there is no CUDA device, or no driver for one")
    path = library or next(_candidates(), SONAME)
    Nccl(path)
    return path


def _candidates() -> Iterator[str]:
    for variable in VARIABLES:
        if os.environ.get(variable):
            yield os.environ[variable]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")[2]
            if path.rpartition("/")[2].startswith("libnccl.so"):
                yield f"/{path}"
    with contextlib.suppress(ImportError):
        wheel = importlib.util.find_spec("nvidia.nccl")
        for folder in (wheel and wheel.submodule_search_locations) or ():
            if (found := Path(folder) / "lib" / SONAME).exists():
                yield str(found)
