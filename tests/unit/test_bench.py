"""The benchmarks on engines that are not vLLM: who runs when, what is asked, what is written."""

import importlib
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvconnect.cli import main
from kvconnect.cli.bench.pair import IN_TREE, Pair
from kvconnect.cli.engines import Engine

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
OURS = "KVConnectNixl"
Bench = Callable[..., Result]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def up_at_start(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every engine that was started, how many earlier ones listened then."""
    ports: list[int] = []
    counts: list[int] = []

    def command(engine: Engine, port: int) -> list[str]:
        assert engine.transfer is not None
        counts.append(sum(listens(earlier) for earlier in ports))
        ports.append(port)
        return [sys.executable, str(FAKE_ENGINE), str(port), str(engine.transfer["kv_role"])]

    monkeypatch.setattr(Engine, "command", command)
    return counts


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, up_at_start: list[int]) -> Bench:
    (tmp_path / "config.json").write_text("{}")
    # by import_module, since the package's own pd and idle are the commands
    pd, idle = (importlib.import_module(f"kvconnect.cli.bench.{name}") for name in ("pd", "idle"))
    for module in (pd, idle):
        monkeypatch.setattr(module, "check_installed", lambda connector: None)
    monkeypatch.setattr(idle, "SETTLE_S", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where logs go

    def run(name: str, *options: str, fault: str = "") -> Result:
        monkeypatch.setenv("FAULT", fault)
        return CliRunner().invoke(main, ["bench", name, "--model", str(tmp_path), *options])

    return run


@pytest.mark.slow
def test_pairs_of_pd_run_one_after_the_other_on_the_same_prompts(
    bench: Bench, tmp_path: Path, up_at_start: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[list[int]]] = {OURS: [], IN_TREE: []}
    first_token_s = Pair.first_token_s

    def spied(pair: Pair, prompt: list[int]) -> float:
        asked[pair.name].append(prompt)
        return first_token_s(pair, prompt)

    monkeypatch.setattr(Pair, "first_token_s", spied)
    report = tmp_path / "report.json"
    done = bench("pd", "--lengths", "8,16", "--prompts", "3", "--json", str(report))
    assert done.exit_code == 0, done.output
    assert len(up_at_start) == 4
    assert up_at_start[2] == 0, "the first pair still ran when the second was started"
    assert asked[OURS] == asked[IN_TREE]
    assert [len(prompt) for prompt in asked[OURS]] == [8] * 4 + [16] * 4
    rows = json.loads(report.read_text())["rows"]
    shown = [(row["connector"], row["prompt_tokens"], row["prompts"]) for row in rows]
    assert shown == [(OURS, 8, 3), (IN_TREE, 8, 3), (OURS, 16, 3), (IN_TREE, 16, 3)]
    assert [row["ratio_p50"] for row in rows[1::2]] == [1.0, 1.0]


@pytest.mark.slow
def test_idle_watches_every_engine_of_one_pair_after_the_other(
    bench: Bench, tmp_path: Path, up_at_start: list[int]
) -> None:
    report = tmp_path / "report.json"
    done = bench("idle", "--seconds", "0.2", "--json", str(report))
    assert done.exit_code == 0, done.output
    assert up_at_start[2] == 0, "the first pair still ran when the second was started"
    rows = json.loads(report.read_text())["rows"]
    expected = [(name, role) for name in (OURS, IN_TREE) for role in ("prefill", "decode")]
    assert [(row["connector"], row["role"]) for row in rows] == expected


@pytest.mark.slow
def test_engine_that_refuses_ends_the_benchmark_and_leaves_its_logs(bench: Bench) -> None:
    """A benchmark used to fail with an engine's 500 and take the logs with it."""
    done = bench("pd", "--lengths", "8", "--prompts", "2", fault="refuses")
    assert done.exit_code == 1
    assert "out of KV" in str(done.exception)
    named = re.search(rf"{OURS} failed; its engines' logs: (\S+)", done.output)
    assert named
    assert {log.name for log in Path(named[1]).iterdir()} == {
        f"{OURS}-prefill.log",
        f"{OURS}-decode.log",
    }
