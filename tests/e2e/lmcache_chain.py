"""LMCacheMPConnector beside ours in a chain, with LMCache's own server: what each of them gave.

    python tests/e2e/lmcache_chain.py       # or one: ours in_tree

Each prompt is handed over; then both engines forget it, and it is asked for again at each, where
LMCache's server has it. Prints a line of JSON for each chain; exits with 1 if anything was wrong.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import multi
from conftest import model
from pair import words

from kvconnect.cli.processes import Fleet, ServerError
from kvconnect_bench.lmcache import CHUNK_TOKENS, lmcache_config, start_lmcache

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkouts import unpacked

LMCACHE = "lmcache==0.5.6"
LENGTHS = range(200, 1200, 100)


def ours(port):
    return setup("KVConnectMulti", [multi.nixl(), lmcache_config(port)])


def in_tree(port):
    handing = multi.child("NixlConnector") | {"kv_connector_module_path": "kvconnect.vllm"}
    return setup("MultiConnector", [handing, lmcache_config(port)])


def setup(name, children):
    return multi.MultiSetup(
        model("KVCONNECT_TP_MODEL"),
        both=["--max-model-len", "2048"],
        names={"kv_connector": name},
        extra={"connectors": children},
        env={"VLLM_SERVER_DEV_MODE": "1"},
    )


CHAINS = {"ours": ours, "in_tree": in_tree}


def check(pair):
    """What the engines of a chain did with the same prompts, asked for three times."""
    prompts = [words(length, seed=41_000 + length) for length in LENGTHS]

    def external(engine, ask):
        source = "vllm:prompt_tokens_by_source_total"
        before = engine.metric(source, source="external_kv_transfer")
        answers = [ask(prompt) for prompt in prompts]
        return answers, engine.metric(source, source="external_kv_transfer") - before

    handed, by_hand_over = external(pair.decode, pair.tokens)
    alone = [pair.prefill.tokens(prompt) for prompt in prompts]  # a hit of its own prefix cache
    for engine in (pair.prefill, pair.decode):
        multi.forget(engine)
    at_prefill, hit_at_prefill = external(pair.prefill, pair.prefill.tokens)
    at_decode, hit_at_decode = external(pair.decode, pair.decode.tokens)
    equal = sum(
        tokens == expected
        for answers in (handed, at_prefill, at_decode)
        for tokens, expected in zip(answers, alone, strict=True)
    )
    total = sum(LENGTHS)
    chunks = sum(length // CHUNK_TOKENS * CHUNK_TOKENS for length in LENGTHS)
    return {
        "equal": f"{equal} of {3 * len(prompts)}",
        "handed over": f"{by_hand_over:.0f} of {total}",
        "LMCache's hits at prefill": f"{hit_at_prefill:.0f} of {total}, {chunks} in whole chunks",
        "LMCache's hits at decode": f"{hit_at_decode:.0f} of {total}, {chunks} in whole chunks",
        "ok": equal == 3 * len(prompts)
        and by_hand_over in (total, total - len(prompts))
        and hit_at_prefill == hit_at_decode == chunks,
    }


def main():
    chosen = sys.argv[1:] or list(CHAINS)
    folder, wrong = unpacked(LMCACHE), 0
    with tempfile.TemporaryDirectory() as logs:
        for name in chosen:
            # not forked: vLLM 0.32 cannot start a worker that has numba imported, as LMCache does
            # (triton_utils/dispatcher.py, line 139), and forked ones have what their parents have
            with (
                Fleet(Path(logs) / f"{name}-lmcache") as lmcaches,
                Fleet(Path(logs) / name) as fleet,
            ):
                wanted = CHAINS[name](start_lmcache(lmcaches, str(folder)))
                wanted = replace(wanted, env={**wanted.env, "PYTHONPATH": str(folder)})
                try:
                    row = check(wanted.start(fleet))
                except ServerError:
                    for server in fleet.servers:
                        print(*server.last_lines(60), sep="\n", file=sys.stderr)
                    raise
            wrong += not row["ok"]
            print(json.dumps({"chain": name} | row), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
