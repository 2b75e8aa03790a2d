"""Plays the offloading demo: one engine, its prompts computed, loaded, and loaded after kill -9.

Before it is started again what it had in host memory is deleted, as a reboot would: so the KV
comes from disk.
"""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import aiohttp

from kvconnect.cli.client import Answer, AskError, Client, Prompt
from kvconnect.cli.counters import Counters
from kvconnect.cli.engines import START_TIMEOUT_S, Engine, engine_env, offload_config
from kvconnect.cli.kept_rows import CAPTION, Row, table, verdict
from kvconnect.cli.play import Demo
from kvconnect.cli.processes import Fleet, Server
from kvconnect.cli.scenes import Scene

BLOCK = 128  # vLLM's default on CPUs; the engine is started with it
METRICS, OURS = "vllm:kv_offload", "vllm:kvconnect_offload"
WARM_UP = Prompt("Hello", 4)
SETTLED_S = 30.0


class KeptDemo(Demo):
    """One run; see the module."""

    def __init__(self, model: Path, logs: Path) -> None:
        super().__init__(model, "offloading", logs)
        self.kept: list[Row] = []
        named = {"long prompt": "2,000 tokens", "8 at once": "8 at once"}
        self._asked = [
            Scene(named[scene.name], scene.prompts) for scene in self._scenes if scene.name in named
        ]
        self._computed: dict[str, tuple[list[Answer], float]] = {}  # scene → answers, ms

    def play(self) -> bool:
        folder = self._logs / "kept"
        with Fleet(self._logs) as fleet:
            try:
                engine = self._boot_one(fleet, folder)
                asyncio.run(self._ask_one(engine, {"computed": "computed", "host": "from memory"}))
                engine.kill()
                self._console.print("[bold]the engine is killed (SIGKILL), its memory deleted[/]")
                shutil.rmtree(folder / "memory")
                engine = self._boot_one(fleet, folder)
                asyncio.run(self._ask_one(engine, {"disk": "from disk"}))
            finally:
                self._last_lines = {server.log: server.last_lines() for server in fleet.servers}
                shutil.rmtree(folder, ignore_errors=True)
        right, line = self._verdict()
        self._console.print(table(self.kept))
        self._console.print(CAPTION, highlight=False)
        seconds = time.monotonic() - self._started_s
        self._console.print(f"[bold {'green' if right else 'red'}]{line}[/] ({seconds:.0f} s)")
        return right

    def _verdict(self) -> tuple[bool, str]:
        return verdict(self.kept, 3 * len(self._asked))

    def _shown_rows(self) -> list[Any]:
        return list(self.kept)

    def _boot_one(self, fleet: Fleet, folder: Path) -> Server:
        config = offload_config(
            cpu_bytes_to_use=512 << 20,
            disk_path=str(folder / "disk"),
            disk_bytes=1 << 30,
            persist=True,
            memory_path=str(folder / "memory"),
        )
        command = Engine(self._model, config, ["--block-size", str(BLOCK)]).command
        env = engine_env(VLLM_SERVER_DEV_MODE="1")  # for /reset_prefix_cache
        engine = fleet.start(f"engine {len(fleet.servers) + 1}", command, env)
        with self._console.status(engine.name):
            fleet.wait_up([engine], START_TIMEOUT_S)
        self._console.print(f"[green]✓[/] {engine.name}: {engine.url}", highlight=False)
        return engine

    async def _ask_one(self, engine: Server, phases: dict[str, str]) -> None:
        async with Client(self._model.name) as client:
            await client.ask(engine.url, WARM_UP)
            for source, name in phases.items():
                for scene in self._asked:
                    await self._play_one(client, engine, scene, source, name)
                await forget(engine.url)

    async def _play_one(
        self, client: Client, engine: Server, scene: Scene, source: str, name: str
    ) -> None:
        count = len(scene.prompts)
        with self._console.status(f"{scene.name}, {name}"):
            before = await _counters(client, engine.url, 0)
            answers = await client.ask_all(engine.url, scene.prompts)
            after = await _counters(client, engine.url, before[0].finished + count)
        seen = after[0] - before[0]
        first_ms = 1e3 * seen.first_token_s / max(seen.first_tokens, 1)
        expected, recompute_ms = self._computed.setdefault(scene.name, (answers, first_ms))
        row = Row(
            name=f"{scene.name}, {name}",
            source=source,
            prompts=count,
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            storable_tokens=sum((a.prompt_tokens - 1) // BLOCK * BLOCK for a in answers),
            host_tokens=round(after[1] - before[1]),
            disk_tokens=round(after[2] - before[2]),
            computed_tokens=round(seen.computed_tokens),
            first_token_ms=round(first_ms, 1),
            recompute_ms=round(recompute_ms, 1),
            equal=sum(a.text == b.text for a, b in zip(answers, expected, strict=True)),
        )
        self.kept.append(row)
        self._console.print(f"[{'red]✗' if row.faults() else 'green]✓'}[/] {row.name}")


async def _counters(client: Client, url: str, finished: float) -> tuple[Counters, float, float]:
    """The engine's counters once so many requests have ended; tokens from memory, and from disk."""
    counters = await client.counters_after(url, METRICS, finished)
    text = await client.metrics(url)
    host, disk = (total(text, f"{OURS}_tokens_from_{source}_total") for source in ("host", "disk"))
    return counters, host, disk


def total(text: str, name: str) -> float:
    """Sum of a metric's samples in Prometheus' text form."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def forget(url: str) -> None:
    """Empty the engine's own prefix cache; it refuses while blocks are being saved."""
    deadline = time.monotonic() + SETTLED_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            async with session.post(f"{url}/reset_prefix_cache") as response:
                if response.status == 200 and '"success":true' in await response.text():
                    return
            await asyncio.sleep(0.2)
    raise AskError(f"{url} does not empty its prefix cache within {SETTLED_S:.0f} s")
