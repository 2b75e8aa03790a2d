"""What the demo of several connectors calls right."""

import dataclasses

import pytest

from kvconnect.cli.demos.rows import ChainedRow, table, verdict

RIGHT = ChainedRow(
    name="from memory and peer",
    prompt_tokens=1000,
    peer_tokens=488,
    host_tokens=512,
    computed_tokens=0,
    sources=frozenset({"peer", "host"}),
    first_token_ms=50,
    recompute_ms=500,
    equal=True,
)


def test_rows_that_are_right_are_summed_up():
    right, line = verdict([RIGHT], 1)
    assert right
    assert "488 prompt tokens from the peer and 512 from host memory, in 1 loads" in line
    assert RIGHT.speedup == 10
    assert table([RIGHT]).row_count == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"peer_tokens": 0, "host_tokens": 1000}, "0 tokens from peer, expected some"),
        ({"computed_tokens": 1, "host_tokens": 511}, "1 tokens computed, expected none"),
        ({"host_tokens": 500}, "988 tokens were counted, expected 1000"),
        ({"equal": False}, "the answer differs"),
    ],
)
def test_a_row_says_what_is_wrong(change, fault):
    right, line = verdict([dataclasses.replace(RIGHT, **change)], 1)
    assert not right
    assert fault in line


def test_what_was_not_asked_is_a_fault():
    assert verdict([RIGHT], 2) == (False, "FAILED: 1 of 2 requests were not made")
