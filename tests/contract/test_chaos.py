"""Either rank killed -9 under load, again and again, over every real transport."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_movers import LIBRARY
from test_transports import real

SCRIPT = Path(__file__).with_name("chaos_movers.py")
TIMES = 6


@pytest.mark.parametrize("name", [real(name) for name in LIBRARY])
def test_ranks_that_are_killed_leave_nothing_wrong_held_or_hanging(name):
    """The long version: make chaos"""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), name, "--times", str(TIMES)],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert ended.stdout, ended.stderr
    report = json.loads(ended.stdout)
    assert report["problems"] == [], f"{report}\n{ended.stderr[-3000:]}"
    assert report["wrong"] == 0
    assert report["held"] == 0, "leases outlived their readers"
    assert report["kills"] == {"supplier": TIMES, "reader": TIMES}
    assert report["kills_amid_fetches"] > TIMES, "it was hardly ever killed amid a fetch"
    assert report["stale"] >= TIMES and report["failed"] > 0
    assert all(report["fetched"].values())
    assert report["frozen_s"] > 0
