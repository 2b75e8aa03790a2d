"""What every demo does: boot servers, play scenes on them, show the rows and the verdict.

A play is a subclass; ``demo`` is the command around it.
"""

import os
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvconnect.cli.client import Completion
from kvconnect.cli.demos.rows import DemoRow, picture, table, verdict
from kvconnect.cli.engines import START_TIMEOUT_S
from kvconnect.cli.processes import Fleet, Server

# "(APIServer pid=1) INFO 11-21 09:50:14 [core.py:99] " before what vLLM has to say
_LOG_PREFIX = re.compile(r"^\(.*?\) (?:\w+ [\d-]+ [\d:]+ \[.*?\] )?")


class Demo(ABC):
    """One run; ``rows`` are what was seen so far."""

    connector: str
    expected: int
    """How many rows there will be."""

    def __init__(self, model: Path, logs: Path) -> None:
        self.rows: list[DemoRow] = []
        self.model = model
        self.logs = logs
        self.console = Console()
        self._started_s = time.monotonic()
        self._last_lines: dict[Path, list[str]] = {}

    @abstractmethod
    def play_on(self, fleet: Fleet) -> None:
        """Start servers in ``fleet``, ask them, and `add` a row for each scene."""

    def play(self) -> bool:
        """The whole demo; True if every row is right. Raises KvConnectError."""
        with Fleet(self.logs) as fleet:
            try:
                self.play_on(fleet)
            finally:  # before they are asked to stop, which fills logs too
                self._last_lines = {server.log: server.last_lines() for server in fleet.servers}
        seconds = time.monotonic() - self._started_s
        right, line = verdict(self.rows, self.expected)
        self.console.print(table(self.rows))
        self.console.print(self.rows[0].caption, highlight=False)
        self.console.print(f"\n{picture(self.rows)}\n", highlight=False, markup=False)
        colour = "green" if right else "red"
        self.console.print(f"[bold {colour}]{escape(line)}[/] ({seconds:.0f} s)")
        return right

    def wait_up(self, fleet: Fleet, servers: Sequence[Server]) -> None:
        """Show what servers say until all are up."""
        with Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
        ) as progress:
            tasks = {
                server.name: progress.add_task(server.name, total=1, note="") for server in servers
            }

            def seen(server: Server, up: bool) -> None:
                note = server.url if up else _last_log_line(server)
                progress.update(tasks[server.name], completed=int(up), note=note)

            fleet.wait_up(list(servers), START_TIMEOUT_S, seen)

    def add(self, row: DemoRow, answer: str = "") -> None:
        """Keep a row, and show whether it is right."""
        self.rows.append(row)
        mark = "[red]✗[/]" if row.faults() else "[green]✓[/]"
        shown = f": [dim]{escape(' '.join(answer.split()))}" if answer else ""
        self.console.print(
            f"{mark} {row.name}{shown}", highlight=False, no_wrap=True, overflow="ellipsis"
        )
        for fault in row.faults():
            self.console.print(f"  [red]{escape(fault)}[/]")

    def show_failure(self, reason: str) -> None:
        """Why, and where to look: the end of each log."""
        for log, lines in self._last_lines.items():
            self.console.rule(f"end of {log}")
            self.console.print("\n".join(lines), markup=False, highlight=False)
        self.console.rule()
        self.console.print(f"[bold red]kvconnect demo failed[/]: {escape(reason)}")
        self.console.print(f"logs: {self.logs}", highlight=False)

    def write_json(self, path: Path) -> None:
        """Rows, and what they were measured with."""
        right, line = verdict(self.rows, self.expected)
        report = {
            "right": right,
            "verdict": line,
            "seconds": round(time.monotonic() - self._started_s, 1),
            "connector": self.connector,
            "model": str(self.model),
            "versions": {name: _version(name) for name in ("kvconnect", "vllm", "nixl")},
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "rows": [msgspec.to_builtins(row) | {"faults": row.faults()} for row in self.rows],
        }
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


def equal_texts(answers: Sequence[Completion], expected: Sequence[Completion]) -> int:
    """How many answers have the text that was expected."""
    return sum(a.text == b.text for a, b in zip(answers, expected, strict=True))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # importable all the same, from a distribution named otherwise
        return None


def _last_log_line(server: Server) -> str:
    lines = [line for line in server.last_lines(5) if line.strip()]
    return escape(_LOG_PREFIX.sub("", lines[-1])[:60]) if lines else ""
