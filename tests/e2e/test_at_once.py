"""Both engines are asked at once: blocks cross while prefill computes the rest."""

import itertools
import threading
from typing import Any

from pair import PREFILL, Pair, in_parallel, words

TRANSFERS = "vllm:nixl_xfer_time_seconds_count"
NUMBERS = itertools.count()
RANKS = 2  # of prefill


def at_once(pair: Pair, prompt: Any, max_tokens: int = 12) -> list[int]:
    """Ask both engines at once, as a router does that knows where prefill is."""
    name = f"transfer {next(NUMBERS)}"
    known = pair.prefilled(words(3, seed=1))
    where = {k: known[k] for k in ("remote_engine_id", "remote_host", "remote_port")}
    where["kvconnect_engine"] = known["kvconnect"]
    asked = {"do_remote_prefill": True, "transfer_id": name, **where}
    answers: list[Any] = []
    prefill = {**PREFILL, "transfer_id": name}
    thread = threading.Thread(
        target=lambda: answers.append(
            pair.prefill.post(prompt, max_tokens=1, kv_transfer_params=prefill)
        )
    )
    thread.start()
    try:
        return pair.decode.tokens(prompt, max_tokens, kv_transfer_params=asked)
    finally:
        thread.join()
        assert answers[0][0] == 200, answers


def test_chunks_cross_before_prefill_has_ended(streaming_pair: Pair):
    """What is told in several parts was told before the lease was granted, but for the last."""
    pair = streaming_pair
    at_once(pair, words(40, seed=2))  # they know each other
    lengths = [1025, 1500, 2000]
    before, computed = pair.decode.metric(TRANSFERS), pair.computed_at_decode()
    for length in lengths:
        prompt = words(length, seed=length + 60_000)
        through = at_once(pair, prompt)
        assert through == pair.prefill.tokens(prompt), length
    assert pair.computed_at_decode() - computed <= len(lengths), "all tokens are external"
    transfers = pair.decode.metric(TRANSFERS) - before
    told = "each prompt is told of before its last step; it is too small to be told of more often"
    assert transfers >= 2 * RANKS * len(lengths), told
    assert pair.decode.metric("vllm:nixl_num_failed_transfers_total") == 0


def test_many_at_once_are_answered_right(streaming_pair: Pair):
    """They share the steps of prefill, and some are whole in one."""
    pair = streaming_pair
    prompts = [words(n, seed=n + 61_000) for n in (5, 100, 256, 257, 511, 700, 900, 1200)]
    through = in_parallel(lambda prompt: at_once(pair, prompt), prompts)
    alone = in_parallel(pair.prefill.tokens, prompts)
    assert through == alone
