"""vLLM's tests of its host-memory manager that can be pointed at ours (docs/evidence/)."""

import os
from pathlib import Path

import pytest
from upstream import run

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
AT_LEAST = 6
"""What 0.30 has of these, with parameters."""


@pytest.mark.engine
def test_vllms_own_manager_tests_pass_against_our_tier(record_property):
    text = Path(os.environ["KVCONNECT_VLLM_SRC"], FILE).read_text()
    named = [name for name in OURS if f"def {name.rpartition(':')[2]}(" in text]
    if "on_request_finished" not in text:
        named.remove("test_cpu_manager")  # 0.30 evicted the head of a prefix before its tail
    tests = [f"{FILE}::{name}" for name in named]
    passed, made = run("retarget_managers", tests, record_property)
    assert passed == made >= AT_LEAST
