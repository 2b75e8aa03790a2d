"""One of two prefill, then one of two decode engines stopped (SIGSTOP) amid its transfers.

    python tests/e2e/hung_engines.py nixl:direct mooncake:staged

Clients ask each of the four pairs of engines without pause. What requests through pairs of healthy
engines take while another engine is stopped is compared with a control: the same seconds and the
same loads without a stop, just before. A request that is under way when the engine goes on counts
with what it has taken until then, since the engine then computes all that it owes at once, which on
two cores delays everybody. How soon after SIGCONT the stopped one's KV is transferred again is in
the table, too.

Exits with 1 if a healthy pair lost more than a second, was answered wrongly or not at all, if a
load between healthy engines failed, or if the stopped engine was not used again. Movers and
engines that stood still for longer than a second say in their logs where (`stopping.py`).
Without engines, and in the test suite: tests/contract/chaos_movers.py.
"""

import argparse
import http.client
import itertools
import os
import re
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
from stopping import STOOD_STILL, STOP_FILE

ROLES = ("prefill", "decode")
CASES = [f"{c}:{m}" for c in ("nixl", "mooncake", "ucx", "p2p") for m in ("direct", "staged")]
PROMPTS, ANSWER, BURST = 8, 8, 6
AGAIN_S = 60.0
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
        """Requests of pairs ``without`` an engine that were under way in this time."""
        return [
            a for a in self.asked if without not in a.pair and a.began < end and a.ended > start
        ]


def window(load, victim, hold_s, stop_file=None):
    """From when until when the victim was stopped amid loads of its own, and which went right.

    Without a ``stop_file`` it is not stopped: the control.
    """
    pairs = [pair for pair in load.pairs if victim in pair]
    tickets = [(pairs[n % 2], n, load.prefill(pairs[n % 2][0], n)) for n in range(BURST)]
    with ThreadPoolExecutor(BURST) as pool:
        began = time.monotonic()
        try:
            if stop_file:
                stop_file.write_text(f"{victim.process.pid} {control_port(victim)}")
            legs = [pool.submit(load.decode, pair[1], at, given) for pair, at, given in tickets]
            while stop_file and stop_file.exists():
                assert time.monotonic() < began + AGAIN_S, "no transfer of the engine has begun"
                time.sleep(0.01)
            began = time.monotonic()
            time.sleep(hold_s)
        finally:
            if stop_file:
                os.killpg(victim.process.pid, signal.SIGCONT)
        return began, time.monotonic(), [leg.result() for leg in legs]


def control_port(engine):
    """Of its control channel, as it says in its log; peers are named by it."""
    return re.search(r"kvconnect: rank .* at [^ ]*:(\d+), key port", engine.log.read_text())[1]


def hang(load, victim, stop_file, hold_s):
    """One line of the table, and whether it is as it should be."""
    healthy = [pair for pair in load.pairs if victim not in pair]
    # of a decode engine whose prefill engines are all healthy, or none
    readers = {d for _, d in healthy} if victim.role == "decode" else set()
    load.start()
    try:
        began, until, right = window(load, victim, hold_s)
        failed = sum(d.client.metric(FAILED) for d in readers)
        stopped, continued, more = window(load, victim, hold_s, stop_file)
        failed = sum(d.client.metric(FAILED) for d in readers) - failed
    finally:
        load.stop()
    again = used_again(load, [pair for pair in load.pairs if victim in pair], continued)
    seen = []
    for name, start, end in (("control", began, until), ("stopped", stopped, continued)):
        requests = load.between(start, end, without=victim)
        seen.append([min(a.ended, end) - a.began for a in requests] or [float("inf")])
        for a in sorted(requests, key=lambda a: a.began - min(a.ended, end))[:3]:
            legs = f"{a.prefilled - a.began:.2f} + {a.ended - a.prefilled:.2f} s"
            names = " → ".join(engine.name for engine in a.pair)
            print(f"# {name}: {names}, at {a.began - start:+.2f} s: {legs}", file=sys.stderr)
    after = [a.seconds for a in load.between(continued, float("inf"), without=victim)]
    lost = max(seen[1]) - max(seen[0])
    shown = " | ".join(f"{len(t)}: {statistics.median(t):.2f}, {max(t):.2f}" for t in seen)
    everything = [a for a in load.asked if a.began >= began]
    wrong = sum(not a.right for a in everything) + (right + more).count(False)
    good = lost <= MOST_S and not wrong and not failed and again < AGAIN_S
    return (
        f"{shown} | {max(lost, 0):.2f} | {max(after, default=0):.2f} | "
        f"{failed:.0f} | {wrong} of {len(everything) + 2 * BURST} | {again:.1f}",
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


def stood_still(engines, victim, already):
    """Say which healthy engines' movers, or whole processes, stood still."""
    for engine in engines:
        count = engine.log.read_text(errors="replace").count(STOOD_STILL)
        if count > already.get(engine, 0) and engine is not victim:
            print(f"# {engine.name} stood still; where: {engine.log}", file=sys.stderr)
        already[engine] = count


def run(nursery, case, hold_s, folder):
    """Print lines of the table; whether all are as they should be."""
    connector, _, mode = case.partition(":")
    path, stop_file = model("KVCONNECT_TP_MODEL"), folder / "stop"
    more = {
        "kv_connector_module_path": "stopping",
        "kv_connector_extra_config": {"transfer_mode": mode},
    }
    env = {STOP_FILE: str(stop_file), "PYTHONPATH": str(Path(__file__).parent)}
    fine, engines, already = True, [], {}
    try:
        for role in ROLES:
            for n in (0, 1):
                engines.append(
                    Killable(nursery, role, n, connector, path, folder, more=more, env=env)
                )
        for engine in engines:
            engine.wait_up()
        load = Load(engines)
        stood_still(engines, None, already)
        for role in ROLES:
            victim = next(e for e in engines if e.role == role)
            shown, good = hang(load, victim, stop_file, hold_s)
            fine &= good
            print(f"| {connector}, {mode} | {role} | {shown} |", flush=True)
            stood_still(engines, victim, already)
    finally:
        for engine in engines:
            engine.kill()
    return fine


def run_contained(nursery, case, hold_s, folder):
    """As `run`; what goes wrong with one case is a line of the table, and the others are run."""
    try:
        return run(nursery, case, hold_s, folder)
    except Exception as e:
        print(f"| {case} | not run to its end: {type(e).__name__}: {e} |", flush=True)
        return False


HEAD = """| transport | stopped | control: requests, median s, longest s | while stopped | \
lost, s | longest after SIGCONT, s | failed loads of healthy | wrong or failed | used again, s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, help=", ".join(CASES))
    parser.add_argument("--hold", type=float, default=15.0, help="seconds that one is stopped")
    given = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kvconnect-hung-"))
    print(HEAD, flush=True)
    all_fine = True
    with Nursery() as forks:
        for number, chosen in enumerate(given.cases):
            (folder := logs / f"{number}").mkdir()
            all_fine &= run_contained(forks, chosen, given.hold, folder)
    print(f"logs: {logs}", file=sys.stderr)
    sys.exit(not all_fine)
