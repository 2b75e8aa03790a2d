"""Compiles csrc/ into kvconnect/lib: libkvc_cpu, and where nvcc is, libkvc_cuda.

    python3 csrc/build_kernels.py    as setup.py does; needs neither setuptools nor anything else

CXX, NVCC              compilers (else c++, g++, clang++; nvcc on PATH or under CUDA_HOME)
KVCONNECT_BUILD_CUDA   0: never build libkvc_cuda; 1: fail where that is impossible
KVCONNECT_CUDA_ARCHITECTURES   as 75,90, instead of all in ARCHITECTURES that this nvcc knows

Both libraries are optional: without a compiler `kvconnect.ops` uses numpy. Plain C ABI and ctypes,
so one build serves every Python and every torch.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from older_glibc import stand_ins

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "kvc_cpu": ["csrc/kvc_cpu.cpp"],
    "kvc_cuda": ["csrc/kvc_cuda.cu"],
}
HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/kvc").iterdir())
# Code for 80 runs on 86, that for 100 on 103, and so on; 89 has fp8 in hardware, which 80 lacks.
ARCHITECTURES = ("75", "80", "89", "90", "100", "120")
CPP_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    # results must be those of torch, bit for bit; and loops with float additions vectorise
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # GCC 12 warns of its own AVX-512 headers (its bug 105593)
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"),
)


def architectures(nvcc: str) -> list[str]:
    """Those to build for; of ARCHITECTURES, only those that this nvcc knows."""
    if asked := os.environ.get("KVCONNECT_CUDA_ARCHITECTURES"):
        return [one.strip().removeprefix("sm_") for one in asked.split(",")]
    listed = _run(nvcc, "--list-gpu-arch", capture_output=True).stdout.decode().split()
    return [one for one in ARCHITECTURES if f"compute_{one}" in listed]


def cuda_flags(nvcc: str) -> list[str]:
    """Flags of nvcc: an SASS per architecture, and PTX of the newest for later ones."""
    found = architectures(nvcc)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in found]
    codes.append(f"-gencode=arch=compute_{found[-1]},code=compute_{found[-1]}")
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
    flags = ("-std=c++17", "-O3", "-fmad=false", "-shared", "-cudart=static", "--threads=0")
    return [*flags, *codes, host]


def compiler_of(name: str) -> str | None:
    """The compiler for a library, if there is one."""
    if name == "kvc_cpu":
        candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    else:
        homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
        candidates = [os.environ.get("NVCC", ""), "nvcc", *(f"{h}/bin/nvcc" for h in homes if h)]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def compile_library(name: str, target: Path) -> None:
    """Make ``target``, from build/ if the same was made before.

    Raises OSError without a compiler, CalledProcessError where it fails.
    """
    compiler = compiler_of(name)
    if compiler is None:
        raise OSError("no compiler found")
    flags = list(CPP_FLAGS) if name == "kvc_cpu" else cuda_flags(compiler)
    version = _run(compiler, "--version", capture_output=True).stdout
    inputs = [version, repr((flags, platform.machine())).encode()]
    sources = [*SOURCES[name], *HEADERS, "csrc/older_glibc.py"]
    inputs += [(ROOT / path).read_bytes() for path in sources]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    cached = ROOT / "build" / f"{name}-{key}.so"
    if not cached.exists():
        cached.parent.mkdir(exist_ok=True)
        made = cached.with_suffix(f".{os.getpid()}")
        with tempfile.TemporaryDirectory() as scratch:
            older = _stand_ins(Path(scratch)) if name == "kvc_cuda" else []
            _run(compiler, *flags, *SOURCES[name], *older, "-o", str(made))
        made.replace(cached)
    target.parent.mkdir(parents=True, exist_ok=True)
    # never into the file itself: a process that has loaded it would run what is half written
    fresh = target.with_suffix(f".{os.getpid()}")
    shutil.copyfile(cached, fresh)
    fresh.replace(target)


def try_compile(name: str, target: Path) -> None:
    """Make ``target`` if it can be made, else say in a line why not; see KVCONNECT_BUILD_CUDA."""
    wanted = os.environ.get("KVCONNECT_BUILD_CUDA", "") if name == "kvc_cuda" else ""
    if wanted == "0":
        return
    try:
        compile_library(name, target)
    except (OSError, subprocess.CalledProcessError) as error:
        if wanted == "1":
            raise
        target.unlink(missing_ok=True)  # none is better than one of other sources
        told = isinstance(error, subprocess.CalledProcessError)
        reason = f"{compiler_of(name)} failed, see above" if told else error
        print(f"kvconnect: lib{name} is not built: {reason}", file=sys.stderr)


def _stand_ins(folder: Path) -> list[str]:
    """What to link so that an older glibc than ours is enough; without them ours is needed."""
    try:
        return stand_ins(compiler_of("kvc_cpu") or "cc", folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"kvconnect: libkvc_cuda will need this machine's glibc: {error}", file=sys.stderr)
        return []


def _run(*command: str, capture_output: bool = False) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, check=True, cwd=ROOT, capture_output=capture_output)  # noqa: S603


if __name__ == "__main__":
    for library in SOURCES:
        try_compile(library, ROOT / "kvconnect/lib" / f"lib{library}.so")
