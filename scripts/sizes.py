#!/usr/bin/env python3
"""How large kvconnect is, and how many places its names have: lines of Python, files and classes.

    scripts/sizes.py                      this tree
    scripts/sizes.py --at 67c4445         ... beside that commit
    scripts/sizes.py --at v0.1 --json     as JSON, by revision

Lines are all lines, with comments and blank ones. What a connector loads is imported in a process
of its own, so it needs the environment of `make setup`.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THIS_TREE = "this tree"

NIXL = ("vllm.nixl", "vllm.scheduler", "vllm.worker", "transport.nixl")
OFFLOADING = ("vllm.offload.connector", "vllm.offload.scheduler", "vllm.offload.worker")

# The core of commits whose docs/structure.md lists no files: what became the files of that list.
UNLISTED_CORE = """
    order blocks plan rows course lease slots lender early supplier reader fetcher puller remote
    watcher planner tier/base tier/peer mover transport/base
    orders geometry/blocks geometry/intersect geometry/rows geometry/chunks staging producer/early
    producer/leases producer/reader producer/stage consumer/fetch consumer/remote consumer/renew
    consumer/stage tier_base tier_peer
"""

# what is counted → what it must not exceed
LIMITS = {
    "core, by the reading path": 2_600,
    "loaded for KVConnectNixl": 8_000,
    "on top for KVConnectOffloading": 5_000,
    "installed (kvconnect)": 21_000,
    "benchmarks (kvconnect_bench)": None,
    "modules directly under kvconnect/": 11,
    "class names in more than one file": None,
}

LOADED = """
import importlib, json, sys
for module in sys.argv[1:]:
    importlib.import_module("kvconnect." + module)
ours = [m for name, m in sys.modules.items() if name.partition(".")[0] == "kvconnect"]
print(json.dumps([m.__file__ for m in ours if getattr(m, "__file__", None)]))
"""


def main() -> None:
    """Print what this tree has, beside what other commits had."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--at", metavar="REV", action="append", default=[], help="a commit too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    found = {}
    for revision in args.at:
        with checked_out(revision) as tree:
            found[revision] = measured(tree)
    found[THIS_TREE] = measured(ROOT)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The files of a commit, in a folder that goes when the context ends."""
    git = ["git", "-C", str(ROOT), "archive", revision, "kvconnect", "benchmarks", "docs"]
    archive = subprocess.run(git, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def measured(tree: Path) -> dict[str, Any]:
    """Each figure of LIMITS, and the class names that are in more than one file."""
    package = tree / "kvconnect"
    bench = [*(package / "cli/bench").rglob("*.py"), *tree.glob("benchmarks/kvconnect_bench/*.py")]
    installed = [path for path in package.rglob("*.py") if path not in bench]
    nixl, offloading = loaded(tree)
    twice = {
        name: [path.relative_to(tree).as_posix() for path in paths]
        for name, paths in sorted(classes(installed + bench).items())
        if len(paths) > 1
    }
    figures = (
        lines(core(tree)),
        lines(nixl),
        lines(offloading - nixl),
        lines(installed),
        lines(bench),
        sum(path.name != "__init__.py" for path in package.glob("*.py")),
        len(twice),
    )
    return {**dict(zip(LIMITS, figures, strict=True)), "twice": twice}


def core(tree: Path) -> list[Path]:
    """The files of the reading path: the first fenced block of docs/structure.md that has any."""
    package = tree / "kvconnect"
    page = (tree / "docs/structure.md").read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if named := re.findall(r"^\s*(?:kvconnect/)?([\w/]+\.py)\b", block, re.M):
            return [package / name for name in named]
    return [path for name in UNLISTED_CORE.split() if (path := package / f"{name}.py").exists()]


def loaded(tree: Path) -> tuple[set[Path], set[Path]]:
    """The files that are imported for KVConnectNixl, and for KVConnectOffloading."""
    env = os.environ | {"PYTHONPATH": str(tree)}
    result = []
    for modules in (NIXL, OFFLOADING):
        command = [sys.executable, "-P", "-c", LOADED, *modules]
        ran = subprocess.run(command, env=env, cwd=tree, check=True, stdout=subprocess.PIPE)
        paths = {Path(file).resolve() for file in json.loads(ran.stdout.splitlines()[-1])}
        if stray := [path for path in paths if not path.is_relative_to(tree.resolve())]:
            sys.exit(f"sizes.py: {stray[0]} was imported, which is not of {tree}")
        result.append(paths)
    return result[0], result[1]


def classes(paths: list[Path]) -> dict[str, list[Path]]:
    """The files in which there is a class of that name."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        nodes = ast.walk(ast.parse(path.read_text()))
        for name in sorted({node.name for node in nodes if isinstance(node, ast.ClassDef)}):
            found[name].append(path)
    return found


def lines(paths: list[Path] | set[Path]) -> int:
    """How many lines all these files have together."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def show(found: dict[str, dict[str, Any]]) -> None:
    """A table, then the class names that this tree has more than once."""
    width = max(map(len, LIMITS))
    print(f"{'':{width}}  " + "".join(f"{name[:12]:>14}" for name in found) + f"{'limit':>10}")
    for name, limit in LIMITS.items():
        figures = "".join(f"{figures[name]:>14,}" for figures in found.values())
        print(f"{name:{width}}  {figures}{f'{limit:,}' if limit else '':>10}")
    for name, files in found[THIS_TREE]["twice"].items():
        print(f"  {name}: {', '.join(files)}")


if __name__ == "__main__":
    main()
