"""The first hour on a GPU: every step that shows whether kvconnect works there, and a table.

    python scripts/gpu_first.py                   all steps that this machine can run
    python scripts/gpu_first.py kernels nccl      these alone
    python scripts/gpu_first.py --fake            without a GPU, over the fakes of CUDA and NCCL

build, kernels, nccl and rates need torch, nvcc and pytest, and no vLLM. direct, staged and graphs
need a vLLM for CUDA and the models of `make setup`; they start real engines, two on one GPU, and
compare their answers with an engine's that works alone. Each step has a limit; all together are
ten minutes. A step that cannot run says what is missing. Exits with 1 if one failed.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")


def no_nvcc() -> str:
    """Why libkvc_cuda cannot be built."""
    sys.path.insert(0, str(ROOT / "csrc"))
    from build_kernels import compiler_of

    return "" if compiler_of("kvc_cuda") else "no nvcc on PATH or under CUDA_HOME"


def no_gpu() -> str:
    """Why kernels cannot run."""
    if importlib.util.find_spec("torch") is None:
        return "no torch"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def no_engines() -> str:
    """Why engines cannot run on the GPU."""
    if missing := no_gpu():
        return missing
    if importlib.util.find_spec("vllm") is None:
        return "no vLLM"
    if not os.environ.get("KVCONNECT_MODEL"):
        return "no models: run `make setup`"
    return ""


def no_compiler() -> str:
    """Why the fakes cannot be built."""
    return "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler"


@dataclass(frozen=True)
class Step:
    """One thing to find out."""

    shows: str
    arguments: Sequence[str]
    """What this Python is run with."""
    missing: Callable[[], str]
    """What the machine lacks for it; empty if nothing."""
    limit_s: int
    env: dict[str, str] = field(default_factory=dict)


ANSWERS, KEPT = "tests/e2e/test_answers.py::test_", "tests/e2e/test_offloading.py::test_"
STEPS = {
    "build": Step(
        "libkvc_cuda is compiled for this GPU",
        ["csrc/build_kernels.py"],
        no_nvcc,
        120,
        {"KVCONNECT_BUILD_CUDA": "1"},
    ),
    "kernels": Step(
        "gather and scatter equal the oracle, to the bit",
        [*PYTEST, "tests/gpu/test_ops_gpu.py"],
        no_gpu,
        60,
    ),
    "nccl": Step(
        "the NCCL transport keeps its contract, two ranks on one GPU",
        [*PYTEST, "tests/gpu/test_nccl_gpu.py"],
        no_gpu,
        60,
    ),
    "rates": Step(
        "gather and scatter as fractions of memcpy",
        [*("-m", "kvconnect.cli", "bench", "kernels", "--device", "cuda", "--rounds", "3")],
        no_gpu,
        45,
    ),
    "direct": Step(
        "prefill → decode between two engines, where auto begins with direct reads",
        [*PYTEST, f"{ANSWERS}only_what_is_not_cached_at_decode_is_fetched"],
        no_engines,
        90,
    ),
    "staged": Step(
        "the same through staging memory, with other block sizes",
        [*PYTEST, f"{ANSWERS}blocks_of_128_to_32_tokens_through_staging_memory_alone"],
        no_engines,
        90,
    ),
    "graphs": Step(
        "offloading to pinned memory while vLLM captures CUDA graphs",
        [*PYTEST, f"{KEPT}prompts_come_back_from_host_memory_and_are_answered_the_same"],
        no_engines,
        135,
        {"KVCONNECT_ENGINE_OPTIONS": "--no-enforce-eager"},
    ),
}
FAKES = {
    "kernels": Step(
        "all of libkvc_cuda over the fake of CUDA's runtime",
        [*PYTEST, "tests/unit/test_ops_cuda.py"],
        no_compiler,
        180,
    ),
    "nccl": Step(
        "what we believe of libnccl, over its fake",
        [*PYTEST, "tests/unit/test_nccl_library.py"],
        no_compiler,
        120,
    ),
    "threads": Step(
        "threads of ours set their device, and pin when they may",
        [*PYTEST, "tests/unit/test_pinning.py", "tests/unit/test_runner.py", "-k", "thread or pin"],
        no_compiler,
        60,
    ),
}


@dataclass(frozen=True)
class Row:
    """What a step found."""

    name: str
    verdict: str
    seconds: float
    said: str


def run(name: str, step: Step) -> Row:
    """Run a step; its last line of output says what it found."""
    if missing := step.missing():
        return Row(name, "not run", 0.0, missing)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path} | step.env
    started = time.monotonic()
    try:
        ended = subprocess.run(  # noqa: S603
            [sys.executable, *step.arguments],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.limit_s,
            check=False,
        )
        verdict, output = "ok" if ended.returncode == 0 else "FAILED", ended.stdout
    except subprocess.TimeoutExpired as e:
        text = e.stdout or b""
        output = text.decode(errors="replace") if isinstance(text, bytes) else text
        verdict = f"FAILED: over {step.limit_s} s"
    if verdict != "ok" or name == "rates":
        print(output)
    lines = [line for line in output.splitlines() if line.strip()]
    said = lines[-1] if lines and step.arguments[:2] == list(PYTEST[:2]) else step.shows
    if verdict == "ok" and "skipped" in said and "passed" not in said:
        verdict = "not run"
    return Row(name, verdict, time.monotonic() - started, said)


def main() -> int:
    """Run the steps that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description="What works on this machine's GPU.")
    parser.add_argument("steps", nargs="*", help=", ".join(dict.fromkeys([*STEPS, *FAKES])))
    parser.add_argument("--fake", action="store_true", help="over fakes, without a GPU")
    asked = parser.parse_args()
    known = FAKES if asked.fake else STEPS
    if unknown := [name for name in asked.steps if name not in known]:
        parser.error(f"no step is called {', '.join(unknown)}; there are {', '.join(known)}")
    rows = []
    for name in asked.steps or known:
        print(f"{name}: {known[name].shows} …", flush=True)
        rows.append(run(name, known[name]))
    print(f"\n{'step':<9}{'verdict':<18}{'seconds':>8}  what was seen")
    for row in rows:
        print(f"{row.name:<9}{row.verdict:<18}{row.seconds:>8.1f}  {row.said}")
    return any(row.verdict.startswith("FAILED") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
