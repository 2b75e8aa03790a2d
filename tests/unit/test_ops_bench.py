"""``kvconnect bench kernels``, with less memory and fewer rounds than a figure needs."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvconnect.cli import main
from kvconnect.ops import Type, load
from kvconnect_bench import kernel_cases
from kvconnect_bench.kernel_cases import KernelArena, KernelCase, runs, shapes

SMALL = ["--rounds", "2", "--call-mib", "1", "--pool-mib", "16"]


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", "kernels", *arguments], env={"COLUMNS": "160"})


@pytest.mark.slow
def test_every_row_is_a_fraction_of_memcpy_and_says_where_it_was_measured(tmp_path):
    out = tmp_path / "kernels.json"
    found = bench(*SMALL, "--json", str(out))
    assert found.exit_code == 0, found.output
    result = json.loads(out.read_text())
    assert result["machine"]["kernels"] == load().name
    assert result["machine"]["versions"]["torch"] == torch.__version__
    named = {(row["verb"], row["shape"], row["run_bytes"]) for row in result["rows"]}
    assert named == {(verb, shape.name, shape.run_bytes) for verb, shape in shapes()}
    for row in result["rows"]:
        assert row["call_bytes"] == 1 << 20 and row["gb_s"] > 0 < row["fraction"]
    against = {row["shape"] for row in result["rows"] if row["torch_ratio"]}
    assert against == {"BF16 → E4M3", "BF16 → E4M3 ×0.37"}
    assert "column-major K" in found.output


def test_figures_are_those_of_the_seconds_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(KernelArena, "time_memcpy", lambda self, nbytes: nbytes / 8e9)
    monkeypatch.setattr(KernelCase, "time", lambda self: self.nbytes / 4e9)
    monkeypatch.setattr(KernelCase, "time_torch", lambda self: self.nbytes / 1e9)
    out = tmp_path / "kernels.json"
    assert bench(*SMALL, "--only", "BF16 → E4M3 ×", "--json", str(out)).exit_code == 0
    row = json.loads(out.read_text())["rows"][0]
    assert (row["gb_s"], row["memcpy_gb_s"]) == (4, 8)
    assert (row["fraction"], row["torch_ratio"]) == (0.5, 4)


def test_another_device_is_refused():
    found = bench("--device", "tpu")
    assert found.exit_code == 2 and "neither cpu nor cuda" in found.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_in_a_line():
    found = bench("--device", "cuda")
    assert found.exit_code == 2 and "CUDA" in found.output and "Traceback" not in found.output


def test_bits_that_are_not_torchs_end_the_run(monkeypatch):
    arena = KernelArena(load(), "cpu", 1 << 20, 1 << 16)
    arena.case("gather", runs(4, Type.BF16, Type.E4M3, 0.5)).check_torch()
    case = arena.case("gather", runs(4, Type.BF16, Type.E4M3, 0.5))
    case.copy = case.copy._replace(factor=0.25)  # what torch is asked for
    with pytest.raises(AssertionError, match="not torch's bits"):
        case.check_torch()


def test_a_call_takes_other_blocks_than_the_last():
    arena = KernelArena(load(), "cpu", 1 << 20, 1 << 16)
    case = arena.case("gather", runs(4))
    seen = [set(case.next_blocks().tolist()) for _ in range(16)]
    assert set().union(*seen) == set(range(256)) and sum(map(len, seen)) == 256


@pytest.mark.parametrize(("verb", "shape"), shapes(), ids=lambda v: getattr(v, "name", v))
def test_a_shape_covers_its_blocks(verb, shape):
    """So that its bytes are those that it says."""
    copy = shape.copy
    cells = kernel_cases.TOKENS * sum(part.heads * part.content for part in shape.copies)
    assert shape.block_bytes == cells * copy.kv_type.itemsize <= copy.block_stride


def test_k_and_v_side_by_side_are_two_parts_that_fill_a_block_between_them():
    """As vLLM's caches on a CPU: a row that measured them as one part said nothing of these."""
    (shape,) = {shape.name: shape for _, shape in shapes() if shape.other}.values()
    heads, tokens = range(shape.copy.heads), range(kernel_cases.TOKENS)
    begins = sorted(
        part.base + head * part.head_stride + token * part.token_stride
        for part in shape.copies
        for head in heads
        for token in tokens
    )
    assert begins == list(range(0, shape.copy.block_stride, shape.run_bytes))
    k, v = shape.copies
    assert v.base - k.base == shape.run_bytes, "the V of a token follows its K"
