"""A process that looks like a vLLM engine to the demo and the benchmarks.

``fake_engine.py PORT ROLE``; prompts are text or token ids.

The FAULT in the environment is what it does wrong.
"""

import contextlib
import http.server
import json
import os
import sys
import threading
import time
from collections import Counter
from typing import Any

PORT, ROLE = int(sys.argv[1]), sys.argv[2]
FAULT = os.environ.get("FAULT", "")
CONSUMER = ROLE == "kv_consumer"
KV_BYTES = 1000
counted: Counter[str] = Counter()
lock = threading.Lock()
TALKS = 100
"""An answer of more tokens comes slowly."""
TOKEN_S = 0.002


def source(name: str) -> str:
    return f'vllm:prompt_tokens_by_source_total{{engine="0",source="{name}"}}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(200, "".join(f"{name} {value}\n" for name, value in counted.items()).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if CONSUMER and FAULT == "refuses":
            return self.reply(400, b"out of KV")
        if "KVCONNECT_BENCH_MARKS" in os.environ:
            with open(os.environ["KVCONNECT_BENCH_MARKS"], "a") as file:
                print(json.dumps((time.monotonic(), "step ended")), file=file)
        prompt = body.get("prompt") or body["messages"][0]["content"]
        params = body.get("kv_transfer_params") or {}
        tokens = len(prompt) // 4
        pulled = bool(params.get("do_remote_prefill"))
        with lock:
            if pulled and FAULT != "computes":
                counted[source("external_kv_transfer")] += tokens
                counted["vllm:nixl_bytes_transferred_sum"] += tokens * KV_BYTES
                counted["vllm:nixl_xfer_time_seconds_sum"] += 1
            else:
                counted[source("local_compute")] += tokens
            counted["vllm:request_success_total"] += 1
        text = f"answer {sum(prompt.encode() if isinstance(prompt, str) else prompt)}"
        if FAULT == "differs" and pulled:
            text = "another prompt's answer"
        usage = {"prompt_tokens": tokens}
        if body.get("stream"):
            token = {"choices": [{"delta": {"content": text}}]}
            # as many as a benchmark asks for; an answer that is compared is one
            answered = body.get("max_tokens", 1) - 1 if FAULT == "talks" else 1
            pause_s = TOKEN_S if answered > TALKS else 0.0
            self.stream(*[token] * answered, {"choices": [], "usage": usage}, pause_s=pause_s)
            return None
        answer: dict[str, Any] = {"choices": [{"text": text, "message": text}], "usage": usage}
        if params.get("do_remote_decode"):
            where: dict[str, Any] = dict.fromkeys(
                ("remote_engine_id", "remote_host", "remote_port"), "here"
            )
            where |= {"tp_size": 1, "pp_size": 1}
            known = {name: params[name] for name in ("transfer_id",) if name in params}
            answer["kv_transfer_params"] = {"do_remote_prefill": True, **where, **known}
        return self.reply(200, json.dumps(answer).encode())

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *events: dict[str, Any], pause_s: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked may hang up
            for event in events:
                time.sleep(pause_s)
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")


if CONSUMER and FAULT == "crashes":
    sys.exit(3)
http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
