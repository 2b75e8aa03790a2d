"""What must be equal on both sides before any KV is handed over: the model's identity.

Geometry (block size, layout, dtype, heads) is compared layer by layer in `kvconnect.plan`,
which can say more about a difference than a hash.
"""

import hashlib
import json
from pathlib import PurePath
from typing import Any

# Fields of a HF config that say how it was saved or loaded, not what the model computes.
INCIDENTAL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def fingerprint(vllm_config: Any, model_id: str | None) -> dict[str, str]:
    """Named fields, compared one by one so that a difference can be named.

    The model's name is the last part of its path, since paths differ between machines; the
    option ``model_id`` says otherwise.
    """
    model = vllm_config.model_config
    speculative = vllm_config.speculative_config
    return {
        "model": model_id or PurePath(str(model.model).rstrip("/")).name,
        "revision": str(model.revision),
        "config": _digest(_plain(model.hf_config.to_dict())),
        "quantization": str(model.quantization),
        "speculative method": str(speculative.method if speculative else None),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in INCIDENTAL}
    return value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
