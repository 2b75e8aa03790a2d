"""The benchmarks on engines that are not vLLM: who runs when, what is asked, what is written."""

import concurrent.futures
import http.client
import importlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner, Result

from kvconnect.cli import main
from kvconnect.cli.engines import VllmServe
from kvconnect.cli.processes import Fleet
from kvconnect_bench.cpu import machine_cpu_s, spinning, yield_cores
from kvconnect_bench.inter_token import Watched, watch
from kvconnect_bench.inter_token import rows_of as rows_of_tokens
from kvconnect_bench.marks import Mark
from kvconnect_bench.others import (
    ALONE,
    BESIDE,
    IN_TREE,
    IN_TREE_PUSH,
    IN_TREE_QUIET,
    LMCACHE,
    OTHERS,
)
from kvconnect_bench.pair import NO_PROGRESS, Asked, MeasuredPair
from kvconnect_bench.pd_rows import Case, Turn, rows_of
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
    assert {row["throughput"]["unit"] for row in rows} == {"tokens/s"}
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
    measure, decoded = MeasuredPair.pull, MeasuredPair.decoded

    def spied(pair: MeasuredPair, prompt: list[int]) -> Asked:
        servers = pair.servers.items()
        seen.update({role: os.sched_getaffinity(server.pid) for role, server in servers})
        seen["client"] = os.sched_getaffinity(0)
        return measure(pair, prompt)

    def spied_alone(pair: MeasuredPair, prompt: list[int]) -> Asked:
        if pair.name == ALONE:
            seen["alone"] = os.sched_getaffinity(pair.servers["decode"].pid)
        return decoded(pair, prompt)

    monkeypatch.setattr(MeasuredPair, "pull", spied)
    monkeypatch.setattr(MeasuredPair, "decoded", spied_alone)
    before, report = os.sched_getaffinity(0), tmp_path / "report.json"
    options = ("--beside", "alone", "--tokens", "8", "--turns", "2", "--rounds", "1", "--own-cores")
    done = bench("pd", *options, "--json", str(report))
    assert done.exit_code == 0, done.output
    assert seen["prefill"] and seen["decode"] and not seen["prefill"] & seen["decode"]
    assert seen["client"] <= seen["decode"], "or it would slow prefill"
    assert os.sched_getaffinity(0) == before
    assert seen["alone"] == seen["prefill"] | seen["decode"], (
        "else it would compute on half of them"
    )
    told = json.loads(report.read_text())
    assert {role: set(cores) for role, cores in told["machine"]["own_cores"].items()} == {
        role: seen[role] for role in ("prefill", "decode")
    }


def test_a_hand_over_counts_above_the_floor_and_beside_the_pull_of_its_turn() -> None:
    case = Case(256, 1025, 1)
    measured = {
        (case, OURS, "pull"): [Turn(Asked(1.0, 1.04)), Turn(Asked(2.0, 2.06))],
        (case, OURS, "streaming"): [Turn(Asked(1.0, 1.02)), Turn(Asked(1.0, 1.03))],
        (case, OURS, "floor"): [Turn(Asked(0, 0.01)), Turn(Asked(0, 0.02))],
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


def test_a_first_token_is_compared_to_each_pair_that_is_not_ours() -> None:
    case = Case(0, 257, 1)
    measured = {
        (case, OURS, "pull"): [Turn(Asked(1.0, 1.2)), Turn(Asked(1.0, 1.0))],
        (case, "ucx", "pull"): [Turn(Asked(1.0, 8.0))] * 2,
        (case, IN_TREE, "pull"): [Turn(Asked(1.0, 2.0))] * 2,
        (case, IN_TREE, "floor"): [Turn(Asked(0.0, 0.1))] * 2,
        (case, LMCACHE, "stored"): [Turn(Asked(1.0, 4.0))] * 2,
        (case, ALONE, "alone"): [Turn(Asked(0.0, 1.0))] * 2,
        (Case(0, 257, 8), IN_TREE_QUIET, "pull"): [Turn(Asked(1.0, 9.0))] * 2,
    }
    rows = {(row.connector, row.way): row for row in rows_of(measured, seed=1)}
    ratios = rows[OURS, "pull"].first_token_ratios
    assert {name: ratio.p50 for name, ratio in ratios.items()} == pytest.approx(
        {f"{IN_TREE} pull": 0.55, f"{LMCACHE} stored": 0.275, f"{ALONE} alone": 1.1}
    )
    assert list(rows[IN_TREE, "pull"].first_token_ratios) == [f"{LMCACHE} stored", f"{ALONE} alone"]
    assert rows[ALONE, "alone"].first_token_ratios == {}


def test_what_follows_the_first_token_is_told_turn_by_turn() -> None:
    case = Case(0, 257, 8)
    quick = Turn(Asked(1.0, 1.1, [0.01] * 99 + [0.5]), tokens_s=80.0, taken=0.5, others=0.1)
    slow = Turn(Asked(1.0, 1.1, [0.03] * 100), tokens_s=40.0, taken=1.0, others=0.3)
    (row,) = rows_of({(case, OURS, "pull"): [quick, slow]}, seed=1)
    assert row.between_tokens_p50 is not None and row.between_tokens_p99 is not None
    assert row.between_tokens_p50.p50 == pytest.approx(20)
    assert row.between_tokens_p99.p50 == pytest.approx((14.9 + 30) / 2), "one of 100 is beyond"
    assert row.throughput is not None and row.taken is not None
    assert (row.throughput.unit, row.throughput.p50, row.taken.p50) == ("tokens/s", 60.0, 0.75)
    assert row.others is not None and row.others.p50 == pytest.approx(0.2)


def test_cpu_time_of_the_engines_is_told_by_role_and_thread() -> None:
    case = Case(256, 1025, 1)
    first = {"prefill": {"worker mover": 0.1, "worker worker": 1.0}, "decode": {"core core": 0.004}}
    then = {"prefill": {"worker worker": 2.0}, "decode": {"core core": 0.004}}
    measured = {(case, OURS, "pull"): [Turn(Asked(1.0, 1.1), first), Turn(Asked(2.0, 2.1), then)]}
    (row,) = rows_of(measured, seed=1)
    assert row.prefill_cpu is not None and row.decode_cpu is not None
    assert (row.prefill_cpu.p50, row.decode_cpu.p50) == pytest.approx((1.55, 0.004))
    assert row.threads_cpu_s == {"prefill worker worker": 1.5, "prefill worker mover": 0.05}


SPINS = """
import threading, sys, time
def spin():
    while True:
        pass
threading.Thread(target=spin, daemon=True).start()
print(flush=True)
spin()
"""


def test_a_thread_that_spins_beside_a_process_first_one_yields_its_core() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SPINS], stdout=subprocess.PIPE, start_new_session=True
    ) as spins:
        try:
            assert spins.stdout is not None
            spins.stdout.readline()
            (thread,) = spinning(spins.pid, seconds=2.0)
            assert thread != spins.pid, "where vLLM computes"
            yield_cores([thread])
            assert os.sched_getscheduler(thread) == os.SCHED_IDLE
            assert os.sched_getscheduler(spins.pid) == os.SCHED_OTHER
        finally:
            spins.kill()


def test_what_everybody_uses_of_the_machine_is_all_but_idle_and_waiting(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  400 30 200 9000 800 5 6 7 50 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    in_use = 400 + 30 + 200 + 5 + 6 + 7  # of user time, guests' (50) is a part
    assert machine_cpu_s(stat) == in_use / os.sysconf("SC_CLK_TCK")
    assert machine_cpu_s() > time.process_time()


@pytest.mark.slow
@pytest.mark.parametrize(("machine_s", "theirs_s"), [(10.0, 5.5), (1.0, 0.0)])
def test_others_used_what_neither_the_engines_nor_this_process_did(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine_s: float,
    theirs_s: float,
) -> None:
    """By clocks of CPU time that each tell so much more whenever they are looked at."""
    machine, own = itertools.count(0, machine_s), itertools.count(0, 3.0)
    of_each = {"prefill": {"a thread": 0.5}, "decode": {"a thread": 0.25}}
    monkeypatch.setattr(
        importlib.import_module("kvconnect_bench.pd"), "machine_cpu_s", machine.__next__
    )
    monkeypatch.setattr(time, "process_time", own.__next__)
    monkeypatch.setattr(MeasuredPair, "used_since", lambda *_: of_each)
    report = tmp_path / "report.json"
    options = ("--tokens", "8", "--turns", "2", "--rounds", "1", "--concurrency", "2")
    done = bench("pd", *options, "--json", str(report))
    assert done.exit_code == 0, done.output
    row = json.loads(report.read_text())["rows"][0]
    tokens = 2 * 2  # of each answer, in the same time
    expected = row["throughput"]["p50"] * theirs_s / tokens
    assert row["others"]["p50"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_threads_that_are_to_yield_are_looked_for_in_both_engines(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = importlib.import_module("kvconnect_bench.pair")
    monkeypatch.setattr(pair, "SETTLED_S", 0.0)
    monkeypatch.setattr(pair, "LOOK_S", 0.1)
    looked: list[int] = []
    yielded: list[list[int]] = []
    monkeypatch.setattr(pair, "spinning", lambda pid, _: looked.append(pid) or [pid])
    monkeypatch.setattr(pair, "yield_cores", yielded.append)
    options = ("--tokens", "8", "--turns", "2", "--rounds", "1")
    done = bench("pd", "--beside", "in-tree-yielding", *options)
    assert done.exit_code == 0, done.output
    assert len(set(looked)) == 2 and yielded == [[pid] for pid in looked]
    monkeypatch.setattr(pair, "spinning", lambda *_: [])
    done = bench("pd", "--beside", "in-tree-yielding", *options)
    assert "no thread of" in str(done.exception), "a pair in which none spins is in-tree's own"


@pytest.mark.slow
def test_in_tree_without_its_thread_has_a_plugin_and_lmcache_asks_without_params(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = importlib.import_module("kvconnect_bench.pair")
    monkeypatch.setattr(pair, "check_unpacked", lambda: None)
    monkeypatch.setattr(pair, "start_lmcache", lambda _: 4711)
    started: dict[str, tuple[Any, Any]] = {}
    names: dict[int | None, str] = {}  # of engines, by their ports
    told: set[str] = set()  # engines that were told of a transfer
    start = Fleet.start

    def spied(fleet: Fleet, name: str, command: Any, env: Any) -> Any:
        plugins = {path.name for path in fleet.logs.glob("*.dist-info")}
        started[name] = (command.__self__.transfer, plugins)
        assert not plugins or str(fleet.logs) in env["PYTHONPATH"].split(os.pathsep)
        server = start(fleet, name, command, env)
        names[urlsplit(server.url).port] = name
        return server

    request = http.client.HTTPConnection.request

    def seen(
        connection: http.client.HTTPConnection,
        method: str,
        url: str,
        body: Any = None,
        *more: Any,
        **named: Any,
    ) -> None:
        if "kv_transfer_params" in (body or ""):
            told.add(names[connection.port])
        request(connection, method, url, body, *more, **named)

    monkeypatch.setattr(Fleet, "start", spied)
    monkeypatch.setattr(http.client.HTTPConnection, "request", seen)
    report = tmp_path / "report.json"
    options = ("--tokens", "8", "--turns", "2", "--rounds", "1", "--json", str(report))
    done = bench("pd", "--beside", "in-tree-quiet,lmcache", *options)
    assert done.exit_code == 0, done.output
    config, plugins = started[f"{IN_TREE_QUIET} decode"]
    assert config["kv_connector_extra_config"] == {"num_threads": 0}
    assert plugins == {"kvconnect_bench_no_progress-0.dist-info"}
    config, plugins = started[f"{LMCACHE} prefill"]
    assert (config["kv_connector"], config["kv_role"]) == (LMCACHE, "kv_producer")
    assert config["kv_connector_extra_config"]["lmcache.mp.port"] == 4711
    assert not plugins and not started["nixl prefill"][1]
    rows = {(row["connector"], row["way"]): row for row in json.loads(report.read_text())["rows"]}
    assert told == {
        f"{pair} {role}" for pair in (OURS, IN_TREE_QUIET) for role in ("prefill", "decode")
    }
    assert rows[LMCACHE, "stored"]["taken"]["p50"] == 0, "the fake one was told of no transfer"
    assert rows[IN_TREE_QUIET, "pull"]["taken"]["p50"] > 0
    assert f"{LMCACHE} stored" in rows[OURS, "pull"]["first_token_ratios"]


def test_agents_that_in_tree_makes_have_no_progress_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed, utils = ModuleType("vllm.distributed"), ModuleType("nixl_utils")
    monkeypatch.setattr(utils, "nixl_agent_config", dict, raising=False)
    monkeypatch.setattr(distributed, "nixl_utils", utils, raising=False)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    module, name = NO_PROGRESS.split(":")
    getattr(importlib.import_module(module), name).__wrapped__()
    made = utils.nixl_agent_config(num_threads=0)
    assert made == {"num_threads": 0, "enable_prog_thread": False}


def test_what_is_named_beside_is_known_by_rows() -> None:
    assert {*BESIDE.values()} == {*OTHERS}


def test_another_pair_that_there_is_not_is_named(bench: Bench) -> None:
    """It used to be a KeyError of Python's."""
    assert "'nope' is none of in-tree" in bench("pd", "--beside", "nope").stderr


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
    options = ("--prompt", "8", "--prompts", "4", "--every-s", "0.1", "--rounds", "2")
    done = bench("inter-token", *options, "--json", str(report), fault="talks")
    assert done.exit_code == 0, done.output
    rows = json.loads(report.read_text())["rows"]
    assert [row["connector"] for row in rows] == [OURS, IN_TREE, ALONE]
    assert {row["arrived"] for row in rows} == {8}
    assert min(row["gaps"] for row in rows) > 8
    assert {len(row["rounds_p99_ms"]) for row in rows} == {2}
    assert rows[2]["p99_ratio"] == 1


class Talker:
    """An engine alone that answers a token a millisecond; what it is asked, holds that up."""

    name, pushes = ALONE, False

    def __init__(self, prompts: int = 0, tokens: int = 100_000) -> None:
        """``prompts``: as many have to be under way together before any is answered."""
        self._computing = threading.Lock()
        self.barrier = threading.Barrier(max(prompts, 1))
        self._together = bool(prompts)
        self._tokens = tokens
        self._warm = False

    def decoded(self, _: Any) -> Asked:
        if not self._warm:
            self._warm = True
            return Asked(0.0, 0.0)
        if self._together:
            self.barrier.wait(10.0)
            return Asked(0.0, 0.0)
        with self._computing:
            time.sleep(HELD_S)
        return Asked(0.0, HELD_S)

    def tokens_at(self, *_: Any) -> Iterator[float]:
        for _token in range(self._tokens):
            with self._computing:
                time.sleep(0.001)
            yield time.perf_counter()


HELD_S = 0.04
PROMPTS = [[1000] * 16] * 5


def watched(talker: Talker, every_s: float = 0.1) -> Watched:
    return watch(cast(MeasuredPair, talker), PROMPTS, every_s)


@pytest.mark.slow
def test_every_prompt_holds_up_the_answer_of_one_engine() -> None:
    """Of 599 gaps two were: its p99 did not see them, and was better than that of a pair."""
    found = watched(Talker())
    assert len(found.first_tokens_s) >= 3
    assert [max(gaps) >= HELD_S for gaps in found.gaps_s] == [True] * 4
    (row,) = rows_of_tokens({ALONE: [found]}, prompt_tokens=16, every_s=0.1, seed=1)
    assert row.held_up >= 4
    assert row.held_up_percent > 1
    assert row.p99_ms >= 1e3 * HELD_S > row.p50_ms


@pytest.mark.slow
def test_a_prompt_arrives_whether_the_one_before_was_answered_or_not() -> None:
    """One that waited for its turn made a slow engine's load a lighter one."""
    found = watched(Talker(prompts=4), 0.2)
    assert len(found.first_tokens_s) == 4


@pytest.mark.slow
def test_prompts_that_an_engine_cannot_serve_do_not_prolong_a_round() -> None:
    """A pair that takes twice the time between two of them would have taken twice the time."""
    talker = Talker(prompts=5)  # only four arrive: none is ever answered
    assert watched(talker, 0.05).first_tokens_s == []
    talker.barrier.abort()


@pytest.mark.slow
def test_an_answer_that_ends_too_early_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match=r"ended 0\.\d s before .* fewer prompts"):
        watched(Talker(tokens=5), 0.05)


def test_what_prompts_hold_up_is_counted_and_compared() -> None:
    def gaps(longest_s: float) -> Watched:
        return Watched([[0.01] * 9 + [longest_s]] * 10, [0.5] * 10)

    watched = {OURS: [gaps(0.015)], ALONE: [gaps(0.5), gaps(1.0)]}
    ours, alone = rows_of_tokens(watched, prompt_tokens=16, every_s=0.1, seed=1)
    assert (ours.held_up, ours.gaps, ours.arrived) == (0, 100, 10)
    assert (alone.held_up, alone.gaps, alone.arrived) == (20, 200, 20)
    assert alone.held_up_percent == 10
    assert alone.rounds_p99_ms == [500, 1000]
    assert (alone.p99_ms, alone.longest_ms, alone.p99_ratio) == (1000, 1000, 1)
    assert ours.p99_ratio == pytest.approx(0.015)
    assert ours.again_ratio == alone.again_ratio == 1
    (ours,) = rows_of_tokens({OURS: [gaps(0.015)]}, prompt_tokens=16, every_s=0.1, seed=1)
    assert ours.p99_ratio is None


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
