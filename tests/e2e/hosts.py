"""Two engines of each connector on this host, with no port set anywhere, and with IPv6 alone.

    python tests/e2e/hosts.py               # or some: nixl p2p

Prints a line of JSON for each pair, and exits with 1 if anything was wrong.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import multi
from conftest import model
from nursery import Nursery
from pair import IPV6, PREFILL, Client, has_ipv6, words

from kvconnect.cli.engines import ROLES, START_TIMEOUT_S, VllmServe, engine_env
from kvconnect.cli.processes import Fleet

CONNECTORS = {
    "nixl": ("KVConnectNixl", {}),
    "mooncake": ("KVConnectMooncake", {"mooncake_protocol": "tcp"}),
    "ucx": ("KVConnectNixl", {"transport": "ucx"}),
    "p2p": ("KVConnectP2pNccl", {}),
    "multi": (
        "KVConnectMulti",
        {"connectors": [multi.nixl(), multi.mooncake(), multi.offloading()]},
    ),
}
SETTINGS = (
    "VLLM_NIXL_SIDE_CHANNEL_HOST",
    "VLLM_NIXL_SIDE_CHANNEL_PORT",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT",
    "VLLM_PORT",
)
"""Variables of the tests' own engines, which these are without."""

PROMPTS, TOKENS = 4, 300
UNBRACKETED = re.compile(r"(?<![\[:0-9a-fA-F])::1:\d")
MOONCAKES_OWN = re.compile(r"^[IWE]\d{4} .*\.cpp:\d+\].*$", re.M)
"""Lines that Mooncake's library writes itself: "listening on ::1:15894"."""


def start(fleet, connector, role, host):
    name, options = CONNECTORS[connector]
    config = {
        "kv_connector": name,
        "kv_role": ROLES[role],
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": options,
    }
    env = {k: v for k, v in engine_env().items() if k not in SETTINGS}
    if host is not None:
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = host
    command = VllmServe(MODEL, config, ["--max-model-len", "1024"]).command
    return fleet.start(f"{role} {len(fleet.servers)}", command, env)


def check(connector, host, folder, launch):
    """What two engines of ``connector`` did; ``host`` is what they are told of it, if anything."""
    with Fleet(folder, launch) as fleet:
        servers = [start(fleet, connector, role, host) for role in ROLES]
        fleet.wait_up(servers, START_TIMEOUT_S)
        prefill, decode = (Client(server, MODEL.name) for server in servers)
        prompts = [words(TOKENS + 50 * n, seed=9000 + n) for n in range(PROMPTS)]
        equal = 0
        for prompt in prompts:
            status, lent = prefill.post(prompt, max_tokens=1, kv_transfer_params=PREFILL)
            assert status == 200, lent
            answer = decode.tokens(prompt, 8, kv_transfer_params=lent["kv_transfer_params"])
            equal += answer == prefill.tokens(prompt, 8)
        source = "vllm:prompt_tokens_by_source_total"
        transferred = decode.metric(source, source="external_kv_transfer")
        logs = [server.log.read_text() for server in servers]
    total = sum(map(len, prompts))
    told = [re.findall(r"offers \d+ layers.* at (\S+:\d+)", log) for log in logs]
    row = {
        "connector": CONNECTORS[connector][0] + (" (ucx)" if connector == "ucx" else ""),
        "host": host or "unset",
        "equal": f"{equal} of {PROMPTS}",
        "transferred": f"{transferred:.0f} of {total}",
        "endpoints": told,
    }
    row["ok"] = (
        equal == PROMPTS
        # the last token of each prompt is decode's own, and counted by one protocol and not another
        and transferred in (total, total - PROMPTS)
        and all(told)
        and not set(told[0]) & set(told[1])
        and (host != IPV6 or all(at.startswith(f"[{IPV6}]:") for one in told for at in one))
        and not any(UNBRACKETED.search(MOONCAKES_OWN.sub("", log)) for log in logs)
    )
    return row


def main():
    chosen = sys.argv[1:] or list(CONNECTORS)
    pairs = [(c, host) for c in chosen for host in (None, IPV6)]
    wrong = 0
    with Nursery() as nursery, tempfile.TemporaryDirectory() as folder:
        for number, (connector, host) in enumerate(pairs):
            if host == IPV6 and not has_ipv6():
                row = {"connector": connector, "skipped": "this host has no IPv6 loopback address"}
            else:
                row = check(connector, host, Path(folder) / str(number), nursery.launch)
                wrong += not row["ok"]
            print(json.dumps(row), flush=True)
    sys.exit(bool(wrong))


MODEL = model("KVCONNECT_TP_MODEL")

if __name__ == "__main__":
    main()
