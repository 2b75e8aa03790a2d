"""Second turns of chats behind the proxy: how soon they begin, by what goes to decode alone.

    python tests/e2e/short_prompts.py [CHATS [N …]]

One prefill and one decode engine (SmolLM2), and a proxy for each `--min-prefill-tokens` N, whose
chats take turns. Prints a line of JSON for each: milliseconds to the first token of second turns
(median, least, most), CPU milliseconds of both engines, answer included, what prefill computed of
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
from kvconnect_bench.cpu import session_cpu_s

COMPUTED = "vllm:prompt_tokens_by_source_total"
RANDOM = random.Random(5)
# of four bytes a token, as the proxy guesses
WORDS = ("the", "water", "of", "long", "river", "was", "cold", "when", "people", "found", "way")


def said(client: Client, messages: list[dict[str, str]]) -> tuple[str, float]:
    """The answer, streamed, and milliseconds until it began."""
    body = {"model": client.model, "messages": messages, "stream": True}
    body |= {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
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


def user(words: int) -> dict[str, str]:
    return {"role": "user", "content": " ".join(RANDOM.choices(WORDS, k=words))}


class Row:
    """The chats behind one proxy."""

    def __init__(self, pair: Pair, least: str, client: Client) -> None:
        self.pair, self.least, self.client = pair, least, client
        self.first_token_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.computed = 0.0

    def warm_up(self) -> None:
        for _ in range(10 if self.least == "auto" else 1):  # what `auto` goes by
            said(self.client, [user(RANDOM.randrange(10, 200))])

    def chat(self) -> None:
        """One of two turns; the second one is measured."""
        first = user(300)
        answer, _ = said(self.client, [first])
        turn = [first, {"role": "assistant", "content": answer}, user(30)]
        computed, cpu_s = self._counts()
        self.first_token_ms.append(said(self.client, turn)[1])
        now = self._counts()
        self.computed += now[0] - computed
        self.cpu_ms.append(1e3 * (now[1] - cpu_s))

    def _counts(self) -> tuple[float, float]:
        """Prompt tokens computed at prefill; CPU seconds of both engines."""
        engines = self.pair.prefill, self.pair.decode
        computed = self.pair.prefill.metric(COMPUTED, source="local_compute")
        return computed, sum(session_cpu_s(one.server.pid) for one in engines)

    def told(self) -> dict[str, object]:
        health = self.client.request("GET", "/health")[1]
        return {
            "min_prefill_tokens": self.least,
            "first_token_ms": round(statistics.median(self.first_token_ms), 1),
            "from": round(min(self.first_token_ms), 1),
            "to": round(max(self.first_token_ms), 1),
            "engines_cpu_ms": round(statistics.median(self.cpu_ms), 1),
            "stayed": health["counters"]["short"],
            "computed_at_prefill": self.computed,
            "at_the_end": health["min_prefill_tokens"],
        }


def main() -> None:
    chats = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with ExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = stack.enter_context(Fleet(folder, nursery.launch))
        pair = Setup(model("KVCONNECT_MODEL"), both=["--max-model-len", "4200"]).start(fleet)
        rows = [
            Row(pair, least, stack.enter_context(proxied(pair, "--min-prefill-tokens", least)))
            for least in sys.argv[2:] or ("0", "auto", "300", "0")
        ]
        for row in rows:
            row.warm_up()
        for _ in range(chats):
            for row in rows:
                row.chat()
        for row in rows:
            print(json.dumps(row.told()), flush=True)


if __name__ == "__main__":
    main()
