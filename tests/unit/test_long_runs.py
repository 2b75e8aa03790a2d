"""The long runs that are scripts still run: a little of each, as nobody starts them every day."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "count", "seen"),
    [
        ("fuzz.py", "--frames=4000", {"honest fetches", "greetings", "frames that decode"}),
        ("soak.py", "--transfers=400", {"right", "aborted", "released"}),
    ],
)
def test_a_little_of_it_goes_right(script, count, seen):
    command = [sys.executable, str(TESTS / script), count, "--seed=3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert all(report[name] for name in seen) and not report["problems"]
