"""What clients can do to real engines: hostile params, abort storms, requests that decode refuses.

    python tests/e2e/clients.py --params 10000 --aborts 500

One prefill and one decode engine of a tiny model. Mutants of real `kv_transfer_params` are sent to
decode: every answer must be right or a 4xx, and memory must not grow. Then clients hang up at every
stage, and then requests are refused by decode alone, directly and through `kvconnect proxy`: how
long prefill's blocks stay held. Prints one line of JSON, with the seed; exits with 1 if anything
was wrong.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
from chaos_engines import HELD, LEASE_S, Killable
from conftest import model
from nursery import Nursery
from pair import PREFILL, Client, in_parallel, words

from kvconnect.cli.engines import engine_env, proxy_command
from kvconnect.cli.processes import Fleet, members_of

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz import mutated, replaced

PROMPTS, ANSWER, WORKERS = 8, 4, 16
REFUSED = 20
LATE_S = 3.0
MIB = 1 << 20
GROWTH_MIB = 32  # of an engine's processes together, beyond what requests without params need
FLAT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""Variable of both engines. oneDNN keeps code for each size of a step, 1,024 of them by default: an
engine without any connector grew by 243 MiB in 2,000 requests, and by 30 with this."""
FRESH_EVERY = 20  # requests between two that bring params of a lease that stands


class Trials:
    """A pair of engines, and what was seen."""

    def __init__(self, prefill, decode, proxy, seed):
        self.prefill, self.decode, self.proxy = prefill, decode, proxy
        self.seed, self.seen, self.problems = seed, Counter(), []
        self.lock = threading.Lock()
        self.prompts = [words(30 + n, seed=n) for n in range(PROMPTS)]
        self.right = [decode.client.tokens(prompt, ANSWER) for prompt in self.prompts]
        self.good = [self.lent(prompt) for prompt in self.prompts]

    def lent(self, prompt):
        status, answer = self.prefill.client.post(prompt, max_tokens=1, kv_transfer_params=PREFILL)
        assert status == 200, answer
        return answer["kv_transfer_params"]

    def params(self, count):
        """That many requests without params at decode, and then as many with hostile ones.

        The former show what memory vLLM itself comes to use, and have it used: what then is more
        is due to the params.
        """
        plain = self.tenths(self.one_without_params, count)
        hostile = self.tenths(self.one_of_params, count)
        for name, before in plain[-1].items():
            if hostile[-1][name] - before > GROWTH_MIB:
                more = hostile[-1][name] - before
                self.problems.append(f"{name} has {more} MiB more than before hostile params")
        return {"without_params": plain, "with_hostile_params": hostile}

    def tenths(self, one, count):
        """The engines' MiB after each tenth of ``count`` requests."""
        looked = []
        for tenth in range(10):
            in_parallel(one, range(tenth * count // 10, (tenth + 1) * count // 10), WORKERS)
            engines = self.prefill, self.decode
            looked.append({e.name: round(resident(e.process.pid) / MIB) for e in engines})
        return looked

    def one_without_params(self, number):
        at = random.Random(f"{self.seed} {number}").randrange(PROMPTS)
        if number % FRESH_EVERY == 0:
            self.lent(self.prompts[at])
        if self.decode.client.tokens(self.prompts[at], ANSWER) != self.right[at]:
            self.problems.append(f"request {number} without params: another answer")

    def one_of_params(self, number):
        rng = random.Random(f"{self.seed} {number}")
        at = rng.randrange(PROMPTS)
        if number % FRESH_EVERY == 0:
            self.good[at] = self.lent(self.prompts[at])
        params = hostile(self.good[at], rng, self.good)
        try:
            status, answer = self.decode.client.post(
                self.prompts[at], max_tokens=ANSWER, kv_transfer_params=params
            )
        except (OSError, http.client.HTTPException, ValueError) as e:
            status, answer = 0, repr(e)
        with self.lock:
            self.seen[f"params answered with {status}"] += 1
            if status == 200:
                if answer["choices"][0]["token_ids"] != self.right[at]:
                    self.problems.append(f"params {number}: another answer; {str(params)[:200]}")
            elif not 400 <= status < 500:
                self.problems.append(f"params {number}: {status} {answer}; {str(params)[:200]}")

    def aborts(self, count):
        """That many clients that hang up; seconds until nothing is held any more."""
        in_parallel(self.abort, range(count), WORKERS)
        return self.until_free("after aborts")

    def abort(self, number):
        rng = random.Random(f"{self.seed} abort {number}")
        prompt = words(rng.choice([50, 400, 1500]), seed=2000 + number)
        body, server = {"max_tokens": 300, "prompt": prompt}, self.proxy
        if number % 3 == 1:
            body, server = (
                {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": PREFILL},
                self.prefill.client,
            )
        elif number % 3 == 2:
            body, server = body | {"kv_transfer_params": self.lent(prompt)}, self.decode.client
        connection = http.client.HTTPConnection(server.netloc, timeout=60)
        text = json.dumps({"model": server.model, "temperature": 0, "stream": True} | body)
        with contextlib.suppress(OSError):
            connection.request(
                "POST", "/v1/completions", text, {"Content-Type": "application/json"}
            )
            time.sleep(rng.random() * 0.5)  # the client's patience
        connection.close()

    def refused(self, through_proxy):
        """Requests whose prompt prefill computes, and which decode refuses: too long an answer."""
        for number in range(REFUSED):
            prompt = words(300, seed=9000 + number + 100 * through_proxy)
            if through_proxy:
                status, answer = self.proxy.post(prompt, max_tokens=5000)
            else:
                status, answer = self.decode.client.post(
                    prompt, max_tokens=5000, kv_transfer_params=self.lent(prompt)
                )
            if not 400 <= status < 500:
                self.problems.append(f"not refused: {status} {answer}")
        return self.until_free("after refusals")

    def until_free(self, when):
        """Seconds until no engine holds a block."""
        began = time.monotonic()
        while any(e.client.metric(HELD) for e in (self.prefill, self.decode)):
            if time.monotonic() > began + LEASE_S + LATE_S:
                self.problems.append(f"blocks are held {LEASE_S + LATE_S:g} s {when}")
                break
            time.sleep(0.1)
        return round(time.monotonic() - began, 1)


def hostile(good, rng, others):
    """Params that a client could send."""
    params, drawn = dict(good), rng.random()
    if drawn < 0.5:  # what the ticket says
        text = params["kvconnect"]
        said, dot, rest = text.partition(".")
        raw = base64.urlsafe_b64decode(said + "=" * (-len(said) % 4))
        tickets = [raw]
        spoiled = base64.urlsafe_b64encode(mutated(raw, rng, tickets)).decode()
        params["kvconnect"] = spoiled + dot + rest
    elif drawn < 0.8:  # the in-tree form, which counts where there is no ticket
        del params["kvconnect"]
        key = rng.choice([k for k in params if k != "do_remote_prefill"])
        params[key] = plain(replaced(params[key], rng))
    elif drawn < 0.9:
        params = plain(replaced(params, rng))
    else:
        params = dict(rng.choice(others))
    return params


def plain(value):
    """As JSON can say it."""
    try:
        return msgspec.json.decode(msgspec.json.encode(value))
    except (TypeError, ValueError, msgspec.MsgspecError):
        return str(value)


def resident(pid):
    pages = 0
    for member in members_of(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(params, aborts, seed, folder):
    """A report."""
    path, began = model("KVCONNECT_TP_MODEL"), time.monotonic()
    with Nursery() as nursery, Fleet(folder) as fleet:
        engines = [
            Killable(nursery, role, 0, "nixl", path, folder, env=FLAT)
            for role in ("prefill", "decode")
        ]
        for engine in engines:
            engine.wait_up()
        server = fleet.start(
            "proxy", proxy_command([engines[0].url], [engines[1].url]), engine_env()
        )
        fleet.wait_up([server], 60.0)
        trials = Trials(*engines, Client(server, path.name), seed)
        found = {
            "memory_mib": trials.params(params),
            "free_after_params_s": trials.until_free("after params"),
            "free_after_aborts_s": trials.aborts(aborts),
            "free_after_refusals_through_the_proxy_s": trials.refused(True),
            "free_after_refusals_sent_directly_s": trials.refused(False),
            "invalid_params": engines[1].client.metric("vllm:kvconnect_num_invalid_params_total"),
            "unexpected_errors": engines[1].client.metric(
                "vllm:kvconnect_num_unexpected_errors_total"
            ),
        }
        for engine in engines:
            engine.check_alive()
    return {
        "seed": seed,
        **trials.seen,
        **found,
        "seconds": round(time.monotonic() - began),
        "problems": trials.problems[:10],
        "logs": str(folder),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=10_000)
    parser.add_argument("--aborts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvconnect-clients-"))
    report = run(given.params, given.aborts, given.seed, logs)
    print(json.dumps(report), flush=True)
    sys.exit(bool(report["problems"]))
