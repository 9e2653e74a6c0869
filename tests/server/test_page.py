"""The page in a browser: with the keyboard alone, on narrow screens, light and dark; what it keeps and asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from browser import Page, browsing, find_browser
from serving import Server, serve_needle

from paddle_qwen1m.server.settings import Settings
from paddle_qwen1m.server.texts import Texts

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")
KEY = "secret-key"
DOCUMENT = (
    "The sky is wide. " * 120 + "The access code for jade is 64931. " + "The grass is green. " * 300
    + "The access code for ruby is 20518.\n"
)  # fmt: skip
ANSWERS = "[...document.querySelectorAll('#answers article')].map(one => one.innerText)"


@pytest.fixture(scope="module")
def server(texts: Texts) -> Iterator[Server]:
    settings = Settings(api_keys=(KEY,))
    with serve_needle(
        texts, settings=settings, defaults={"temperature": 0.0}, max_model_len=8192, max_num_batched_tokens=1024,
        kv_cache_memory_bytes=300_000_000,
    ) as one:  # fmt: skip
        yield one


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    assert BROWSER is not None
    with browsing(BROWSER) as one:
        one.open(server.url)
        yield one


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id"))


def tab_to(page: Page, name: str) -> None:
    for _ in range(12):
        if focused(page) == name:
            return
        page.press("Tab")
    raise AssertionError(f"Tab does not reach {name}")


def test_a_document_is_asked_twice_with_the_keyboard_alone(page: Page, server: Server) -> None:
    page.wait("document.querySelector('#model').innerText.includes('key')")  # it says that one is needed
    tab_to(page, "document")
    page.type(DOCUMENT)
    tab_to(page, "open-key")
    page.press("Enter")
    tab_to(page, "key")
    page.type(KEY)
    page.press("Tab")
    page.wait("document.querySelector('#model').innerText.includes('8,192')")
    tokens = len(server.client.post("/tokenize", json={"prompt": DOCUMENT}, headers={"Authorization": f"Bearer {KEY}"})
                 .json()["tokens"])  # fmt: skip
    page.wait(f"document.querySelector('#count').innerText.startsWith('{tokens:,} tokens')")
    page.evaluate("window.seen = []; new MutationObserver(() => seen.push(bar.value)).observe(bar, {attributes: true})")
    page.evaluate("document.querySelector('#question').focus()")
    page.type("What is the access code for jade?")
    page.press("Enter")
    first = page.wait(f"{ANSWERS}.find(one => one.includes('written'))")
    assert "The access code for jade is 64931." in first and " 0 of them from the cache" in first
    assert len({value for value in page.evaluate("seen") if 0 < value < 1}) >= 2, "the progress was not seen"
    page.wait("!document.querySelector('#ask').disabled")
    assert focused(page) == "question"
    page.type("What is the access code for ruby?")
    page.press("Enter")
    second = page.wait(
        f"{ANSWERS}.length === 2 && {ANSWERS}.find(one => one.includes('20518') && one.includes('written'))"
    )
    assert " 0 of them from the cache" not in second
    kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
    assert kept[:3] == [0, 0, ""] and KEY not in kept[3]
    assert {url.split("/")[2] for url in page.requests} == {server.url.split("/")[2]}


def test_a_dropped_file_is_taken_and_text_stays_text(page: Page) -> None:
    page.evaluate(f"key.value = {json.dumps(KEY)}")
    markup = "<img src=x onerror='window.hurt = 1'><b>bold</b>"
    page.evaluate(
        f"""{{ const held = new DataTransfer(); held.items.add(new File([{json.dumps(markup)}], "a.md"));
        document.querySelector("#document").dispatchEvent(new DragEvent("drop", {{ dataTransfer: held }})); }}"""
    )
    page.wait("document.querySelector('#document').value.includes('bold')")
    page.wait("document.querySelector('#count').innerText.includes('tokens')")
    page.evaluate(f"question.value = {json.dumps(markup)}; form.requestSubmit()")
    page.wait(f"{ANSWERS}.find(one => one.includes('written'))")
    assert page.evaluate("document.querySelectorAll('#answers b, #answers img').length") == 0
    assert page.evaluate("window.hurt") is None
    assert "blocked" in page.evaluate(
        """new Promise(done => { document.addEventListener("securitypolicyviolation", () => done("blocked"));
        fetch("http://127.0.0.2:9/").catch(() => setTimeout(() => done("asked"), 1000)); })"""
    )


def test_it_can_be_stopped_and_tells_what_was_refused(page: Page, server: Server) -> None:
    page.evaluate(f"key.value = {json.dumps(KEY)}")
    page.evaluate(f"document.querySelector('#document').value = {json.dumps('The grass is green. ' * 1100)}")
    page.evaluate("question.value = 'x'; form.requestSubmit()")
    page.wait("!document.querySelector('#stop').disabled")
    page.evaluate("document.querySelector('#stop').click()")
    page.wait(f"{ANSWERS}.find(one => one.includes('stopped'))")
    page.wait("!document.querySelector('#ask').disabled")
    server.wait(lambda: server.engine.is_idle)
    page.evaluate(f"document.querySelector('#document').value = {json.dumps('The grass is green. ' * 3000)}")
    page.evaluate("form.requestSubmit()")
    page.wait(f"{ANSWERS}.find(one => one.includes('context length is only 8192'))")


def test_narrow_screens_colours_and_names(page: Page) -> None:
    for width in (320, 1280):
        page.resize(width, 800)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).color"))
    assert colours == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button, progress")]
        .filter(one => !(one.labels?.length || one.ariaLabel || one.innerText)).map(one => one.id)"""
    )
    assert nameless == []
