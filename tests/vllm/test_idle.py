"""In which of vLLM's steps a worker may wait for a transfer to end."""

from types import SimpleNamespace

import pytest

from kvconnect.vllm.idle import MOST_S, IdleSteps


def waits(*tokens: int, dp: int = 1, pp: int = 1) -> list[float]:
    steps = IdleSteps(SimpleNamespace(data_parallel_size=dp, pipeline_parallel_size=pp))
    return [steps.wait_s(number) for number in tokens]


def test_a_worker_waits_from_the_second_step_in_a_row_that_computes_nothing():
    assert [bool(wait) for wait in waits(0, 0, 0, 5, 0, 0)] == [0, 1, 1, 0, 0, 1]


def test_it_waits_longer_the_longer_nothing_was_computed():
    found = waits(*[0] * 99)
    assert found == sorted(found) and found[1] < MOST_S == found[-1]
    assert waits(*[0] * 99, 1, 0, 0)[-3:] == found[:2][:1] + found[:2]


@pytest.mark.parametrize("size", [{"dp": 2}, {"pp": 2}])
def test_where_other_engines_or_stages_would_wait_with_it_it_does_not(size: dict[str, int]):
    assert not any(waits(0, 0, 0, **size))
