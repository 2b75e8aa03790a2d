"""``kvconnect bench all``: every benchmark, one after the other, and one page of what they found.

Each is a process of its own, which leaves nothing to the next one. What fails is named on the page
and ends the command with 1; the others are measured all the same.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kvconnect_bench import options
from kvconnect_bench.report import write

AT_MOST_S = 3600.0  # of one benchmark, if it is not quick
QUICK_S = 240.0


class Benchmark(NamedTuple):
    """A benchmark: what it is given when all is to be quick, and whether engines run."""

    name: str
    quick: Sequence[str]
    engines: bool = False


PARTS = (
    Benchmark("connector", ("--quick",)),
    Benchmark("scale", ("--quick",)),
    Benchmark("kernels", ("--rounds", "3", "--call-mib", "16", "--pool-mib", "256")),
    Benchmark("transport", ("--rounds", "3", "--total-mib", "32", "--row-kib", "16,64")),
    Benchmark("offload", ("--parts", "tiers,restarts", "--mb", "128", "--rounds", "5")),
    Benchmark("pd", ("--quick",), engines=True),
    Benchmark("trace", ("--turns", "3", "--tokens", "1000"), engines=True),
    Benchmark("inter-token", ("--prompts", "3"), engines=True),
    Benchmark("idle", ("--seconds", "5"), engines=True),
    Benchmark("proxy", ("--connections", "1,64", "--seconds", "1.5", "--turns", "1")),
)
WHOLE_OFFLOAD = ("--parts", "tiers,restarts,eviction,hits,cost")


def all_benchmarks(
    model: options.Model = None,
    folder: Annotated[Path, typer.Option(help="Where results and page go.")] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Ten minutes on two cores.")] = False,
    only: Annotated[str, typer.Option(help="Of these, with commas; all if empty.")] = "",
) -> None:
    """Every benchmark, and one HTML page of their results."""
    chosen = only.split(",") if only else [part.name for part in PARTS]
    if unknown := set(chosen) - {part.name for part in PARTS}:
        raise typer.BadParameter(f"no benchmarks {sorted(unknown)}", param_hint="--only")
    folder.mkdir(parents=True, exist_ok=True)
    files, failed = [], []
    for part in (one for one in PARTS if one.name in chosen):
        given = list(part.quick) if quick else []
        if part.name == "offload" and not quick:
            given += WHOLE_OFFLOAD
        if model is not None and (part.engines or part.name == "offload"):
            given += ["--model", str(model)]
        result, started = folder / f"{part.name}.json", time.monotonic()
        typer.echo(f"{part.name} ...")
        if fault := _run(part.name, [*given, "--json", str(result)], quick):
            failed.append(f"{part.name}: {fault}")
        else:
            files.append(result)
        typer.echo(f"{part.name}: {fault or 'done'}, {time.monotonic() - started:.0f} s")
    write(folder / "report.html", files, failed)
    typer.echo(f"{folder / 'report.html'}: open it in a browser")
    if failed:
        raise typer.Exit(1)


def _run(name: str, given: Sequence[str], quick: bool) -> str:
    """Why it failed; empty if it did not."""
    command = [sys.executable, "-P", "-m", "kvconnect.cli", "bench", name, *given]
    at_most_s = QUICK_S if quick else AT_MOST_S
    try:
        done = subprocess.run(  # noqa: S603 - our own command, no shell
            command, capture_output=True, text=True, check=False, timeout=at_most_s
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {at_most_s:.0f} s"
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-500:]
