"""Plays the demo of several connectors: loads of one decode engine, from a peer and from memory.

Both engines have KVConnectMulti[KVConnectNixl, KVConnectOffloading]. A prompt whose head the
decode engine has seen takes that from memory and the rest from the prefill engine; where that one
is killed between its ticket and the load, what memory has is loaded and the rest is computed.
"""

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

from kvconnect.cli.chained_rows import CAPTION, Row, table, verdict
from kvconnect.cli.client import Client, Prompt
from kvconnect.cli.counters import Counters
from kvconnect.cli.engines import START_TIMEOUT_S, Engine, engine_env, multi_config
from kvconnect.cli.kept import BLOCK, WARM_UP, forget, total
from kvconnect.cli.play import Demo
from kvconnect.cli.processes import Fleet, Server
from kvconnect.cli.scenes import inventory

METRICS, OURS = "vllm:nixl", "vllm:kvconnect_chain_tokens"
ROWS = 5
ASK_FOR = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
LENGTH = 24  # of an answer, in tokens


class ChainedDemo(Demo):
    """One run; see the module."""

    def __init__(self, model: Path, logs: Path) -> None:
        super().__init__(model, "multi", logs)
        self.loads: list[Row] = []
        self._recompute_ms = 0.0

    def play(self) -> bool:
        with Fleet(self._logs) as fleet:
            try:
                prefill, decode = self._boot_both(fleet)
                asyncio.run(self._ask_both(prefill, decode))
            finally:
                self._last_lines = {server.log: server.last_lines() for server in fleet.servers}
        right, line = self._verdict()
        self._console.print(table(self.loads))
        self._console.print(CAPTION, highlight=False)
        seconds = time.monotonic() - self._started_s
        self._console.print(f"[bold {'green' if right else 'red'}]{line}[/] ({seconds:.0f} s)")
        return right

    def _verdict(self) -> tuple[bool, str]:
        return verdict(self.loads, ROWS)

    def _shown_rows(self) -> list[Any]:
        return list(self.loads)

    def _boot_both(self, fleet: Fleet) -> tuple[Server, Server]:
        command = Engine(
            self._model, multi_config(cpu_bytes_to_use=512 << 20), ["--block-size", str(BLOCK)]
        ).command
        env = engine_env(VLLM_SERVER_DEV_MODE="1")  # for /reset_prefix_cache
        prefill, decode = (fleet.start(f"{r} engine", command, env) for r in ("prefill", "decode"))
        with self._console.status("both engines"):
            fleet.wait_up([prefill, decode], START_TIMEOUT_S)
        for server in (prefill, decode):
            self._console.print(f"[green]✓[/] {server.name}: {server.url}", highlight=False)
        return prefill, decode

    async def _ask_both(self, prefill: Server, decode: Server) -> None:
        first = inventory("Porto", 126, 100)
        head = first[: first.index("Room 160")]  # as far as three prompts are the same
        shared, last = (head + inventory(town, 66, 500) for town in ("Braga", "Evora"))
        async with Client(self._model.name) as client:
            for server in (prefill, decode):
                await client.ask(server.url, WARM_UP)
            stage = _Stage(client, prefill, decode)
            self._add(await stage.play("computed", first, {"computed"}, ticket=False))
            self._add(await stage.play("from the peer", inventory("Faro", 126, 300), {"peer"}))
            self._add(await stage.play("from memory and peer", shared, {"host", "peer"}))
            again = {"host", "computed"}  # what does not fill a block
            self._add(await stage.play("from memory", first, again, ticket=False))
            self._console.print("[bold]the prefill engine hands out a ticket, and is killed[/]")
            self._add(await stage.play("from memory, alone", last, again, kill=True))

    def _add(self, row: Row) -> None:
        if not self.loads:
            self._recompute_ms = row.first_token_ms
        row = dataclasses.replace(row, recompute_ms=self._recompute_ms)
        self.loads.append(row)
        self._console.print(f"[{'red]✗' if row.faults() else 'green]✓'}[/] {row.name}")


class _Stage:
    """Asks both engines, and reads decode's counters around it."""

    def __init__(self, client: Client, prefill: Server, decode: Server) -> None:
        self._client = client
        self._prefill = prefill
        self._decode = decode

    async def play(
        self, name: str, text: str, sources: set[str], ticket: bool = True, kill: bool = False
    ) -> Row:
        """``ticket``: prefill computes the prompt first; ``kill``: and then dies."""
        client, url = self._client, self._decode.url
        await forget(url)
        expected = await client.ask(self._prefill.url, Prompt(text, LENGTH))
        params = None
        if ticket:
            params = (await client.ask(self._prefill.url, Prompt(text, 1, params=ASK_FOR))).params
        if kill:
            self._prefill.kill()
        before = await self._seen(0)
        answer = await client.ask(url, Prompt(text, LENGTH, params=params))
        after = await self._seen(before[0].finished + 1)
        seen = after[0] - before[0]
        return Row(
            name=name,
            prompt_tokens=answer.prompt_tokens,
            peer_tokens=round(after[1] - before[1]),
            host_tokens=round(after[2] - before[2]),
            computed_tokens=round(seen.computed_tokens + after[3] - before[3]),
            sources=frozenset(sources),
            first_token_ms=round(1e3 * seen.first_token_s / max(seen.first_tokens, 1), 1),
            recompute_ms=0.0,
            equal=answer.text == expected.text,
            alone=kill,
        )

    async def _seen(self, finished: float) -> tuple[Counters, float, float, float]:
        """Decode's counters once so many requests have ended; tokens from peers, from memory, lost.

        What a load lost is computed again, though vLLM has counted it as loaded.
        """
        counters = await self._client.counters_after(self._decode.url, METRICS, finished)
        text = await self._client.metrics(self._decode.url)
        peers, host, lost = (
            total(text, f"{OURS}_{what}_total") for what in ("from_peers", "from_host", "lost")
        )
        return counters, peers, host, lost
