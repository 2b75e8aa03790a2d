"""What `kvconnect bench trace` wraps is there, and says when it happens."""

import multiprocessing
import os
from pathlib import Path

from kvconnect.control import wire
from kvconnect_bench import marks


def traced(folder: Path) -> None:
    os.environ |= marks.environment(folder, "decode")
    marks.install()
    wire.decode(wire.encode(wire.Closed(seq=1, stood=True)))


def test_functions_that_are_marked_say_when_they_are_called(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=traced, args=(tmp_path,))
    process.start()  # of its own: what is wrapped stays so
    process.join()
    assert process.exitcode == 0
    found = marks.read(tmp_path)
    assert [(m.engine, m.what) for m in found] == [
        ("decode", "Closed sent"),
        ("decode", "Closed arrived"),
    ]
    assert found[0].at_s <= found[1].at_s
