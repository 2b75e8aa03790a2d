"""The benchmarks' page, which a real browser opens, and what `bench all` makes of faults."""

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvconnect.cli import main
from kvconnect_bench import bench as commands
from kvconnect_bench.plots import CHARTS

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*.json"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
whole = importlib.import_module("kvconnect_bench.all")


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH: apt-get install chromium")
def test_a_browser_opens_the_page_of_all_results_and_shows_every_plot_and_row(tmp_path):
    page = tmp_path / "page.html"
    done = run("report", *RESULTS, "--out", page)
    assert done.exit_code == 0, done.output
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.search(r"<body[^>]*>", shown)[0]
    figures = page.read_text().count("<figure>")
    assert f'data-drawn="{figures}"' in body and figures >= len(RESULTS) - 1, body
    rows = sum(len(json.loads(path.read_text())["rows"]) for path in RESULTS)
    assert f'data-rows="{rows}"' in body
    assert all(f'id="{path.stem}"' in shown for path in RESULTS)


def test_every_benchmark_has_a_plot_and_is_one_of_all():
    named = {one.name or one.callback.__name__ for one in commands.registered_commands}
    assert named - {"all", "report"} == set(CHARTS) == {part.name for part in whole.PARTS}


def test_what_is_no_result_is_named(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"of": "something else"}')
    done = run("report", other, "--out", tmp_path / "page.html")
    assert done.exit_code != 0
    assert other.name in "".join(f"{done.output} {done.exception}".split())


def test_what_a_file_says_is_text_and_no_markup(tmp_path):
    result = tmp_path / "idle.json"
    result.write_text(json.dumps({"rows": [{"connector": "<script>alert(1)</script>"}]}))
    run("report", result, "--out", tmp_path / "page.html")
    assert "<script>alert" not in (tmp_path / "page.html").read_text()


def test_all_measures_the_others_where_one_fails_and_says_so(tmp_path, monkeypatch):
    def fake(name, given, quick):
        if name == "scale":
            return "no <memory>"
        path = Path(given[given.index("--json") + 1])
        path.write_text(json.dumps({"benchmark": name, "rows": []}))
        return ""

    monkeypatch.setattr(whole, "_run", fake)
    done = run("all", "--quick", "--folder", tmp_path)
    assert done.exit_code == 1
    page = (tmp_path / "report.html").read_text()
    assert "scale: no &lt;memory&gt;" in page
    sections = set(re.findall('<section id="([^"]*)"', page))
    assert sections == {part.name for part in whole.PARTS} - {"scale"}


@pytest.mark.slow
def test_what_a_request_and_a_step_cost_is_measured_without_engines(tmp_path, monkeypatch):
    connector = importlib.import_module("kvconnect_bench.connector")
    monkeypatch.setattr(connector, "IMPORTS", ("kvconnect",))
    out = tmp_path / "connector.json"
    small = ("--transfers", "2", "--leases", "2", "--peers", "1", "--tokens", "1024")
    done = run("connector", *small, "--spans", "64,640", "--rounds", "2", "--json", out)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert {row["of"] for row in rows} >= {"transfers", "leases", "peers", "tokens", "spans"}
    assert all(row["value"]["p50"] > 0 and row["value"]["unit"] for row in rows)


@pytest.mark.slow
def test_a_peer_sends_as_much_whatever_the_number_of_peers_and_nothing_at_rest(tmp_path):
    out = tmp_path / "scale.json"
    done = run("scale", "--peers", "1,3", "--rounds", "2", "--json", out)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    frames = [row for row in rows if row["name"].startswith("frames of greeting")]
    assert len(frames) == 4
    assert {row["to_first"] for row in frames} == {1.0}
    at_rest = [row["value"]["p50"] for row in rows if row["name"].startswith("frames at rest")]
    assert at_rest == [0, 0, 0, 0]
