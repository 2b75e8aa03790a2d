"""Prefill hands over to decode; then the prefill engine is killed, and decode works alone.

Every answer that came through the proxy is compared with those of both engines asked directly.
"""

import asyncio
from pathlib import Path

from kvconnect.cli.client import Completion, CompletionClient, CounterReader
from kvconnect.cli.demos.rows import MB, HandOverRow
from kvconnect.cli.demos.runner import Demo, equal_texts
from kvconnect.cli.demos.scenes import Scene, scenes
from kvconnect.cli.engines import CONNECTORS, VllmServe, engine_env, proxy_command, transfer_config
from kvconnect.cli.processes import Fleet, Server


class HandOverDemo(Demo):
    """A prefill engine, a decode engine and the proxy, with a connector of ``CONNECTORS``."""

    def __init__(self, model: Path, logs: Path, connector: str) -> None:
        super().__init__(model, logs)
        self.connector = connector
        self._scenes = scenes()
        self.expected = len(self._scenes)

    def play_on(self, fleet: Fleet) -> None:
        env = engine_env()
        prefill, decode = (
            fleet.start(
                f"{role} engine",
                VllmServe(self.model, transfer_config(self.connector, role)).command,
                env,
            )
            for role in ("prefill", "decode")
        )
        proxy = fleet.start("proxy", proxy_command([prefill.url], [decode.url]), env)
        self.wait_up(fleet, [prefill, decode, proxy])
        asyncio.run(self._ask(prefill, decode, proxy.url))

    async def _ask(self, prefill: Server, decode: Server, proxy_url: str) -> None:
        async with CompletionClient(self.model.name) as client:
            reader = CounterReader(client, decode.url, CONNECTORS[self.connector].metrics)
            await reader.after(0)
            urls = prefill.url, decode.url, proxy_url
            for scene in self._scenes:
                if not scene.alone:
                    await self._play_scene(client, reader, scene, urls)
            alone = [scene for scene in self._scenes if scene.alone]
            expected = [await client.ask_all(prefill.url, scene.prompts) for scene in alone]
            prefill.kill()
            self.console.print("[bold]the prefill engine is killed (SIGKILL)[/]")
            for scene, answers in zip(alone, expected, strict=True):
                await self._play_scene(client, reader, scene, urls, answers)

    async def _play_scene(
        self,
        client: CompletionClient,
        reader: CounterReader,
        scene: Scene,
        urls: tuple[str, str, str],
        expected: list[Completion] | None = None,
    ) -> None:
        """``expected`` are prefill's own answers, if it cannot be asked any more."""
        prefill_url, decode_url, proxy_url = urls
        count = len(scene.prompts)
        with self.console.status(scene.name):
            answers = await client.ask_all(proxy_url, scene.prompts)
            seen = await reader.after(count)
            if expected is None:
                expected = await client.ask_all(prefill_url, scene.prompts)
            own = await client.ask_all(decode_url, scene.prompts)
            await reader.after(count)
        row = HandOverRow(
            name=scene.name,
            alone=scene.alone,
            prompts=count,
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            moved_tokens=round(seen.moved_tokens),
            cached_tokens=round(seen.cached_tokens),
            computed_tokens=round(seen.computed_tokens),
            moved_mb=round(seen.moved_bytes / MB, 3),
            gb_per_s=_rate(seen.moved_bytes, seen.transfer_s),
            hand_over_ms=round(seen.mean_first_token_ms, 1),
            failed_transfers=round(seen.failed_transfers),
            equal_to_prefill=equal_texts(answers, expected),
            equal_to_decode=equal_texts(answers, own),
            answers=[answer.text for answer in answers],
        )
        self.add(row, row.answers[0])


def _rate(nbytes: float, seconds: float) -> float | None:
    return round(nbytes / seconds / 1e9, 3) if seconds else None
