"""The proxy's page in the system's Chromium: opened, judged by axe, its picture taken.

Needs Playwright and axe, which `tests/ui.sh` has.
"""

import contextlib
import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from axe_playwright_python.async_playwright import Axe
from PIL import Image
from playwright.async_api import async_playwright

LARGEST_SHOT = 150_000
WCAG = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
LOOKS = (("light", "light", 1280), ("dark", "dark", 1280), ("phone", "light", 360))
"""What a picture is called, the colours, and the width in pixels."""


def chromium() -> str | None:
    """Debian's, or another one's of that name."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator:
    """The browser, headless."""
    async with async_playwright() as driver:
        # a container's root may not have the sandbox
        args = ["--no-sandbox", "--force-color-profile=srgb"]
        made = await driver.chromium.launch(executable_path=chromium(), args=args)
        try:
            yield made
        finally:
            await made.close()


async def context(chromium, name: str, scheme: str, width: int):
    """Of one of `LOOKS`: what a person has set."""
    return await chromium.new_context(
        color_scheme=scheme,
        viewport={"width": width, "height": 1500},
        reduced_motion="reduce" if name == "phone" else "no-preference",
    )


async def log_in(page, key: str = "operator") -> None:
    """Give the admin key that the page asks for."""
    await page.get_by_label("Admin key").fill(key)
    await page.get_by_role("button", name="Show").click()


async def accessible(page, name: str) -> None:
    """No violation of WCAG 2.1 A and AA that axe can find."""
    found = await Axe().run(page, options=WCAG)
    rules = len(found.response["passes"])
    faults = [
        (rule["id"], [node["html"][:200] for node in rule["nodes"]])
        for rule in found.response["violations"]
    ]
    unsure = [rule["id"] for rule in found.response["incomplete"]]
    print(f"axe, {name}: {rules} rules passed, {len(faults)} violated, {unsure or 'none'} unsure")
    assert not faults, json.dumps(faults, indent=1)
    assert rules >= 10


async def shot(page, name: str, folder: Path) -> None:
    """Its picture, as ``ui-NAME.png``."""
    path = folder / f"ui-{name}.png"
    taken = await page.screenshot()
    Image.open(io.BytesIO(taken)).quantize(128).save(path, optimize=True)
    assert path.stat().st_size < LARGEST_SHOT, path
