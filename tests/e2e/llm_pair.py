"""Two engines made in Python; prints whether transferred KV equals source KV byte for byte.

Run by test_llm.py in a process of its own, since vLLM engines cannot be unloaded.
"""

import hashlib
import json
import os
import sys

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # collective_rpc of our own function

from pair import PREFILL, words
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig


def digests(worker):
    """A digest of every block of this rank, over all layers."""
    caches = worker.model_runner.kv_caches
    found = []
    for block in range(caches[0].shape[0]):
        h = hashlib.blake2b(digest_size=16)
        for cache in caches:
            h.update(cache[block].contiguous().view(-1).numpy().tobytes())
        found.append(h.hexdigest())
    return found


def engine(role: str) -> LLM:
    return LLM(
        os.environ["KVCONNECT_TP_MODEL"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        num_gpu_blocks_override=40,
        kv_transfer_config=KVTransferConfig(kv_connector="KVConnectNixl", kv_role=role),
    )


def main() -> None:
    prefill, decode = engine("kv_producer"), engine("kv_consumer")
    prompt = {"prompt_token_ids": words(5 * 128 + 40, seed=31)}
    greedy = {"temperature": 0, "ignore_eos": True}
    asked = SamplingParams(**greedy, max_tokens=1, extra_args={"kv_transfer_params": PREFILL})
    (lent,) = prefill.generate([prompt], asked, use_tqdm=False)
    (source,) = prefill.collective_rpc(digests)
    params = {"kv_transfer_params": lent.kv_transfer_params}
    asked = SamplingParams(**greedy, max_tokens=8, extra_args=params)
    (answer,) = decode.generate([prompt], asked, use_tqdm=False)
    (arrived,) = decode.collective_rpc(digests)
    (alone,) = prefill.generate([prompt], SamplingParams(**greedy, max_tokens=8), use_tqdm=False)
    full = lent.kv_transfer_params["remote_block_ids"][0][:5]  # the last one grows while decoding
    result = {
        "equal blocks": sum(source[block] in arrived for block in full),
        "distinct blocks": len({source[block] for block in full}),
        "equal answer": list(answer.outputs[0].token_ids) == list(alone.outputs[0].token_ids),
    }
    print("RESULT " + json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
