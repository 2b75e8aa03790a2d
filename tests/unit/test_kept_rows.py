"""What the offloading demo calls right."""

import dataclasses

import pytest

from kvconnect.cli.demos.rows import StoredRow, table, verdict

RIGHT = StoredRow(
    name="long, from disk",
    source="disk",
    prompts=2,
    prompt_tokens=1000,
    storable_tokens=896,
    host_tokens=0,
    disk_tokens=896,
    computed_tokens=104,
    first_token_ms=20,
    recompute_ms=200,
    equal=2,
)


def test_rows_that_are_right_are_summed_up():
    right, line = verdict([RIGHT], 1)
    assert right
    assert "896 from disk" in line
    assert RIGHT.speedup == 10
    assert table([RIGHT]).row_count == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"disk_tokens": 768, "computed_tokens": 232}, "768 tokens came from disk, expected 896"),
        ({"host_tokens": 128}, "128 tokens came from host, expected 0"),
        ({"computed_tokens": 105}, "105 tokens were computed, expected 104"),
        ({"equal": 1}, "1 answers differ"),
        ({"source": "computed"}, "896 tokens came from disk, expected 0"),
    ],
    ids=["less from disk", "from memory", "computed", "another answer", "not computed"],
)
def test_a_row_says_what_is_wrong(change, fault):
    right, line = verdict([dataclasses.replace(RIGHT, **change)], 1)
    assert not right
    assert fault in line


def test_what_was_not_asked_is_a_fault():
    assert verdict([RIGHT], 2) == (False, "FAILED: 1 of 2 requests were not made")
