"""What must be equal on both sides before any KV is handed over: the model's identity.

Only what KV depends on and geometry does not show: which weights, by their content, and how
positions enter. vLLM and transformers may be of other versions on the two sides, so a model's
config is never hashed whole: versions add fields to it. Geometry (block size, layout, dtype, heads,
head size, layer names) is compared layer by layer in `kvconnect.geometry.intersect`, which can say
more about a difference than a hash; adapters, salts and multimodal inputs are a request's own and
in its digest.

Names and paths are not compared: one model may be at two, and two models at one.
"""

import hashlib
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvconnect.vllm.weights import Weights, unlike_any, weights_of

# Of the text model's config. The size of a hidden state is no geometry of KV, but says how a model
# differs where its weights only say that it does.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
POSITIONS = ("rope_parameters", "rope_scaling", "rope_theta", "sliding_window")
REACH = ("max_position_embeddings", "original_max_position_embeddings")
"""Positions depend on these with ``dynamic`` and ``longrope`` alone; users change them freely."""
COMPUTED = (
    "activation_function",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "hidden_act",
    "hidden_activation",
    "index_topk",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "moe_top_k",
    "n_group",
    "norm_eps",
    "norm_topk_prob",
    "num_experts_per_tok",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "routed_scaling_factor",
    "scoring_func",
    "topk_group",
)
"""With the same weights other KV comes of other ones: of a config, or of ``--hf-overrides``."""
DRAFT_LAYERS = ("n_predict", "num_nextn_predict_layers")
LONGEST = 400  # characters of a field; wire.Name allows 512
NO_KV = {"ngram", "[ngram]", "ngram_gpu", "suffix", "medusa", "mlp_speculator"}
"""Methods of speculation that keep no KV, and change none of the model's."""


def fingerprint(vllm_config: Any, model_id: str | None) -> dict[str, str]:
    """Named fields, compared one by one so that a difference can be named.

    With the option ``model_id`` the user says which weights these are: it is compared instead.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    rope = getattr(text, "rope_parameters", None)  # since transformers 5 holds the other two
    fields = {
        "architectures": ", ".join(model.hf_config.architectures or ()),
        "sizes": _told(text, SIZES),
        "positions": _told(text, [p for p in POSITIONS if not (rope and p in POSITIONS[1:3])])
        + _reach(model, text, rope)
        + _scaled_by_position(model, text),
        "computation": _told(text, COMPUTED),
        "quantization": str(model.quantization),
        "speculation": _speculation(vllm_config),
    }
    if model_id:
        return fields | {"model_id": model_id}
    found = all_weights(vllm_config)
    return fields | {k: w.digest if w.known else unlike_any(w) for k, w in found.items()}


def of_model(model: str, model_id: str | None) -> dict[str, str]:
    """Those fields of an engine that serves ``model`` without further arguments."""
    from vllm.config import LoadConfig
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=model).create_model_config()
    alone = SimpleNamespace(model_config=config, load_config=LoadConfig(), speculative_config=None)
    return fingerprint(alone, model_id)


def all_weights(vllm_config: Any) -> dict[str, Weights]:
    """By field, of the model and of a draft model that is another and keeps KV of its own."""
    model, load = vllm_config.model_config, vllm_config.load_config
    found = {"weights": weights_of(model, load)}
    draft = getattr(_drafting(vllm_config), "draft_model_config", None)
    if draft is not None and draft.model != model.model:
        own = getattr(vllm_config.speculative_config, "draft_load_config", None)
        found["weights of the draft model"] = weights_of(draft, own or load)
    return found


def _drafting(vllm_config: Any) -> Any:
    """The config of speculation whose layers are among the KV; None where there is none."""
    speculative = vllm_config.speculative_config
    return None if speculative is None or speculative.method in NO_KV else speculative


def _speculation(vllm_config: Any) -> str:
    if (speculative := _drafting(vllm_config)) is None:
        return "none that keeps KV"
    draft = speculative.draft_model_config
    sizes = _told(draft.hf_text_config, (*SIZES, *DRAFT_LAYERS)) if draft is not None else ""
    return f"{speculative.method} {sizes}".strip()


def _reach(model: Any, text: Any, rope: Any) -> str:
    """How far positions were meant to go, where they are turned by it; "" elsewhere.

    vLLM takes the long factors of ``longrope`` where ``max_model_len`` is beyond the original's.
    """
    told = rope or getattr(text, "rope_scaling", None) or {}
    each = [one for one in (told, *told.values()) if isinstance(one, dict)]
    kinds = [one.get("rope_type", one.get("type")) for one in each]
    if not {"dynamic", "longrope"} & set(kinds):
        return ""
    original = [
        one.get(REACH[1]) or getattr(text, REACH[1], None) or 0
        for one, kind in zip(each, kinds, strict=True)
        if kind == "longrope"
    ]
    long = any(model.max_model_len > most for most in original)
    return f" {_told(text, REACH)} {'long' if long else 'short'}"


def _scaled_by_position(model: Any, text: Any) -> str:
    """Whether Llama 4 scales queries by their position, which its config does not decide.

    vLLM takes it from the generation config, or else from ``max_model_len`` (llama4.py,
    ``Llama4ForCausalLM.__init__``); KV of the layers above depends on it from 8,192 tokens on.
    """
    if not str(getattr(text, "model_type", "")).startswith("llama4"):
        return ""
    said = {**model.try_get_generation_config(), **model.override_generation_config}
    return f" scaled {said.get('attn_temperature_tuning', model.max_model_len > 32768)}"


def _told(config: Any, names: Sequence[str]) -> str:
    """Fields of a config that it has, as text."""
    found = {name: getattr(config, name, None) for name in names}
    text = json.dumps(
        {k: v for k, v in found.items() if v is not None}, sort_keys=True, default=str
    )
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 40]}… {hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
