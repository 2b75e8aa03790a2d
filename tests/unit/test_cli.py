"""The command line: light, honest about what it saw, and nothing left running behind it."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import kvconnect
from kvconnect.cli import engines, main
from kvconnect.cli.counters import read_counters
from kvconnect.cli.demo import ConnectorName
from kvconnect.cli.demos.rows import HandOverRow, picture, table, verdict
from kvconnect.cli.demos.scenes import scenes
from kvconnect.cli.engines import CONNECTORS, VllmServe, engine_env, proxy_command, transfer_config
from kvconnect.cli.processes import Fleet, Server, ServerError
from kvconnect.errors import ConfigError
from kvconnect.proxy.config import ProxyConfig, make_config

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
BLOCK_CHARS = 4 * 128

# Ends when the interpreter tries to import what a fresh environment does not have.
WITHOUT_HEAVY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "vllm", "nixl", "aiohttp", "numpy", "zmq"}:
            raise SystemExit(f"imports {name}")

sys.meta_path.insert(0, Refuse())
from kvconnect.cli import main
main(sys.argv[1:])
"""

# /health, a child that ignores SIGTERM, and the child's pid in a file.
SERVER_WITH_CHILD = """
import http.server, subprocess, sys
child = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 60; done"])
open(sys.argv[2], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

# What the command is to a fleet: a main thread that may be told to go at any time.
FLEET = """
import sys
from pathlib import Path
from kvconnect.cli.processes import Fleet
script, folder = sys.argv[1], Path(sys.argv[2])
with Fleet(folder) as fleet:
    start = [sys.executable, "-c", script]
    server = fleet.start("server", lambda port: [*start, str(port), str(folder / "pid")])
    fleet.wait_up([server], 20)
    print("up", flush=True)
    sys.stdin.read()
"""


def running(pid: int) -> bool:
    """Zombies do not run: where nobody reaps orphans, they stay."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def with_child(folder: Path) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-c", SERVER_WITH_CHILD, str(port), str(folder / "pid")]


def child_in(folder: Path) -> int:
    return int((folder / "pid").read_text())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version"], kvconnect.__version__),
        (["--help"], "demo"),
        (["demo", "--help"], "--keep-logs"),
        (["proxy", "--help"], "--prefill"),
        (["bench", "--help"], "pd"),
    ],
    ids=["version", "help", "demo", "proxy", "bench"],
)
def test_help_and_version_need_no_heavy_import(arguments: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEAVY, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout


def test_connectors_of_the_demo_are_those_of_the_table() -> None:
    assert [str(name) for name in ConnectorName] == [*CONNECTORS, "offloading", "multi"]


def test_engine_command_says_what_vllm_serve_should_do(model: Path) -> None:
    command = VllmServe(model, transfer_config("nixl", "decode"), options=["--seed", "7"]).command(
        81
    )
    assert command[command.index("serve") + 1] == str(model)
    assert command[-2:] == ["--seed", "7"]
    given = dict(itertools.pairwise(command))
    assert given["--port"] == "81"
    assert given["--dtype"] == "float32"
    assert given["--served-model-name"] == "tiny"
    assert "--enforce-eager" in command
    expected = {"kv_connector": "KVConnectNixl", "kv_role": "kv_consumer"}
    assert json.loads(given["--kv-transfer-config"]) == expected


def test_engine_without_connector_has_no_transfer_config(model: Path) -> None:
    assert "--kv-transfer-config" not in VllmServe(model).command(81)


def test_proxy_command_names_every_engine() -> None:
    command = proxy_command(["http://p"], ["http://d1", "http://d2"])(8000)
    assert [c for c in command if c.startswith(("--prefill", "--decode", "--port"))] == [
        "--prefill=http://p",
        "--decode=http://d1",
        "--decode=http://d2",
        "--port=8000",
    ]


def test_environment_has_defaults_and_no_engine_of_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    env = engine_env(VLLM_NIXL_SIDE_CHANNEL_HOST="10.0.0.1")
    assert (env["OMP_NUM_THREADS"], env["HF_HUB_OFFLINE"]) == ("5", "1")
    assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
    assert not {"VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_API_KEY"} & set(env)
    assert engine_env(VLLM_NIXL_SIDE_CHANNEL_PORT="1")["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "1"


@pytest.mark.parametrize("model", [None, Path("/nowhere")])
def test_missing_model_is_an_error_that_names_make_setup(model: Path | None) -> None:
    with pytest.raises(ConfigError, match="make setup"):
        engines.check_model(model)


def test_connector_that_is_not_installed_is_an_error_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'kvconnect[nixl]'")):
        engines.check_installed("nixl")


@pytest.mark.slow
def test_leaving_a_fleet_ends_servers_and_children_that_ignore_sigterm(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("a server", with_child(tmp_path))
        fleet.wait_up([server], 20)
        child = child_in(tmp_path)
        assert running(server.pid)
        assert running(child)
        assert (tmp_path / "a-server.log").read_text() == "listening\n"
    assert not running(server.pid)
    assert not running(child)


@pytest.mark.slow
def test_kill_ends_the_whole_group_at_once_and_may_be_repeated(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("server", with_child(tmp_path))
        fleet.wait_up([server], 20)
        server.kill()
        assert not running(server.pid)
        assert not running(child_in(tmp_path))
        with pytest.raises(ServerError, match="SIGKILL"):
            server.is_up()
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, -signal.SIGINT),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, 128 + signal.SIGHUP),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"],
)
def test_nothing_is_left_whatever_signal_ends_the_command(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    command = [sys.executable, "-c", FLEET, SERVER_WITH_CHILD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        child = child_in(tmp_path)
        process.send_signal(number)
        process.communicate()
    assert process.returncode == status
    assert eventually(lambda: not running(child))


def test_server_that_ends_is_an_error_with_its_status_and_log(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("bad engine", lambda port: ["sh", "-c", "echo no memory; exit 3"])
        with pytest.raises(ServerError, match=r"bad engine ended with status 3; .*bad-engine\.log"):
            fleet.wait_up([server], 20)
        assert server.last_lines() == ["no memory"]


def test_server_that_is_too_slow_is_an_error(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        server = fleet.start("slow engine", lambda port: ["sleep", "60"])
        with pytest.raises(ServerError, match="slow engine is not up after 0 s"):
            fleet.wait_up([server], 0)


def test_ports_of_a_fleet_differ(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        servers = [fleet.start(f"s{n}", lambda port: ["sleep", "60"]) for n in range(8)]
        assert len({server.url for server in servers}) == 8


METRICS = """\
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 65.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 3.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 2101.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 4.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 7.0
vllm:nixl_bytes_transferred_sum{engine="0",model_name="m"} 1.2386304e+08
vllm:nixl_bytes_transferred_count{engine="0",model_name="m"} 5.0
vllm:nixl_xfer_time_seconds_sum{engine="0",model_name="m"} 0.07527
vllm:nixl_num_failed_transfers_total{engine="0",model_name="m"} 4.0
"""


def test_counters_are_read_from_metrics_as_vllm_writes_them() -> None:
    counters = read_counters(METRICS, "vllm:nixl")
    assert (counters.computed_tokens, counters.cached_tokens) == (65, 3)
    assert (counters.moved_tokens, counters.finished) == (2101, 11)
    assert (counters.moved_bytes, counters.transfer_s) == (123_863_040, 0.07527)
    assert counters.failed_transfers == 4
    assert (counters - counters).moved_bytes == 0


def test_other_metrics_are_read_by_name_and_count_as_0_where_they_are_not() -> None:
    name = "vllm:nixl_bytes_transferred_count"
    counters = read_counters(METRICS, "vllm:nixl", [name, "vllm:not_there"])
    assert counters.others == {name: 5, "vllm:not_there": 0}
    nothing = read_counters("", "vllm:nixl", counters.others)
    assert (counters - nothing).others == counters.others


GOOD = HandOverRow(
    name="long",
    alone=False,
    prompts=2,
    prompt_tokens=100,
    moved_tokens=90,
    cached_tokens=10,
    computed_tokens=0,
    moved_mb=4.5,
    gb_per_s=1.5,
    hand_over_ms=50.0,
    failed_transfers=0,
    equal_to_prefill=2,
    equal_to_decode=2,
    answers=["a", "b"],
)
ALONE = replace(GOOD, name="alone", alone=True, moved_tokens=0, moved_mb=0.0, computed_tokens=90)


def test_right_rows_are_right() -> None:
    right, line = verdict([GOOD, ALONE], expected=2)
    assert right
    assert line.startswith("RIGHT: 90 of 100 prompt tokens")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (replace(GOOD, moved_tokens=89, computed_tokens=1), "1 prompt tokens were computed"),
        (replace(GOOD, moved_mb=0.0), "no KV was moved"),
        (replace(GOOD, equal_to_prefill=1), "1 answers differ from prefill's"),
        (replace(GOOD, equal_to_decode=0), "2 answers differ from decode's own"),
        (replace(GOOD, failed_transfers=1), "1 transfers failed"),
        (replace(GOOD, moved_tokens=190), "decode counted 200 prompt tokens, expected 100"),
        (replace(ALONE, moved_mb=0.1), "though the prefill engine was dead"),
        (replace(ALONE, equal_to_prefill=1), "1 answers differ from prefill's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_wrong_row_is_a_failure(row: HandOverRow, fault: str) -> None:
    right, line = verdict([GOOD, row, ALONE], expected=3)
    assert not right
    assert fault in line


def test_the_picture_says_who_sent_what_to_whom() -> None:
    lines = picture([GOOD, ALONE]).splitlines()
    assert lines == [
        f"           prefill {'━' * 30}▶ decode  90 tokens",
        f"decode's own cache {'━' * 7}▶{' ' * 23} decode  20 tokens",
        f"   decode computed {'━' * 30}▶ decode  90 tokens",
    ]
    assert picture([]) == ""


def test_the_proxy_without_options_is_configured_as_without_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[ProxyConfig] = []

    async def serve(config: ProxyConfig, *_: object) -> None:
        served.append(config)

    monkeypatch.setattr("kvconnect.proxy.app.serve", serve)
    done = CliRunner().invoke(main, ["proxy", "--prefill=http://p", "--decode=http://d"])
    assert done.exit_code == 0, done.output
    assert served == [make_config(prefill=["http://p"], decode=["http://d"])]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["proxy"], 2, "kvconnect proxy: Missing option '--prefill'; see `kvconnect proxy --help`"),
        (
            ["proxy", "--prefill=ftp://p", "--decode=http://d"],
            2,
            "kvconnect proxy: Invalid value: --prefill 'ftp://p' is not an http(s) URL with a host"
            "; write http://HOST:PORT",
        ),
        (["doctr"], 2, "kvconnect: No such command 'doctr'"),
        (["config", "explain", "{"], 2, "kvconnect config explain: Invalid value: --config is no"),
        (
            ["inspect", "127.0.0.1"],
            2,
            "kvconnect inspect: Invalid value: '127.0.0.1' is no address",
        ),
        (["inspect", "--metrics", "nothing"], 1, "cannot be read: "),
        (["inspect", "127.0.0.1:9", "--timeout", "0.1"], 1, "did not complete the greeting"),
        (
            ["proxy", "--prefill=http://p", "--decode=http://d", "--ssl-certfile=/nowhere"],
            2,
            "kvconnect proxy: Invalid value: --ssl-certfile: /nowhere cannot be used (",
        ),
        (
            ["proxy", "--prefill=http://p", "--decode=http://d", "--host=203.0.113.7"],
            1,
            "kvconnect proxy cannot listen on 203.0.113.7:8000: ",
        ),
        (["bench", "pd", "--lenght", "3"], 2, "kvconnect bench pd: No such option: --lenght"),
        (["config", "explain", '{"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}'], 0, ""),
        (["config", "explain", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'], 1, ""),
        (["config", "explain", '{"kv_connector": "KVConnectNixl", "kv_role": "both"}'], 2, ""),
    ],
)
def test_an_error_is_one_line_with_the_remedy(
    arguments: list[str], status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """docs/cli.md has the statuses. `inspect` used to log first what it then said."""
    done = CliRunner().invoke(main, arguments)
    assert not caplog.records
    assert done.exit_code == status, done.output
    assert len(done.stderr.splitlines()) == bool(said)
    assert said in done.stderr
    assert not said or "; " in done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvconnect ", {"bench", "config", "demo", "doctor", "inspect", "proxy"}),
        ("kvconnect bench ", {"pd", "transport", "offload"}),
        ("kvconnect proxy --pre", {"--prefill"}),
        ("kvconnect demo --connector mu", {"multi"}),
    ],
)
def test_bash_completes_commands_options_and_values(words: str, offered: set[str]) -> None:
    done = CliRunner().invoke(
        main,
        [],
        prog_name="kvconnect",
        env={
            "_KVCONNECT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        },
    )
    assert offered <= set(done.output.split()), done.output


def test_missing_rows_are_a_failure() -> None:
    assert verdict([], expected=6) == (False, "FAILED: 6 of 6 requests were not made")


def test_table_and_its_caption_fit_80_columns() -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    wide = replace(GOOD, prompt_tokens=20_000, moved_tokens=20_000, moved_mb=12_345.6)
    with console.file:
        console.print(table([replace(wide, name=scene.name) for scene in scenes()]))
        console.print(HandOverRow.caption)
    text = console.export_text()
    assert "…" not in text
    assert all(scene.name in text for scene in scenes())
    shown = re.sub(r"\[/?b\]", "", HandOverRow.caption)
    assert shown in text  # unwrapped


def test_prompts_share_no_block_and_end_with_those_after_the_kill() -> None:
    played = scenes()
    first = [
        p.text[:BLOCK_CHARS] for s in played for p in s.prompts if not s.name.endswith("again")
    ]
    assert len(set(first)) == len(first)
    assert [s.alone for s in played] == sorted(s.alone for s in played)


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch, model: Path) -> Callable[..., Result]:
    """The demo on engines that are not vLLM; ``fault`` is what they do wrong."""

    def command(engine: VllmServe, port: int) -> list[str]:
        assert engine.transfer is not None
        return [sys.executable, str(FAKE_ENGINE), str(port), str(engine.transfer["kv_role"])]

    monkeypatch.setattr(VllmServe, "command", command)
    monkeypatch.setattr(engines, "check_installed", lambda connector: None)

    def play(*options: str, fault: str = "") -> Result:
        monkeypatch.setenv("FAULT", fault)
        return CliRunner().invoke(main, ["demo", "--model", str(model), *options])

    return play


@pytest.mark.slow
def test_demo_exits_0_when_every_row_is_right(
    fake_engines: Callable[..., Result], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    done = fake_engines("--json", str(report), "--keep-logs", str(tmp_path / "logs"))
    assert done.exit_code == 0, done.output
    assert "RIGHT" in done.output
    rows = json.loads(report.read_text())["rows"]
    assert [row["alone"] for row in rows] == [False] * 4 + [True] * 2
    assert [row["computed_tokens"] for row in rows[:4]] == [0] * 4
    logs = {log.name for log in (tmp_path / "logs").iterdir()}
    assert logs == {"prefill-engine.log", "decode-engine.log", "proxy.log"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("computes", "prompt tokens were computed at decode"),
        ("differs", "differ from prefill's"),
        ("refuses", "out of KV"),
        ("crashes", "ended with status 3"),
    ],
)
def test_demo_exits_1_and_says_where_the_logs_are(
    fake_engines: Callable[..., Result], fault: str, seen: str, tmp_path: Path
) -> None:
    done = fake_engines("--keep-logs", str(tmp_path), fault=fault)
    assert done.exit_code == 1, done.output
    unwrapped = done.output.replace("\n", " ")
    assert seen in unwrapped
    assert "logs: " in unwrapped


def test_demo_exits_2_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCONNECT_MODEL", raising=False)
    monkeypatch.setattr(engines, "check_installed", lambda connector: None)
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 2
    assert "make setup" in done.output


@pytest.mark.slow
def test_demo_exits_130_on_ctrl_c(
    fake_engines: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Server] = []

    def interrupt(fleet: Fleet, *_: object) -> None:
        started.extend(fleet.servers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Fleet, "wait_up", interrupt)
    done = fake_engines()
    assert done.exit_code == 130
    assert len(started) == 3
    assert not any(running(server.pid) for server in started)
