"""Loads of one rank: each ends once, and why it failed is in the log with the request's id."""

import pytest
from kit.log_lines import failed_loads

from kvconnect.vllm.offload.loads import RunningLoads


def test_a_load_ends_once_when_its_last_fill_has_ended(caplog):
    loads = RunningLoads()
    loads.begin("r", [1, 2])
    loads.begin("other", [3])
    loads.done(2, "")
    loads.done(9, "a save's, and no load's")
    assert loads.take() == (set(), set())
    loads.done(1, "")
    assert loads.take() == ({"r"}, set())
    assert loads.take() == (set(), set())
    assert not caplog.records


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)], ids=str)
def test_why_it_failed_is_logged_with_the_requests_id(caplog, order):
    """It used to be lost on its way through four layers."""
    loads = RunningLoads()
    loads.begin("r", [1, 2, 3])
    errors = {1: "", 2: "not read: I/O error", 3: ""}
    for number in order:
        loads.done(number, errors[number])
    assert loads.take() == ({"r"}, {"r"})
    (line,) = failed_loads(caplog)
    assert line["request"] == "r" and line["error"] == "1 of 3 chunks: not read: I/O error"
    assert (line["peer"], line["path"], line["cause"]) == ("none", "store", "stored")
    assert line["remedy"]


def test_what_cannot_even_be_started_has_failed_at_once(caplog):
    loads = RunningLoads()
    loads.begin("r", [], "memory has no room for 2 chunks on disk")
    assert loads.take() == ({"r"}, {"r"})
    (line,) = failed_loads(caplog)
    assert line["error"] == "memory has no room for 2 chunks on disk"
