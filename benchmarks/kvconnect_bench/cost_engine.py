"""The engine whose cost of offloading is measured: one process, and what it used in each turn.

``python -m kvconnect_bench.cost_engine PLAN``, a `CostPlan` as JSON; it writes `CostTurns` as JSON.

* A turn answers new random prompts, all at once, with the connector in one state, and ends when all
  that it is to store has been stored. What the whole process used until then counts.
* A round has a turn of each state, in random order.
"""

import contextlib
import dataclasses
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import kv_transfer_state

from kvconnect.cli.engines import offload_config
from kvconnect_bench import switched
from kvconnect_bench.cost_plan import CostPlan, CostTurn, CostTurns, State
from kvconnect_bench.offload_engines import BLOCK_TOKENS, DTYPE, VOCABULARY

THREADS = "kvconnect-"  # how names of our threads begin
IDLE_S = 0.001  # vLLM's own pause after a step without tokens
EVICTED = "vllm:kvconnect_offload_evictions"
HITS = "vllm:kvconnect_offload_tokens_from_host"
STORED = "vllm:kv_offload_store_bytes"
CLASSES = {
    State.NOTHING: switched.DoesNothing,
    State.AGAIN: switched.DoesNothing,
    State.OFFLOADS: switched.SwitchedOffloading,
    State.COUNTED: switched.Counted,
}
"""What the connector is; in the other state there is none."""


class Used(NamedTuple):
    """CPU seconds of this process so far."""

    cpu_s: float
    calls_s: float
    threads_s: float

    @classmethod
    def now(cls) -> "Used":
        ours = [one.ident for one in threading.enumerate() if one.name.startswith(THREADS)]
        clocks = [time.pthread_getcpuclockid(ident) for ident in ours if ident]
        threads_s = sum(time.clock_gettime(clock) for clock in clocks)
        return cls(time.process_time(), switched.Counted.calls_s, threads_s)


class Engine:
    """An engine in this process, whose connector is switched."""

    def __init__(self, plan: CostPlan) -> None:
        config = offload_config(cpu_bytes_to_use=plan.memory_bytes)
        config["kv_connector"] = switched.SwitchedOffloading.__name__
        config["kv_connector_module_path"] = switched.__name__
        self._plan = plan
        self._llm = LLM(
            plan.model,
            dtype=DTYPE,
            enforce_eager=True,
            max_model_len=8192,
            block_size=BLOCK_TOKENS,
            disable_log_stats=False,  # an engine that serves has them
            kv_transfer_config=KVTransferConfig(**config),
        )
        self._engine: Any = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._connectors = self._scheduler.connector, kv_transfer_state.get_kv_transfer_group()
        self._draw = random.Random(0)

    def rounds(self) -> Iterator[list[CostTurn]]:
        """Once memory is full: every store then costs an eviction, as in the long run."""
        while not self.counted(EVICTED):
            self._turn(State.OFFLOADS)
        for _ in range(self._plan.rounds):
            yield [self._turn(state) for state in self._draw.sample(list(State), len(State))]

    def counted(self, name: str) -> float:
        """A counter of the engine's; 0 if it has not counted yet."""
        return float(sum(one.value for one in self._llm.get_metrics() if one.name == name))

    def _turn(self, state: State) -> CostTurn:
        plan, tokens = self._plan, range(self._plan.input_tokens)
        prompts = [
            {"prompt_token_ids": [self._draw.randrange(*VOCABULARY) for _ in tokens]}
            for _ in range(plan.requests)
        ]
        asked = SamplingParams(max_tokens=plan.output_tokens, ignore_eos=True, temperature=0)
        with self._in(state):
            before, started_s = Used.now(), time.perf_counter()
            self._llm.generate(prompts, asked, use_tqdm=False)
            answered_s = time.perf_counter() - started_s
            while self._scheduler.has_requests():
                self._engine.step()
                time.sleep(IDLE_S)
            used = [now - then for now, then in zip(Used.now(), before, strict=True)]
        return CostTurn(state, answered_s, *used)

    @contextlib.contextmanager
    def _in(self, state: State) -> Iterator[None]:
        """With the connector in this state."""
        if state in CLASSES:
            switched.switch(CLASSES[state])
            yield
            return
        self._set(None, None)
        try:
            yield
        finally:
            self._set(*self._connectors)

    def _set(self, scheduler: Any, worker: Any) -> None:
        self._scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = scheduler, worker


def main() -> None:
    plan = CostPlan(**json.loads(sys.argv[1]))
    engine = Engine(plan)
    rounds = list(engine.rounds())
    found = CostTurns(rounds, engine.counted(HITS), engine.counted(STORED))
    Path(plan.out).write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
