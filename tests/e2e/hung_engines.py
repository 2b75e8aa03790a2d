"""One of two prefill, then one of two decode engines stopped (SIGSTOP) amid its transfers.

    python tests/e2e/hung_engines.py nixl:direct mooncake:staged

Clients ask each of the four pairs of engines without pause. What requests through pairs of healthy
engines take, before, while another engine is stopped, and after, is a line of the table; so is how
soon after SIGCONT the stopped one's KV is transferred again. Exits with 1 if a healthy pair lost
more than a second, was answered wrongly or not at all, or the stopped engine was not used again.
Without engines, and in the test suite: tests/contract/chaos_movers.py.
"""

import argparse
import http.client
import itertools
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from chaos_engines import Killable
from conftest import model
from nursery import Nursery
from pair import PREFILL, words
from stopping import STOP_FILE

ROLES = ("prefill", "decode")
CASES = [f"{c}:{m}" for c in ("nixl", "mooncake", "ucx", "p2p") for m in ("direct", "staged")]
PROMPTS, ANSWER, BURST = 8, 8, 6
BEFORE_S, AFTER_S, AGAIN_S = 8.0, 5.0, 60.0
MOST_S = 1.0
"""That a request through a healthy pair may lose."""
FAILED = "vllm:nixl_num_failed_transfers_total"
COMPUTED = "vllm:prompt_tokens_by_source_total"


@dataclass
class Asked:
    pair: tuple
    began: float
    prefilled: float
    ended: float
    right: bool

    @property
    def seconds(self):
        return self.ended - self.began


class Load:
    """A client of every pair, which asks without pause while `running`."""

    def __init__(self, engines):
        self.pairs = list(itertools.product(*([e for e in engines if e.role == r] for r in ROLES)))
        self.prompts = [words(500 + 90 * n, seed=n) for n in range(PROMPTS)]
        self.expected = [engines[-1].client.tokens(prompt, ANSWER) for prompt in self.prompts]
        for pair in self.pairs:  # they greet each other
            self.one(pair, 0)
        self.asked, self.running = [], threading.Event()
        self.threads = []

    def start(self):
        self.running.set()
        self.threads = [threading.Thread(target=self._run, args=(p,)) for p in self.pairs]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.running.clear()
        for thread in self.threads:
            thread.join()

    def _run(self, pair):
        for at in itertools.cycle(range(PROMPTS)):
            if not self.running.is_set():
                return
            self.asked.append(self.one(pair, at))

    def one(self, pair, at):
        began = prefilled = time.monotonic()
        try:
            params = self.prefill(pair[0], at)
            prefilled = time.monotonic()
            right = self.decode(pair[1], at, params)
        except (OSError, http.client.HTTPException, AssertionError) as e:
            print(f"# {pair[0].name} → {pair[1].name}: {e}", file=sys.stderr)
            right = False
        return Asked(pair, began, prefilled, time.monotonic(), right)

    def prefill(self, engine, at):
        params = {"kv_transfer_params": PREFILL}
        status, answer = engine.client.post(self.prompts[at], max_tokens=1, **params)
        assert status == 200, answer
        return answer["kv_transfer_params"]

    def decode(self, engine, at, params):
        given = engine.client.tokens(self.prompts[at], ANSWER, kv_transfer_params=params)
        return given == self.expected[at]

    def between(self, start, end, without):
        """What was asked of pairs ``without`` an engine and answered within this time."""
        return [
            a
            for a in list(self.asked)
            if without not in a.pair and a.began < end and a.ended > start
        ]


def hang(load, victim, stop_file, hold_s):
    """One line of the table, and whether it is as it should be."""
    others = [pair for pair in load.pairs if victim in pair]
    began = time.monotonic()
    load.start()
    time.sleep(BEFORE_S)
    tickets = [(others[n % 2], n, load.prefill(others[n % 2][0], n)) for n in range(BURST)]
    port = tickets[0][2]["remote_port"] if victim.role == "prefill" else 0
    stopped = time.monotonic()
    with ThreadPoolExecutor(BURST) as pool:
        try:
            stop_file.write_text(f"{victim.process.pid} {port}")
            legs = [pool.submit(load.decode, pair[1], at, given) for pair, at, given in tickets]
            while stop_file.exists():
                assert time.monotonic() < stopped + 20, "no transfer of the engine has begun"
                time.sleep(0.01)
            stopped = time.monotonic()
            time.sleep(hold_s)
        finally:
            os.killpg(victim.process.pid, signal.SIGCONT)
        continued = time.monotonic()
        right = [leg.result() for leg in legs]
    load.stop()
    again = used_again(load, others, continued)
    load.start()
    time.sleep(AFTER_S)
    load.stop()
    last = time.monotonic()
    times = (began, stopped), (stopped, continued), (last - AFTER_S, last)
    seen = [load.between(*span, without=victim) for span in times]
    seen[0] = [a for a in seen[0] if a.ended <= stopped]  # others it can have delayed
    took = [[a.seconds for a in part] or [float("inf")] for part in seen]
    lost = max(took[1]) - max(took[0])
    for a in sorted(seen[1], key=lambda a: -a.seconds)[:3]:
        legs = f"{a.prefilled - a.began:.2f} + {a.ended - a.prefilled:.2f} s"
        names = " → ".join(engine.name for engine in a.pair)
        print(f"# {names}, {a.began - stopped:+.2f} s after the stop: {legs}", file=sys.stderr)
    shown = " | ".join(f"{len(t)}: {statistics.median(t):.2f}, {max(t):.2f}" for t in took)
    everything = [a for a in load.asked if a.began >= began]
    wrong = sum(not a.right for a in everything) + right.count(False)
    good = lost <= MOST_S and not wrong and again < AGAIN_S
    return (
        f"{shown} | {max(lost, 0):.2f} | {wrong} of {len(everything) + BURST} | {again:.1f}",
        good,
    )


def used_again(load, pairs, since):
    """Seconds until each of the pairs has transferred a prompt."""
    for pair in pairs:
        decode = pair[1].client
        while time.monotonic() < since + AGAIN_S:
            before = decode.metric(FAILED), decode.metric(COMPUTED, source="local_compute")
            right = load.one(pair, 0).right
            now = decode.metric(FAILED), decode.metric(COMPUTED, source="local_compute")
            if right and now == before:
                break
        else:
            return AGAIN_S
    return time.monotonic() - since


def run(case, hold_s, folder):
    """Lines of the table; whether all are as they should be."""
    connector, _, mode = case.partition(":")
    path, stop_file = model("KVCONNECT_TP_MODEL"), folder / "stop"
    more = {
        "kv_connector_module_path": "stopping",
        "kv_connector_extra_config": {"transfer_mode": mode},
    }
    env = {STOP_FILE: str(stop_file), "PYTHONPATH": str(Path(__file__).parent)}
    fine = True
    with Nursery() as nursery:
        engines = [
            Killable(nursery, role, n, connector, path, folder, more=more, env=env)
            for role in ROLES
            for n in (0, 1)
        ]
        for engine in engines:
            engine.wait_up()
        load = Load(engines)
        for role in ROLES:
            victim = next(e for e in engines if e.role == role)
            shown, good = hang(load, victim, stop_file, hold_s)
            fine &= good
            print(f"| {connector}, {mode} | {role} | {shown} |", flush=True)
    return fine


HEAD = """| transport | stopped | before: requests, median s, longest s | while | after | \
lost, s | wrong or failed | used again, s |
| --- | --- | --- | --- | --- | --- | --- | --- |"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, help=", ".join(CASES))
    parser.add_argument("--hold", type=float, default=15.0, help="seconds that one is stopped")
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvconnect-hung-"))
    print(HEAD, flush=True)
    all_fine = True
    for number, chosen in enumerate(given.cases):
        (folder := logs / f"{number}").mkdir()
        all_fine &= run(chosen, given.hold, folder)
    print(f"logs: {logs}", file=sys.stderr)
    sys.exit(not all_fine)
