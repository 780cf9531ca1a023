"""The page at /: who gets it, under which headers, and that nothing on it comes from elsewhere."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from mlx_cluster.gateway.web_page import MEDIA_TYPES
from tests.unit.gateway.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOLDER = resources.files("mlx_cluster.gateway") / "web"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name, never fetched


async def test_a_browser_gets_the_page_under_a_strict_policy(world: World) -> None:
    answer = await world.http.get("/", headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["vary"] == "accept"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<title>mlx-cluster</title>" in answer.text


async def test_everything_the_page_names_is_served_by_the_gateway(world: World) -> None:
    page = (await world.http.get("/", headers=BROWSER)).text
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    for name in MEDIA_TYPES:
        if name.endswith(".js"):
            source = (FOLDER / name).read_text()
            named |= {f"/web/{path}" for path in re.findall(r'from "\./([^"]+)"', source)}
    assert {"/web/app.js", "/web/stream.js", "/web/style.css", "/web/icon.svg"} <= named
    for path in named:
        answer = await world.http.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"] == MEDIA_TYPES[path.removeprefix("/web/")]
        assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("name", sorted(MEDIA_TYPES))
async def test_no_file_refers_to_anything_outside(name: str) -> None:
    text = (FOLDER / name).read_text().replace(SVG_NAMESPACE, "")
    assert not re.search(r"https?:|[\"'(]//|@import|url\(|data:image", text)


@pytest.mark.parametrize("name", [name for name in sorted(MEDIA_TYPES) if name.endswith((".js", ".html"))])
async def test_no_text_can_become_markup_or_code(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
    )
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", text)  # the policy forbids inline ones


async def test_every_id_that_the_script_uses_is_on_the_page() -> None:
    page = (FOLDER / "index.html").read_text()
    used = set(re.findall(r'\$\("([\w-]+)"\)', (FOLDER / "app.js").read_text()))
    assert len(used) > 10
    assert used <= set(re.findall(r'id="([\w-]+)"', page))


async def test_a_program_gets_a_hint_in_the_form_it_asks_for(world: World) -> None:
    as_json = await world.http.get("/", headers={"accept": "application/json"})
    body = as_json.json()
    assert body["base_url"] == f"{world.url}/v1"
    assert {"method": "POST", "path": "/v1/chat/completions", "what": "a chat"} in body["routes"]
    as_text = await world.http.get("/")
    assert as_text.headers["content-type"].startswith("text/plain")
    assert f"curl {world.url}/v1/chat/completions" in as_text.text


async def test_only_the_page_s_own_files_are_served(world: World) -> None:
    for name in ("other.js", "..%2fapp.py", "%2e%2e/app.py"):
        answer = await world.http.get(f"/web/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
