"""The connector from Python: ``LLM(..., kv_transfer_config=KVTransferConfig(...))``."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_transferred_kv_equals_source_kv_byte_for_byte():
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llm_pair.py"))],
        env=os.environ | {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = [x for x in ran.stdout.splitlines() if x.startswith("RESULT ")]
    assert lines, ran.stdout[-3000:] + ran.stderr[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert result == {"equal blocks": 5, "distinct blocks": 5, "equal answer": True}
