"""What it costs an API server to tokenize a prompt, and what its token ids cost in place of that.

    python tests/e2e/tokenize_once.py [TOKENS]

One engine that has the prompt cached. Prints, as JSON, CPU milliseconds of its API server (not of
its engine) for a request, medians over rounds in turns: the prompt as a text or chat, the same
asked for with `return_token_ids`, and its ids in place of it. The text stands there twice: what
differs between the two means nothing.
"""

import contextlib
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from conftest import model
from nursery import Nursery
from pair import Client

from kvconnect.cli.engines import START_TIMEOUT_S, VllmServe, engine_env
from kvconnect.cli.processes import Fleet

ROUNDS, REQUESTS = 9, 8
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def cpu_ms(pid: int) -> float:
    """CPU time of a process' threads so far."""
    stats = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e6


def english(tokens: int) -> str:
    """About so many tokens of a text."""
    seen = " ".join(file.read_text() for file in Path(__file__).parents[2].glob("docs/*.md"))
    words = seen.split()
    start = random.Random(1).randrange(len(words) // 2)
    return " ".join(words[start : start + tokens // 2])


def kinds(client: Client, text: str) -> dict[str, tuple[str, dict]]:
    """Ways to ask for one prompt, each with the ids that the engine itself made of it."""

    def ids(path: str, body: dict) -> list[int]:
        status, answer = client.request("POST", path, body | {"return_token_ids": True})
        assert status == 200, answer
        return answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]

    both = {"model": client.model, "max_tokens": 1, "temperature": 0}
    prompt = {"prompt": text} | both
    chat = {"messages": [{"role": "user", "content": text}]} | both
    asked = {"return_token_ids": True}
    handed = {"kv_transfer_params": {"prompt_token_ids": ids(CHAT, chat)}}
    return {
        "text": (TEXT, prompt),
        "text again": (TEXT, prompt),
        "text, ids returned": (TEXT, prompt | asked),
        "ids": (TEXT, prompt | {"prompt": ids(TEXT, prompt)}),
        "chat": (CHAT, chat),
        "chat, ids returned": (CHAT, chat | asked),
        "chat, ids in kv_transfer_params": (CHAT, chat | handed),
    }


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    smol = model("KVCONNECT_MODEL")
    with contextlib.ExitStack() as stack:
        nursery = stack.enter_context(Nursery())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        fleet = stack.enter_context(Fleet(Path(folder), nursery.launch))
        command = VllmServe(smol, None, ["--max-model-len", "8192"]).command
        server = fleet.start("engine", command, engine_env())
        fleet.wait_up([server], START_TIMEOUT_S)
        client = Client(server, smol.name)
        ways = kinds(client, english(tokens))
        measured: dict[str, list[float]] = {name: [] for name in ways}
        answers = {}
        for number in range(ROUNDS):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                path, body = ways[name]
                before = cpu_ms(server.pid)
                for _ in range(REQUESTS):
                    status, answer = client.request("POST", path, body)
                    assert status == 200, answer
                measured[name].append((cpu_ms(server.pid) - before) / REQUESTS)
                choice = answer["choices"][0]
                said = choice.get("text") or choice["message"]["content"]
                answers[name] = answer["usage"]["prompt_tokens"], said
    for name, found in measured.items():
        row = {"prompt": name, "tokens": answers[name][0], "answer": answers[name][1]}
        row |= {"cpu_ms": round(statistics.median(found), 2)}
        row |= {"from": round(min(found), 2), "to": round(max(found), 2)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
