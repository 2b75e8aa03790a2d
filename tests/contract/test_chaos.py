"""Either rank killed -9 under load, again and again, over every real transport."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_movers import LIBRARY
from test_transports import real

SCRIPT = Path(__file__).with_name("chaos_movers.py")
TIMES = 3


@pytest.mark.parametrize(
    ("name", "env"),
    [
        *(pytest.param(*real(n).values, {}, marks=real(n).marks, id=n) for n in LIBRARY),
        # hosts without RDMA: reads that UCX would emulate once ended the peer that was read
        pytest.param("nixl", {"UCX_TLS": "tcp"}, marks=real("nixl").marks, id="nixl-tcp"),
    ],
)
def test_ranks_that_are_killed_leave_nothing_wrong_held_or_hanging(name, env):
    """The long version: make chaos"""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), name, "--times", str(TIMES)],
        capture_output=True,
        env={**os.environ, **env},
        text=True,
        check=False,
        timeout=400,
    )
    assert ended.stdout, ended.stderr
    report = json.loads(ended.stdout)
    assert report["problems"] == [], f"{report}\n{ended.stderr[-3000:]}"
    assert report["wrong"] == 0
    assert report["held"] == 0, "leases outlived their readers"
    assert report["kills"] == {"supplier": TIMES, "reader": TIMES}
    assert report["kills_amid_fetches"] == 2 * TIMES, "nothing was under way when one was killed"
    assert report["stale"] > 0 and report["failed"] > 0
    assert all(report["fetched"].values())
    assert report["frozen_s"] > 0
