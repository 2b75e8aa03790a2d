"""Writes scripts/requirements.lock: every distribution of the test environment, with its version.

    .venv/bin/python scripts/lock.py        after changing requirements-test.txt or pyproject.toml

setup.sh installs the lock with --no-deps, so a clean clone gets what was tested, nothing is
resolved at setup time, and what UNWANTED names is not downloaded at all.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
LOCK = HERE / "requirements.lock"

UNWANTED = {
    # The index's builds are for CUDA and break transformers on torch's CPU build
    # ("operator torchvision::nms does not exist"). vLLM needs them for images and sound only.
    "torchaudio",
    "torchcodec",
    "torchvision",
    # 1 GB that vLLM on a CPU finds and disables ("doesn't include CPU backend"), so that the V1
    # model runner is used with or without it. xgrammar, which names it, imports it for CUDA only.
    "triton",
    # `nixl` depends on both CUDA builds; one is enough.
    "nixl-cu13",
    # ucxx-cu12 names them for device memory, which transport/ucx.py does not move. Without RMM
    # ucxx does not look for libucx: transport/ucx.py loads it first.
    "cuda-bindings",
    "cuda-core",
    "cuda-pathfinder",
    "librmm-cu12",
    "nvidia-ml-py",
    "rapids-logger",
    "rmm-cu12",
}
X86_ONLY = {"intel-openmp", "intel-cmplr-lib-ur"}


def resolve() -> dict[str, str]:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    if index := os.environ.get("TORCH_CPU_INDEX"):
        pip += ["--extra-index-url", index]
    with tempfile.NamedTemporaryFile() as report:
        args = ["--report", report.name, "-r", str(HERE / "requirements-test.txt"), *wanted]
        subprocess.run(pip + args, check=True)  # noqa: S603 - our own files are its only input
        installs = json.load(report)["install"]
    return {i["metadata"]["name"]: i["metadata"]["version"] for i in installs}


def line(name: str, version: str) -> str:
    return f"{name}=={version}" + ('; platform_machine == "x86_64"' if name in X86_ONLY else "")


def main() -> None:
    found = {name.lower().replace("_", "-"): version for name, version in resolve().items()}
    lines = [line(name, found[name]) for name in sorted(found.keys() - UNWANTED)]
    header = "# Made by scripts/lock.py; do not edit."
    LOCK.write_text("\n".join([header, *lines]) + "\n")
    print(f"wrote {LOCK}: {len(lines)} distributions")


if __name__ == "__main__":
    main()
