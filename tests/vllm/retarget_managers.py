"""pytest plugin: points vLLM's tests of its host-memory manager at `OffloadTier` and our policies.

Their manager is asked for chunk ids; ours leaves slots to the ranks, so ids are given out here, as
theirs are. Theirs stores all that is offered or nothing; ours stores what there is room for: that
too is done here. What they assert about inner queues, statistics and hooks has nothing to point at.
"""

from collections import defaultdict

import numpy as np
from tests.v1.kv_offload.cpu import test_manager
from vllm.v1.kv_offload.base import LookupResult, Medium, OffloadingEvent, PrepareStoreOutput
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from kvconnect.offload.cache import CacheTier, KeyState
from kvconnect.offload.eviction import make
from kvconnect.offload.jobs import Forget
from kvconnect.offload.tiers import KeyedChunk, OffloadTier

FOUND = {
    KeyState.ABSENT: LookupResult.MISS,
    KeyState.FILLING: LookupResult.HIT_PENDING,
    KeyState.HELD: LookupResult.HIT,
}
_made = 0


class Manager:
    """vLLM's OffloadingManager over an `OffloadTier`."""

    medium = Medium.CPU

    def __init__(self, num_chunks, cache_policy, store_threshold):
        global _made
        _made += 1
        self.capacity = num_chunks
        self.tier = OffloadTier(CacheTier("host", make(cache_policy, num_chunks), store_threshold))
        self.ids, self.free_ids = {}, list(reversed(range(num_chunks)))
        self.saves, self.fills, self.events = {}, {}, []
        self.of_request = defaultdict(list)

    def lookup(self, key, _context):
        return FOUND[self.tier.host.standing(key)]

    def touch(self, keys, _context):
        self.tier.host.touch(keys)

    def prepare_store(self, keys, context):
        keys = list(keys)
        self.of_request[context.req_id] += keys
        host = self.tier.host
        new = [key for key in dict.fromkeys(keys) if host.standing(key) is KeyState.ABSENT]
        pinned = {key for _, key in self.fills} | {*self.saves, *keys}
        stay = sum(host.standing(key) is not KeyState.ABSENT for key in pinned)
        if len(new) > self.capacity - stay:
            return None
        result = self.tier.store([KeyedChunk(key, 0, ()) for key in keys])
        evicted = [job.key for job in result.jobs if isinstance(job, Forget)]
        saves = [job for job in result.jobs if not isinstance(job, Forget)]
        self._note()
        self.saves |= {job.key: job.number for job in saves}
        stored = [job.key for job in saves]
        freed = [self.ids.pop(key) for key in evicted]  # the last one first, behind unused ones
        self.free_ids = freed + self.free_ids
        self.ids |= {key: self.free_ids.pop() for key in stored}
        return PrepareStoreOutput(stored, self._spec(stored), evicted)

    def complete_store(self, keys, _context, success=True):
        for key in keys:
            if (number := self.saves.pop(key, None)) is not None:
                self.tier.answered(number, success)
                if not success:
                    self.free_ids.append(self.ids.pop(key))
        self._note()
        if not success and hasattr(OffloadingEvent, "metadata_only"):
            # Since 0.33 theirs notes it for what it keeps of keys; it is never published.
            gone = [key for key in keys if self.tier.host.standing(key) is KeyState.ABSENT]
            self.events.append(
                OffloadingEvent(keys=gone, medium=Medium.CPU, removed=True, metadata_only=True)
            )

    def prepare_load(self, keys, context):
        self.of_request[context.req_id] += keys
        request = f"{context.req_id} {len(self.fills)} {len(self.events)}"
        result = self.tier.load(request, [KeyedChunk(key, 0, ()) for key in keys])
        self.fills |= {(job.number, job.key): None for job in result.jobs}
        return self._spec(keys)

    def complete_load(self, keys, _context):
        """The end of a prefix first, as ours is told by no one."""
        for key in reversed(list(keys)):
            place = next(one for one in self.fills if one[1] == key)
            del self.fills[place]
            self.tier.answered(place[0], True)

    def on_request_finished(self, context):
        keys = list(dict.fromkeys(self.of_request.pop(context.req_id, ())))
        keys.sort(key=lambda key: context.get_offload_key_position(key) or 0)
        self.tier.ended(keys)

    def reset_cache(self):
        self.tier.clear()
        self._note()

    def take_events(self):
        events, self.events = self.events, []
        return events

    def _spec(self, keys):
        return CPULoadStoreSpec(np.array([self.ids[key] for key in keys], dtype=np.int64))

    def _note(self):
        changes = self.tier.host.take_changes()
        for held in (False, True):
            if keys := [key for key, now in changes if now == held]:
                self.events.append(OffloadingEvent(keys=keys, medium=Medium.CPU, removed=not held))


def make_cpu_manager(num_chunks=4, cache_policy="lru", store_threshold=0, **_):
    return Manager(num_chunks, cache_policy, store_threshold)


test_manager.make_cpu_manager = make_cpu_manager
# the second is for looking into their policy; tests that do fail
test_manager.TestARCPolicy._make_manager = lambda _, num_chunks=4, **__: (
    make_cpu_manager(num_chunks, "arc"),
    None,
)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"our tier was made {_made} times")
