"""Lets a library that is linked here be loaded where glibc is older than 2.34.

glibc 2.34 took libpthread, libdl and librt into libc and gave their functions new versions: what is
linked there, as NVIDIA's static runtime is into libkvc_cuda, asks for ``pthread_create`` of
GLIBC_2.34, though each newer glibc still has that of GLIBC_2.2.5. A linker takes a function from
the first library that has it. So `stand_ins` makes three libraries of the old names, with the
functions in their old versions and nothing in them, to be linked before libc. At run time glibc's
own are used.
"""

import re
import subprocess
from pathlib import Path

LIBRARIES = {
    "libpthread.so.0": ("pthread_", "__pthread_", "sem_"),
    "libdl.so.2": ("dl",),
    "librt.so.1": ("shm_",),
}
"""Names before 2.34, and how the names of their functions begin."""
NEW = (2, 29)


def stand_ins(compiler: str, folder: Path) -> list[str]:
    """Paths of the three libraries, made in ``folder``; none where glibc is old, or not in use.

    Raises OSError or CalledProcessError.
    """
    versions = _versions(compiler)
    made = []
    for library, beginnings in LIBRARIES.items():
        old: dict[str, list[str]] = {}
        for function, (default, *others) in versions.items():
            if function.startswith(beginnings) and default >= NEW and others:
                old.setdefault("GLIBC_" + ".".join(map(str, max(others))), []).append(function)
        if old:
            made.append(_stand_in(compiler, folder, library, old))
    return made


def _versions(compiler: str) -> "dict[str, list[tuple[int, ...]]]":
    """Of each function of this machine's libc its default version, and then its older ones."""
    libc = _run(compiler, "-print-file-name=libc.so.6").strip()
    listed = _run("nm", "-D", "--with-symbol-versions", libc)
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, at, number in re.findall(r" T (\w+)(@@?)GLIBC_([\d.]+)$", listed, re.M):
        known = found.setdefault(name, [])
        known.insert(0 if at == "@@" else len(known), tuple(map(int, number.split("."))))
    return found


def _stand_in(compiler: str, folder: Path, library: str, functions: "dict[str, list[str]]") -> str:
    path = folder / f"{library.partition('.')[0]}.so"  # nvcc takes no file that ends with .0
    source, script = path.with_suffix(".c"), path.with_suffix(".map")
    names = sorted(name for some in functions.values() for name in some)
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    blocks = (f"{version} {{ {'; '.join(some)}; }};\n" for version, some in functions.items())
    script.write_text("".join(blocks))
    named = [f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
    flags = ["-shared", "-nostdlib", "-fno-builtin", "-x", "c"]
    _run(compiler, *flags, *named, str(source), "-o", str(path))
    return str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
