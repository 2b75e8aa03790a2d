"""Requests whose KV is read while it is computed: how far the steps so far have come with each.

* Told are blocks that steps before the present one completed; the worker's half has them wait for
  the device as it is when this step's metadata arrives, which is after those steps were given.
* Told is what is worth it: each telling costs a rank four messages and a read. Less than
  `WORTH_TELLING_BYTES` wait for what follows, but not beyond the last step but one.
* Nothing is told of a request with the step that admits it: what it found in the prefix cache may
  be computed by that very step, for vLLM enters blocks there when it schedules them.
* A request that is admitted again, or has fewer tokens than before, is computed anew: what was
  taken back may have been computed with, or be, blocks of another's load that failed.
* Groups that let go of blocks while they compute, and recurrent state, come with the grant; so does
  all of a request with an adapter, and of an engine that drafts tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvconnect.planner import Planner
from kvconnect.vllm import _compat
from kvconnect.vllm.params import Prompt

WORTH_TELLING_BYTES = 4 << 20
"""On a rank. As much crosses within milliseconds, and a telling costs one or two of CPU time."""


@dataclass
class _RequestProgress:
    request: Any
    name: str
    admitted: bool = False
    tokens: int = 0
    """Those that will be computed when the last step has run: fewer are some taken back."""
    told: tuple[list[int], ...] = ()
    """Blocks of each group."""
    digest: bytes = b""
    """Of the prompt, once: that is work of every token. Another one at the end is another lease."""


class PrefillProgress:
    """How far the requests of one engine are; vLLM's scheduler calls it."""

    def __init__(self, planner: Planner, vllm_config: Any, kv_cache_config: Any) -> None:
        self._planner = planner
        self._groups = _compat.transfer_group_ids(kv_cache_config)
        groups = [kv_cache_config.kv_cache_groups[g] for g in self._groups]
        specs = [group.kv_cache_spec for group in groups]
        self._sizes = [spec.block_size if only_grows(spec) else 0 for spec in specs]
        self._bytes = [
            _compat.block_bytes(group) if size else 0
            for group, size in zip(groups, self._sizes, strict=True)
        ]
        self._off = vllm_config.speculative_config is not None or not any(self._sizes)
        self._requests: dict[str, _RequestProgress] = {}

    def add(self, request: Any, name: str) -> None:
        """A request was promised whose reader may come before it is computed."""
        if not self._off and request.lora_request is None:
            self._requests[request.request_id] = _RequestProgress(request, name)

    def granted(self, request_id: str, tables: Sequence[Sequence[int]], digest: bytes) -> None:
        """These blocks and tokens are leased: where others were told of, under another lease id."""
        if (progress := self._requests.get(request_id)) and progress.told:
            kept = tuple(list(t[: len(k)]) for t, k in zip(tables, progress.told, strict=True))
            if (kept, digest) != (progress.told, progress.digest):
                self._restart(progress)

    def ended(self, request_id: str) -> None:
        """It is finished. Idempotent."""
        self._requests.pop(request_id, None)

    def step(self, output: Any) -> None:
        """vLLM has scheduled a step: tell what those before it have completed."""
        if not self._requests:
            return
        again = {one.req_id for one in output.scheduled_new_reqs}
        again |= output.scheduled_cached_reqs.resumed_req_ids | (output.preempted_req_ids or set())
        for request_id in dict.fromkeys((*again, *output.num_scheduled_tokens)):
            if (progress := self._requests.get(request_id)) is None:
                continue
            if request_id in again:
                self._restart(progress)
            if tokens := output.num_scheduled_tokens.get(request_id):
                if progress.admitted:
                    self._tell(progress, output.kv_connector_block_state, tokens)
                progress.admitted = True
                progress.tokens = progress.request.num_computed_tokens + tokens

    def _tell(self, progress: _RequestProgress, state: Any, scheduled: int) -> None:
        """Tell what is complete, if it is worth it now that so many tokens more are computed."""
        request = progress.request
        tokens, most = request.num_computed_tokens, request.num_prompt_tokens
        if tokens < progress.tokens:
            self._restart(progress)
            return
        complete = [min(tokens, most) // size if size else 0 for size in self._sizes]
        told = progress.told or tuple([] for _ in complete)
        untold = [now - len(before) for now, before in zip(complete, told, strict=True)]
        if not any(untold) or state is None:
            return
        nbytes = sum(count * size for count, size in zip(untold, self._bytes, strict=True))
        left = most - tokens - scheduled  # when this step has run
        if nbytes < WORTH_TELLING_BYTES and (left > scheduled or left == 0):
            return  # it comes with more, or with the grant, which follows a prompt's last step
        tables = state.get_block_ids(request.request_id)
        blocks = [
            tables[group][len(before) : now]
            for group, before, now in zip(self._groups, told, complete, strict=True)
        ]
        progress.digest = progress.digest or Prompt(request).digest(most)
        self._planner.progress(request.request_id, blocks, most, progress.digest)
        for table, more in zip(told, blocks, strict=True):
            table += more
        progress.told = told

    def _restart(self, progress: _RequestProgress) -> None:
        if progress.told:
            self._planner.restart(progress.request.request_id, progress.name)
        progress.admitted, progress.tokens = False, 0
        progress.told, progress.digest = (), b""


def step_tokens(vllm_config: Any) -> int:
    """How many tokens of a prompt are computed in one step, at most."""
    scheduler = vllm_config.scheduler_config
    most: int = getattr(scheduler, "max_num_scheduled_tokens", None) or (
        scheduler.max_num_batched_tokens
    )
    return min(most, scheduler.long_prefill_token_threshold or most)


def only_grows(spec: Any) -> bool:
    """Whether a request keeps all blocks of a group, each of so many tokens, while it computes."""
    layers = getattr(spec, "kv_cache_specs", {"": spec}).values()
    return all(
        isinstance(layer, FullAttentionSpec) and _compat.tokens_per_state(layer) == 1
        for layer in layers
    )
