"""The page at / in a real Chromium: chat, stop, parameters, client configuration, keyboard, narrow and dark.

The engine is scripted, so that the test decides when a token comes. ``MLX_CLUSTER_SCREENSHOTS=docs`` writes the
pictures of the documentation.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from mlx_cluster.tokenizer import load
from tests.fake_engine import Script, write_byte_level_tokenizer
from tests.unit.gateway.conftest import World, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
CODE = "Start it like this:\n\n```sh\nmlx-cluster up\n```\n\nand <b>open</b> the page."
CLIENTS = {
    "OpenAI SDK": 'base_url="{url}/v1"',
    "Open WebUI": "OPENAI_API_BASE_URL={url}/v1",
    "Claude Code": "ANTHROPIC_BASE_URL={url}",
    "Codex": 'base_url = "{url}/v1"',
    "Continue": 'apiBase: "{url}/v1"',
    "curl": "{url}/v1/chat/completions",
}


def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None) or (str(MAC) if MAC.exists() else None)
    if found is None:
        pytest.skip(
            "no Chromium or Chrome on this machine: install one (apt-get install chromium) to test the web page"
        )
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    path = chromium()
    async with async_playwright() as driver:
        made = await driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield made
        await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = write_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    async with running(directory, load(directory)) as made:
        yield made


@asynccontextmanager
async def opened(browser: Browser, world: World, **how: Any) -> AsyncIterator[Page]:
    """The page, once it knows its models; it must not have asked for anything outside nor complained."""
    context = await browser.new_context(**how)
    page = await context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        await page.goto(world.url)
        await expect(page.locator("#model")).to_have_value("tiny")
        yield page
        assert all(address.startswith(world.url) for address in asked), asked
        # The browser itself prints refused requests to its console.
        assert not [line for line in complaints if "status of 400" not in line], complaints
    finally:
        await context.close()


async def ask(page: Page, text: str) -> None:
    await page.locator("#prompt").fill(text)
    await page.keyboard.press("Enter")


async def test_a_chat_streams_and_its_text_never_becomes_markup(browser: Browser, world: World) -> None:
    engine = world.engine(text=CODE)
    async with opened(browser, world) as page:
        await page.locator("#system").fill("Be brief")
        await page.locator("#temperature").fill("0.3")
        await page.locator("#max-tokens").fill("200")
        await ask(page, "How do I start it?")
        await expect(page.locator(".turn.model pre code")).to_have_text("mlx-cluster up")
        await expect(page.locator(".turn.model .facts")).to_contain_text("tokens")
        assert "<b>open</b>" in await page.locator(".turn.model").inner_text()
        request = engine.requests[0]
        assert (request.sampling.temperature, request.max_tokens) == (0.3, 200)
        prompt = "".join(world.tokenizer.token_text(token_id) for token_id in request.prompt)
        assert "system\nBe brief" in prompt
        # A second turn carries the whole conversation.
        second = world.engine(text="Yes.")
        await ask(page, "Really?")
        await expect(page.locator(".turn.model").nth(1)).to_contain_text("Yes.")
        prompt = "".join(world.tokenizer.token_text(token_id) for token_id in second.requests[0].prompt)
        assert "assistant\nStart it like this" in prompt
        await page.locator("#new-chat").click()
        await expect(page.locator(".turn")).to_have_count(0)


async def test_tokens_show_as_they_come_and_stop_cancels_the_engine(browser: Browser, world: World) -> None:
    go = asyncio.Semaphore(0)
    engine = world.engine(Script(tokens=world.tokenizer.encode("abcdefgh" * 30), go=go))
    async with opened(browser, world) as page:
        await ask(page, "letters")
        await expect(page.locator("#stop")).to_be_visible()
        for _ in range(3):
            go.release()
        await expect(page.locator(".turn.model .text")).to_have_text("abc")
        await asyncio.sleep(0.4)  # a rate is shown once there is a third of a second to measure over
        for _ in range(5):
            go.release()
        await expect(page.locator("#status")).to_contain_text("tokens/s")
        await page.keyboard.press("Escape")
        await engine.until(lambda: bool(engine.cancelled))
        await expect(page.locator("#send")).to_be_visible()
        await expect(page.locator(".turn.model .facts")).to_contain_text("stopped")
        await expect(page.locator("#prompt")).to_be_focused()
        engine = world.engine(Script(tokens=world.tokenizer.encode("abc" * 30), go=asyncio.Semaphore(1)))
        await ask(page, "again")
        await page.locator("#stop").click()
        await engine.until(lambda: bool(engine.cancelled))


async def test_a_refusal_is_shown_with_the_server_s_own_words(browser: Browser, world: World) -> None:
    world.engine(text="never")
    async with opened(browser, world) as page:
        await page.locator("#max-tokens").fill("99999")
        await ask(page, "hello")
        await expect(page.locator(".turn .error")).to_contain_text("the context of 'tiny' is 512")


async def test_every_client_s_configuration_can_be_copied(browser: Browser, world: World) -> None:
    async with opened(browser, world, permissions=["clipboard-read", "clipboard-write"]) as page:
        await page.locator("#show-clients").click()
        tabs = page.get_by_role("tab")
        assert await tabs.all_inner_texts() == list(CLIENTS)
        await tabs.first.focus()
        for number, (name, text) in enumerate(CLIENTS.items()):
            if number:
                await page.keyboard.press("ArrowRight")
            await expect(page.get_by_role("tab", name=name)).to_be_focused()
            await expect(page.locator("#snippet")).to_contain_text(text.format(url=world.url))
            await page.locator("#copy").click()
            await expect(page.locator("#copied")).to_have_text("Copied")
            copied = await page.evaluate("navigator.clipboard.readText()")
            assert copied == await page.locator("#snippet").text_content()
            await page.get_by_role("tab", name=name).focus()
        await page.keyboard.press("Escape")
        await expect(page.locator("#clients")).to_be_hidden()


async def test_everything_is_reached_by_keyboard(browser: Browser, world: World) -> None:
    async with opened(browser, world) as page:
        await page.locator("h1").click()
        reached = set()
        for _ in range(20):
            await page.keyboard.press("Tab")
            reached.add(await page.evaluate("document.activeElement.id"))
        assert {
            "model",
            "show-clients",
            "new-chat",
            "thread",
            "prompt",
            "send",
            "system",
            "temperature",
            "max-tokens",
            "key",
        } <= reached


@pytest.mark.parametrize("width", [320, 390, 768])
async def test_narrow_screens_need_no_scrolling_sideways(browser: Browser, world: World, width: int) -> None:
    world.engine(text="a-very-long-word-" * 9 + "\n```\n" + "x" * 300 + "\n```")
    async with opened(browser, world, viewport={"width": width, "height": 700}) as page:
        await ask(page, "long " * 40)
        await expect(page.locator(".turn.model .facts")).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        await page.locator("#show-settings").click()
        await expect(page.locator("#temperature")).to_be_visible()
        await expect(page.locator("#show-settings")).to_have_attribute("aria-expanded", "true")
        await page.locator("#show-clients").click()
        assert await page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_light_and_dark_follow_the_system_with_enough_contrast(
    browser: Browser, world: World, scheme: Any
) -> None:
    world.engine(text="A stage is a contiguous range of layers on one node.\n\n```sh\nmlx-cluster up\n```")
    async with opened(browser, world, color_scheme=scheme, viewport={"width": 1100, "height": 700}) as page:
        await ask(page, "What is a stage?")
        await expect(page.locator(".turn.model .facts")).to_be_visible()
        for place in ("body", "#keys", "#send", ".turn.user .text", ".turn.model .facts", "#facts"):
            ratio = await page.evaluate(CONTRAST, place)
            assert ratio >= 4.5, f"{place}: {ratio:.2f}"
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in background[4:-1].split(",")) < 200) == (scheme == "dark")
        if folder := os.environ.get("MLX_CLUSTER_SCREENSHOTS"):
            await page.screenshot(path=Path(folder) / f"web-{scheme}.png")


CONTRAST = """place => {
  const element = document.querySelector(place);
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  let behind = element;
  while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const light = (text) => {
    const [r, g, b] = parts(text).map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
