"""Runs vLLM's own tests against our classes: a pytest plugin of this folder points them there."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OPTIONS = ("-q", "--noconftest", "-W", "ignore", "-p", "no:cacheprovider", "-o", "addopts=")


def run(plugin, tests, record_property):
    """How many of vLLM's tests passed, all of those asked for, and how often ours was made."""
    source = os.environ.get("KVCONNECT_VLLM_SRC", "")
    assert Path(source, "tests").is_dir(), "vLLM's tests are missing: run `make setup`"
    path = [source, str(HERE), os.environ.get("PYTHONPATH", "")]  # which vLLM, perhaps
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "-p", plugin, *tests],
        cwd=source,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    counts = {n: int(c) for c, n in re.findall(r"(\d+) (passed|failed|error)", ran.stdout)}
    for name, count in counts.items():
        record_property(f"upstream {name}", count)
    assert ran.returncode == 0 and counts, ran.stdout[-6000:] + ran.stderr[-2000:]
    made = re.search(r"our (?:connector|tier) was made (\d+) times", ran.stdout)
    assert made, "vLLM's tests ran, but not against ours"
    return counts["passed"], int(made[1])
