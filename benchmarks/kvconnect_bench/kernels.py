"""``kvconnect bench kernels``: gather and scatter as fractions of memcpy, in the same run.

Needs torch and no vLLM. Rounds are interleaved: in each, every row is measured once, right after
a memcpy of as many bytes; a fraction is the median of the rounds' fractions. One thread on a CPU.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvconnect_bench import options
from kvconnect_bench.results import machine, save

if TYPE_CHECKING:
    from kvconnect_bench.kernel_cases import KernelArena, KernelCase

MIB = 1 << 20


@dataclass(frozen=True)
class KernelRow:
    """One shape and direction; bytes are those of the cache's side."""

    verb: str
    shape: str
    run_bytes: int
    """Contiguous bytes of the cache, at least."""
    call_bytes: int
    gb_s: float
    """Median; sums are made in the same pass."""
    memcpy_gb_s: float
    """Median of as many bytes, contiguous on both sides."""
    fraction: float
    """Its rate divided by memcpy's."""
    torch_ratio: float | None
    """Times as fast as torch's gather, then convert; only where torch's bits are equal to ours."""
    submit_us: float | None = None
    """On a GPU, whose figures are the device's time: the host's time for a call."""


@dataclass
class KernelTimes:
    """Seconds of one row, a value a round."""

    memcpy: list[float]
    move: list[float]
    torch: list[float]
    submit: list[float]


def kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Times that each row is measured.")] = 15,
    call_mib: Annotated[int, typer.Option(help="MiB a call; 0: 64, on a GPU 512.")] = 0,
    pool_mib: Annotated[int, typer.Option(help="MiB to choose from; 0: 1024, GPU 8192.")] = 0,
    max_ctas: Annotated[int, typer.Option(help="CTAs of a launch at most; 0: all that fit.")] = 0,
    huge_pages: Annotated[bool, typer.Option(help="For cache and wire, on a CPU.")] = False,
    only: Annotated[str, typer.Option(help="Shapes whose names contain this.")] = "",
    out: options.Json = None,
) -> None:
    """Gather and scatter of KV, as fractions of memcpy on the same machine in the same run."""
    import torch
    from rich.console import Console

    from kvconnect.errors import ConfigError
    from kvconnect.ops import load
    from kvconnect_bench.kernel_cases import KernelArena, shapes

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    torch.set_num_threads(1)
    try:
        found = load("cuda" if device == "cuda" else "cpu", max_ctas=max_ctas)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    pool, call = (8192, 512) if device == "cuda" else (1024, 64)
    console = Console()
    with console.status("filling memory"):
        sizes = ((pool_mib or pool) * MIB, (call_mib or call) * MIB)
        arena = KernelArena(found, device, *sizes, huge_pages=huge_pages and device == "cpu")
        cases = [arena.case(verb, shape) for verb, shape in shapes() if only in shape.name]
        for case in cases:
            if case.verb == "gather" and case.shape.compare_torch:
                case.check_torch()
    rows = _measure(arena, cases, rounds, console)
    gpu = _gpu() if found.name == "cuda" else None
    conditions = {"gpu": gpu, "kernels": found.name, "rounds": rounds, "huge_pages": huge_pages}
    console.print(_table(rows, machine() | conditions))
    if out is not None:
        save(out, "kernels", rows, **conditions)


def _measure(
    arena: "KernelArena", cases: Sequence["KernelCase"], rounds: int, console: Any
) -> list[KernelRow]:
    from rich.progress import track

    times = [KernelTimes([], [], [], []) for _ in cases]
    for turn in track(range(rounds + 1), "measuring", console=console, transient=True):
        for case, t in zip(cases, times, strict=True):
            against_torch = case.verb == "gather" and case.shape.compare_torch
            seconds = [arena.time_memcpy(case.nbytes)]
            moved_s = case.time()
            if turn == 0:  # page tables, frequencies, modules of kernels
                continue
            t.memcpy += seconds
            t.move.append(moved_s)
            if against_torch:
                t.torch.append(case.time_torch())
            if arena.on_gpu:
                t.submit.append(case.time_submit())
    return [_row(case, t) for case, t in zip(cases, times, strict=True)]


def _row(case: "KernelCase", t: KernelTimes) -> KernelRow:
    def gb_s(seconds: Sequence[float]) -> float:
        return round(case.nbytes / statistics.median(seconds) / 1e9, 2)

    def ratio(above: Sequence[float], below: Sequence[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)

    return KernelRow(
        verb=case.verb,
        shape=case.shape.name,
        run_bytes=case.shape.run_bytes,
        call_bytes=case.nbytes,
        gb_s=gb_s(t.move),
        memcpy_gb_s=gb_s(t.memcpy),
        fraction=ratio(t.memcpy, t.move),
        torch_ratio=ratio(t.torch, t.move) if t.torch else None,
        submit_us=round(statistics.median(t.submit) * 1e6, 1) if t.submit else None,
    )


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _table(rows: Sequence[KernelRow], where: dict[str, Any]) -> Any:
    from rich.table import Table

    device = where["gpu"] or f"{where['cpu']}, one thread"
    table = Table(title=f"{where['kernels']} on {device}; fractions of memcpy in the same run")
    for heading in ("shape", "verb"):
        table.add_column(heading)
    for heading in ("run", "GB/s", "memcpy", "fraction", "× torch"):
        table.add_column(heading, justify="right")
    for row in rows:
        run = f"{row.run_bytes >> 10} KiB" if row.run_bytes >= 1024 else f"{row.run_bytes} B"
        torch_ratio = "" if row.torch_ratio is None else f"{row.torch_ratio:.2f}"
        rates = (f"{row.gb_s:.2f}", f"{row.memcpy_gb_s:.2f}", f"{row.fraction:.2f}")
        table.add_row(row.shape, row.verb, run, *rates, torch_ratio)
    return table
