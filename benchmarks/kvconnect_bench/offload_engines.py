"""Real engines that offload: a hit of each tier beside computing, and beside LMCache's.

* One request at a time. An engine's own prefix cache is emptied before each, but for hits of that
  cache itself; by the engine's counters it is known that all whole blocks came from where the row
  says.
* LMCache's engine runs beside ours, gets the same prompts in the same round, and who is asked first
  alternates.
"""

import json
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvconnect.cli.engines import (
    START_TIMEOUT_S,
    VllmServe,
    engine_env,
    offload_config,
)
from kvconnect.cli.processes import Fleet, Server
from kvconnect_bench.counters import EXTERNAL, counted
from kvconnect_bench.lmcache import lmcache_config, start_lmcache
from kvconnect_bench.pair import first_token_s

DTYPE = "bfloat16"
VOCABULARY = (1000, 40_000)  # token ids that are plain words in every tokenizer we ship
BLOCK_TOKENS = 128
SETTLED_S = 30.0  # at most, until what was computed has been saved
COUNTERS = {
    "recompute": "",
    "device": "vllm:prefix_cache_hits_total",
    "memory": "vllm:kvconnect_offload_tokens_from_host_total",
    "disk": "vllm:kvconnect_offload_tokens_from_disk_total",
}
"""Where KV comes from, and what counts its tokens."""
LMCACHE = "LMCache, memory"


@dataclass(frozen=True)
class HitRow:
    """Time to first token of prompts whose KV comes from one source."""

    source: str
    prompt_tokens: int
    prompts: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    times_faster: float
    """Than computing: medians."""


def hits(
    model: Path, lengths: Sequence[int], prompts: int, folder: Path | None, lmcache: bool
) -> list[HitRow]:
    """Rows for each length and source; ``lmcache``: beside LMCacheMPConnector with its server."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="kvconnect-bench-") as place:
        for length in lengths:
            with Fleet(Path(place) / f"logs {length}") as fleet:
                rows += _hits(
                    fleet, model, length, prompts, Path(place) / f"disk {length}", lmcache
                )
    return rows


def _hits(
    fleet: Fleet, model: Path, length: int, prompts: int, disk: Path, lmcache: bool
) -> list[HitRow]:
    seed = random.Random(length)
    asked = [[seed.randrange(*VOCABULARY) for _ in range(length)] for _ in range(prompts + 1)]
    one = kv_bytes(model, length)  # memory has room for one prompt, and not for two
    config = offload_config(
        cpu_bytes_to_use=max(one * 3 // 2, 8 << 20),
        disk_path=str(disk),
        disk_bytes=max(one * (prompts + 3), 8 << 20),
    )
    engine = start_engine(fleet, f"engine for {length}", model, config)
    seconds: dict[str, list[float]] = {source: [] for source in COUNTERS}

    def asks(engine: Server, prompt: list[int], counter: str, emptied: bool = True) -> float:
        if emptied:
            empty_prefix_cache(engine)
        before = counted(engine, counter)
        body = {"model": model.name, "prompt": prompt, "temperature": 0, "ignore_eos": True}
        taken_s = first_token_s(engine.url, body)
        _expect(engine, counter, before, length // BLOCK_TOKENS * BLOCK_TOKENS)
        return taken_s

    def ours(prompt: list[int], sources: Sequence[str]) -> None:
        for source in sources:
            seconds[source].append(asks(engine, prompt, COUNTERS[source], source != "device"))

    def here(prompt: list[int]) -> None:
        ours(prompt, ("recompute", "memory"))

    turns = [here]
    if lmcache:
        config = lmcache_config(start_lmcache(fleet))
        beside = start_engine(fleet, f"LMCache for {length}", model, config)
        seconds[LMCACHE] = []

        def theirs(prompt: list[int]) -> None:
            asks(beside, prompt, "")
            seconds[LMCACHE].append(asks(beside, prompt, EXTERNAL))

        turns.append(theirs)
    for prompt in asked:
        for turn in turns:
            turn(prompt)
        turns.reverse()
    for prompt in asked[:-1]:  # the last one is in memory
        ours(prompt, ("disk",))
    for prompt in asked:  # last: such a hit keeps a prompt in memory longer, too
        asks(engine, prompt, "")
        ours(prompt, ("device",))
    return _hit_rows(length, seconds)


def _hit_rows(length: int, seconds: Mapping[str, Sequence[float]]) -> list[HitRow]:
    base = statistics.median(seconds["recompute"][1:])
    return [
        HitRow(
            source=source,
            prompt_tokens=length,
            prompts=len(times),
            ttft_p50_ms=round(1e3 * statistics.median(times), 1),
            ttft_p90_ms=round(1e3 * statistics.quantiles(times, n=10)[-1], 1),
            times_faster=round(base / statistics.median(times), 2),
        )
        for source, (_, *times) in seconds.items()  # the first of each warms up
    ]


def start_engine(fleet: Fleet, name: str, model: Path, config: dict[str, Any]) -> Server:
    """An engine that is up; ``config``: ``--kv-transfer-config``."""
    options = ["--dtype", DTYPE, "--max-model-len", "8192", "--block-size", str(BLOCK_TOKENS)]
    command = VllmServe(model, config, options).command
    server = fleet.start(name, command, engine_env(VLLM_SERVER_DEV_MODE="1"))  # /reset_prefix_cache
    fleet.wait_up([server], START_TIMEOUT_S)
    return server


def kv_bytes(model: Path, tokens: int) -> int:
    """Bytes that the KV of so many tokens takes."""
    config = json.loads((model / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    whole = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    return int(config["num_hidden_layers"] * 2 * heads * head * 2 * whole)


def _expect(engine: Server, counter: str, before: float, tokens: int) -> None:
    """A counter is seen soon after the answer."""
    _wait(
        lambda: not counter or counted(engine, counter) - before >= tokens,
        f"{tokens} tokens more in {counter}",
    )


def empty_prefix_cache(engine: Server) -> None:
    """Empty the engine's own prefix cache; it refuses while blocks are being saved."""
    request = urllib.request.Request(f"{engine.url}/reset_prefix_cache", method="POST")  # noqa: S310

    def is_empty() -> bool:
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - our own engine
            return b'"success":true' in answer.read().replace(b" ", b"")

    _wait(is_empty, "an empty prefix cache")


def _wait(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SETTLED_S
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {SETTLED_S:.0f} s for {what}")
        time.sleep(0.1)
