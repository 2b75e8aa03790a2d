"""Steps in which vLLM computes nothing, because all its requests wait for KV or are lent.

vLLM then steps again and again, with a sleep of a millisecond between two steps, and looks for
transfers that have ended once in each: without a wait that is half a core or more, in vLLM's
processes as in ours. A worker that waits in such a step sees the end when it comes.

* Only from the second such step in a row on: nothing of an earlier step runs on the device then.
* The longer nothing has ended the longer a step. A request that arrives meanwhile waits for the
  steps that are under way, `MOST_S` in all.
* After a step in which something ended comes one without a wait: it was under way already when the
  scheduler was told, and the next one may compute.
* Never in a pipeline, where batches that run are several steps old, nor with data parallelism,
  where other engines' steps may wait for this one's.
"""

from typing import Any

MOST_S = 0.010
PER_STEP_S = 0.0005


class IdleSteps:
    """Of one engine; its scheduler's half tells it of every step."""

    def __init__(self, vllm_config: Any) -> None:
        parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
        under_way = 2 if scheduler.async_scheduling else 1
        alone = parallel.data_parallel_size == 1 and parallel.pipeline_parallel_size == 1
        self._most_s = MOST_S / under_way if alone else 0.0
        self._in_a_row = 0

    def most_s(self, tokens: int) -> float:
        """How long the workers may wait in a step that computes so many tokens."""
        before = self._in_a_row
        self._in_a_row = 0 if tokens else before + 1
        return self._most_s if before and not tokens else 0.0


class IdleWaits:
    """Of one worker: how long it waits in these steps."""

    def __init__(self) -> None:
        self._in_a_row = 0  # steps in which nothing ended

    def wait_s(self, most_s: float) -> float:
        """In the step that begins, in which it may wait for ``most_s``."""
        before = self._in_a_row
        self._in_a_row = before + 1 if most_s else 0
        return min(before * PER_STEP_S, most_s)

    def ended(self) -> None:
        """Something ended in this step."""
        self._in_a_row = 0
