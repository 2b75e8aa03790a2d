"""bench offload: what needs no engine is measured small; engines are fakes that count."""

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvconnect.cli import main

offload_tiers = importlib.import_module("kvconnect_bench.offload_tiers")
offload_eviction = importlib.import_module("kvconnect_bench.offload_eviction")
offload_engines = importlib.import_module("kvconnect_bench.offload_engines")


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
    """Counts what is asked of it; ``loads``: whether its counter moves as it should."""

    pid, url, name = 0, "http://engine", "engine"

    def __init__(self, loads: bool) -> None:
        self.loads, self.asked, self.counts = loads, [], {}


@pytest.mark.parametrize("loads", [True, False])
def test_a_hit_that_was_none_is_no_figure(tmp_path, monkeypatch, loads):
    """A time to first token counts only if the engine says that it loaded the prompt."""
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8})
    )
    engine, counted = Engine(loads), iter(range(0, 1 << 20, 128 if loads else 1))
    monkeypatch.setattr(offload_engines, "start_engine", lambda *_: engine)
    monkeypatch.setattr(offload_engines, "empty_prefix_cache", lambda _: None)
    monkeypatch.setattr(offload_engines, "counted", lambda *_: next(counted))
    monkeypatch.setattr(offload_engines, "SETTLED_S", 0.0)
    seconds = iter([1.0] + [2.0, 0.5] * 50)
    monkeypatch.setattr(offload_engines, "first_token_s", lambda *_: next(seconds))
    if not loads:
        with pytest.raises(RuntimeError, match="tokens_from_host"):
            offload_engines.hits(tmp_path, [200], 3, tmp_path)
        return
    rows = offload_engines.hits(tmp_path, [200], 3, tmp_path)
    assert [row.source for row in rows] == ["recompute", "memory", "disk"]


def test_throughput_is_compared_round_by_round(tmp_path, monkeypatch):
    """Rounds in which the whole machine is slow do not change the ratio."""
    names = iter(["on", "off"])
    runs = []

    def start(_fleet, name, *_):
        engine = Engine(True)
        engine.name = next(names)
        assert engine.name == name
        return engine

    def load_once(engine, _model, _requests, _tokens, turn):
        runs.append((turn, engine.name))
        rate = 100.0 / (1 + turn)
        return (rate * 0.9, 11.0) if engine.name == "on" else (rate, 10.0)

    monkeypatch.setattr(offload_engines, "start_engine", start)
    monkeypatch.setattr(offload_engines, "load_once", load_once)
    monkeypatch.setattr(offload_engines, "counted", lambda _, name: 5e6 * ("store" in name))
    found = offload_engines.cost(tmp_path, 3, 8, (512, 32), together=False)
    assert (found.throughput_ratio, found.cpu_ratio, found.stored_mb) == (0.9, 1.1, 5.0)
    assert (found.throughput_low, found.throughput_high) == (0.9, 0.9)
    assert found.off_spread > 0
    assert [name for _, name in runs] == ["off", "on", "on", "off"] * 2
    monkeypatch.setattr(offload_engines, "counted", lambda *_: 1.0)
    names = iter(["on", "off"])
    with pytest.raises(RuntimeError, match="expected none"):
        offload_engines.cost(tmp_path, 1, 8, (512, 32), together=False)
