"""``kvconnect bench transport``: what is measured, what is compared, what is written."""

import importlib
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kvconnect.cli import main
from kvconnect_bench.sides import MODES, ConsumerSide, Fetched, ProducerSide, TransferCase

MIB = 1 << 20
PATIENCE_S = 100.0
CASE = TransferCase("nixl", "tcp", 4096, 2 * MIB, MIB)
# by import_module, since the package's own transport is the command
transport = importlib.import_module("kvconnect_bench.transport")


@pytest.mark.slow
def test_two_processes_move_blocks_in_every_mode(tmp_path):
    report = tmp_path / "report.json"
    options = ["--wires", "tcp", "--row-kib", "4", "--total-mib", "2", "--staging-mib", "1"]
    done = CliRunner().invoke(
        main, ["bench", "transport", *options, "--rounds", "2", "--json", str(report)]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    rows = found["rows"]
    by = {row["mode"]: row for row in rows}
    assert list(by) == list(MODES)
    assert {(row["row_bytes"], row["rounds"]) for row in rows} == {(4096, 2)}
    assert by["direct"]["descriptors"] > by["staged"]["descriptors"] > 0
    assert (by["direct"]["staged_rounds"], by["staged"]["staged_rounds"]) == (0, 2)
    assert by["direct"]["of_direct"] == 1.0
    assert found["machine"]["versions"]["nixl"]


@pytest.mark.slow
def test_other_bytes_than_the_supplier_s_are_noticed():
    """In every mode and anywhere: in the request's blocks, and in those that are not its."""
    supplier, reader = (side(CASE, None) for side in (ProducerSide, ConsumerSide))
    try:
        for mode in MODES:
            right = reader.fetch(mode, *supplier.lend(mode), PATIENCE_S)
            assert (right.error, right.staged) == ("", mode == "staged")
        lent = supplier.blocks[5]
        layer = supplier.cache.layers[-1]
        supplier.cache.cells(layer, 1)[lent, 0, 0, 0, 0, 0] ^= 1
        for mode in MODES:
            assert (
                "memory is not" in reader.fetch(mode, *supplier.lend(f"{mode} 2"), PATIENCE_S).error
            )
        supplier.cache.cells(layer, 1)[lent, 0, 0, 0, 0, 0] ^= 1
        reader.wiped[0] ^= 1  # a guard byte, as if a transfer had changed it
        assert "memory is not" in reader.fetch("direct", *supplier.lend("again"), PATIENCE_S).error
    finally:
        reader.close()
        supplier.close()


def test_ratios_are_of_the_same_round():
    """A median of ratios: a round in which the machine was slow counts like any other."""
    fetched = {
        "direct": [Fetched(s, 512, False, "") for s in (3.0, 30.0, 3.0)],
        "staged": [Fetched(s, 4, True, "") for s in (1.0, 10.0, 1.5)],
    }
    times = transport.TransferTimes([0.5, 5.0, 0.5], [0.25, 2.5, 0.25], fetched)
    direct, staged = transport.rows_of(CASE, times)
    assert (staged.of_direct, direct.of_direct) == (3.0, 1.0)
    assert (staged.of_contiguous, staged.of_memcpy) == (0.5, 0.25)
    assert (direct.descriptors, staged.descriptors) == (512, 4)
    assert (direct.staged_rounds, staged.staged_rounds) == (0, 3)
    assert staged.ms_p50 == 1500.0


@pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
def test_a_row_is_what_one_block_of_one_layer_holds(size):
    case = replace(CASE, row_bytes=size << 10, total_bytes=128 * MIB)
    model = case.model
    assert case.problem() == ""
    row = model.heads * model.block_tokens * model.content * model.itemsize
    assert row == size << 10
    assert row * model.layers * case.blocks == 128 * MIB
    tables = case.table(1), case.table(2)
    assert all(len(set(table)) == case.blocks for table in tables)
    assert tables[0] != tables[1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--transport", "pigeon"], "none of nixl"),
        (["--wires", "shm,air"], "'air'"),
        (["--row-kib", "4096", "--total-mib", "1"], "fill 32 layers"),
        (["--row-kib", "20"], "power of two"),
    ],
)
def test_what_cannot_be_measured_is_said(options, why):
    done = CliRunner().invoke(main, ["bench", "transport", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and why in done.output
