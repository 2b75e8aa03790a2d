"""vLLM's tests of its host-memory manager that can be pointed at ours (docs/evidence/)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILE = "tests/v1/kv_offload/cpu/test_manager.py"
# The others read private fields of their manager and policies, or its statistics; and one wants
# what ended late to be older than what was stored meanwhile.
OURS = (
    "test_cpu_eviction_removed_precedes_stored",
    "test_already_stored_chunk_not_evicted_during_prepare_store",
    "test_cpu_manager",
    "test_prepare_load_preserves_key_order",
    "TestARCPolicy::test_eviction_with_load",
    "test_filter_reused_manager_oversized_offer_makes_progress",
    "test_request_finish_orders_lru_prefix_independent_of_store_completion",
    "test_request_finish_orders_lru_prefix_independent_of_load_completion",
    "test_request_key_positions_override_store_observation_order",
    "test_request_key_positions_order_tails_across_kv_groups",
)
PASSED = 13  # some have parameters


@pytest.mark.engine
def test_vllms_own_manager_tests_pass_against_our_tier():
    source = os.environ.get("KVCONNECT_VLLM_SRC", "")
    assert Path(source, FILE).is_file(), "vLLM's tests are missing: run `make setup`"
    python_path = os.pathsep.join([source, str(HERE)])
    options = ["-q", "--noconftest", "-W", "ignore", "-p", "no:cacheprovider", "-o", "addopts="]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "retarget_managers"]
        + [f"{FILE}::{name}" for name in OURS],
        cwd=source,
        env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) == PASSED, ran.stdout[-2000:]
    made = re.search(r"our tier was made (\d+) times", ran.stdout)
    assert made and int(made[1]) == PASSED, "vLLM's tests ran, but not against our tier"
