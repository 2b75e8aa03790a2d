"""What docs/proxy.md promises, at real engines: one line of JSON for each check.

    python tests/e2e/proxy_features.py [CHECK…]

Two prefill and two decode engines of a tiny model with `KVConnectNixl`, then one that offloads and
a pair that does both, behind `kvconnect proxy`. A line says what was looked at, what was seen and
whether it is right; exits with 1 if anything is not. With stand-ins: tests/unit/test_proxy_*.
"""

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conftest import model
from nursery import Nursery
from pair import Client, eventually, in_parallel, words
from proxied import Engines, Load, Proxy, timed

from kvconnect.cli.engines import multi_config, offload_config, transfer_config
from kvconnect.cli.processes import Fleet, Server

SEATS = 4
OPTIONS = (
    "--max-model-len=2048",
    f"--max-num-seqs={SEATS}",  # more have to wait
    "--block-size=32",
    "--scheduling-policy=priority",
    "--enable-prompt-tokens-details",
)
ENV = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
BLOCK, CLIENTS = 32, 4
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
GENERATED = "vllm:generation_tokens_total"
SOURCES = "vllm:prompt_tokens_by_source_total"
CACHED = "vllm:prompt_tokens_cached_total"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
DELAYED_S = 1.0
"""Longer than the longest without a fault: that is a delay."""
NOTICED_S = 15.0
"""An engine that says nothing is left out by then: `STUCK_S`, and a look each second."""
CONVERSATIONS, TURNS = 8, 4
CLEARLY = 1.25
"""By chance one policy finds more than another; sticking finds half as much again."""
DEADLINE_S, ENDLESS, LONG = 0.7, 1700, 500
ALONE = f"--min-prefill-tokens={2**31}"
"""Of a proxy: decode engines do all themselves."""
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
Seen = tuple[bool, dict[str, Any]]


def come_and_go(engines: Engines) -> Seen:
    """Engines are added, drained and removed while clients ask."""
    prompts = [words(200, seed=n) for n in range(24)]
    right = [engines["d0"].tokens(prompt, 24) for prompt in prompts]
    proxy, after_drain = engines.proxy(["p0"], ["d0"]), 0
    with Load(proxy, prompts, 24, CLIENTS) as load, ThreadPoolExecutor(1) as pool:
        load.until_served(engines["d0"], 8)
        for role, old, new in (("decode", "d0", "d1"), ("prefill", "p0", "p1")):
            was, comes = engines[old], engines[new]
            long = pool.submit(proxy.tokens, words(100, seed=99), LONG)
            eventually(lambda: len(proxy.looks()["running"]) > CLIENTS, 20, "a long one has begun")
            proxy.order(role, comes)
            load.until_served(comes, 8)
            proxy.order(role, was, drain=True)
            drained_at = time.time()
            load.until_served(comes, 8)
            after_drain += sum(
                row[role] == was.server.url and row["began_unix_s"] > drained_at
                for row in proxy.looks()["recent"]
            )
            eventually(lambda r=role, e=was: proxy.state(r, e) is None, 60, "it has drained")
            assert len(long.result()) == LONG, "an engine that drains ends what it has"
            proxy.order(role, was)
            load.until_served(was, 8)
            proxy.remove(role, comes)
            load.until_served(was, 8)
    failed = [answer for _, status, answer in load.answers if status != 200]
    good = [(at, answer) for at, status, answer in load.answers if status == 200]
    wrong = sum(answer["choices"][0]["token_ids"] != right[at] for at, answer in good)
    counted = proxy.counters()
    return not (failed or wrong or after_drain), {
        "requests": len(load.answers),
        "failed": len(failed),
        "wrong": wrong,
        "given to one that drains": after_drain,
        **{name: counted[name] for name in ("retries", "local_retries", "unretried")},
        "failures": failed[:1],
    }


def stopped(engines: Engines) -> Seen:
    """Of two decode engines one is stopped (SIGSTOP): whole, then all but its API server."""
    right, seen = True, {}
    for kind in ("whole", "engine core"):
        proxy = engines.proxy(["p0"], ["d0", "d1"])
        usual = _twenty(proxy, 100)
        victim = engines["d1"].server
        pids = [pid for pid in victim.pids if kind == "whole" or pid != victim.pid]
        row = _with_stopped(proxy, victim, pids, max(usual) + DELAYED_S)
        right &= row["answered"] == 40 and row["delayed"] <= CLIENTS and not row["delayed then"]
        right &= row["by at most s"] <= NOTICED_S
        seen[kind] = {"without a stop": _seconds(usual), **row}
    return right, seen


def _with_stopped(proxy: Proxy, victim: Server, pids: Collection[int], late_s: float) -> Any:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        first, second = _twenty(proxy, 200), _twenty(proxy, 300)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    seeds = itertools.count(400)

    def is_up() -> bool:
        proxy.tokens(words(100, next(seeds)), 4)  # the probe is a request
        return any(e["url"] == victim.url and e["state"] == "up" for e in proxy.looks()["engines"])

    eventually(is_up, 60, "it is up again")
    late = [seconds - statistics.median(first) for seconds in first if seconds > late_s]
    return {
        "first twenty": _seconds(first),
        "delayed": len(late),
        "by at most s": round(max(late, default=0.0), 1),
        "next twenty": _seconds(second),
        "delayed then": sum(seconds > late_s for seconds in second),
        "answered": len(first) + len(second),
        "up again after s": round(time.monotonic() - began, 1),
    }


def _twenty(proxy: Proxy, seed: int) -> list[float]:
    """Seconds that each of twenty requests took, four at a time; each is answered."""
    prompts = [words(100, seed + n) for n in range(20)]
    return [seconds for seconds, _ in in_parallel(lambda p: timed(proxy.tokens, p, 12), prompts)]


def _seconds(taken: Iterable[float]) -> str:
    ordered = sorted(taken)
    return f"median {statistics.median(ordered):.2f} s, longest {ordered[-1]:.2f} s"


def prefixes(engines: Engines) -> Seen:
    """Conversations under each policy: what part of their later turns prefill had cached."""
    rates = {}
    for number, (name, policy, sessions) in enumerate(
        (
            ("round-robin", "round-robin", False),
            ("least-loaded", "least-loaded", False),
            ("prefix", "prefix", False),
            ("round-robin with X-Session-ID", "round-robin", True),
        )
    ):
        proxy = engines.proxy(["p0", "p1"], ["d0", "d1"], f"--policy={policy}")
        rates[name] = _converse(engines, proxy, 1000 * (number + 1), sessions)
    least = max(rates["round-robin"]["prefill"], rates["least-loaded"]["prefill"])
    sticky = rates["prefix"], rates["round-robin with X-Session-ID"]
    return all(rate["prefill"] > CLEARLY * least for rate in sticky), rates


def _converse(engines: Engines, proxy: Proxy, seed: int, sessions: bool) -> dict[str, float]:
    """Hit rates of both roles' prefix caches, from each conversation's second turn on."""
    chosen = random.Random(seed)
    told: list[list[dict[str, str]]] = [[] for _ in range(CONVERSATIONS)]

    def turn(number: int) -> None:
        text = " ".join(f"{chosen.randrange(10**6)}" for _ in range(25))
        told[number].append({"role": "user", "content": text})
        body = {"model": proxy.model, "messages": told[number], "max_tokens": 8, "temperature": 0}
        header = {"X-Session-ID": f"{seed} {number}"} if sessions else {}
        status, answer = proxy.request("POST", "/v1/chat/completions", body, header)
        assert status == 200, answer
        said = answer["choices"][0]["message"]["content"] or "."
        told[number].append({"role": "assistant", "content": said})

    roles = {"prefill": ("p0", "p1"), "decode": ("d0", "d1")}
    looked = {}
    for number in range(TURNS):
        if number == 1:
            looked = {role: _cache(engines, names) for role, names in roles.items()}
        order = list(range(CONVERSATIONS))
        chosen.shuffle(order)
        in_parallel(turn, order, 2)
    rates = {}
    for role, names in roles.items():
        hits, queries = (b - a for a, b in zip(looked[role], _cache(engines, names), strict=True))
        rates[role] = round(hits / queries, 3)
    return rates


def _cache(engines: Engines, names: Iterable[str]) -> tuple[float, float]:
    return tuple(sum(engines[n].metric(metric) for n in names) for metric in (HITS, QUERIES))


def responses(engines: Engines) -> Seen:
    """Who goes on from a response is answered by the engine that keeps it; so after a restart."""
    first = engines.proxy(["p0"], ["d0", "d1"], "--policy=round-robin")
    path, served, refused, detours = "/v1/responses", [], 0, 0

    def ask(proxy: Proxy, **more: Any) -> dict[str, Any]:
        body = {"model": proxy.model, "input": "What next?", "max_output_tokens": 8, **more}
        status, answer = proxy.request("POST", path, body)
        assert status == 200, answer
        return answer

    kept = [ask(first)["id"] for _ in range(5)]
    owners = [row["decode"] for row in first.looks()["recent"][-5:]]
    for proxy in (first, engines.proxy(["p0"], ["d0", "d1"], "--policy=round-robin")):
        for response in kept:
            ask(proxy, previous_response_id=response)
        served += [row["decode"] for row in proxy.looks()["recent"][-5:]]
        refused += sum(proxy.request("GET", f"{path}/{response}")[0] != 200 for response in kept)
        detours += proxy.counters()["retries"]  # the other engine's 404 leads to the right one, too
    sticks = sum(owner == asked for owner, asked in zip(owners * 2, served, strict=True))
    other = next(engines[n] for n in ("d0", "d1") if engines[n].server.url != owners[0])
    body = {"model": first.model, "input": "?", "previous_response_id": kept[0]}
    elsewhere, _ = other.request("POST", path, body)
    right = sticks == 10 and not (refused or detours) and elsewhere == 404
    return right and len(set(owners)) == 2, {
        "went on at its engine": f"{sticks} of 10",
        "asked another first": detours,
        "not found by id": refused,
        "engines that keep some": len(set(owners)),
        "what the other engine says": elsewhere,
    }


def endpoints(engines: Engines) -> Seen:
    """Messages and responses are split; the rest is answered as decode answers it."""
    proxy, decode = engines.proxy(["p0"], ["d0"]), engines["d0"]
    name, text = proxy.model, " ".join(map(str, range(5000, 5100)))
    said = [{"role": "user", "content": text}]
    split = {
        "/v1/messages": {"messages": said, "max_tokens": 8},
        "/v1/responses": {"input": f"now {text}", "max_output_tokens": 8},
        "/v1/chat/completions": {"messages": [*said, *said], "max_tokens": 8},
    }
    seen: dict[str, Any] = {}
    for path, body in split.items():
        before = decode.metric(SOURCES, source="external_kv_transfer")
        status, _ = proxy.request("POST", path, {"model": name, **body})
        came = decode.metric(SOURCES, source="external_kv_transfer") - before
        seen[path] = {"status": status, "tokens from prefill": came}
    right = all(row["status"] == 200 and row["tokens from prefill"] > 0 for row in seen.values())
    passed = {
        ("POST", "/tokenize"): {"model": name, "prompt": "one two"},
        ("POST", "/detokenize"): {"model": name, "tokens": [1000, 1001]},
        ("POST", "/v1/messages/count_tokens"): {"model": name, "messages": said},
        ("POST", "/v1/embeddings"): {"model": name, "input": "one"},
        ("GET", "/version"): None,
        ("GET", "/v1/models"): None,
    }
    for (method, path), body in passed.items():
        status, answer = proxy.request(method, path, body)
        alike = status, _shape(answer)
        same = alike == (lambda s, a: (s, _shape(a)))(*decode.request(method, path, body))
        seen[path] = {"status": status, "as decode alone": same}
        right &= same and (status == 200 or path == "/v1/embeddings")
    return right, seen


def _shape(answer: Any) -> Any:
    """An answer without ids and times, which differ each time."""
    if isinstance(answer, dict):
        varies = ("id", "created", "request_id")
        return {key: _shape(value) for key, value in answer.items() if key not in varies}
    return [_shape(one) for one in answer] if isinstance(answer, list) else answer


def deadlines(engines: Engines) -> Seen:
    """A client's deadline: 504, or an error in its stream; engines stop what they did for it."""
    proxy, decode = engines.proxy(["p0"], ["d0"]), engines["d0"]
    head = {"X-Request-Timeout-S": str(DEADLINE_S)}
    before = decode.metric(GENERATED)
    took, (status, _) = timed(proxy.post, words(300, seed=7), head, max_tokens=ENDLESS)
    idle = [timed(eventually, lambda: not decode.metric(RUNNING), 10, "decode has stopped")[0]]
    body = {"model": proxy.model, "prompt": words(300, seed=8), "max_tokens": ENDLESS}
    body |= {"stream": True, "ignore_eos": True}
    streamed, end = timed(_stream, proxy, body, head)
    idle += [timed(eventually, lambda: not decode.metric(RUNNING), 10, "decode has stopped")[0]]
    generated, late = decode.metric(GENERATED) - before, proxy.counters()["late"]
    stops = max(idle) < DELAYED_S and generated < ENDLESS
    right = status == 504 and b'"error"' in end and stops and late == 2
    return right and max(took, streamed) < DEADLINE_S + DELAYED_S, {
        "status": status,
        "answered after s": round(took, 2),
        "stream ended after s": round(streamed, 2),
        "its last event": end.decode().strip()[:120],
        "decode idle after further s": round(max(idle), 2),
        "tokens that decode generated": f"{generated:.0f} of {2 * ENDLESS}",
        "late counted by the proxy": late,
    }


def _stream(client: Client, body: Any, head: Any) -> bytes:
    """The last event of a stream."""
    connection = http.client.HTTPConnection(client.netloc, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), head)
        said = b""
        answer = connection.getresponse()
        try:
            while more := answer.read1():
                said += more
        except http.client.HTTPException:
            pass  # it ends short of the body's end, so that nobody takes it for whole
        return said.strip().rpartition(b"\n\n")[2]
    finally:
        connection.close()


def priorities(engines: Engines) -> Seen:
    """Who comes last and is urgent overtakes those who wait: in decode's queue, in the proxy's."""
    rows = {
        "in decode's queue": _overtaking(engines, engines.proxy(["p0"], ["d0"]), 7000),
        "in the proxy's": _overtaking(
            engines, engines.proxy(["p0"], ["d0"], f"--max-requests-per-engine={SEATS}"), 8000
        ),
    }
    # four at a time: among the second four, and among the last two
    right = all(row["urgent"] <= 2 * SEATS < row["patient"] for row in rows.values())
    return right, rows


def _overtaking(engines: Engines, proxy: Proxy, seed: int) -> dict[str, int]:
    """Which of ten it was that ended, of two with a priority that came ninth and tenth.

    vLLM serves a request that it has begun to load for before any that it has not: so first as
    many as it has seats have to run.
    """
    ended: list[str] = []
    seeds = itertools.count(seed)

    def ask(name: str, tokens: int, head: dict[str, str]) -> None:
        proxy.tokens(words(64, seed=next(seeds)), tokens, headers=head)
        ended.append(name)

    def waiting() -> float:
        health = proxy.request("GET", "/health")[1]
        return engines["d0"].metric(WAITING) + health["queue"]["waiting"]

    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(ask, "plain", 300, {}) for _ in range(SEATS)]
        eventually(lambda: engines["d0"].metric(RUNNING) == SEATS, 20, "all seats are taken")
        asked += [pool.submit(ask, "plain", 30, {}) for _ in range(4)]
        eventually(lambda: waiting() >= 4, 20, "four have to wait")
        for name, priority in (("patient", 9), ("urgent", -9)):
            before = waiting()
            asked.append(pool.submit(ask, name, 30, {"X-Vllm-Priority": str(priority)}))
            eventually(lambda b=before: waiting() > b, 20, "it waits as well")
        for one in asked:
            one.result()
    return {name: ended.index(name) + 1 for name in ("patient", "urgent")}


def cached_nixl(engines: Engines) -> Seen:
    return _cached(engines.proxy(["p0"], ["d0"]), engines["p0"], engines["d0"])


def cached_at_once(engines: Engines) -> Seen:
    """Decode is asked before prefill has said what it had; whole answers and streams."""
    pair, right, rows = (engines["p0"], engines["d0"]), True, {}
    for kind, options in (("whole", {}), ("stream", STREAM)):
        proxy = engines.proxy(["p0"], ["d0"], "--at-once=always")
        proxy.tokens(words(BLOCK, seed=2), 1)  # prefill says where it is
        fine, rows[kind] = _cached(proxy, *pair, **options)
        early = rows[kind]["asked at once"] = proxy.counters()["at_once"]
        right &= fine and early == len(rows[kind]) - 1
    return right, rows


def cached_offloading(engines: Engines) -> Seen:
    return _cached(engines.proxy(["keeper"], ["keeper"], ALONE), engines["keeper"])


def cached_multi(engines: Engines) -> Seen:
    return _cached(engines.proxy(["prefill"], ["decode"]), engines["prefill"], engines["decode"])


def _cached(proxy: Proxy, *engines: Client, **options: Any) -> Seen:
    """usage…cached_tokens is what the engine that got the prompt first had not to compute."""
    prompt, rows = words(10 * BLOCK, seed=random.randrange(1 << 30)), {}
    longer = prompt + words(3 * BLOCK, seed=1)
    steps = (
        ("first", prompt, False),
        ("again", prompt, False),
        ("longer", longer, False),
        ("longer, all prefix caches reset", longer, True),
    )
    right = True
    for name, asked, reset in steps:
        for engine in engines if reset else ():
            eventually(lambda e=engine: _forgets(e), 30, "its prefix cache is empty")
        before = [_prompt_tokens(engine) for engine in engines]
        status, answer = proxy.post(asked, max_tokens=4, **options)
        assert status == 200, answer
        told = (_usage(answer)["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        after = [_prompt_tokens(engine) for engine in engines]
        both = zip(before, after, strict=True)
        gained = [(now[0] - then[0], now[1] - then[1]) for then, now in both]
        counted = next(cached for got, cached in gained if got)
        right &= told == counted
        rows[name] = {"prompt": len(asked), "told": told, "counted": counted}
        rows[name]["engines that got it"] = sum(got > 0 for got, _ in gained)
        time.sleep(0.5)  # what is stored is stored with the next steps
    return right and rows["again"]["told"] > 0 and rows["first"]["told"] == 0, rows


def _usage(answer: Any) -> Any:
    """Of a whole answer, or of a stream's last event."""
    if isinstance(answer, str):
        *_, last, end = (event.removeprefix("data: ") for event in answer.strip().split("\n\n"))
        assert end == "[DONE]", end
        answer = json.loads(last)
    return answer["usage"]


def _prompt_tokens(engine: Client) -> tuple[float, float]:
    """Of all prompts so far; of which not computed."""
    return engine.metric("vllm:prompt_tokens_total"), engine.metric(CACHED)


def _forgets(engine: Client) -> bool:
    return engine.request("POST", "/reset_prefix_cache")[0] == 200


def wishes(engines: Engines) -> Seen:
    """A client's max_load_tokens: not more of its prompt is loaded from host memory."""
    rows, right = {}, True
    for name, proxy, computes in (
        ("offloading", engines.proxy(["keeper"], ["keeper"], ALONE), engines["keeper"]),
        ("multi", engines.proxy(["prefill"], ["decode"]), engines["prefill"]),
    ):
        prompt = words(12 * BLOCK, seed=random.randrange(1 << 30))
        proxy.tokens(prompt, 4)
        time.sleep(1.0)  # stored
        for most in (0, 4 * BLOCK, None):
            eventually(lambda e=computes: _forgets(e), 30, "its prefix cache is empty")
            before = computes.metric(SOURCES, source="external_kv_transfer")
            params = {} if most is None else {"kv_transfer_params": {"max_load_tokens": most}}
            proxy.tokens(prompt, 4, **params)
            came = computes.metric(SOURCES, source="external_kv_transfer") - before
            rows[f"{name}, {'no wish' if most is None else most}"] = came
            right &= came > 4 * BLOCK if most is None else came == most
    return right, rows


Check = Callable[[Engines], Seen]
PAIRS: dict[str, Check] = {
    "come-and-go": come_and_go,
    "stopped": stopped,
    "prefixes": prefixes,
    "responses": responses,
    "endpoints": endpoints,
    "deadlines": deadlines,
    "priorities": priorities,
    "cached-nixl": cached_nixl,
    "cached-at-once": cached_at_once,
}
KEEPERS: dict[str, Check] = {
    "cached-offloading": cached_offloading,
    "cached-multi": cached_multi,
    "wishes": wishes,
}


def run(nursery: Nursery, folder: Path, configs: Any, checks: dict[str, Check]) -> bool:
    """Whether all that the checks saw at engines with these configurations was right."""
    fine = True
    with Fleet(folder, nursery.launch) as fleet:
        engines = Engines(fleet, model("KVCONNECT_TP_MODEL"), ENV)
        engines.start(configs, OPTIONS)
        for name, check in checks.items():
            began = time.monotonic()
            try:
                right, seen = check(engines)
            except (AssertionError, OSError, KeyError, http.client.HTTPException) as error:
                right, seen = False, {"error": repr(error)}
            took = round(time.monotonic() - began, 1)
            print(json.dumps({"check": name, "right": right, "s": took, **seen}), flush=True)
            fine &= right
    return fine


def main(chosen: Sequence[str]) -> bool:
    nixl = {role: transfer_config("nixl", role) for role in ("prefill", "decode")}
    pairs = {f"{role[0]}{n}": config for role, config in nixl.items() for n in (0, 1)}
    host = {"cpu_bytes_to_use": 64 << 20}
    keepers = {"keeper": offload_config(**host)}
    keepers |= dict.fromkeys(("prefill", "decode"), multi_config(**host))
    fine, logs = True, Path(tempfile.mkdtemp(prefix="kvconnect-proxy-features-"))
    with Nursery() as nursery:
        for number, (configs, checks) in enumerate(((pairs, PAIRS), (keepers, KEEPERS))):
            asked = {n: check for n, check in checks.items() if n in chosen}
            if asked:
                fine &= run(nursery, logs / str(number), configs, asked)
    print(f"logs: {logs}", file=sys.stderr)
    return fine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*PAIRS, *KEEPERS]
    parser.add_argument("checks", nargs="*", default=every, help=", ".join(every))
    sys.exit(not main(parser.parse_args().checks))
