"""Second turns of chats behind the proxy: how soon they begin, by what goes to decode alone.

    python tests/e2e/short_prompts.py [CHATS [N …]]

One prefill and one decode engine (SmolLM2). Prints a line of JSON for each `--min-prefill-tokens`
N: milliseconds to the first token of second turns (median, least, most), what prefill computed of
them, and from how many tokens on the proxy splits at the end.
"""

import http.client
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from conftest import model
from nursery import Nursery
from pair import Client, Pair, Setup, proxied

from kvconnect.cli.processes import Fleet

COMPUTED = "vllm:prompt_tokens_by_source_total"
RANDOM = random.Random(5)


def said(client: Client, messages: list[dict[str, str]]) -> tuple[str, float]:
    """The answer, streamed, and milliseconds until it began."""
    body = {"model": client.model, "messages": messages, "stream": True}
    body |= {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection(client.netloc, timeout=300)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.read(1)
    taken_ms = (time.perf_counter() - began) * 1e3
    lines = answer.read().decode().splitlines()
    connection.close()
    events = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    deltas = [one["delta"].get("content") or "" for event in events for one in event["choices"]]
    return "".join(deltas), taken_ms


def user(numbers: int) -> dict[str, str]:
    text = " ".join(str(RANDOM.randrange(10**6)) for _ in range(numbers))
    return {"role": "user", "content": text}


def measured(pair: Pair, least: str, chats: int) -> dict[str, object]:
    """What second turns took with this ``--min-prefill-tokens``."""
    with proxied(pair, "--min-prefill-tokens", least) as client:
        for _ in range(10):  # what `auto` goes by
            said(client, [user(RANDOM.randrange(10, 200))])
        firsts = [[user(200)] for _ in range(chats)]
        turns = [
            [*first, {"role": "assistant", "content": said(client, first)[0]}, user(6)]
            for first in firsts
        ]
        before = pair.prefill.metric(COMPUTED, source="local_compute")
        taken = [said(client, turn)[1] for turn in turns]
        computed = pair.prefill.metric(COMPUTED, source="local_compute") - before
        health = client.request("GET", "/health")[1]
    return {
        "min_prefill_tokens": least,
        "first_token_ms": round(statistics.median(taken), 1),
        "from": round(min(taken), 1),
        "to": round(max(taken), 1),
        "stayed": health["counters"]["short"],
        "computed_at_prefill": computed,
        "at_the_end": health["min_prefill_tokens"],
    }


def main() -> None:
    chats = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with ExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = stack.enter_context(Fleet(folder, nursery.launch))
        pair = Setup(model("KVCONNECT_MODEL"), both=["--max-model-len", "4200"]).start(fleet)
        for least in sys.argv[2:] or ("0", "auto", "300", "0"):
            print(json.dumps(measured(pair, least, chats)), flush=True)


if __name__ == "__main__":
    main()
