"""bench offload: what needs no engine is measured small; engines are fakes that count."""

import importlib
import io
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvconnect.cli import main
from kvconnect_bench.cost_plan import CostPlan, CostTurn, CostTurns, State

offload_tiers = importlib.import_module("kvconnect_bench.offload_tiers")
offload_eviction = importlib.import_module("kvconnect_bench.offload_eviction")
offload_engines = importlib.import_module("kvconnect_bench.offload_engines")
offload_cost = importlib.import_module("kvconnect_bench.offload_cost")
counters = importlib.import_module("kvconnect_bench.counters")


def bench(*options: str) -> str:
    done = CliRunner().invoke(main, ["bench", "offload", *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_tiers_move_everything_beside_plain_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(offload_tiers, "HEADERS", 50)
    report = tmp_path / "report.json"
    small = ("--mb", "4", "--rounds", "2", "--folder", str(tmp_path))
    bench("--parts", "tiers,restarts", *small, "--json", str(report))
    rows = json.loads(report.read_text())["rows"]
    moved = [row["row"] for row in rows if row["part"] == "tiers"]
    assert {row["mb"] for row in moved} == {4}
    assert all(0 < row["rate"]["p25"] <= row["rate"]["p50"] for row in moved)
    assert {row["rate"]["unit"] for row in moved} == {"GB/s"}
    assert sum(row["operation"] == row["beside"] for row in moved) == 3
    assert {row["operation"] for row in moved if row["cpu_ratio"]} == {
        *("memcpy", "memcpy again", "save: blocks to memory", "load: memory to blocks")
    }
    assert "memcpy again" in {row["operation"] for row in moved}
    found = [row["row"] for row in rows if row["part"] == "restarts"]
    assert [row["slots"] for row in found] == [50, 50]
    assert list(tmp_path.iterdir()) == [report], "something was left in the folder"


def test_no_policy_is_better_than_who_knows_the_future(tmp_path, monkeypatch):
    monkeypatch.setattr(offload_eviction, "KEYS", 200)
    monkeypatch.setattr(offload_eviction, "ACCESSES", 2000)
    monkeypatch.setattr(offload_eviction, "CAPACITIES", (20,))
    report = tmp_path / "report.json"
    bench("--parts", "eviction", "--json", str(report))
    rows = [row["row"] for row in json.loads(report.read_text())["rows"]]
    assert {row["policy"] for row in rows} == {"lru", "arc"}
    assert len(rows) == 8
    assert all(0 < row["hit_rate"] <= row["best_hit_rate"] for row in rows)


def test_unknown_parts_are_refused():
    done = CliRunner().invoke(main, ["bench", "offload", "--parts", "tiers,tires"])
    assert done.exit_code == 2
    assert "tires" in done.output


def test_memory_for_hits_is_that_of_the_model_s_kv(tmp_path: Path):
    config = {"num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    assert offload_engines.kv_bytes(tmp_path, 300) == 30 * 2 * 3 * 64 * 2 * 256


class Engine:
    """One that nobody started."""

    url = "http://engine"

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize("lmcache", [True, False])
def test_a_hit_that_was_none_is_no_figure(tmp_path, monkeypatch, loads, lmcache):
    """A time to first token counts only if the engine says that it loaded the prompt."""
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8})
    )
    counted = iter(range(0, 1 << 20, 128 if loads else 1))
    monkeypatch.setattr(offload_engines, "start_engine", lambda _fleet, name, *_: Engine(name))
    monkeypatch.setattr(offload_engines, "start_lmcache", lambda _: 1)
    monkeypatch.setattr(offload_engines, "empty_prefix_cache", lambda _: None)
    monkeypatch.setattr(offload_engines, "counted", lambda *_: next(counted))
    monkeypatch.setattr(offload_engines, "SETTLED_S", 0.0)
    monkeypatch.setattr(offload_engines, "first_token_s", lambda *_: 1.0)
    if not loads:
        with pytest.raises(RuntimeError, match="tokens_from_host"):
            offload_engines.hits(tmp_path, [200], 3, tmp_path, lmcache)
        return
    rows = offload_engines.hits(tmp_path, [200], 3, tmp_path, lmcache)
    sources = ["recompute", "device", "memory", "disk"] + ["LMCache, memory"] * lmcache
    assert [row.source for row in rows] == sources


def test_a_counter_is_read_with_its_label(monkeypatch):
    text = b"""# HELP one x
one_total{engine="0",source="a"} 3.0
one_total{engine="0",source="b"} 4.0
"""
    monkeypatch.setattr(counters.urllib.request, "urlopen", lambda _: io.BytesIO(text))
    for name, expected in (("one_total", 7), ('one_total{source="b"}', 4), ("one", 0), ("", 0)):
        assert counters.counted(Engine("on"), name) == expected


def measured(rounds: int = 9, hits: float = 0.0) -> CostTurns:
    """Each round slower than the one before, in all states; offloading takes more."""

    def turn(state: State, slow: int) -> CostTurn:
        offloads = state in (State.OFFLOADS, State.COUNTED)
        calls_s = 0.02 * slow * (state == State.COUNTED)
        cpu_s = slow * {State.OFFLOADS: 1.1, State.COUNTED: 1.2}.get(state, 1.0)
        return CostTurn(state, 2.0 * slow, cpu_s, calls_s, 0.08 * offloads)

    states = list(State)
    found = [
        [turn(state, 1 + n) for state in states[n % 5 :] + states[: n % 5]] for n in range(rounds)
    ]
    return CostTurns(found, hits, 5e6)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """What the engine is told; it says what ``measured`` does."""
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": 576})
    )
    told: list[CostPlan] = []

    def run(plan):
        told.append(plan)
        return measured(plan.rounds)

    monkeypatch.setattr(offload_cost, "run", run)
    return told


def test_cost_is_compared_round_by_round_in_one_engine(engine, tmp_path):
    """Rounds in which the whole machine is slow do not change the ratio; both turns count."""
    rows = offload_cost.cost(tmp_path, 9, 2)
    on, again, connector, calls, threads, both = rows
    assert (on.connector, on.beside) == ("offloading", "a connector that does nothing")
    assert (again.connector, again.beside) == (on.beside + ", again", on.beside)
    assert (connector.connector, connector.beside) == (on.beside, "no connector")
    assert {(row.rounds, row.stored_mb) for row in rows} == {(9, 5.0)}
    assert (on.cpu_low, on.cpu.p50, on.cpu_high) == pytest.approx((1.15, 1.15, 1.15))
    assert on.cpu_ms == pytest.approx(5750)
    assert on.seconds.p50 == again.cpu.p50 == connector.cpu.p50 == 1
    assert calls.cpu.p50 == pytest.approx(0.02 / 1.2, abs=1e-4)
    assert threads.cpu.p50 == pytest.approx(0.08 / 6, abs=1e-4), "that of the fifth of nine"
    assert both.cpu.p50 == pytest.approx(0.02 / 1.2 + 0.08 / 6, abs=1e-4)
    assert threads.seconds is None


def test_memory_is_filled_after_a_few_turns_of_any_model(engine, tmp_path):
    """A small model's KV would not have filled what suits a large one: it never began to evict."""
    offload_cost.cost(tmp_path, 6, 2)
    turn = 2 * offload_engines.kv_bytes(tmp_path, offload_cost.INPUT_TOKENS)
    assert engine[0].memory_bytes == offload_cost.TURNS_KEPT * turn


def test_a_load_is_no_cost_at_no_hits(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(offload_cost, "run", lambda plan: measured(plan.rounds, hits=128.0))
    with pytest.raises(RuntimeError, match="128 tokens were loaded, expected none"):
        offload_cost.cost(tmp_path, 6, 2)


@pytest.mark.slow
def test_an_engine_that_ends_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(offload_cost, "ENGINE", "kvconnect_bench.there_is_none")
    plan = CostPlan("model", 6, 2, 256, 16, 1 << 20, str(tmp_path / "out"))
    with pytest.raises(offload_cost.EngineFailedError, match="No module named"):
        offload_cost.run(plan)


@pytest.mark.slow
def test_what_the_engine_measured_arrives_as_it_was(monkeypatch, tmp_path):
    """Its process writes JSON, which knows no states."""
    module, out = tmp_path / "says.py", tmp_path / "out.json"
    module.write_text(f"open({str(out)!r}, 'w').write({json.dumps(asdict(measured(2)))!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(offload_cost, "ENGINE", "says")
    assert offload_cost.run(CostPlan("model", 2, 2, 256, 16, 1 << 20, str(out))) == measured(2)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    rng, inside = random.Random(1), 0
    for _ in range(400):
        low, high = offload_cost.median_within([rng.gauss(1.0, 0.05) for _ in range(30)])
        inside += low <= 1.0 <= high
    assert 0.92 < inside / 400 < 0.99


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (11, 2, 10), (12, 3, 10), (14, 3, 12), (20, 6, 15)],
)
def test_the_interval_of_few_values_is_that_of_tables(values, first, last):
    """Of 8, 11 and 14 it was one narrower on both sides: 93 and 94 %."""
    assert offload_cost.median_within(range(1, values + 1)) == (first, last)


@pytest.mark.parametrize(("option", "too_few"), [("--cost-rounds", "5"), ("--prompts", "2")])
def test_too_few_for_an_interval_or_a_quantile_are_refused(monkeypatch, option, too_few):
    for module, part in ((offload_cost, "cost"), (offload_engines, "hits")):
        monkeypatch.setattr(module, part, lambda *_: pytest.fail("they were not"))
    done = CliRunner().invoke(main, ["bench", "offload", "--parts", "hits,cost", option, too_few])
    assert done.exit_code == 2 and option in done.output
