"""docs/start-cpu.md as a newcomer follows it: its commands as they stand, to the page in Chromium.

    tests/ui.sh tests/e2e/start_page.py [--shots FOLDER]    # as `make test-start` does

Takes the page's blocks of code in their order: the three servers, what is asked, and the load to
look at; only the ports become free ones. Prints when each step was there, and what axe finds on
`/ui` of the real engines in light, dark and at a phone's width; pictures go to FOLDER. Exits with 1
if something of what the page says did not come.
"""

import argparse
import asyncio
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from kit import browser, pages

from kvconnect.cli.engines import START_TIMEOUT_S
from kvconnect.cli.processes import Fleet, Server

PAGE = pages.ROOT / "docs/start-cpu.md"
PORTS = {"prefill": "8100", "decode": "8200", "proxy": "8000"}
TABLES = ("engines", "running", "transfers", "tiers", "recent")


class Newcomer:
    """Pastes the page's blocks into terminals, and looks at the clock."""

    def __init__(self, fleet: Fleet) -> None:
        self.began = time.monotonic()
        blocks = [one.text for one in pages.snippets(PAGE) if not one.language]
        at = next(n for n, text in enumerate(blocks) if PORTS["prefill"] in text)
        *servers, self.asking, self.load = blocks[at : at + len(PORTS) + 2]
        self.text = dict(zip(PORTS, servers, strict=True))
        self.fleet = fleet
        self.ports: dict[str, str] = {}

    def says(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {what}", flush=True)

    def filled(self, block: str) -> str:
        """With the ports that were free."""
        for name, port in self.ports.items():
            block = re.sub(rf"\b{PORTS[name]}\b", port, block)
        return block

    def serve(self, name: str) -> Server:
        """A terminal of its own."""

        def command(port: int) -> list[str]:
            self.ports[name] = str(port)
            return ["bash", "-c", self.filled(self.text[name])]

        return self.fleet.start(name, command)

    def ask(self) -> None:
        """What the fourth terminal says is what the page says that it does."""
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.filled(self.asking)],
            check=True,
            capture_output=True,
            text=True,
        )
        said = run.stdout
        for promised in ('" Paris', '"status":"ok"', '"decode_alone":0', "5.0\n"):
            assert promised in said, f"{promised!r} is not in: {said}"
        self.says("answered, by way of prefill")


async def look(base: str, key: str, folder: Path, says) -> None:
    """The page in each look, while requests come."""
    async with browser.browser() as chromium:
        for name, scheme, width in browser.LOOKS:
            context = await browser.context(chromium, name, scheme, width)
            page = await context.new_page()
            page.set_default_timeout(60_000)
            await page.goto(f"{base}/ui")
            await browser.log_in(page, key)
            for table in TABLES:
                await page.locator(f"#{table} tbody tr").first.wait_for()
            await page.locator("#recent tbody tr").nth(3).wait_for()
            await browser.accessible(page, name)
            await browser.shot(page, f"real-{name}", folder)
            says(f"/ui, {name}")
            await context.close()


def main(shots: Path) -> None:
    os.chdir(pages.ROOT)
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder)) as fleet:
        newcomer = Newcomer(fleet)
        servers = [newcomer.serve(name) for name in PORTS]
        fleet.wait_up(servers[:2], START_TIMEOUT_S)
        newcomer.says("both engines are up")
        fleet.wait_up(servers, START_TIMEOUT_S)
        newcomer.ask()
        key = re.search(r"--admin-key (\S+)", newcomer.text["proxy"])[1]
        load = newcomer.filled(newcomer.load)
        with subprocess.Popen(["bash", "-c", load], start_new_session=True) as asking:
            try:
                asyncio.run(look(servers[2].url, key, shots, newcomer.says))
            finally:
                os.killpg(asking.pid, 15)
        newcomer.says("all that the page says was there")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=Path, default=Path(".cache/shots"))
    main(parser.parse_args().shots.resolve())
