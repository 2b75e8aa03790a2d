"""How far a hit reaches, beside trying every end; and the tier that says what is there."""

from hypothesis import given
from hypothesis import strategies as st

from kvconnect.offload.hits import ChunkRange, Group, hit_tokens, needed

groups = st.lists(
    st.builds(Group, st.sampled_from([2, 4]), st.sampled_from([None, None, 1, 3, 5])),
    min_size=1,
    max_size=3,
)


def key(group, chunk):
    return bytes([group, chunk])


@given(groups, st.integers(0, 6), st.integers(0, 26), st.data())
def test_it_is_the_farthest_end_whose_chunks_are_all_there(groups, local_blocks, most, data):
    local = 2 * local_blocks
    keys = [[key(g, c) for c in range(24 // group.chunk_tokens)] for g, group in enumerate(groups)]
    everything = [k for own in keys for k in own]
    missing = data.draw(st.sets(st.sampled_from(everything), max_size=4))
    asked = []

    def has(one):
        asked.append(one)
        return one not in missing

    found = hit_tokens(groups, keys, has, local, most)
    right = local
    for end in range(local + 1, min(most, 24) + 1):
        aligned = all(end % group.chunk_tokens == 0 for group in groups)
        # token by token: what the next one, or the last one again, looks at and is not here
        wanted = {
            keys[g][token // group.chunk_tokens]
            for g, group in enumerate(groups)
            for token in range(local, end)
            if group.window_tokens is None or token >= end - group.window_tokens
        }
        if aligned and not wanted & missing:
            right = end
    assert found == right
    assert len(asked) == len(set(asked))
    for g, group in enumerate(groups):
        need = needed(group, local, found)
        assert not missing & set(keys[g][need.first : need.end])


def test_what_is_here_need_not_be_loaded():
    full, window = Group(4), Group(4, 6)
    assert needed(full, 8, 16) == ChunkRange(2, 4)
    assert needed(full, 10, 16) == ChunkRange(2, 4), "of the chunk in the middle only some blocks"
    assert needed(window, 0, 40) == ChunkRange(8, 10)
    assert needed(window, 36, 40) == ChunkRange(9, 10)
    assert needed(full, 16, 16) == ChunkRange(0, 0)
