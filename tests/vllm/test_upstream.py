"""vLLM's own connector tests, from its source distribution, run against our class."""

import pytest
from upstream import run

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
AT_LEAST = 41
"""What the version with the fewest has, 0.31. Fewer would mean that files were not found."""


@pytest.mark.engine
def test_vllms_own_connector_tests_pass_against_ours(record_property):
    passed, made = run("retarget", [f"{UNIT}/{name}" for name in FILES], record_property)
    assert passed >= AT_LEAST and made >= 20
