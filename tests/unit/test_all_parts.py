"""tests/all.sh, which is `make test`: two runs of pytest, and what status comes of theirs."""

import os
import subprocess
from pathlib import Path

import pytest

ALL = Path(__file__).parents[1] / "all.sh"
FAKE = """#!/bin/sh
echo "$@" >> "$RUNS"
case "$*" in *--ignore=tests/e2e*) exit "$FIRST" ;; *) exit "$SECOND" ;; esac
"""


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 1, 2), (0, 5, 0), (5, 0, 0), (5, 5, 5), (5, 1, 1)],
)
def test_both_parts_run_and_either_fails_all(first, second, status, tmp_path):
    """5: no test was selected, as is usual of one part with -k."""
    python, runs = tmp_path / "python", tmp_path / "runs"
    python.write_text(FAKE)
    python.chmod(0o755)
    told = {"RUNS": str(runs), "FIRST": str(first), "SECOND": str(second)}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ALL, "-k", "a name"], env=os.environ | told | {"PATH": path}, check=False, timeout=60
    )
    assert done.returncode == status
    lines = runs.read_text().splitlines()
    assert len(lines) == 2
    assert all(line.endswith("-k a name") for line in lines)
