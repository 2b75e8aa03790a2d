"""`make gpu-first`: its table, over steps that take no time."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_first.py"


@pytest.fixture
def first(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_first", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_first", module)
    spec.loader.exec_module(module)
    steps = {
        "good": module.Step("it works", ["-c", "print('seen')"], lambda: "", 30),
        "bad": module.Step("it fails", ["-c", "raise SystemExit(3)"], lambda: "", 30),
        "slow": module.Step("it hangs", ["-c", "import time; time.sleep(30)"], lambda: "", 1),
        "absent": module.Step("it cannot run", ["-c", "1/0"], lambda: "no GPU", 30),
    }
    monkeypatch.setattr(module, "STEPS", steps)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_first.py", *arguments])
        return module.main()

    return run


def test_each_step_is_a_row_and_one_that_fails_is_the_exit(first, capsys):
    assert first() == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[-4:]}
    assert "ok" in rows["good"] and "FAILED" in rows["bad"]
    assert "over 1 s" in rows["slow"]
    assert "not run" in rows["absent"] and "no GPU" in rows["absent"]


def test_a_step_can_be_run_alone_and_what_cannot_run_is_no_failure(first, capsys):
    assert first("good", "absent") == 0
    assert "bad" not in capsys.readouterr().out


def test_an_unknown_step_is_refused_by_name(first, capsys):
    with pytest.raises(SystemExit):
        first("godo")
    assert "no step is called godo; there are good, bad, slow, absent" in capsys.readouterr().err


def test_all_limits_together_are_ten_minutes():
    spec = importlib.util.spec_from_file_location("gpu_first_limits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert sum(step.limit_s for step in module.STEPS.values()) <= 600
