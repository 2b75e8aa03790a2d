"""Plays the demo's scenes on real engines and shows them. ``demo`` is the command around it."""

import asyncio
import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvconnect.cli.client import Answer, Client
from kvconnect.cli.engines import (
    CONNECTORS,
    START_TIMEOUT_S,
    Engine,
    engine_env,
    proxy_command,
    transfer_config,
)
from kvconnect.cli.processes import Fleet, Server
from kvconnect.cli.rows import CAPTION, MB, Row, table, verdict
from kvconnect.cli.scenes import Scene, scenes

# "(APIServer pid=1) INFO 11-21 09:50:14 [core.py:99] " before what vLLM has to say
_LOG_PREFIX = re.compile(r"^\(.*?\) (?:\w+ [\d-]+ [\d:]+ \[.*?\] )?")


class Demo:
    """One run; `rows` are what was seen so far."""

    def __init__(self, model: Path, connector: str, logs: Path) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._connector = connector
        self._logs = logs
        self._scenes = scenes()
        self._console = Console()
        self._started_s = time.monotonic()
        self._last_lines: dict[Path, list[str]] = {}

    def play(self) -> bool:
        """The whole demo; True if every row is right. Raises KvConnectError."""
        with Fleet(self._logs) as fleet:
            try:
                prefill, decode, proxy = self._boot(fleet)
                asyncio.run(self._ask(prefill, decode, proxy))
            finally:  # before they are told to stop, which fills logs too
                self._last_lines = {server.log: server.last_lines() for server in fleet.servers}
        seconds = time.monotonic() - self._started_s
        right, line = self._verdict()
        self._console.print(table(self.rows))
        self._console.print(CAPTION, highlight=False)
        colour = "green" if right else "red"
        self._console.print(f"[bold {colour}]{escape(line)}[/] ({seconds:.0f} s)")
        return right

    def show_failure(self, reason: str) -> None:
        """Why, and where to look: the end of each log."""
        for log, lines in self._last_lines.items():
            self._console.rule(f"end of {log}")
            self._console.print("\n".join(lines), markup=False, highlight=False)
        self._console.rule()
        self._console.print(f"[bold red]kvconnect demo failed[/]: {escape(reason)}")
        self._console.print(f"logs: {self._logs}", highlight=False)

    def write_json(self, path: Path) -> None:
        """Rows, and what they were measured with."""
        right, line = self._verdict()
        report = {
            "right": right,
            "verdict": line,
            "seconds": round(time.monotonic() - self._started_s, 1),
            "connector": self._connector,
            "model": str(self._model),
            "versions": {name: _version(name) for name in ("kvconnect", "vllm", "nixl")},
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "rows": [
                msgspec.to_builtins(row) | {"faults": row.faults()} for row in self._shown_rows()
            ],
        }
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))

    def _verdict(self) -> tuple[bool, str]:
        return verdict(self.rows, len(self._scenes))

    def _shown_rows(self) -> list[Any]:
        return list(self.rows)

    def _boot(self, fleet: Fleet) -> tuple[Server, Server, Server]:
        env = engine_env()
        prefill, decode = (
            fleet.start(
                f"{role} engine",
                Engine(self._model, transfer_config(self._connector, role)).command,
                env,
            )
            for role in ("prefill", "decode")
        )
        proxy = fleet.start("proxy", proxy_command([prefill.url], [decode.url]), env)
        with Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self._console,
        ) as progress:
            tasks = {
                server.name: progress.add_task(server.name, total=1, note="")
                for server in (prefill, decode, proxy)
            }

            def seen(server: Server, up: bool) -> None:
                note = server.url if up else _said_last(server)
                progress.update(tasks[server.name], completed=int(up), note=note)

            fleet.wait_up([prefill, decode, proxy], START_TIMEOUT_S, seen)
        return prefill, decode, proxy

    async def _ask(self, prefill: Server, decode: Server, proxy: Server) -> None:
        async with Client(self._model.name) as client:
            stage = _Stage(client, prefill, decode, proxy, CONNECTORS[self._connector].metrics)
            together = [scene for scene in self._scenes if not scene.alone]
            alone = [scene for scene in self._scenes if scene.alone]
            for scene in together:
                await self._play_scene(stage, scene)
            expected = [await client.ask_all(prefill.url, scene.prompts) for scene in alone]
            prefill.kill()
            self._console.print("[bold]the prefill engine is killed (SIGKILL)[/]")
            for scene, answers in zip(alone, expected, strict=True):
                await self._play_scene(stage, scene, answers)

    async def _play_scene(
        self, stage: "_Stage", scene: Scene, expected: list[Answer] | None = None
    ) -> None:
        with self._console.status(scene.name):
            row = await stage.play(scene, expected)
        self.rows.append(row)
        mark = "[red]✗[/]" if row.faults() else "[green]✓[/]"
        answer = " ".join(row.answers[0].split())
        self._console.print(
            f"{mark} {scene.name}: [dim]{escape(answer)}",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis",
        )
        for fault in row.faults():
            self._console.print(f"  [red]{escape(fault)}[/]")


class _Stage:
    """Asks the proxy and both engines the same, and reads decode's counters around it."""

    def __init__(
        self,
        client: Client,
        prefill: Server,
        decode: Server,
        proxy: Server,
        metrics: str,
    ) -> None:
        self._client = client
        self._prefill_url = prefill.url
        self._decode_url = decode.url
        self._proxy_url = proxy.url
        self._metrics = metrics

    async def play(self, scene: Scene, expected: list[Answer] | None) -> Row:
        """``expected`` are prefill's own answers, if it cannot be asked any more."""
        client, prompts, count = self._client, scene.prompts, len(scene.prompts)
        before = await client.counters(self._decode_url, self._metrics)
        answers = await client.ask_all(self._proxy_url, prompts)
        after = await client.counters_after(
            self._decode_url, self._metrics, before.finished + count
        )
        if expected is None:
            expected = await client.ask_all(self._prefill_url, prompts)
        own = await client.ask_all(self._decode_url, prompts)
        await client.counters_after(self._decode_url, self._metrics, after.finished + count)
        seen = after - before
        return Row(
            name=scene.name,
            alone=scene.alone,
            prompts=count,
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            moved_tokens=round(seen.moved_tokens),
            cached_tokens=round(seen.cached_tokens),
            computed_tokens=round(seen.computed_tokens),
            moved_mb=round(seen.moved_bytes / MB, 3),
            gb_per_s=_rate(seen.moved_bytes, seen.transfer_s),
            hand_over_ms=round(1e3 * seen.first_token_s / max(seen.first_tokens, 1), 1),
            failed_transfers=round(seen.failed_transfers),
            equal_to_prefill=_equal(answers, expected),
            equal_to_decode=_equal(answers, own),
            answers=[answer.text for answer in answers],
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # importable all the same, from a distribution named otherwise
        return None


def _rate(nbytes: float, seconds: float) -> float | None:
    return round(nbytes / seconds / 1e9, 3) if seconds else None


def _equal(answers: list[Answer], expected: list[Answer]) -> int:
    return sum(a.text == b.text for a, b in zip(answers, expected, strict=True))


def _said_last(server: Server) -> str:
    lines = [line for line in server.last_lines(5) if line.strip()]
    return escape(_LOG_PREFIX.sub("", lines[-1])[:60]) if lines else ""
