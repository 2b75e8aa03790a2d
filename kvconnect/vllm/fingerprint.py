"""What must be equal on both sides before any KV is handed over: the model's identity.

Only what KV depends on and geometry does not show: which weights, and how positions enter. vLLM
and transformers may be of other versions on the two sides, so a model's config is never hashed
whole: versions add fields to it. Geometry (block size, layout, dtype, heads, head size, layer
names) is compared layer by layer in `kvconnect.geometry.intersect`, which can say more about a
difference than a hash; adapters, salts and multimodal inputs are a request's own and in its digest.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

# Of the text model's config. The size of a hidden state is no geometry of KV, but tells two
# models of one name apart.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
POSITIONS = ("rope_parameters", "rope_scaling", "rope_theta", "sliding_window")
LONGEST = 400  # characters of a field; wire.Name allows 512


def fingerprint(vllm_config: Any, model_id: str | None) -> dict[str, str]:
    """Named fields, compared one by one so that a difference can be named.

    The model's name is the last part of its path, since paths differ between machines; the
    option ``model_id`` says otherwise.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None)  # since transformers 5 holds the other two
    speculative = vllm_config.speculative_config
    return {
        "model": model_id or PurePath(str(model.model).rstrip("/")).name,
        "revision": str(model.revision),
        "architectures": ", ".join(model.hf_config.architectures or ()),
        "sizes": _told(text, SIZES),
        "positions": _told(text, [p for p in POSITIONS if not (rope and p in POSITIONS[1:3])]),
        "quantization": str(model.quantization),
        "speculative method": str(speculative.method if speculative else None),
    }


def _told(config: Any, names: Sequence[str]) -> str:
    """Fields of a config that it has, as text."""
    found = {name: getattr(config, name, None) for name in names}
    text = json.dumps(
        {k: v for k, v in found.items() if v is not None}, sort_keys=True, default=str
    )
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 40]}… {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
