"""Sleep mode of vLLM 0.33: who can follow it, and what happens before memory is given back."""

import pytest

from kvconnect.vllm import KVConnectNixl, KVConnectOffloading
from kvconnect.vllm.offload.worker import OffloadWorker


def test_only_who_registers_no_memory_says_that_it_can_sleep():
    """vLLM's default is yes: NIXL would read what is mapped there no more."""
    assert not KVConnectNixl.supports_sleep_mode(None)
    base = getattr(KVConnectOffloading, "supports_sleep_mode", lambda _: True)
    assert base(None)


class Runner:
    """Says whether it came to rest; notes what it was given before."""

    def __init__(self, rests):
        self.rests, self.given = rests, []

    def put(self, jobs, fence):
        self.given += jobs

    def rest(self):
        return self.rests


@pytest.fixture
def worker():
    """Without vLLM's configuration: only what sleep needs."""
    made = OffloadWorker.__new__(OffloadWorker)
    made._saves, made._device = ["saves of the last step"], None
    return made


@pytest.mark.parametrize("rests", [True, False])
def test_what_is_stored_is_stored_before_memory_is_given_back(worker, rests):
    runner = Runner(rests)
    worker._place = type("Place", (), {"runner": runner})
    if rests:
        worker.rest()
    else:
        with pytest.raises(RuntimeError, match="cannot go to sleep"):
            worker.rest()
    assert runner.given == ["saves of the last step"]
