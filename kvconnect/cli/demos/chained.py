"""Loads of one decode engine from a peer and from its own host memory, in one load.

Both engines have KVConnectMulti[KVConnectNixl, KVConnectOffloading]. A prompt whose head the
decode engine has seen takes that from memory and the rest from the prefill engine; where that one
is killed between its ticket and the load, what memory has is loaded and the rest is computed.
"""

import asyncio
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from kvconnect.cli.client import CompletionClient, CompletionRequest, CounterReader
from kvconnect.cli.demos.rows import ChainedRow
from kvconnect.cli.demos.runner import Demo
from kvconnect.cli.demos.scenes import inventory
from kvconnect.cli.demos.stored import BLOCK, WARM_UP
from kvconnect.cli.engines import VllmServe, engine_env, multi_config
from kvconnect.cli.processes import Fleet, Server

ASK_FOR = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
LENGTH = 24  # of an answer, in tokens
# "lost": what a load lost is computed again, though vLLM has counted it as loaded
_FROM_PEERS, _FROM_HOST, _LOST = (
    f"vllm:kvconnect_chain_tokens_{what}_total" for what in ("from_peers", "from_host", "lost")
)


class ChainedDemo(Demo):
    """A prefill engine and a decode engine, both with two connectors, and no proxy."""

    connector = "multi"
    expected = 5

    def __init__(self, model: Path, logs: Path) -> None:
        super().__init__(model, logs)
        self._recompute_ms: float | None = None

    def play_on(self, fleet: Fleet) -> None:
        config = multi_config(cpu_bytes_to_use=512 << 20)
        command = VllmServe(self.model, config, ["--block-size", str(BLOCK)]).command
        env = engine_env(VLLM_SERVER_DEV_MODE="1")  # for /reset_prefix_cache
        prefill, decode = (fleet.start(f"{r} engine", command, env) for r in ("prefill", "decode"))
        self.wait_up(fleet, [prefill, decode])
        asyncio.run(self._ask(prefill, decode))

    async def _ask(self, prefill: Server, decode: Server) -> None:
        first = inventory("Porto", 126, 100)
        head = first[: first.index("Room 160")]  # as far as three prompts are the same
        shared, last = (head + inventory(town, 66, 500) for town in ("Braga", "Evora"))
        again = {"host", "computed"}  # what does not fill a block
        async with CompletionClient(self.model.name) as client:
            reader = CounterReader(
                client, decode.url, "vllm:nixl", [_FROM_PEERS, _FROM_HOST, _LOST]
            )
            for server in (prefill, decode):
                await client.ask(server.url, WARM_UP)
            await reader.after(1)
            scenes = _ChainedScenes(client, reader, prefill, decode.url)
            self._keep(await scenes.play("computed", first, {"computed"}, ticket=False))
            self._keep(await scenes.play("from the peer", inventory("Faro", 126, 300), {"peer"}))
            self._keep(await scenes.play("from memory and peer", shared, {"host", "peer"}))
            self._keep(await scenes.play("from memory", first, again, ticket=False))
            self.console.print("[bold]the prefill engine hands out a ticket, and is killed[/]")
            self._keep(await scenes.play("from memory, alone", last, again, kill=True))

    def _keep(self, row: ChainedRow) -> None:
        if self._recompute_ms is None:
            self._recompute_ms = row.first_token_ms
        self.add(replace(row, recompute_ms=self._recompute_ms))


@dataclass(frozen=True)
class _ChainedScenes:
    """Asks both engines, and reads decode's counters around it."""

    client: CompletionClient
    reader: CounterReader
    prefill: Server
    decode_url: str

    async def play(
        self,
        name: str,
        text: str,
        sources: AbstractSet[str],
        ticket: bool = True,
        kill: bool = False,
    ) -> ChainedRow:
        """``ticket``: prefill computes the prompt first; ``kill``: and then dies."""
        client, url = self.client, self.prefill.url
        await client.forget(self.decode_url)
        expected = await client.ask(url, CompletionRequest(text, LENGTH))
        params = None
        if ticket:
            prefilled = await client.ask(url, CompletionRequest(text, 1, params=ASK_FOR))
            params = prefilled.params
        if kill:
            self.prefill.kill()
        asked = CompletionRequest(text, LENGTH, params=params)
        answer = await client.ask(self.decode_url, asked)
        seen = await self.reader.after(1)
        return ChainedRow(
            name=name,
            prompt_tokens=answer.prompt_tokens,
            peer_tokens=round(seen.others[_FROM_PEERS]),
            host_tokens=round(seen.others[_FROM_HOST]),
            computed_tokens=round(seen.computed_tokens + seen.others[_LOST]),
            sources=frozenset(sources),
            first_token_ms=round(seen.mean_first_token_ms, 1),
            recompute_ms=0.0,
            equal=answer.text == expected.text,
            alone=kill,
        )
