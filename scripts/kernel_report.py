"""Writes the table of docs/evidence/kernels.md: registers, spills and widths of every CUDA kernel.

    python scripts/kernel_report.py         needs nvcc, and cuobjdump of the same CUDA or later

Registers and spills are what the assembler reports (-Xptxas -v), widths are read off the machine
code. cuobjdump is looked for on PATH, beside nvcc, and in this Python's package
nvidia-cuda-cuobjdump. Exits with 1 if a kernel spills or touches local memory.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

from build_kernels import ARCHITECTURES, HEADERS, SOURCES, compiler_of  # noqa: E402

PAGE = ROOT / "docs/evidence/kernels.md"
BEGIN, END = "<!-- scripts/kernel_report.py -->\n", "<!-- end -->\n"
PATHS = (
    *("plain 16 B", "plain 8 B", "cells"),
    *(f"KV {kv} B, wire {wire} B" for kv in (1, 2, 4) for wire in (1, 2, 4) if kv != wire),
)
RUNS = {"N3kvc4grid7Words16E": 16, "m": 8, "j": 4, "h": 1}


@dataclass
class Kernel:
    """What compiler and disassembler say of one kernel on one architecture."""

    registers: int = 0
    spilled_bytes: int = 0
    stack_bytes: int = 0
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def loads(self) -> str:
        """Bits of a load of KV or wire, and how many loads there are.

        Wide ones pass the L1 cache by (NA); a kernel that has them loads only its tables without.
        """
        loads = [op for op in self.operations if op.startswith("LDG.")]
        return self._widths([op for op in loads if ".NA" in op] or loads)

    @property
    def stores(self) -> str:
        """Bits of a store of KV or wire, and how many stores there are."""
        return self._widths([op for op in self.operations if op.startswith(("STG.", "ST."))])

    def _widths(self, operations: list[str]) -> str:
        found: Counter[int] = Counter()
        for operation in operations:
            flags, count = operation.split("."), self.operations[operation]
            small = {"U8": 8, "U16": 16, "64": 64, "128": 128, "256": 256}
            found[max((small[f] for f in flags if f in small), default=32)] += count
        return " ".join(f"{bits}×{found[bits]}" for bits in sorted(found, reverse=True))

    @property
    def local(self) -> int:
        """Accesses to local memory, which is where spills go."""
        return sum(n for op, n in self.operations.items() if op.split(".")[0] in ("LDL", "STL"))


def name_of(mangled: str) -> str | None:
    """What a kernel is called in the table."""
    path = re.search(r"kvc_kernelILN3kvc4grid4PathE(\d+)ELb([01])E", mangled)
    if path:
        return f"{PATHS[int(path[1])]}, {'gather' if path[2] == '1' else 'scatter'}"
    runs = re.search(r"kvc_runs_kernelI(N3kvc4grid7Words16E|[mjh])E", mangled)
    return f"runs, {RUNS[runs[1]]} B" if runs else None


def tool(name: str) -> str:
    """Path of a CUDA tool."""
    nvcc = compiler_of("kvc_cuda")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    found = shutil.which(name) or next(
        (str(f / name) for f in folders if (f / name).exists()), None
    )
    if found is None:
        sys.exit(f"no {name}; pip install nvidia-cuda-{name} has one")
    return found


def run(*command: str) -> str:
    """Both outputs of a command that succeeds."""
    return subprocess.run(  # noqa: S603
        command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


def report(architecture: str, folder: Path) -> dict[str, Kernel]:
    """All kernels of an architecture."""
    nvcc = compiler_of("kvc_cuda") or sys.exit("no nvcc")
    cubin = folder / f"{architecture}.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-cubin", f"-arch=sm_{architecture}"]
    told = run(nvcc, *flags, "-Xptxas=-v", *SOURCES["kvc_cuda"], "-o", str(cubin))
    kernels: dict[str, Kernel] = {}
    current = Kernel()
    for line in told.splitlines():
        if "warning" in line:
            sys.exit(line)
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = name_of(entry[1])
            assert name is not None, entry[1]
            current = kernels[name] = Kernel()
        elif stack := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            current.stack_bytes, current.spilled_bytes = int(stack[1]), int(stack[2])
        elif used := re.search(r"Used (\d+) registers", line):
            current.registers = int(used[1])
    count_operations(run(tool("cuobjdump"), "-sass", str(cubin)), kernels)
    return kernels


def count_operations(listing: str, kernels: dict[str, Kernel]) -> None:
    """Add to ``kernels`` what a disassembly has."""
    current = Kernel()
    for line in listing.splitlines():
        if entry := re.search(r"Function : (\w+)", line):
            current = kernels[name_of(entry[1]) or ""]
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            current.operations[found[1]] += 1


def table(found: dict[str, dict[str, Kernel]]) -> str:
    """As markdown: a row a kernel, a column an architecture."""
    heads = [f"sm_{a}" for a in found]
    lines = [f"| kernel | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted(next(iter(found.values()))):
        cells = []
        for kernels in found.values():
            k = kernels[name]
            cells.append(f"{k.registers} / {k.spilled_bytes}; {k.loads} → {k.stores}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = {a: report(a, Path(folder)) for a in ARCHITECTURES}
    read = [p for p in HEADERS if "/cpu_" not in p]
    sources = b"".join((ROOT / p).read_bytes() for p in (*SOURCES["kvc_cuda"], *read))
    release = re.search(
        r"release [\d.]+, V([\d.]+)", run(compiler_of("kvc_cuda") or "", "--version")
    )
    assert release is not None
    count = len(found[ARCHITECTURES[0]])
    bad = [
        f"{name} on sm_{a}"
        for a, kernels in found.items()
        for name, k in kernels.items()
        if k.spilled_bytes or k.stack_bytes or k.local
    ]
    text = (
        f"nvcc {release[1]}, sources {hashlib.sha256(sources).hexdigest()[:12]}: {count} kernels "
        f"on {len(found)} architectures; with a spill, a stack frame or an access to local memory: "
        f"{', '.join(bad) or 'none'}.\n\n"
        "A cell is: registers / bytes spilled; loads → stores, as bits × instructions.\n\n"
        f"{table(found)}"
    )
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])
    print(text)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
