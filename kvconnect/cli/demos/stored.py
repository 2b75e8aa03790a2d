"""One engine that offloads: prompts computed, loaded from memory, and from disk after kill -9.

Before it is started again what it had in host memory is deleted, as a reboot would: so the KV
comes from disk.
"""

import asyncio
import shutil
from pathlib import Path

from kvconnect.cli.client import Completion, CompletionClient, CompletionRequest, CounterReader
from kvconnect.cli.demos.rows import StoredRow
from kvconnect.cli.demos.runner import Demo, equal_texts
from kvconnect.cli.demos.scenes import Scene, scenes
from kvconnect.cli.engines import VllmServe, engine_env, offload_config
from kvconnect.cli.processes import Fleet, Server

BLOCK = 128  # vLLM's default on CPUs; the engines are started with it
WARM_UP = CompletionRequest("Hello", 4)
_SHOWN = {"long prompt": "2,000 tokens", "8 at once": "8 at once"}
_FROM = {
    source: f"vllm:kvconnect_offload_tokens_from_{source}_total" for source in ("host", "disk")
}


class StoredDemo(Demo):
    """One engine with KVConnectOffloading, killed and started again."""

    connector = "offloading"

    def __init__(self, model: Path, logs: Path) -> None:
        super().__init__(model, logs)
        self._scenes = [scene for scene in scenes() if scene.name in _SHOWN]
        self.expected = 3 * len(self._scenes)
        self._computed: dict[str, tuple[list[Completion], float]] = {}  # scene → answers, ms

    def play_on(self, fleet: Fleet) -> None:
        folder = self.logs / "kept"
        try:
            engine = self._boot(fleet, folder)
            asyncio.run(self._ask(engine, {"computed": "computed", "host": "from memory"}))
            engine.kill()
            self.console.print("[bold]the engine is killed (SIGKILL), its memory deleted[/]")
            shutil.rmtree(folder / "memory")
            engine = self._boot(fleet, folder)
            asyncio.run(self._ask(engine, {"disk": "from disk"}))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _boot(self, fleet: Fleet, folder: Path) -> Server:
        config = offload_config(
            cpu_bytes_to_use=512 << 20,
            disk_path=str(folder / "disk"),
            disk_bytes=1 << 30,
            persist=True,
            memory_path=str(folder / "memory"),
        )
        command = VllmServe(self.model, config, ["--block-size", str(BLOCK)]).command
        env = engine_env(VLLM_SERVER_DEV_MODE="1")  # for /reset_prefix_cache
        engine = fleet.start(f"engine {len(fleet.servers) + 1}", command, env)
        self.wait_up(fleet, [engine])
        return engine

    async def _ask(self, engine: Server, phases: dict[str, str]) -> None:
        async with CompletionClient(self.model.name) as client:
            reader = CounterReader(client, engine.url, "vllm:kv_offload", [*_FROM.values()])
            await client.ask(engine.url, WARM_UP)
            await reader.after(1)
            for source, name in phases.items():
                for scene in self._scenes:
                    shown = f"{_SHOWN[scene.name]}, {name}"
                    with self.console.status(shown):
                        answers = await client.ask_all(engine.url, scene.prompts)
                        row = await self._row(reader, scene, answers, source, shown)
                    self.add(row)
                await client.forget(engine.url)

    async def _row(
        self,
        reader: CounterReader,
        scene: Scene,
        answers: list[Completion],
        source: str,
        name: str,
    ) -> StoredRow:
        seen = await reader.after(len(answers))
        first_ms = seen.mean_first_token_ms
        expected, recompute_ms = self._computed.setdefault(scene.name, (answers, first_ms))
        return StoredRow(
            name=name,
            source=source,
            prompts=len(answers),
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            storable_tokens=sum((a.prompt_tokens - 1) // BLOCK * BLOCK for a in answers),
            host_tokens=round(seen.others[_FROM["host"]]),
            disk_tokens=round(seen.others[_FROM["disk"]]),
            computed_tokens=round(seen.computed_tokens),
            first_token_ms=round(first_ms, 1),
            recompute_ms=round(recompute_ms, 1),
            equal=equal_texts(answers, expected),
        )
