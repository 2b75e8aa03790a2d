"""A reset, pauses, a sleep and a shutdown of real engines while leases are out.

    python tests/e2e/lifecycle.py           # --quick: but for the pause of 40 s

Prints a line of JSON for each step, and exits with 1 if anything was wrong.
"""

import concurrent.futures
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import model
from pair import Setup, eventually, in_parallel, words

from kvconnect.cli.processes import Fleet

LEASE_S, DRAIN_S, PAUSE_S = 10, 6, 40
END_S = 15  # vLLM's own end, on two busy cores
TOKENS, REQUESTS = 700, 4
PAUSED_WITHIN_S, RESET_WITHIN_S = 1.0, 1.0

SETUP = Setup(
    model("KVCONNECT_TP_MODEL"),
    both=["--max-model-len", "2048", "--dtype", "float32", "--shutdown-timeout", "60"],
    extra={"kv_lease_duration": LEASE_S, "drain_timeout": DRAIN_S},
    policy="recompute",
    env={"VLLM_SERVER_DEV_MODE": "1"},
)


class Steps:
    """What is done to one pair, one thing after another."""

    def __init__(self, fleet):
        self.pair = SETUP.start(fleet)
        self.wrong = 0
        self.seed = 0

    def leases(self):
        """New prompts, and params of the leases that are out for them."""
        self.seed += REQUESTS
        prompts = [words(TOKENS, self.seed + i) for i in range(REQUESTS)]
        return prompts, [self.pair.prefilled(prompt) for prompt in prompts]

    def answers(self, prompts, params):
        """At decode, all at once."""
        decode = self.pair.decode
        return in_parallel(
            lambda one: decode.post(one[0], max_tokens=8, kv_transfer_params=one[1]),
            list(zip(prompts, params, strict=True)),
        )

    def right(self, prompts, answers):
        """How many answers are what decode computes by itself."""
        self.post(self.pair.decode, "/reset_prefix_cache")
        count = 0
        for prompt, (status, answer) in zip(prompts, answers, strict=True):
            expected = self.pair.decode.tokens(prompt, 8)
            count += status == 200 and answer["choices"][0]["token_ids"] == expected
        return count

    def post(self, engine, path):
        """Its answer, and how long it took."""
        began = time.monotonic()
        status, answer = engine.request("POST", path)
        return status, answer, round(time.monotonic() - began, 3)

    def tell(self, step, holds, **what):
        self.wrong += not holds
        print(json.dumps({"step": step, "ok": bool(holds)} | what), flush=True)

    def loaded(self):
        name = "vllm:prompt_tokens_by_source_total"
        return self.pair.decode.metric(name, source="external_kv_transfer")

    # -- the steps -----------------------------------------------------------------------

    def reset(self, query=""):
        prompts, params = self.leases()
        before = self.loaded()
        status, answer, seconds = self.post(self.pair.prefill, f"/reset_prefix_cache{query}")
        answers = self.answers(prompts, params)
        loaded = self.loaded() - before
        right = self.right(prompts, answers)
        ok = status == 200 and answer == {"success": True} and right == REQUESTS and not loaded
        what = {"answer": answer, "seconds": seconds, "right": right, "loaded": loaded}
        self.tell(f"reset{query}", ok and seconds <= RESET_WITHIN_S, **what)

    def pause_prefill(self, mode, reads=0):
        """Leases are revoked where the pause clears the cache (vLLM's default), else read in it."""
        prompts, params = self.leases()
        before = self.loaded()
        status, answer, seconds = self.post(self.pair.prefill, f"/pause?mode={mode}")
        answers = self.answers(prompts, params)
        loaded = self.loaded() - before
        resumed = self.post(self.pair.prefill, "/resume")[0]
        right = self.right(prompts, answers)
        ok = (status, resumed, right) == (200, 200, REQUESTS) and seconds <= PAUSED_WITHIN_S
        ok = ok and loaded >= reads * (TOKENS - 1) and bool(loaded) == bool(reads)
        what = {"answer": answer, "seconds": seconds, "right": right, "loaded": loaded}
        self.tell(f"pause {mode} of prefill", ok, **what)

    def pause_decode(self):
        prompts, params = self.leases()
        before = self.loaded()
        status, _, seconds = self.post(self.pair.decode, "/pause?mode=keep")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.answers, prompts, params)
            time.sleep(PAUSE_S)
            held = not waiting.done()
            self.post(self.pair.decode, "/resume")
            answers = waiting.result(timeout=60)
        loaded = self.loaded() - before
        right = self.right(prompts, answers)
        ok = status == 200 and held and right == REQUESTS and seconds <= PAUSED_WITHIN_S
        what = {"seconds": seconds, "right": right, "loaded": loaded, "paused_s": PAUSE_S}
        self.tell("decode paused", ok and loaded >= REQUESTS * (TOKENS - 1), **what)

    def sleep(self):
        prompts, params = self.leases()
        before = self.loaded()
        status, _, seconds = self.post(self.pair.prefill, "/sleep?level=1")
        awake, _, _ = self.post(self.pair.prefill, "/wake_up")
        answers = self.answers(prompts, params)
        loaded = self.loaded() - before
        again = self.right(prompts, [(200, self.again(prompt)) for prompt in prompts])
        right = self.right(prompts, answers)
        ok = (status, awake, right, again, loaded) == (200, 200, REQUESTS, REQUESTS, 0)
        what = {"seconds": seconds, "right": right, "again": again, "loaded": loaded}
        self.tell("sleep and wake", ok and seconds <= PAUSED_WITHIN_S, **what)

    def again(self, prompt):
        tokens = self.pair.tokens(prompt, 8)
        return {"choices": [{"token_ids": tokens}]}

    def shutdown(self):
        """Half of the leases are read while prefill drains; the others run out."""
        prompts, params = self.leases()
        before = self.loaded()
        server = self.pair.prefill.server
        began = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(1.0)
        half = REQUESTS // 2
        answers = self.answers(prompts[:half], params[:half])
        loaded = self.loaded() - before
        right = self.right(prompts[:half], answers)
        eventually(lambda: len(server.pids) <= 1, 30, "prefill has ended")
        seconds = round(time.monotonic() - began, 1)
        server.pause(5)
        killed = "force killing" in "\n".join(server.last_lines(60))
        ok = right == half and loaded >= half * (TOKENS - 1) and not killed
        late = server.log.read_text().count("leases were not read within")
        what = {"seconds": seconds, "right": right, "loaded": loaded, "killed": killed}
        what |= {"drain_timeout": DRAIN_S, "told": late}
        within = DRAIN_S <= seconds <= DRAIN_S + END_S
        self.tell("SIGTERM", ok and within and late == 1, **what)


def main() -> None:
    with tempfile.TemporaryDirectory() as logs, Fleet(Path(logs)) as fleet:
        steps = Steps(fleet)
        try:
            steps.reset()
            steps.reset("?reset_running_requests=true&reset_external=true")
            for mode in ("abort", "wait", "keep"):
                steps.pause_prefill(mode)
            steps.pause_prefill("keep&clear_cache=false", reads=REQUESTS)
            steps.sleep()
            if "--quick" not in sys.argv:
                steps.pause_decode()
            steps.shutdown()
            if steps.wrong:
                print(*steps.pair.prefill.server.last_lines(60), sep="\n", file=sys.stderr)
        except BaseException:
            for server in fleet.servers:
                print(f"--- {server.name}", *server.last_lines(40), sep="\n", file=sys.stderr)
            raise
    sys.exit(bool(steps.wrong))


if __name__ == "__main__":
    main()
