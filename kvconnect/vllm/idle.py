"""Steps in which vLLM computes nothing, because all its requests wait for KV or are lent.

vLLM then steps again and again, with a sleep of a millisecond between two steps, and looks for
transfers that have ended once in each: without a wait that is half a core or more, in vLLM's
processes as in ours. A worker that waits in such a step sees the end when it comes.

* Only from the second such step in a row on: nothing of an earlier step runs on the device then.
* The longer the engine has waited the longer a step: a request that arrives meanwhile waits for
  its end, 5 ms at most.
* Never in a pipeline, where batches that run are several steps old, nor with data parallelism,
  where other engines' steps may wait for this one's.
"""

from typing import Any

FIRST_S, MOST_S = 0.0005, 0.005
PER_STEP_S = 0.0002


class IdleSteps:
    """Of one engine; its scheduler's half tells it of every step."""

    def __init__(self, parallel: Any) -> None:
        """``parallel``: vLLM's parallel config."""
        alone: bool = parallel.data_parallel_size == 1
        self._may_wait = alone and parallel.pipeline_parallel_size == 1
        self._in_a_row = 0

    def wait_s(self, tokens: int) -> float:
        """How long the workers may wait in a step that computes so many tokens."""
        before = self._in_a_row
        self._in_a_row = 0 if tokens else before + 1
        if tokens or not before or not self._may_wait:
            return 0.0
        return min(FIRST_S + before * PER_STEP_S, MOST_S)
