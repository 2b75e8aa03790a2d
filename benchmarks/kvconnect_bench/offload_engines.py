"""Real engines that offload: a hit beside computing, and what offloading costs who never hits.

* `hits`: one engine, one request at a time. Its own prefix cache is emptied before each; by its
  counters it is known that all whole blocks came from where the row says.
* `cost`: an engine with offloading and one without, both up, each loaded by ``vllm bench serve``
  with random prompts, the same for both. One at a time, and who begins alternates; or together,
  where whatever else runs on the machine slows both alike. Throughput is the client's; CPU
  seconds are those of all processes of the engine.
"""

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from kvconnect_bench.idle import thread_cpu_s
from kvconnect_bench.pair import first_token_s

DTYPE = "bfloat16"
VOCABULARY = (1000, 40_000)  # token ids that are plain words in every tokenizer we ship
BLOCK_TOKENS = 128
MEMORY_BYTES = 2 << 30
SETTLED_S = 30.0  # at most, until what was computed has been saved
SOURCES = ("recompute", "memory", "disk")


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


@dataclass(frozen=True)
class CostRow:
    """Offloading on ÷ off without a single hit, over all rounds."""

    together: bool
    """Whether both engines were loaded at once."""
    rounds: int
    requests: int
    """Per round and engine."""
    input_tokens: int
    output_tokens: int
    throughput_ratio: float
    """Median of the rounds' ratios of total tokens a second; above 1, offloading was faster."""
    throughput_low: float
    throughput_high: float
    off_spread: float
    """(highest - lowest) / median of the engine without offloading, over the rounds."""
    cpu_ratio: float
    """Median of the rounds' ratios of CPU seconds; above 1, offloading used more."""
    cpu_low: float
    cpu_high: float
    stored_mb: float
    """By the engine that offloads, in all rounds."""


def hits(model: Path, lengths: Sequence[int], prompts: int, folder: Path | None) -> list[HitRow]:
    """Rows for each length and source."""
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="kvconnect-bench-") as place:
        for length in lengths:
            with Fleet(Path(place) / f"logs {length}") as fleet:
                rows += _hits(fleet, model, length, prompts, Path(place) / f"disk {length}")
    return rows


def _hits(fleet: Fleet, model: Path, length: int, prompts: int, disk: Path) -> list[HitRow]:
    seed = random.Random(length)
    asked = [[seed.randrange(*VOCABULARY) for _ in range(length)] for _ in range(prompts + 1)]
    one = kv_bytes(model, length)  # memory has room for one prompt, and not for two
    config = offload_config(
        cpu_bytes_to_use=max(one * 3 // 2, 8 << 20),
        disk_path=str(disk),
        disk_bytes=max(one * (prompts + 3), 8 << 20),
    )
    engine = start_engine(fleet, f"engine for {length}", model, config)
    seconds: dict[str, list[float]] = {source: [] for source in SOURCES}

    def ask(prompt: list[int], source: str, counter: str) -> None:
        empty_prefix_cache(engine)
        before = counted(engine, counter)
        body = {"model": model.name, "prompt": prompt, "temperature": 0, "ignore_eos": True}
        seconds[source].append(first_token_s(engine.url, body))
        _expect(engine, counter, before, length // BLOCK_TOKENS * BLOCK_TOKENS)

    for prompt in asked:
        ask(prompt, "recompute", "")
        ask(prompt, "memory", "vllm:kvconnect_offload_tokens_from_host_total")
    for prompt in asked[:-1]:  # the last one is in memory
        ask(prompt, "disk", "vllm:kvconnect_offload_tokens_from_disk_total")
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


def cost(
    model: Path, rounds: int, requests: int, tokens: tuple[int, int], together: bool
) -> CostRow:
    """``tokens``: of an input and an output; ``together``: both engines are loaded at once."""
    with (
        tempfile.TemporaryDirectory(prefix="kvconnect-bench-") as place,
        Fleet(Path(place)) as fleet,
    ):
        engines = {
            "on": start_engine(fleet, "on", model, offload_config(cpu_bytes_to_use=MEMORY_BYTES)),
            "off": start_engine(fleet, "off", model, None),
        }
        rates: dict[str, list[float]] = {"on": [], "off": []}
        cpu_s: dict[str, list[float]] = {"on": [], "off": []}
        for turn in range(rounds + 1):
            order = list(engines) if turn % 2 else list(reversed(engines))
            with ThreadPoolExecutor(2 if together else 1) as pool:
                runs = [
                    pool.submit(load_once, engines[name], model, requests, tokens, turn)
                    for name in order
                ]
            for name, run in zip(order, runs, strict=True):
                found = run.result()
                if turn:  # the first one warms up
                    rates[name].append(found[0])
                    cpu_s[name].append(found[1])
        hit = counted(engines["on"], "vllm:kvconnect_offload_tokens_from_host_total")
        if hit:
            raise RuntimeError(f"{hit:.0f} tokens were loaded, expected none: no cost at 0 %")
        stored = counted(engines["on"], "vllm:kv_offload_store_bytes_total")
    faster = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    used = [on / off for on, off in zip(cpu_s["on"], cpu_s["off"], strict=True)]
    spread = (max(rates["off"]) - min(rates["off"])) / statistics.median(rates["off"])
    return CostRow(
        together=together,
        rounds=rounds,
        requests=requests,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        throughput_ratio=round(statistics.median(faster), 4),
        throughput_low=round(min(faster), 4),
        throughput_high=round(max(faster), 4),
        off_spread=round(spread, 4),
        cpu_ratio=round(statistics.median(used), 4),
        cpu_low=round(min(used), 4),
        cpu_high=round(max(used), 4),
        stored_mb=round(stored / 1e6, 1),
    )


def load_once(
    engine: Server, model: Path, requests: int, tokens: tuple[int, int], turn: int
) -> tuple[float, float]:
    """Tokens a second, and CPU seconds of the engine, of one run of ``vllm bench serve``."""
    result = engine.log.with_suffix(".json")
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai", "--endpoint", "/v1/completions", "--base-url", engine.url]
    command += ["--model", str(model), "--served-model-name", model.name, "--ignore-eos"]
    command += ["--dataset-name", "random", "--random-input-len", str(tokens[0])]
    command += ["--random-output-len", str(tokens[1]), "--num-prompts", str(requests)]
    command += ["--max-concurrency", "4", "--seed", str(turn), "--disable-tqdm"]
    command += ["--save-result", "--result-filename", str(result)]
    before = sum(thread_cpu_s(engine.pid).values())
    done = subprocess.run(command, env=engine_env(), capture_output=True, text=True, check=False)  # noqa: S603 - our own command, no shell
    used = sum(thread_cpu_s(engine.pid).values()) - before
    if done.returncode:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{found['completed']} of {requests} requests were answered")
    return float(found["total_token_throughput"]), used


def start_engine(fleet: Fleet, name: str, model: Path, config: dict[str, Any] | None) -> Server:
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


def counted(engine: Server, name: str) -> float:
    """A counter of the engine; 0 for no name."""
    if not name:
        return 0.0
    with urllib.request.urlopen(f"{engine.url}/metrics") as answer:  # noqa: S310 - our own engine
        text = answer.read().decode()
    return sum(float(n) for n in re.findall(rf"^{re.escape(name)}\{{.*\}} (\S+)$", text, re.M))


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
