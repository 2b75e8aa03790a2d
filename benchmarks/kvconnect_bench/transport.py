"""``kvconnect bench transport``: the staged path beside the direct one, between two processes.

Needs no vLLM and no model. Rounds are interleaved: in each, every mode moves the same blocks once,
after one contiguous transfer and one memcpy of as many bytes; a ratio is the median of the rounds'
ratios. What arrived is compared byte for byte every time.
"""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvconnect_bench import options
from kvconnect_bench.results import machine, save

if TYPE_CHECKING:
    from kvconnect_bench.sides import Fetched, SideProcess, TransferCase

MIB = 1 << 20
WARM_ROUNDS = 6  # auto has tried both paths twice by then
START_S, ROUND_S = 120.0, 60.0  # until a side is up; for anything it is asked later


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """One mode over one wire, for blocks of one size a layer."""

    transport: str
    wire: str
    row_bytes: int
    """Contiguous on both sides; their order is random."""
    total_bytes: int
    mode: str
    rounds: int
    ms_p50: float
    ms_p90: float
    """From the order to the outcome, leases and checks included."""
    gb_s: float
    of_direct: float
    """Times as fast as direct."""
    of_contiguous: float
    """Fraction of the rate of one contiguous transfer."""
    of_memcpy: float
    descriptors: int
    """Descriptors of the last round; chunks where it was staged."""
    staged_rounds: int
    contiguous_gb_s: float
    memcpy_gb_s: float


@dataclass
class TransferTimes:
    """Seconds, a value a round."""

    contiguous: list[float]
    memcpy: list[float]
    modes: dict[str, list["Fetched"]]


def transport(
    name: Annotated[str, typer.Option("--transport", help="Transport to measure.")] = "nixl",
    wires: Annotated[str, typer.Option(help="Of the transport's; all if empty.")] = "",
    row_kib: Annotated[str, typer.Option(help="KiB of a block of a layer.")] = "4,16,64",
    total_mib: Annotated[int, typer.Option(help="MiB of a transfer.")] = 128,
    staging_mib: Annotated[int, typer.Option(help="MiB of staging memory a side.")] = 64,
    rounds: Annotated[int, typer.Option(help="Times that each is measured.")] = 15,
    out: options.Json = None,
) -> None:
    """Staged against direct against auto, two processes on this machine, in the same run."""
    from rich.console import Console

    from kvconnect_bench.sides import MODES, WIRES, TransferCase

    if name not in WIRES:
        raise typer.BadParameter(
            f"{name!r} is none of {', '.join(WIRES)}", param_hint="--transport"
        )
    known = WIRES[name]
    chosen = wires.split(",") if wires else list(known)
    if unknown := [wire for wire in chosen if wire not in known]:
        raise typer.BadParameter(f"{unknown} are none of {list(known)}", param_hint="--wires")
    console, rows = Console(), []
    for wire in chosen:
        for kib in row_kib.split(","):
            case = TransferCase(name, wire, int(kib) << 10, total_mib * MIB, staging_mib * MIB)
            if problem := case.problem():
                raise typer.BadParameter(problem, param_hint="--row-kib")
            times = TransferTimes([], [], {mode: [] for mode in MODES})
            with console.status(f"{name} {wire} {kib} KiB: starting") as status:
                for turn in _measure(case, rounds, times):
                    done = f"round {turn} of {rounds}" if turn > 0 else "warming up"
                    status.update(f"{name} {wire} {kib} KiB: {done}")
            rows += rows_of(case, times)
    console.print(_table(rows, machine() | {"rounds": rounds}))
    if out is not None:
        save(out, "transport", rows, rounds=rounds)


def _measure(case: "TransferCase", rounds: int, times: TransferTimes) -> Iterator[int]:
    """Round after round; ``times`` gets those of all that are no warm ones."""
    from kvconnect_bench.sides import MODES, ConsumerSide, ProducerSide, SideProcess

    with contextlib.ExitStack() as sides:
        supplier, reader = (SideProcess(side, case) for side in (ProducerSide, ConsumerSide))
        for side in (supplier, reader):
            sides.callback(side.end)
        hello, table = supplier.ask("hello", timeout_s=START_S)
        reader.ask("memcpy", timeout_s=START_S)
        for turn in range(1 - WARM_ROUNDS, rounds + 1):
            contiguous = _contiguous(supplier, reader, hello, table)
            memcpy = reader.ask("memcpy", timeout_s=ROUND_S)
            # neither is always the first
            order = MODES[turn % len(MODES) :] + MODES[: turn % len(MODES)]
            fetched = {mode: _fetch(supplier, reader, mode, f"{mode} {turn}") for mode in order}
            if turn > 0:
                times.contiguous.append(contiguous)
                times.memcpy.append(memcpy)
                for mode in MODES:
                    times.modes[mode].append(fetched[mode])
            yield turn


def _contiguous(supplier: "SideProcess", reader: "SideProcess", hello: bytes, table: Any) -> float:
    supplier.tell("serve")
    seconds: float = reader.ask("contiguous", hello, table, ROUND_S, timeout_s=2 * ROUND_S)
    supplier.tell("stop")  # what ends it, and is then answered itself
    for _ in range(2):
        supplier.answer(ROUND_S)
    return seconds


def _fetch(supplier: "SideProcess", reader: "SideProcess", mode: str, name: str) -> "Fetched":
    from kvconnect_bench.sides import SideError

    source, terms = supplier.ask("lend", name, timeout_s=ROUND_S)
    found: Fetched = reader.ask("fetch", mode, source, terms, ROUND_S, timeout_s=2 * ROUND_S)
    if found.error:
        raise SideError(f"{name}: {found.error}")
    if not supplier.ask("freed", name, ROUND_S, timeout_s=2 * ROUND_S):
        raise SideError(f"{name}: its lease did not end within {ROUND_S:g} s")
    return found


def rows_of(case: "TransferCase", times: TransferTimes) -> list[TransferRow]:
    def ratio(above: Sequence[float], below: Sequence[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)

    def gb_s(seconds: Sequence[float]) -> float:
        return round(case.total_bytes / statistics.median(seconds) / 1e9, 2)

    direct = [fetched.seconds for fetched in times.modes["direct"]]
    rows = []
    for mode, fetched in times.modes.items():
        seconds = [f.seconds for f in fetched]
        rows.append(
            TransferRow(
                transport=case.transport,
                wire=case.wire,
                row_bytes=case.row_bytes,
                total_bytes=case.total_bytes,
                mode=mode,
                rounds=len(seconds),
                ms_p50=round(statistics.median(seconds) * 1e3, 2),
                ms_p90=round(statistics.quantiles(seconds, n=10)[-1] * 1e3, 2),
                gb_s=gb_s(seconds),
                of_direct=ratio(direct, seconds),
                of_contiguous=ratio(times.contiguous, seconds),
                of_memcpy=ratio(times.memcpy, seconds),
                descriptors=fetched[-1].descriptors,
                staged_rounds=sum(f.staged for f in fetched),
                contiguous_gb_s=gb_s(times.contiguous),
                memcpy_gb_s=gb_s(times.memcpy),
            )
        )
    return rows


def _table(rows: Sequence[TransferRow], where: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    title = f"two processes on {where['cores']} cores of {where['cpu']}"
    caption = "contig., memcpy: fractions of their rates in the same run"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for heading in (
        "p50 ms",
        "p90 ms",
        "GB/s",
        "× direct",
        "contig.",
        "memcpy",
        "descr.",
        "staged",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.transport} {row.wire} {row.row_bytes >> 10}K {row.mode}",
            f"{row.ms_p50:.1f}",
            f"{row.ms_p90:.1f}",
            f"{row.gb_s:.2f}",
            f"{row.of_direct:.2f}",
            f"{row.of_contiguous:.2f}",
            f"{row.of_memcpy:.2f}",
            f"{row.descriptors:,}",
            f"{row.staged_rounds}/{row.rounds}",
            end_section=row.mode == rows[-1].mode,
        )
    return table
