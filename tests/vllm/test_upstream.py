"""vLLM's own connector tests, from its source distribution, run against our class."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
UNIT = "tests/v1/kv_connector/unit"
# vLLM's files that need no accelerator and test the contract through the class that is configured.
FILES = [
    "test_remote_prefill_lifecycle.py",
    "test_remote_decode_lifecycle.py",
    "test_kv_load_failure_recovery.py",
    "test_invalid_blocks_correctness.py",
    "test_error_propagation.py",
    "test_output_aggregator.py",
    "test_kv_connector_lifecycle.py",
    "test_cache_pollution_prevention.py",
    "test_handshake_pp_aggregation.py",
]
# 0.32: 42 tests in the first seven, 3 in the last two. Fewer would mean that files were not found.
AT_LEAST = 45


@pytest.mark.engine
def test_vllms_own_connector_tests_pass_against_ours():
    source = os.environ.get("KVCONNECT_VLLM_SRC", "")
    assert Path(source, UNIT).is_dir(), "vLLM's tests are missing: run `make setup`"
    python_path = os.pathsep.join([source, str(HERE)])
    options = ["-q", "--noconftest", "-W", "ignore", "-p", "retarget", "-p", "no:cacheprovider"]
    files = [f"{UNIT}/{name}" for name in FILES]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-o", "addopts=", *files],
        cwd=source,
        env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert ran.returncode == 0 and passed, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert int(passed[1]) >= AT_LEAST, ran.stdout[-2000:]
    made = re.search(r"our connector was made (\d+) times", ran.stdout)
    assert made and int(made[1]) >= 20, "vLLM's tests ran, but not against our connector"
