"""In which of vLLM's steps a worker may wait for a transfer to end, and how long it does."""

from types import SimpleNamespace

import pytest
from workers import engines

from kvconnect.vllm import worker as module
from kvconnect.vllm.idle import MOST_S, PER_STEP_S, IdleSteps, IdleWaits


def allowed(*tokens: int, dp: int = 1, pp: int = 1, under_way: int = 1) -> list[float]:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=dp, pipeline_parallel_size=pp),
        scheduler_config=SimpleNamespace(async_scheduling=under_way > 1),
    )
    steps = IdleSteps(config)
    return [steps.most_s(number) for number in tokens]


def test_a_worker_may_wait_from_the_second_step_in_a_row_that_computes_nothing():
    assert [bool(most) for most in allowed(0, 0, 0, 5, 0, 0)] == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("under_way", [1, 2])
def test_all_steps_that_are_under_way_together_last_no_longer_than_a_request_may_wait(under_way):
    assert max(allowed(0, 0, 0, under_way=under_way)) * under_way == pytest.approx(MOST_S)


@pytest.mark.parametrize("size", [{"dp": 2}, {"pp": 2}])
def test_where_other_engines_or_stages_would_wait_with_it_it_may_not(size: dict[str, int]):
    assert not any(allowed(0, 0, 0, **size))


def test_it_waits_longer_the_longer_nothing_ended():
    waits = IdleWaits()
    found = [waits.wait_s(MOST_S) for _ in range(99)]
    assert found == sorted(found) and found[1] == PER_STEP_S < MOST_S == found[-1]


def test_the_step_after_one_in_which_something_ended_is_not_held_up():
    """It used to last as long as any: what had ended was computed with after that."""
    waits = IdleWaits()
    for _ in range(99):
        waits.wait_s(MOST_S)
    waits.ended()
    assert [waits.wait_s(MOST_S) for _ in range(2)] == [0, PER_STEP_S]


def test_a_step_that_may_not_wait_does_not_and_begins_anew():
    waits = IdleWaits()
    assert [waits.wait_s(most) for most in (MOST_S, MOST_S, 0, MOST_S)] == [0, PER_STEP_S, 0, 0]


class Recorded(IdleWaits):
    """Waits as long as it may, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def wait_s(self, most_s: float) -> float:
        self.told.append("waits")
        return most_s

    def ended(self) -> None:
        self.told.append("ended")


def test_a_worker_that_waits_sees_the_end_of_a_load_when_it_comes_and_waits_anew(monkeypatch):
    waits = Recorded()
    monkeypatch.setattr(module, "IdleWaits", lambda: waits)
    with engines(monkeypatch, 0, 0) as (p, d):
        d.heard = lambda is_it: next(o for _ in range(9) if is_it(o := d.worker.take(3600)[0]))
        assert d.fetched("d", p.lend("r", [3], seed=7), [5]) is None
    assert waits.told[-2:] == ["waits", "ended"]
