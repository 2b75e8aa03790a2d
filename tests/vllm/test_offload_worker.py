"""The worker's half of offloading: what it refuses, and when it does what."""

from types import SimpleNamespace

import pytest
import torch

from kvconnect.config import parse
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.jobs import JobDone, Save
from kvconnect.offload.store.runner import Report
from kvconnect.vllm.offload.messages import StepJobs
from kvconnect.vllm.offload.worker import OffloadWorker, check_share


def config(**options):
    return parse({"cpu_bytes_to_use": 1 << 20} | options, OffloadConfig, "test")


def test_share_on_a_gpu_is_an_error_at_the_start():
    """It used to be a line in the log of an engine that then stored nothing at all."""
    with pytest.raises(ConfigError, match="share is true on a cuda device"):
        check_share(config(share=True), torch.device("cuda", 0))
    check_share(config(share=True), torch.device("cpu"))
    check_share(config(), torch.device("cuda", 0))


class Store:
    """Notes what is asked of it, and of its runner, in sequence."""

    def __init__(self, rests=True):
        self.rests, self.asked, self.runner = rests, [], self

    def engine_runs(self):
        self.asked.append("engine runs")

    def put(self, jobs, fence):
        self.asked += jobs

    def take(self):
        return Report()

    def rest(self):
        return self.rests


def worker(store):
    made = OffloadWorker(
        SimpleNamespace(lora_config=None),
        SimpleNamespace(kv_cache_groups=[], transfer_group_ids=()),
        config(),
    )
    made.serve(store)
    return made


SAVE = Save(1, b"k", 0, (1,))


def test_the_rest_of_memory_is_pinned_from_the_first_step_on():
    """By then vLLM has captured its graphs; threads that pin meanwhile spoil a capture."""
    store = Store()
    one = worker(store)
    assert one.collect() == (set(), set())
    assert store.asked == []
    one.begin_step(StepJobs(saves=[SAVE]))
    assert store.asked == ["engine runs"]
    one.forward_is_done()
    assert store.asked == ["engine runs", SAVE]


@pytest.mark.parametrize("rests", [True, False])
def test_what_is_stored_is_stored_before_memory_is_given_back(rests):
    store = Store(rests)
    one = worker(store)
    one.begin_step(StepJobs(saves=[SAVE]))
    if rests:
        one.rest()
    else:
        with pytest.raises(RuntimeError, match="cannot go to sleep"):
            one.rest()
    assert store.asked[-1] == SAVE


def test_a_step_in_which_nothing_was_done_has_no_results_and_gives_no_jobs():
    """Both used to cost every step of a decode: an answer to compare, and a fence for no jobs."""
    store = Store()
    store.put = lambda *_: pytest.fail("there are no jobs")
    made = worker(store)
    made.begin_step(StepJobs())
    made.forward_is_done()
    made.collect()
    assert made.take_done() is None


def test_what_was_done_is_told_once():
    class Done(Store):
        def take(self):
            return Report([JobDone(1, "")], {1: 0.0}, gained={b"k"})

    made = worker(Done())
    made.collect()
    done = made.take_done()
    assert done.answers == {1: (1, 0)} and set(done.gained) == {b"k"}
    assert made.take_done() is None
