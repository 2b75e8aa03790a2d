"""Engines killed and stopped, and their side channels spoiled, for a minute; longer: make chaos"""

import random

import pytest
from chaos_engines import run


@pytest.mark.slow
def test_whatever_befalls_two_by_two_engines_no_answer_is_wrong_and_nothing_is_left(tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    report = run("nixl", seconds=35, seed=seed, folder=tmp_path)
    assert report.problems == [] and report.wrong == 0, report
    assert not any(report.held.values()), report
    assert sum(report.blows.values()) >= 3 and report.answers >= 20, report
    assert report.transferred_tokens > 0 and report.side_channel_bytes > 0, report
