"""One library that is both libkvc_cuda and libnccl, on a CPU: see unit/fake_cuda, unit/fake_nccl.

`build` makes it, `use` makes this process use it: device memory is host memory then.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

from kvconnect.geometry.blocks import Region
from kvconnect.ops import native

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FAULTS = ("init", "silent", "deaf", "async", "abort_ms")


def build(folder, *flags):
    """Make it in ``folder``, which `use` wants. ``flags`` go before all others."""
    fakes = [f"-I{HERE / 'unit' / name}" for name in ("fake_cuda", "fake_nccl")]
    sources = [HERE.parent / "csrc/kvc_cuda.cu", HERE / "unit/fake_nccl/fake_nccl.cpp"]
    made = Path(folder) / "libkvc_cuda.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-x", "c++"]
    command = [COMPILER, *flags, *options, *fakes, *map(str, sources), "-o", str(made)]
    subprocess.run(command, check=True)
    (made.parent / "libnccl.so.2").symlink_to(made.name)


class FakeGpu:
    """The library that is in use, for its faults and counters."""

    def __init__(self, folder):
        self.library = ctypes.CDLL(os.fspath(Path(folder) / "libnccl.so.2"))
        self.library.kvc_fake_nccl.argtypes = (ctypes.c_char_p, ctypes.c_int)

    def set(self, **faults):
        for name, value in faults.items():
            self.library.kvc_fake_nccl(name.encode(), value)

    def get(self, name):
        return self.library.kvc_fake_nccl(name.encode(), -1)

    def reset(self):
        self.library.kvc_fake_reset()
        self.library.kvc_fake_set_device(0)  # as an engine's thread: it has a context
        self.set(version=21701, aborted=0, **dict.fromkeys(FAULTS, 0))


def use(folder, monkeypatch=None):
    """From now on, kvconnect finds the fakes in ``folder``."""
    if monkeypatch is None:  # a process of its own
        native.LIB = Path(folder)
    else:
        monkeypatch.setattr(native, "LIB", Path(folder))
    fake = FakeGpu(folder)
    fake.reset()
    return fake


def options(folder, **more):
    """Of the nccl transport."""
    return {"library": os.fspath(Path(folder) / "libnccl.so.2"), **more}


def as_device(regions, device=0):
    """Host memory, said to be a device's."""
    return [Region(r.address, r.nbytes, "VRAM", device) for r in regions]
