"""The benchmarks on engines that are not vLLM: who runs when, what is asked, what is written."""

import importlib
import itertools
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvconnect.cli import main
from kvconnect.cli.engines import VllmServe
from kvconnect_bench.pair import IN_TREE, MeasuredPair

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")
OURS = "nixl"
Bench = Callable[..., Result]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def up_at_start(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every engine that was started, how many earlier ones listened then."""
    ports: list[int] = []
    counts: list[int] = []

    def command(engine: VllmServe, port: int) -> list[str]:
        assert engine.transfer is not None
        counts.append(sum(listens(earlier) for earlier in ports))
        ports.append(port)
        return [sys.executable, str(FAKE_ENGINE), str(port), str(engine.transfer["kv_role"])]

    monkeypatch.setattr(VllmServe, "command", command)
    return counts


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, up_at_start: list[int]) -> Bench:
    (tmp_path / "config.json").write_text("{}")
    # by import_module, since the package's own idle is the command
    idle, pair = (importlib.import_module(f"kvconnect_bench.{n}") for n in ("idle", "pair"))
    monkeypatch.setattr(pair, "check_installed", lambda connector: None)
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
    asked: list[tuple[str, list[int]]] = []
    first_token_s = MeasuredPair.first_token_s

    def spied(pair: MeasuredPair, prompt: list[int]) -> float:
        asked.append((pair.name, prompt))
        return first_token_s(pair, prompt)

    monkeypatch.setattr(MeasuredPair, "first_token_s", spied)
    report = tmp_path / "report.json"
    options = ("--connector", "nixl,ucx", "--lengths", "8,16", "--prompts", "2", "--rounds", "2")
    done = bench("pd", *options, "--json", str(report))
    assert done.exit_code == 0, done.output
    assert len(up_at_start) == 12
    assert max(up_at_start[::2]) == 0, "a pair still ran when the next was started"
    names = ["nixl", "ucx", IN_TREE]
    order = [name for name, _ in itertools.groupby(name for name, _ in asked)]
    assert order == [*names, *names[-2::-1]], "who is last in a round is the first in the next"
    prompts = {name: [prompt for asked_of, prompt in asked if asked_of == name] for name in names}
    assert prompts["nixl"] == prompts["ucx"] == prompts[IN_TREE]
    assert [len(prompt) for prompt in prompts["nixl"]] == 2 * ([8] * 3 + [16] * 3)
    assert prompts["nixl"][0] != prompts["nixl"][6], "else the second round is a cache hit"
    rows = json.loads(report.read_text())["rows"]
    shown = [(row["connector"], row["prompt_tokens"], row["prompts"]) for row in rows]
    assert shown == [(name, length, 4) for length in (8, 16) for name in names]
    assert [row["ratio_p50"] for row in rows[2::3]] == [1.0, 1.0]
    assert all(len(row["rounds_p50_ms"]) == 2 for row in rows)


def test_a_connector_there_is_not_is_named(bench: Bench) -> None:
    done = bench("pd", "--connector", "nixl,nope")
    assert done.exit_code == 1
    assert "'nope' is none of" in f"{done.output} {done.exception}"


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
