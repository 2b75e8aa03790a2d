"""Builds the kernels of csrc/ into kvconnect/lib; everything else is in pyproject.toml.

Both libraries are optional: without a compiler the install succeeds and `kvconnect.ops` uses
numpy. Plain C ABI and ctypes, so one build serves every Python and every torch.

CXX, NVCC              compilers (else c++, g++, clang++; nvcc on PATH or under CUDA_HOME)
KVCONNECT_BUILD_CUDA   0: never build libkvc_cuda; 1: fail where that is impossible
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = {
    "kvc_cpu": ["csrc/kvc_cpu.cpp", "csrc/kvc_grid_cpu.cpp"],
    "kvc_cuda": ["csrc/kvc_cuda.cu"],
}
HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/kvc").iterdir())
ARCHITECTURES = ("80", "90", "100", "120")
CPP_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    # results must be those of torch, bit for bit; and loops with float additions vectorise
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"),
)


def cuda_flags() -> list[str]:
    """Flags of nvcc: an SASS per architecture, and PTX of the newest for later ones."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas"
    flags = ("-std=c++17", "-O3", "-fmad=false", "-shared", "-cudart=static", "--threads=0")
    return [*flags, *codes, f"-Xcompiler={host}"]


def compiler_of(name: str) -> str | None:
    """The compiler for a library, if there is one."""
    if name == "kvc_cpu":
        candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    else:
        homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
        candidates = [os.environ.get("NVCC", ""), "nvcc", *(f"{h}/bin/nvcc" for h in homes if h)]
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def run(*command: str, capture_output: bool = False) -> "subprocess.CompletedProcess[bytes]":
    """Run a compiler; raises CalledProcessError."""
    return subprocess.run(command, check=True, cwd=ROOT, capture_output=capture_output)  # noqa: S603


def compile_library(name: str, compiler: str, target: Path) -> None:
    """Make ``target``, from build/ if the same was made before."""
    flags = list(CPP_FLAGS) if name == "kvc_cpu" else cuda_flags()
    version = run(compiler, "--version", capture_output=True).stdout
    inputs = [version, repr((flags, platform.machine())).encode()]
    inputs += [(ROOT / path).read_bytes() for path in (*SOURCES[name], *HEADERS)]
    key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    cached = ROOT / "build" / f"{name}-{key}.so"
    if not cached.exists():
        cached.parent.mkdir(exist_ok=True)
        made = cached.with_suffix(f".{os.getpid()}")
        run(compiler, *flags, *SOURCES[name], "-o", str(made))
        made.replace(cached)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(cached, target)


class BuildLibraries(build_ext):
    """Compiles without Python's flags and names; a missing compiler is one line, no failure."""

    def get_ext_filename(self, fullname: str) -> str:
        """kvconnect.lib.kvc_cpu → kvconnect/lib/libkvc_cpu.so."""
        *parents, name = fullname.split(".")
        return os.path.join(*parents, f"lib{name}.so")

    def build_extension(self, ext: Extension) -> None:
        """Compile one library, or say why not."""
        name = ext.name.rpartition(".")[2]
        wanted = os.environ.get("KVCONNECT_BUILD_CUDA", "") if name == "kvc_cuda" else ""
        if wanted == "0":
            return
        compiler = compiler_of(name)
        try:
            if compiler is None:
                raise OSError("no compiler found")
            compile_library(name, compiler, Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            # none is better than one of other sources
            (ROOT / "kvconnect/lib" / f"lib{name}.so").unlink(missing_ok=True)
            reason = error if compiler is None else f"{compiler} failed, see above"
            print(f"kvconnect: lib{name} is not built: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: into kvconnect/lib, which is no package and may not exist."""
        (ROOT / "kvconnect/lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries are tied to a platform, not to a Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(f"kvconnect.lib.{name}", sources, depends=HEADERS, optional=True)
        for name, sources in SOURCES.items()
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
