"""Routers, unmodified, in front of two real engines of each connector that they work with.

    python tests/e2e/routers.py             # or some: toy plain

PRODUCTION_STACK names a checkout of vllm-project/production-stack; without it, it is cloned.

Prints a line of JSON for each router and connector, and exits with 1 if anything was wrong. Answers
are compared in float32 with those of the prefill engine alone. docs/routers.md is what it found.
"""

import importlib.util
import itertools
import json
import operator
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import multi
import pytest
from conftest import model
from nursery import Nursery
from pair import PREFILL, Client, Pair, Setup, eventually, in_parallel, words

from kvconnect.cli.engines import engine_env, proxy_command
from kvconnect.cli.processes import HOST, Fleet
from kvconnect.config import NixlConfig
from kvconnect.vllm.params import LEAST_STEP

sys.path.insert(1, str(Path(__file__).parents[1]))
from checkouts import CACHE, UnavailableError, checkout, unpacked

SOURCES = Path(os.environ.get("KVCONNECT_VLLM_SRC", ""))
EXAMPLES = SOURCES / "examples/disaggregated"
LENGTHS = (40, 129, 257, 400, 640, 900)
STREAMED = "vllm:kvconnect_num_streamed_transfers_total"
SHORT = ["--max-model-len", "2048"]
DYNAMO = "ai-dynamo==1.6.1"
LEAST_LOADED = NixlConfig().kv_recompute_threshold


def free_port():
    with socket.create_server((HOST, 0)) as taken:
        return taken.getsockname()[1]


# -- engines ---------------------------------------------------------------------------------


def nixl(smol):
    return Setup(smol, both=SHORT)


def stock(smol):
    """vLLM's own name, as configurations that were written for it have it."""
    names = {"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"}
    return Setup(smol, both=SHORT, names=names)


def push(smol):
    """vLLM's name for the connector whose router asks both engines at once."""
    names = {"kv_connector": "NixlPushConnector", "kv_connector_module_path": "kvconnect.vllm"}
    return Setup(smol, both=[*SHORT, "--max-num-batched-tokens", "256"], names=names)


def several(smol):
    names = {"kv_connector": "KVConnectMulti"}
    children = [multi.nixl(), multi.offloading()]
    return Setup(smol, both=SHORT, names=names, extra={"connectors": children})


def in_tree(smol):
    """vLLM's own MultiConnector; its child that hands over has vLLM's name."""
    handing = multi.child("NixlConnector") | {"kv_connector_module_path": "kvconnect.vllm"}
    children = {"connectors": [handing, multi.offloading()]}
    return Setup(smol, both=SHORT, names={"kv_connector": "MultiConnector"}, extra=children)


def mooncake(smol):
    env = {"VLLM_MOONCAKE_BOOTSTRAP_PORT": str(free_port())}
    steps = [*SHORT, "--max-num-batched-tokens", "256"]  # its routers ask both engines at once
    return Setup(smol, both=steps, connector="mooncake", env=env)


def stock_mooncake(smol):
    """vLLM's own name; Dynamo hands on the engine id that is configured."""
    names = {"kv_connector": "MooncakeConnector", "kv_connector_module_path": "kvconnect.vllm"}
    return replace(
        mooncake(smol), names=names, prefill_names={"engine_id": "the one that prefills"}
    )


def p2p(smol):
    """Both engines are told where the one that prefills is, and nothing else."""
    port = free_port()
    at = {"prefill_address": f"{HOST}:{port}"}
    return Setup(
        smol,
        both=SHORT,
        connector="p2p",
        prefill_names={"kv_port": port},
        extra=at,
        policy="recompute",
    )


# -- routers ---------------------------------------------------------------------------------


def port_of(client):
    return client.netloc.rpartition(":")[2]


def of_vllm(script):
    """One of vLLM's own, which take engines so."""

    def command(pair):
        engines = ["--prefiller-host", HOST, "--prefiller-port", port_of(pair.prefill)]
        engines += ["--decoder-host", HOST, "--decoder-port", port_of(pair.decode)]
        start = [sys.executable, str(script), "--host", HOST, *engines]
        return lambda port: [*start, "--port", str(port)]

    return command


def pushes(pair):
    """It is told where prefill is: so is decode, by params of a prompt that was asked for alone."""
    at = pair.prefilled(words(3, seed=1))
    engines = ["--prefill", f"{HOST}:{port_of(pair.prefill)}"]
    engines += ["--decode", f"{HOST}:{port_of(pair.decode)}", "--model", pair.prefill.model]
    where = ["--prefill-engine-id", at["remote_engine_id"]]
    where += ["--prefill-kv-host", at["remote_host"]]
    where += ["--prefill-side-channel-port", str(at["remote_port"])]
    start = [sys.executable, str(PUSH), *engines, *where]
    return lambda port: [*start, "--port", str(port)]


def mooncakes(pair):
    bootstrap = pair.setup.env["VLLM_MOONCAKE_BOOTSTRAP_PORT"]
    script = EXAMPLES / "mooncake_connector/mooncake_connector_proxy.py"
    engines = ["--prefill", pair.prefill.server.url, bootstrap, "--decode", pair.decode.server.url]
    return lambda port: [sys.executable, str(script), "--port", str(port), *engines]


def rust(pair):
    """github.com/vllm-project/router, from its wheel."""
    bootstrap = pair.setup.env.get("VLLM_MOONCAKE_BOOTSTRAP_PORT")
    kind = "mooncake" if bootstrap else "nixl"
    engines = ["--prefill", pair.prefill.server.url, *([bootstrap] if bootstrap else [])]
    engines += ["--decode", pair.decode.server.url, "--policy", "round_robin"]
    mode = ["--vllm-pd-disaggregation", "--kv-connector", kind, "--host", HOST]
    start = [sys.executable, "-P", "-m", "vllm_router.launch_router", *mode, *engines]
    start += ["--prometheus-port", str(free_port())]
    return lambda port: [*start, "--port", str(port)]


def production_stack(mode):
    """production-stack's router in this mode, out of its sources, in an environment of its own."""

    def command(pair):
        python, sources = stack_environment()
        urls = ",".join([pair.prefill.server.url, pair.decode.server.url])
        name = pair.setup.model.name
        start = ["env", f"PYTHONPATH={sources}", str(python), "-m", "vllm_router.app"]
        start += ["--host", HOST, "--service-discovery", "static", "--static-backends", urls]
        start += ["--static-models", f"{name},{name}", "--static-model-labels", "prefill,decode"]
        start += ["--prefill-model-labels", "prefill", "--decode-model-labels", "decode"]
        return lambda port: [*start, "--routing-logic", mode, "--port", str(port)]

    return command


def stack_environment():
    """Python with what that router needs, and its sources; raises UnavailableError."""
    sources = checkout("PRODUCTION_STACK", "vllm-project/production-stack") / "src"
    needs = sources / "vllm_router/requirements.txt"
    folder = CACHE / "production-stack"
    python, stamp = folder / "bin/python", folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != needs.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-I", "-m", "pip", "install", "-q", "-r", str(needs)]
        if subprocess.run(pip).returncode:
            raise UnavailableError(f"{needs} cannot be installed, see pip's message above")
        stamp.write_text(needs.read_text())
    return python, sources


def ours(pair):
    return proxy_command([pair.prefill.server.url], [pair.decode.server.url])


@contextmanager
def behind(command, pair):
    """A client of the router that ``command`` starts."""
    server = pair.fleet.start("router", command(pair), engine_env())
    client = Client(server, pair.prefill.model)

    def serves():
        server.is_up()  # raises once it has ended
        try:
            return client.post(words(40, seed=1), max_tokens=1)[0] == 200
        except OSError:
            return False

    try:
        eventually(serves, 60, f"{server.name} serves; its log: {server.log}")
        yield client
    finally:
        server.kill()
        pair.fleet.servers.remove(server)


def started(command):
    @contextmanager
    def asked(pair):
        with behind(command, pair) as client:
            yield client.post

    return asked


def through_float64(text):
    return int(float(text))


@contextmanager
def llm_d(pair):
    """llm-d's sidecar: its two bodies, and numbers as Go hands them on."""

    def ask(prompt, **options):
        headers = {"x-request-id": str(uuid.uuid4())}
        legs = {"max_tokens": 1, "stream": False, "kv_transfer_params": PREFILL}
        status, lent = pair.prefill.post(prompt, headers, **{**options, **legs})
        assert status == 200, lent
        handed = json.dumps(lent["kv_transfer_params"])
        params = json.loads(handed, parse_int=through_float64)
        return pair.decode.post(prompt, headers, **options, kv_transfer_params=params)

    yield ask


@contextmanager
def plain(pair):
    """production-stack's disaggregated_prefill: one id to both engines, and no params."""

    def ask(prompt, **options):
        headers = {"X-Request-Id": str(uuid.uuid4())}
        status, answer = pair.prefill.post(prompt, headers, **{**options, "max_tokens": 1})
        assert status == 200, answer
        return pair.decode.post(prompt, headers, **options)

    yield ask


def dynamo_protocols():
    """The module by which Dynamo knows connectors, out of its wheel."""
    source = unpacked(DYNAMO) / "dynamo/vllm/kv_connector_protocols.py"
    spec = importlib.util.spec_from_file_location("dynamo_protocols", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def dynamo(pair):
    """What Dynamo's workers make of an engine's configuration, and the params of both legs."""
    from vllm.config import KVTransferConfig

    choose = dynamo_protocols().make_kv_connector_protocol
    os.environ |= pair.setup.env  # where vLLM's own function looks for the bootstrap port

    def configured(transfer):
        engines = SimpleNamespace(local_engines_only=True)
        transfer = KVTransferConfig(**transfer)
        return SimpleNamespace(kv_transfer_config=transfer, parallel_config=engines)

    for name in ("KVConnectNixl", "KVConnectMulti"):  # as docs/routers.md says
        with pytest.raises(ValueError, match="Unsupported kv_connector"):
            choose(configured({"kv_connector": name, "kv_role": "kv_both"}))

    def ask(prompt, **options):
        protocol = choose(configured(pair.setup.transfer("prefill")))
        params = protocol.prefill_request_kv_transfer_params()
        leg = {"max_tokens": 1, "kv_transfer_params": params}
        status, lent = pair.prefill.post(prompt, **{**options, **leg})
        assert status == 200, lent
        answer = SimpleNamespace(kv_transfer_params=lent.get("kv_transfer_params"))
        handed = protocol.decode_request_kv_transfer_params(answer)
        return pair.decode.post(prompt, **options, kv_transfer_params=handed)

    yield ask


TOY = SOURCES / "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py"
MULTI_TURN = EXAMPLES / "disaggregated_serving/disagg_proxy_multiturn.py"
PUSH = EXAMPLES / "disaggregated_serving/disagg_proxy_pushconnector_demo.py"
ROUTERS = {
    "push": ("vLLM disagg_proxy_pushconnector_demo.py", started(pushes), [nixl, stock, push]),
    "toy": ("vLLM toy_proxy_server.py", started(of_vllm(TOY)), [nixl, stock, several, p2p]),
    "multiturn": ("vLLM disagg_proxy_multiturn.py", started(of_vllm(MULTI_TURN)), [nixl]),
    "rust": ("vllm-router", started(rust), [nixl, stock, several, mooncake]),
    "ours": ("kvconnect proxy", started(ours), [nixl, several, p2p, mooncake]),
    "llm-d": ("llm-d sidecar (its bodies)", llm_d, [nixl, several]),
    "dynamo": (f"{DYNAMO} (its protocols)", dynamo, [stock, in_tree, stock_mooncake]),
    "mooncake": ("vLLM mooncake_connector_proxy.py", started(mooncakes), [mooncake]),
    "stack": (
        "production-stack disaggregated_prefill_orchestrated",
        started(production_stack("disaggregated_prefill_orchestrated")),
        [nixl, stock, several],
    ),
    "stack-plain": (
        "production-stack disaggregated_prefill",
        started(production_stack("disaggregated_prefill")),
        [p2p],
    ),
    "plain": ("production-stack disaggregated_prefill (its requests)", plain, [p2p]),
}
CONVERSING = {
    "multiturn": (ROUTERS["multiturn"][0], of_vllm(MULTI_TURN)),
    "ours-turns": ("kvconnect proxy", ours),
}
"""Who hands to prefill what decode lends of the turn before: `check_turns`."""
AT_ONCE = [(ROUTERS["push"][1], push), (ROUTERS["mooncake"][1], mooncake)]
"""Whose routers ask both engines at once: blocks have to cross while prefill computes."""
ENGINES = (nixl, stock, push, several, in_tree, mooncake, stock_mooncake, p2p)


def check(router, connect, pair, setup, seed):
    """What came of some prompts behind one router."""
    source = "vllm:prompt_tokens_by_source_total"
    prompts = [words(length, seed + n) for n, length in enumerate(LENGTHS)]
    equal = transferred = 0
    with connect(pair) as ask:
        before = pair.decode.metric(source, source="external_kv_transfer")
        streamed = pair.decode.metric(STREAMED)
        answers = [ask(prompt, max_tokens=12) for prompt in prompts]
        transferred = pair.decode.metric(source, source="external_kv_transfer") - before
        streamed = pair.decode.metric(STREAMED) - streamed
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        assert status == 200, answer
        _, alone = pair.prefill.post(prompt, max_tokens=12)
        equal += answer["choices"][0]["text"] == alone["choices"][0]["text"]
    total = sum(LENGTHS)
    return {
        "router": router,
        "connector": setup.__name__,
        "equal": f"{equal} of {len(prompts)}",
        "transferred": f"{transferred:.0f} of {total}",
        "streamed": f"{streamed:.0f} of {len(prompts)}",
        # the last token of each prompt is decode's own, and counted by one protocol and not another
        "ok": equal == len(prompts)
        and transferred in (total, total - len(prompts))
        and (streamed > 0 or (connect, setup) not in AT_ONCE),
    }


def conversing():
    """A model whose answers are text, and engines that lend both ways."""
    extra = {"bidirectional_kv_xfer": True}
    return Setup(model("KVCONNECT_MODEL"), both=["--max-model-len", "4200"], extra=extra)


def asked_in_turn(pair):
    """As of a router that knows no conversations."""

    def ask(body):
        _, lent = chat(pair.prefill, body | {"max_tokens": 1, "kv_transfer_params": PREFILL})
        return chat(pair.decode, body | {"kv_transfer_params": lent["kv_transfer_params"]})

    return ask


def chat(client, body):
    """The text of a greedy answer, and the whole of it."""
    body = {"model": client.model, "temperature": 0} | body
    status, answer = client.request("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer


def agreed_tokens(first, second):
    """How much of a second turn's prompt decode holds of the first, in steps that are lent.

    The two part where the text of an answer has other tokens than the model wrote it with.
    """
    # the last token was sampled, and not computed with
    held = first["prompt_token_ids"] + first["choices"][0]["token_ids"][:-1]
    both = zip(held, second["prompt_token_ids"], strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
    return same // LEAST_STEP * LEAST_STEP


class PrefillCounts(NamedTuple):
    """What a prefill engine has counted: prompt tokens, and loads."""

    computed: float
    loaded: float
    loads: float

    @classmethod
    def of(cls, client):
        source = "vllm:prompt_tokens_by_source_total"
        return cls(
            client.metric(source, source="local_compute"),
            client.metric(source, source="external_kv_transfer"),
            client.metric("vllm:kvconnect_handover_seconds_count"),
        )

    def since(self, before):
        return PrefillCounts(*map(operator.sub, self, before))


class Chats(NamedTuple):
    """Some chats that have gone on once, and what prefill counted of their second turns."""

    turns: list
    """The messages of each second one."""
    said: list
    found: list
    counted: PrefillCounts

    @classmethod
    def of(cls, ask, firsts, prefill):
        def asked(messages):
            # a first answer has to be worth loading, a second one tells whether it was read right
            most = 120 if len(messages) == 1 else 24
            return ask({"messages": messages, "max_tokens": most})

        said = in_parallel(asked, [[one] for one in firsts])
        turns = [
            [one, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
            for one, (text, _) in zip(firsts, said, strict=True)
        ]
        before = PrefillCounts.of(prefill)
        found = in_parallel(asked, turns)
        return cls(turns, said, found, PrefillCounts.of(prefill).since(before))

    def agreed(self):
        """`agreed_tokens` of each, where answers tell their tokens."""
        both = zip(self.said, self.found, strict=True)
        return [agreed_tokens(first, second) for (_, first), (_, second) in both]


def check_turns(router, command, pair, chats=20):
    """Second turns behind a router: what prefill computed of them, and what without reuse.

    The same chats twice, once under a salt of their own, so that what each second turn could have
    loaded is known by its tokens.
    """
    firsts = [
        {"role": "user", "content": f"{n} {router}: tell a long story about the number {n}."}
        for n in range(chats)
    ]
    salted = {"cache_salt": "without reuse", "return_token_ids": True}
    in_turn = asked_in_turn(pair)
    plain = Chats.of(lambda body: in_turn(body | salted), firsts, pair.prefill)
    with behind(command, pair) as client:

        def on(body):
            return chat(client, body | {"conversation_id": body["messages"][0]["content"]})

        reused = Chats.of(on, firsts, pair.prefill)

    def alone(messages):
        body = {"messages": messages, "max_tokens": 24, "cache_salt": "alone"}
        return chat(pair.prefill, body)[0]

    expected = in_parallel(alone, plain.turns)
    answers = [text for text, _ in [*plain.found, *reused.found]]
    equal = sum(map(operator.eq, answers, [*expected, *expected]))
    agreed = plain.agreed()
    worth = [tokens for tokens in agreed if tokens >= LEAST_LOADED]
    counted, computed = reused.counted, plain.counted.computed
    return {
        "router": f"{router}, second turns of {chats} chats",
        "equal": f"{equal} of {len(answers)}",
        "computed at prefill": f"{counted.computed:.0f}, and {computed:.0f} without reuse",
        "loaded from decode": f"{counted.loaded:.0f} tokens of {sum(worth)} that agree",
        "turns that loaded": f"{counted.loads:.0f} of {len(worth)}",
        f"turns of which fewer than {LEAST_LOADED} tokens agree": chats - len(worth),
        "ok": equal == len(answers)
        and reused.turns == plain.turns
        and (counted.loaded, counted.loads) == (sum(worth), len(worth))
        and counted.computed < computed / 2,
    }


def main():
    chosen = sys.argv[1:] or [*ROUTERS, "ours-turns"]
    smol, wrong = model("KVCONNECT_TP_MODEL"), 0
    assert TOY.is_file(), f"{TOY} is missing: run `make setup`"
    with Nursery() as nursery, tempfile.TemporaryDirectory() as folder:
        for setup in ENGINES:
            rows = [row for name, row in ROUTERS.items() if name in chosen and setup in row[2]]
            if not rows:
                continue
            with Fleet(Path(folder) / setup.__name__, nursery.launch) as fleet:
                pair: Pair = setup(smol).start(fleet)
                for number, (router, connect, _) in enumerate(rows):
                    try:
                        row = check(router, connect, pair, setup, 20_000 + 100 * number)
                        wrong += not row["ok"]
                    except UnavailableError as error:
                        row = {"router": router, "skipped": str(error)}
                    print(json.dumps(row), flush=True)
        turns = [CONVERSING[name] for name in chosen if name in CONVERSING]
        if turns:
            with Fleet(Path(folder) / "turns", nursery.launch) as fleet:
                pair = conversing().start(fleet)
                for router, command in turns:
                    row = check_turns(router, command, pair)
                    wrong += not row["ok"]
                    print(json.dumps(row), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
