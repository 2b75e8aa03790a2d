"""`/ui` in a real headless Chromium, with live data from stand-in engines.

`make ui-shots` has all that it takes, and writes the screenshots of docs/img.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from test_proxy_app import PARAMS, Engine

from kvconnect.proxy.app import start
from kvconnect.proxy.config import make_config

opened = pytest.importorskip("kit.browser", reason="no Playwright: `make ui-shots` has it")
if opened.chromium() is None:
    pytest.skip("no chromium (Debian: apt-get install chromium)", allow_module_level=True)

SHOTS = os.environ.get("KVCONNECT_UI_SHOTS")
HOSTILE = "<img src=x onerror=hacked=1>"
ROLES = ("table", "rowgroup", "row", "columnheader", "rowheader", "cell")


class Decoder(Engine):
    """Answers after a while, streams on for a while, and tells what it has read."""

    looks = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            self.looks += 1
            return web.Response(text=self.metrics())
        if request.method != "POST":
            return web.Response()
        wanted = await request.json()
        if wanted["prompt"] == "breaks":
            return web.Response(status=500, body=b"{}")
        await asyncio.sleep(0.02 + 0.05 * wanted["max_tokens"] / 100)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(wanted["max_tokens"] // 4):
            await response.write(b'data: {"choices":[{"text":"secret answer"}]}\n\n')
            await asyncio.sleep(0.01)
        while wanted["prompt"] == "stays" and not self.go_on.is_set():
            await response.write(b'data: {"choices":[{"text":"secret answer"}]}\n\n')
            await asyncio.sleep(0.2)
        await response.write(b"data: [DONE]\n\n")
        return response

    def metrics(self) -> str:
        done = self.looks * 12
        numbers = {
            'read_bytes_total{path="staged",peer="10.0.0.1:5600"}': done * 11e6,
            'reads_total{path="staged",peer="10.0.0.1:5600"}': done,
            'read_seconds_total{path="staged",peer="10.0.0.1:5600"}': done * 0.0031,
            'read_bytes_total{path="direct",peer="10.0.0.2:5600"}': done * 14e6,
            'reads_total{path="direct",peer="10.0.0.2:5600"}': done // 2,
            'read_seconds_total{path="direct",peer="10.0.0.2:5600"}': done * 0.0009,
            'held_blocks{cause="leased"}': 0,
            'held_oldest_seconds{cause="leased"}': 0,
            'held_blocks{cause="loading"}': 96 + self.looks,
            'held_oldest_seconds{cause="loading"}': 0.31,
            "offload_tokens_from_host_total": 41_200,
            "offload_tokens_from_disk_total": 9_800,
            "offload_tokens_missed_total": 30_100,
            'failed_loads_total{cause="timeout"}': 2 + self.looks // 3,
            f'failed_loads_total{{cause="{HOSTILE}"}}': 1,
        }
        text = "".join(f"vllm:kvconnect_{name} {value}\n" for name, value in numbers.items())
        return text + (
            "vllm:prefix_cache_queries_total 90000\nvllm:prefix_cache_hits_total 38700\n"
            "vllm:external_prefix_cache_queries_total 51300\n"
            "vllm:external_prefix_cache_hits_total 47100\n"
        )


class Prefiller(Engine):
    """Computes for a while, and keeps what it has lent."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            return web.Response(
                text='vllm:kvconnect_held_blocks{cause="leased"} 412\n'
                'vllm:kvconnect_held_oldest_seconds{cause="leased"} 2.4\n'
                "vllm:nixl_num_kv_expired_reqs_total 3\n"
            )
        if request.method == "POST":
            wanted = await request.json()
            await asyncio.sleep(3 if wanted["prompt"] == "long" else len(wanted["prompt"]) / 2000)
        answer = {"id": "p", "choices": [], "kv_transfer_params": PARAMS}
        return web.json_response(answer)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """A proxy with two engines of each role and one that is down, and requests under way."""
    prefill, decode = [Prefiller(), Prefiller()], [Decoder(), Decoder()]
    async with contextlib.AsyncExitStack() as stack:
        for engine in (*prefill, *decode):
            await stack.enter_async_context(engine.serving())
        config = make_config(
            prefill=[engine.url for engine in prefill],
            decode=[*(engine.url for engine in decode), "http://127.0.0.1:9"],
            admin_key="operator",
        )
        runner = await start(config, "127.0.0.1", 0)
        stack.push_async_callback(runner.cleanup)
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        session = await stack.enter_async_context(ClientSession(base))

        async def ask(name: str, prompt: str, tokens: int) -> None:
            body = {"prompt": prompt, "max_tokens": tokens, "stream": True}
            head = {"X-Request-Id": name}
            async with session.post("/v1/completions", json=body, headers=head) as response:
                await response.read()

        lengths = [120, 900, 300, 1500, 60, 700]
        done = (ask(f"chat-{n}", "x" * lengths[n % 6], 8 + 40 * (n % 4)) for n in range(8))
        await asyncio.gather(*done, ask("chat-fails", "breaks", 4))
        stay = [
            asyncio.create_task(ask("chat-long", "stays", 200)),
            asyncio.create_task(ask("chat-longer", "stays", 80)),
        ]
        stopping = asyncio.Event()

        async def ask_on() -> None:
            for number in itertools.count():
                await ask(f"chat-again-{number}", "long", 60)
                if stopping.is_set():
                    return

        stay.append(asyncio.create_task(ask_on()))
        try:
            yield base
        finally:
            stopping.set()
            for engine in (*prefill, *decode):
                engine.go_on.set()
            await asyncio.gather(*stay)


async def shown(page) -> None:
    """Until engines were read twice, and requests are there."""
    for table in ("engines", "running", "transfers", "held", "tiers", "errors", "recent"):
        await page.locator(f"#{table} tbody tr").first.wait_for(timeout=60_000)
    await page.get_by_text("staged").first.wait_for(timeout=60_000)


async def keeps_strangers_out(page, base: str) -> None:
    await page.goto(f"{base}/ui")
    assert await page.evaluate("document.activeElement.id") == "key"
    await opened.accessible(page, "key asked for")
    await opened.log_in(page, "wrong")
    await page.get_by_text("This key is not the proxy's admin key.").wait_for()
    assert await page.locator("#main").is_hidden()


async def says_all(page) -> None:
    text = await page.locator("#main").inner_text()
    for word in (
        "127.0.0.1:9", "down", "chat-long", "chat-fails", "prefill", "decode",
        "10.0.0.1:5600", "direct", "412", "2.40 s", "host", "50.8 %", "device", "43.0 %",
        "lease expired unread", "load failed: timeout", "hand-over", "→",
    ):  # fmt: skip
        assert word in text, word
    assert "secret answer" not in text and "xxxx" not in text
    assert await page.locator("#recent tbody tr").count() >= 9
    assert await page.locator("#recent tbody tr").last.locator(".bar i").count() >= 3


async def escapes(page) -> None:
    """Markup of others is text, and a script that got in all the same would not run."""
    await page.get_by_text(f"load failed: {HOSTILE}").first.wait_for()
    assert await page.locator("main img").count() == 0
    run = "const s = document.createElement('script'); s.textContent = 'hacked = 1'; "
    await page.evaluate(run + "document.body.append(s); s.remove()")
    assert await page.evaluate("typeof hacked") == "undefined"


async def works_by_keyboard(page) -> None:
    await page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(2):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("document.activeElement.textContent"))
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await page.evaluate(outline) == "solid", f"no focus to be seen on {reached[-1]}"
    assert reached == ["To the engines", "Pause"]
    await page.keyboard.press("Space")
    assert await page.get_by_role("button", name="Pause", pressed=True).count() == 1
    await page.keyboard.press("Space")
    assert await page.get_by_role("button", name="Pause", pressed=False).count() == 1


async def speaks(page) -> None:
    """Tables are tables at each width; what is read out changes with what it says alone."""
    tree = await page.locator("#engines").aria_snapshot()
    assert 'table "Engines"' in tree and "columnheader" in tree and "rowheader" in tree, tree
    for role in ROLES:
        assert await page.locator(f"main [role={role}]").count(), role
    status = page.get_by_role("status")
    assert await status.get_attribute("aria-live") == "polite"
    assert "4 of 5 engines up" in await status.inner_text()
    watch = "changes = 0; new MutationObserver(() => changes++).observe(%s, %s)"
    await page.evaluate(watch % ("document.getElementById('status')", "{childList: true}"))
    await page.evaluate("first = latest")
    while await page.evaluate("latest === first"):  # waits by eval are against the page's policy
        await asyncio.sleep(0.05)
    assert await page.evaluate("changes") == 0


async def rests_while_hidden(page) -> None:
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true}); "
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    await page.evaluate(hide % "true" + tell)
    await page.locator("#connection", has_text="Not connected").wait_for()
    await page.evaluate(hide % "false" + tell)
    await page.locator("#connection", has_text="Live").wait_for()


@pytest.mark.slow
def test_the_page_as_people_meet_it(tmp_path):
    folder = Path(SHOTS) if SHOTS else tmp_path
    folder.mkdir(parents=True, exist_ok=True)

    async def scenario() -> None:
        async with serving() as base, opened.browser() as chromium:
            for name, scheme, width in opened.LOOKS:
                context = await opened.context(chromium, name, scheme, width)
                page, asked, faults = await context.new_page(), [], []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
                page.set_default_timeout(60_000)
                await keeps_strangers_out(page, base)
                await opened.log_in(page)
                await shown(page)
                await says_all(page)
                await opened.accessible(page, name)
                await opened.shot(page, name, folder)
                wide = await page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{wide - width} pixels are out of sight"
                moving = "getComputedStyle(document.querySelector('#running .bar i:last-child'))"
                duration = await page.evaluate(f"{moving}.transitionDuration")
                assert (duration == "0s") == (name == "phone"), duration
                await speaks(page)
                await works_by_keyboard(page)
                await escapes(page)
                await rests_while_hidden(page)
                assert not faults
                assert {url.removeprefix(base) for url in asked} == {"/ui", "/ui/events"}
                await context.close()

    asyncio.run(asyncio.wait_for(scenario(), 300))
