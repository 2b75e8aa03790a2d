"""Commands of `vllm serve` in the documentation are ones that the installed vLLM takes."""

import deployed
import pytest
from kit import pages

SERVES = [
    (f"{pages.name_of(page)}:{line}", words)
    for page in pages.PAGES
    if page.name not in ("CHANGELOG.md", "perf-log.md")
    for line, words in pages.commands(page)
    if words[:2] == ["vllm", "serve"] and len(words) > 2
]


def test_there_are_some():
    assert len(SERVES) > 8


@pytest.mark.parametrize(("where", "words"), SERVES, ids=[where for where, _ in SERVES])
def test_vllm_takes_the_command_and_we_its_configuration(where, words):
    deployed.check_command(words)
