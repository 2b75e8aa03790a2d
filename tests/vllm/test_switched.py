"""The connector that `kvconnect bench offload` switches: off, nothing of ours is asked."""

from collections.abc import Iterator

import pytest

from kvconnect_bench import switched
from kvconnect_bench.switched import Counted, DoesNothing, SwitchedOffloading, switch


class Half:
    """Says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> object:
        self.asked.append(name)
        return lambda *_: None


class Made(SwitchedOffloading):
    """One without vLLM's configuration."""

    def __init__(self) -> None:
        self.half = Half()
        self._scheduler = self._worker = self.half  # type: ignore[assignment]
        self.made.append(self)


@pytest.fixture
def connector() -> Iterator[Made]:
    """One whose half says what it is asked for."""
    yield Made()
    SwitchedOffloading.made.clear()


def test_switched_off_it_answers_as_a_connector_that_has_nothing(connector: Made) -> None:
    switch(DoesNothing)
    assert connector.get_num_new_matched_tokens(None, 0) == (0, False)
    assert connector.request_finished_all_groups(None, ()) == (False, None)
    assert connector.has_pending_push_work() is False
    assert connector.get_kv_connector_stats() is None
    assert connector.build_connector_worker_meta() is None
    connector.update_state_after_alloc(None, None, 0)
    connector.update_connector_output(None)
    connector.bind_connector_metadata(connector.build_connector_meta(None))
    connector.wait_for_save()
    results = connector.get_transfer_results(set())
    assert not results.finished_recving and not results.finished_sending
    assert list(connector.take_events()) == []
    assert connector.half.asked == []


def test_switched_on_it_is_ours_again(connector: Made) -> None:
    switch(DoesNothing)
    switch(SwitchedOffloading)
    connector.wait_for_save()
    assert connector.half.asked == ["forward_is_done"]


@pytest.mark.parametrize("name", switched.called())
def test_all_that_ours_answers_is_switched(name: str) -> None:
    """A method that a later change adds is, too."""
    assert getattr(DoesNothing, name) is not getattr(SwitchedOffloading, name)


def test_calls_are_counted_where_they_are_to_be(connector: Made) -> None:
    before_s = Counted.calls_s
    for to in (SwitchedOffloading, DoesNothing):
        switch(to)
        connector.wait_for_save()
    assert Counted.calls_s == before_s
    switch(Counted)
    connector.wait_for_save()
    assert Counted.calls_s > before_s
    assert connector.half.asked == ["forward_is_done"] * 2
