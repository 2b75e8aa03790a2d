"""Builds the kernels of csrc/ into kvconnect/lib; everything else is in pyproject.toml.

What is built, and when, is said by csrc/build_kernels.py.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_GLIBC = 28  # the minor version; nothing is tested with an older one
sys.path.insert(0, str(ROOT / "csrc"))

from build_kernels import HEADERS, SOURCES, try_compile  # noqa: E402


class BuildLibraries(build_ext):
    """Compiles without Python's flags and names."""

    def get_ext_filename(self, fullname: str) -> str:
        """kvconnect.lib.kvc_cpu → kvconnect/lib/libkvc_cpu.so."""
        *parents, name = fullname.split(".")
        return os.path.join(*parents, f"lib{name}.so")

    def build_extension(self, ext: Extension) -> None:
        """Compile one library, or say why not."""
        if not self.editable_mode:
            name = ext.name.rpartition(".")[2]
            try_compile(name, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        """For an editable install: to where they are loaded from, so that none goes stale."""
        for name in SOURCES:
            try_compile(name, ROOT / "kvconnect/lib" / f"lib{name}.so")


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries are tied to a platform, not to a Python.

    The platform is the oldest glibc that has all symbols which they ask for, by manylinux's names.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag; it is asked for when the libraries have been built."""
        platform = super().get_tag()[2]
        libraries = list(Path(self.bdist_dir).glob("kvconnect/lib/*.so"))
        if platform.startswith("linux_") and libraries:
            found = (re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes()) for path in libraries)
            newest = max(OLDEST_GLIBC, *(int(minor) for minors in found for minor in minors))
            platform = platform.replace("linux_", f"manylinux_2_{newest}_")
        return "py3", "none", platform


setup(
    ext_modules=[
        Extension(f"kvconnect.lib.{name}", sources, depends=HEADERS, optional=True)
        for name, sources in SOURCES.items()
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
