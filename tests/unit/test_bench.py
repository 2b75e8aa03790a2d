"""The benchmarks on engines that are not vLLM: who runs when, what is asked, what is written."""

import concurrent.futures
import importlib
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvconnect.cli import main
from kvconnect.cli.engines import VllmServe
from kvconnect_bench.marks import Mark
from kvconnect_bench.pair import ALONE, IN_TREE, IN_TREE_PUSH, Asked, MeasuredPair
from kvconnect_bench.pd import Case, rows_of
from kvconnect_bench.trace import rows_of as trace_rows

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
        counts.append(sum(listens(earlier) for earlier in ports))
        ports.append(port)
        role = str(engine.transfer["kv_role"]) if engine.transfer else "kv_consumer"
        return [sys.executable, str(FAKE_ENGINE), str(port), role]

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
    asked: list[tuple[str, str, list[int]]] = []

    def spy(way: str) -> None:
        measure = getattr(MeasuredPair, way)

        def spied(pair: MeasuredPair, prompt: list[int]) -> Asked:
            asked.append((pair.name, way, prompt))
            found = measure(pair, prompt)
            assert isinstance(found, Asked)
            return found

        monkeypatch.setattr(MeasuredPair, way, spied)

    for way in ("pull", "streaming", "decoded"):
        spy(way)
    report = tmp_path / "report.json"
    options = ("--connector", "nixl,ucx", "--tokens", "8,200", "--turns", "2", "--rounds", "2")
    done = bench("pd", *options, "--json", str(report))
    assert done.exit_code == 0, done.output
    assert len(up_at_start) == 2 * (3 * 2 + 1)
    pairs = [up_at_start[n] for n in (0, 2, 4, 6, 7, 8, 10, 12)]
    assert max(pairs) == 0, "a pair still ran when the next was started"
    names = ["nixl", "ucx", IN_TREE, ALONE]
    order = [name for name, _ in itertools.groupby(name for name, *_ in asked)]
    assert order == [*names, *names[-2::-1]], "who is last in a round is the first in the next"
    of = {
        name: [prompt for by, way, prompt in asked if (by, way) == (name, "pull")] for name in names
    }
    alone = [prompt for by, _, prompt in asked if by == ALONE]
    assert of["nixl"] == of["ucx"] == of[IN_TREE]
    once = [
        pulls[turn % 3 % 2] for turn, pulls in enumerate(zip(*[iter(of["nixl"])] * 2, strict=True))
    ]
    assert once == alone, "in every other of the three turns of a case the first comes last"
    assert [len(prompt) for prompt in alone] == 2 * ([129] * 3 + [257] * 3)
    assert (
        len({tuple(prompt) for by, way, prompt in asked if by == "nixl" and way != "decoded"}) == 36
    )
    first = [way for by, way, _ in asked if by == "nixl"][:10]
    again = ["pull", "decoded", "decoded"]  # what is done twice in each turn
    assert first == ["pull", "streaming", *again, "pull", "streaming", *again]
    report_of = json.loads(report.read_text())
    assert report_of["machine"]["cores"]
    rows = report_of["rows"]
    assert len(rows) == 2 * (3 * 5 + 1)
    assert {(row["turns"], row["seed"]) for row in rows} == {(4, 1)}
    streamed = next(row for row in rows if row["way"] == "streaming")
    assert (streamed["compared_to"], streamed["hand_over_ratio"]["unit"]) == ("nixl pull", "ratio")


@pytest.mark.slow
def test_a_run_of_pd_that_is_out_of_time_ends_after_a_round_and_keeps_its_rows(
    bench: Bench, tmp_path: Path, up_at_start: list[int]
) -> None:
    report = tmp_path / "report.json"
    options = ("--beside", "in-tree-push", "--tokens", "8", "--turns", "2", "--rounds", "9")
    done = bench("pd", *options, "--minutes", "0.001", "--json", str(report))
    assert done.exit_code == 0, done.output
    assert len(up_at_start) == 2 * 2, "one round of two pairs"
    found = json.loads(report.read_text())
    assert found["machine"]["rounds"] == 1
    ways = {(row["connector"], row["way"]) for row in found["rows"]}
    assert (IN_TREE_PUSH, "push") in ways and ("nixl", "pull again") in ways


@pytest.mark.slow
def test_with_own_cores_prefill_runs_where_neither_decode_nor_the_client_does(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    seen: dict[str, set[int]] = {}
    measure = MeasuredPair.pull

    def spied(pair: MeasuredPair, prompt: list[int]) -> Asked:
        servers = pair.servers.items()
        seen.update({role: os.sched_getaffinity(server.pid) for role, server in servers})
        seen["client"] = os.sched_getaffinity(0)
        return measure(pair, prompt)

    monkeypatch.setattr(MeasuredPair, "pull", spied)
    before, report = os.sched_getaffinity(0), tmp_path / "report.json"
    options = ("--beside", "", "--tokens", "8", "--turns", "2", "--rounds", "1", "--own-cores")
    done = bench("pd", *options, "--json", str(report))
    assert done.exit_code == 0, done.output
    assert seen["prefill"] and seen["decode"] and not seen["prefill"] & seen["decode"]
    assert seen["client"] <= seen["decode"], "or it would slow prefill"
    assert os.sched_getaffinity(0) == before
    told = json.loads(report.read_text())
    assert {role: set(cores) for role, cores in told["machine"]["own_cores"].items()} == {
        role: seen[role] for role in ("prefill", "decode")
    }


def test_a_hand_over_counts_above_the_floor_and_beside_the_pull_of_its_turn() -> None:
    case = Case(256, 1025, 1)
    measured = {
        (case, OURS, "pull"): [Asked(1.0, 1.04), Asked(2.0, 2.06)],
        (case, OURS, "streaming"): [Asked(1.0, 1.02), Asked(1.0, 1.03)],
        (case, OURS, "floor"): [Asked(0, 0.01), Asked(0, 0.02)],
    }
    pull, streaming, floor = rows_of(measured, seed=1)
    assert pull.above_floor is not None
    assert pull.above_floor.p50 == pytest.approx(35)  # of 30 and 40
    assert pull.compared_to == ""
    assert streaming.hand_over_ratio is not None
    assert streaming.hand_over_ratio.p50 == pytest.approx(0.5)
    assert streaming.above_floor_ratio is not None
    assert streaming.above_floor_ratio.p50 == pytest.approx((10 / 30 + 10 / 40) / 2, abs=1e-3)
    assert streaming.prefill_ratio is not None
    assert streaming.prefill_ratio.p50 == pytest.approx(0.75)
    assert floor.above_floor is None


def test_cpu_time_of_the_engines_is_told_by_role_and_thread() -> None:
    case = Case(256, 1025, 1)
    first = {"prefill": {"worker mover": 0.1, "worker worker": 1.0}, "decode": {"core core": 0.004}}
    then = {"prefill": {"worker worker": 2.0}, "decode": {"core core": 0.004}}
    measured = {(case, OURS, "pull"): [Asked(1.0, 1.1, first), Asked(2.0, 2.1, then)]}
    (row,) = rows_of(measured, seed=1)
    assert row.prefill_cpu is not None and row.decode_cpu is not None
    assert (row.prefill_cpu.p50, row.decode_cpu.p50) == pytest.approx((1.55, 0.004))
    assert row.threads_cpu_s == {"prefill worker worker": 1.5, "prefill worker mover": 0.05}


class LateThreads(concurrent.futures.ThreadPoolExecutor):
    """As on a busy machine."""

    def submit(self, work: Callable[..., Any], *given: Any, **more: Any) -> Any:  # type: ignore[override]
        def late() -> Any:
            time.sleep(0.1)
            return work(*given, **more)

        return super().submit(late)


@pytest.mark.slow
def test_a_trace_names_what_happened_after_prefill_in_each_way(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the thread begins that asks prefill, while decode is asked."""
    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", LateThreads)
    report = tmp_path / "report.json"
    options = ["--tokens", "8", "--turns", "2", "--since-ms", "-60000", "--json", str(report)]
    done = bench("trace", *options)
    assert done.exit_code == 0, done.output
    rows = json.loads(report.read_text())["rows"]
    found = {(row["way"], row["engine"], row["what"]): row for row in rows}
    for way in ("pull", "streaming"):
        assert found[way, "prefill", "step ended"]["after_prefill"]["p50"] == 0
        assert found[way, "client", "has the first token"]["hand_overs"] == 2
    assert ("pull", "decode", "step ended") in found


def test_rows_of_a_trace_are_in_the_order_of_their_times_and_of_the_last_time() -> None:
    ended, sent = ("prefill", "step ended"), ("prefill", "Opened sent")
    found = [
        Mark(at_s, *what)
        for start in (10, 20)
        for at_s, what in ((start, ended), (start + 2, ended), (start + 3, sent), (start + 9, sent))
    ]
    rows = trace_rows(
        "pull", 129, 64, found, [(10.0, 14.0, Asked(2.5, 4.0)), (20.0, 24.0, Asked(2.5, 4.0))]
    )
    shown = [(row.what, row.after_prefill and row.after_prefill.p50) for row in rows]
    assert shown == [
        ("step ended", 0),
        ("has prefill's answer", 500),
        ("Opened sent", 1000),
        ("has the first token", 2000),
    ]
    assert [row.interval_ms for row in rows] == [0, 500, 500, 1000]


@pytest.mark.slow
def test_tokens_of_one_answer_are_timed_while_prompts_arrive(bench: Bench, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--prompt", "8", "--tokens", "200", "--every-s", "0.001", "--rounds", "1")
    done = bench("inter-token", *options, "--json", str(report), fault="talks")
    assert done.exit_code == 0, done.output
    rows = json.loads(report.read_text())["rows"]
    assert [row["connector"] for row in rows] == [OURS, IN_TREE, ALONE]
    assert [row["tokens"] for row in rows] == [199, 199, 199]
    assert rows[2]["p99_ratio"] == 1
    assert min(row["arrived"] for row in rows) > 0


def test_one_hand_over_is_traced_of_one_connector(bench: Bench) -> None:
    """Two used to be a ValueError of Python's."""
    assert "run it for each" in bench("trace", "--connector", "nixl,ucx").stderr


def test_a_connector_there_is_not_is_named(bench: Bench) -> None:
    done = bench("pd", "--connector", "nixl,nope")
    assert done.exit_code == 2
    assert "'nope' is none of" in done.stderr


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
    done = bench("pd", "--tokens", "8", "--turns", "2", fault="refuses")
    assert done.exit_code == 1
    assert "out of KV" in str(done.exception)
    named = re.search(rf"{OURS} failed; its engines' logs: (\S+)", done.output)
    assert named
    assert {log.name for log in Path(named[1]).iterdir()} == {
        f"{OURS}-prefill.log",
        f"{OURS}-decode.log",
    }
