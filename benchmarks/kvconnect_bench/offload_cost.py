"""What offloading costs an engine that never hits: CPU seconds beside engines without it.

* Three engines are up: one that offloads, one that does not, and another that does not, which says
  what a difference means nothing (A/A). They are the same in all else.
* Many short rounds: each engine in turn gets the same new random prompts, all at once, and who
  begins moves on by one. So what else the machine does meets all alike.
* CPU seconds are of all processes of an engine, from the beginning of one of its turns to that of
  its next: what is stored after the answers counts, and so does what an idle engine uses.
* A row is the median of the rounds' ratios, with the interval in which the true median is with 95 %
  certainty: what the method resolves.
"""

import json
import math
import random
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kvconnect.cli.engines import START_TIMEOUT_S, offload_config
from kvconnect.cli.processes import Fleet, Server
from kvconnect_bench.counters import counted
from kvconnect_bench.cpu import session_cpu_s
from kvconnect_bench.offload_engines import VOCABULARY, launch_engine
from kvconnect_bench.results import Spread

INPUT_TOKENS, OUTPUT_TOKENS = 512, 32
MEMORY_BYTES = 256 << 20  # soon full: every store then costs an eviction, as in the long run
WARM_ROUNDS = 3
UNCERTAIN = 0.05  # how often an interval may not hold what it is of
OFF, AGAIN, ON = "without", "without, again", "offloading"
HITS = "vllm:kvconnect_offload_tokens_from_host_total"
STORED = "vllm:kv_offload_store_bytes_total"


@dataclass(frozen=True)
class CostRow:
    """An engine's use divided by that of the one without offloading, round by round."""

    engine: str
    """One that offloads, or one that does not either: A/A."""
    rounds: int
    requests: int
    """Of a round, at once."""
    input_tokens: int
    output_tokens: int
    cpu: Spread
    """Ratio of CPU seconds; above 1, it used more."""
    cpu_low: float
    """The median is between the two with 95 % certainty."""
    cpu_high: float
    seconds: Spread
    """Ratio of seconds until all requests were answered."""
    stored_mb: float
    """In all rounds, the first ones included."""


@dataclass
class _Used:
    """CPU seconds and seconds of an engine's rounds."""

    cpu_s: list[float]
    answered_s: list[float]


def cost(model: Path, rounds: int, requests: int) -> list[CostRow]:
    """Rows of the engine that offloads, and of the A/A."""
    with (
        tempfile.TemporaryDirectory(prefix="kvconnect-bench-") as place,
        Fleet(Path(place)) as fleet,
    ):
        configs = {OFF: None, ON: offload_config(cpu_bytes_to_use=MEMORY_BYTES), AGAIN: None}
        engines = {name: launch_engine(fleet, name, model, one) for name, one in configs.items()}
        fleet.wait_up(list(engines.values()), START_TIMEOUT_S)
        used = measured(engines, model.name, rounds, requests)
        if hit := counted(engines[ON], HITS):
            raise RuntimeError(f"{hit:.0f} tokens were loaded, expected none: no cost at 0 %")
        stored = {ON: counted(engines[ON], STORED)}
    return [
        _row(name, used[name], used[OFF], requests, stored.get(name, 0)) for name in (ON, AGAIN)
    ]


def measured(
    engines: Mapping[str, Server], model: str, rounds: int, requests: int
) -> dict[str, _Used]:
    """What each engine used in ``rounds`` rounds."""
    used = {name: _Used([], []) for name in engines}
    marks: dict[str, float] = {}
    names, seed = list(engines), random.Random(0)
    for turn in range(WARM_ROUNDS + rounds + 1):  # the last one ends the one before
        prompts = [
            [seed.randrange(*VOCABULARY) for _ in range(INPUT_TOKENS)] for _ in range(requests)
        ]
        for name in names:
            now = session_cpu_s(engines[name].pid)
            if turn > WARM_ROUNDS:
                used[name].cpu_s.append(now - marks[name])
            marks[name] = now
            taken_s = answered_s(engines[name], model, prompts)
            if WARM_ROUNDS <= turn < WARM_ROUNDS + rounds:
                used[name].answered_s.append(taken_s)
        names = [*names[1:], names[0]]
    return used


def answered_s(engine: Server, model: str, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds until ``engine`` has answered all of them, asked at once."""

    def ask(prompt: Sequence[int]) -> None:
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS}
        body |= {"ignore_eos": True, "temperature": 0}
        request = urllib.request.Request(  # noqa: S310 - our own engine
            f"{engine.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            answer.read()

    started = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(ask, prompts))
    return time.perf_counter() - started


def median_within(values: Sequence[float]) -> tuple[float, float]:
    """Between which of ``values``, six or more, the median of what they are drawn from is, at 95 %.

    By the chance that so few of them are below it, or above: whatever they are drawn from.
    """
    ordered, n, first = sorted(values), len(values), 0
    missed = 2 / 2**n
    while (missed := missed + 2 * math.comb(n, first + 1) / 2**n) <= UNCERTAIN:
        first += 1
    return ordered[first], ordered[n - 1 - first]


def _row(name: str, own: _Used, beside: _Used, requests: int, stored: float) -> CostRow:
    ratios = [a / b for a, b in zip(own.cpu_s, beside.cpu_s, strict=True)]
    times = [a / b for a, b in zip(own.answered_s, beside.answered_s, strict=True)]
    cpu, seconds = Spread.of(f"of {OFF}", ratios), Spread.of(f"of {OFF}", times)
    low, high = median_within(ratios)
    assert cpu and seconds and low <= median(ratios) <= high
    return CostRow(
        engine=name,
        rounds=len(ratios),
        requests=requests,
        input_tokens=INPUT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        cpu=cpu,
        cpu_low=round(low, 4),
        cpu_high=round(high, 4),
        seconds=seconds,
        stored_mb=round(stored / 1e6, 1),
    )
