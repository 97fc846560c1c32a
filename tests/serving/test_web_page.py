"""The page in a browser: what a user does with mouse and keyboard, at desk and phone width."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("websockets", reason="needs websockets, which is missing")

from chromium import CHROMIUM, Page, open_browser
from conftest import make_served, running

from nanoforge.serving.server import ModelServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is missing"),
]
REPLIES = "[...document.querySelectorAll('.body')].map((node) => node.innerText)"
DONE = "document.querySelectorAll('.answer').length && !document.querySelector('.running')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page, server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """The page as it is opened for the first time; it must end without an error. No reply ends by itself."""
    for name in ("tiny", "other"):
        monkeypatch.setitem(server.engine.models[name].__dict__, "end_ids", ())
    browser.resize(1280, 800)
    browser.open(f"{server.url}health")
    browser.evaluate("sessionStorage.clear(); localStorage.clear()")
    browser.open(server.url)
    browser.wait_for("document.querySelector('#model-a').value === 'tiny'")
    browser.errors.clear()
    yield browser
    assert browser.errors == []


def set_value(page: Page, selector: str, value: Any) -> None:
    page.evaluate(
        f"(() => {{ const node = document.querySelector({json.dumps(selector)}); "
        f"node.value = {json.dumps(str(value))}; "
        "for (const name of ['input', 'change']) node.dispatchEvent(new Event(name, {bubbles: true})); })()"
    )


def send(page: Page, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.press("Enter")


def test_a_chat_with_two_models(page: Page, client: Any) -> None:
    # 1. Two models, the same prompt and seed; Shift+Enter is a new line.
    page.click("#compare")
    set_value(page, "#seed", 7)
    set_value(page, "#max_tokens", 24)
    set_value(page, "#system", "Be brief.")
    page.click("#input")
    page.type("Who are")
    page.press("Enter", shift=True)
    send(page, "you?")
    page.wait_for(DONE)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are\nyou?"}]
    options = {"messages": messages, "seed": 7, "max_tokens": 24}
    expected = [
        client.chat.completions.create(model=name, **options).choices[0].message.content for name in ("tiny", "other")
    ]
    shown = page.evaluate("[...document.querySelectorAll('.body')].map((node) => node.textContent)")
    assert shown == expected
    assert page.evaluate("document.querySelector('.user').textContent") == "Who are\nyou?"
    assert "seed 7" in page.evaluate("document.querySelector('.facts').textContent")

    # 2. The second turn has the first one; both stay in the tab.
    send(page, "And now?")
    page.wait_for(f"document.querySelectorAll('.turn').length === 2 && {DONE}")
    page.open(page.evaluate("location.href"))
    page.wait_for("document.querySelectorAll('.turn').length === 2")
    assert page.evaluate("document.querySelector('.body').textContent") == expected[0]
    page.click("#code")
    page.wait_for("document.querySelector('#code-box').open")
    code = page.evaluate("document.querySelector('#code-text').textContent")
    assert code.startswith("curl http") and "And now?" in code
    page.click("[data-code=python]")
    compile(page.evaluate("document.querySelector('#code-text').textContent"), "snippet", "exec")
    page.press("Escape")
    page.click("#clear")
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0


def test_tokens_show_their_alternatives(page: Page) -> None:
    set_value(page, "#max_tokens", 12)
    send(page, "Hi")
    page.wait_for(DONE)
    assert page.evaluate("document.querySelectorAll('.t.q1, .t.q2, .t.q3, .t.q4, .t.q5').length") >= 3
    page.point(".t")
    page.wait_for("!document.querySelector('#tip').hidden")
    rows = page.evaluate("document.querySelectorAll('#tip tr').length")
    assert rows in (5, 6) and page.evaluate("document.querySelectorAll('#tip .drawn').length") == 1
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    page.wait_for("document.querySelector('#tip').hidden")
    page.evaluate("document.querySelector('.body').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.t')].indexOf(document.querySelector('.t.on'))") == 1
    assert "%" in page.evaluate("document.querySelector('#news').textContent")
    page.press("Escape")
    page.wait_for("document.querySelector('#tip').hidden")


def test_stopping_ends_the_request(page: Page, server: ModelServer) -> None:
    set_value(page, "#max_tokens", 90000)
    page.click("#modes label:nth-child(3)")  # a chat of such replies would not fit the context
    for stop in (lambda: page.click("#stop"), lambda: page.press("Escape")):
        send(page, "aaa")
        page.wait_for("document.querySelectorAll('.turn:last-child .t').length > 3 && !$('stop').hidden")
        stop()
        page.wait_for(DONE)
        assert "stopped" in page.evaluate("document.querySelector('.turn:last-child .facts').textContent")
    page.wait_for("document.querySelector('#engine').textContent === 'ready'")
    assert server.engine.state()["tiny"]["running"] == 0


def test_what_is_said_is_never_html(page: Page) -> None:
    send(page, "<img src=x onerror=alert(1)>")
    page.wait_for(DONE)
    assert page.evaluate("document.querySelectorAll('#turns img, #turns script').length") == 0
    assert page.evaluate("document.querySelector('.user').textContent") == "<img src=x onerror=alert(1)>"


def test_contexts_stand_below_each_other(page: Page) -> None:
    set_value(page, "#model-a", "pair")
    page.wait_for("document.querySelectorAll('#inputs textarea').length === 2")
    set_value(page, "#max_tokens", 30)
    page.click("#input")
    page.type("abc")
    page.click("#input-1")
    page.type("UL.")
    page.press("Enter")
    page.wait_for(DONE)
    lanes = page.evaluate(
        "[...document.querySelectorAll('.lanes:first-child .lane > span')].map((node) => node.textContent.length)"
    )
    assert len(lanes) == 2 and lanes[0] == lanes[1] > 0


def test_phone_width(page: Page) -> None:
    page.resize(390, 844, mobile=True)
    send(page, "a" * 60)
    page.wait_for(DONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.evaluate("document.querySelector('#settings').checkVisibility()")
    page.click("#toggle-settings")
    assert page.evaluate("document.querySelector('#temperature').checkVisibility()")
    page.press("Escape")
    assert not page.evaluate("document.querySelector('#settings').checkVisibility()")
    for theme in ("dark", "light"):
        page.evaluate(f"setTheme('{theme}')")
        assert page.evaluate("document.documentElement.dataset.theme") == theme


def test_the_token_comes_from_the_address_or_a_field(browser: Page, tmp_path: Path) -> None:
    with running([make_served("tiny", 0)], token="secret") as server:
        browser.open(server.url)
        browser.wait_for("document.querySelector('#model-a').value === 'tiny'")
        assert browser.evaluate("location.hash") == "" and "#token=secret" in server.url
        browser.evaluate("sessionStorage.clear()")
        browser.open(f"{server.url.partition('#')[0]}?again")
        browser.wait_for("document.querySelector('#token-box').open")
        browser.click("#token")
        browser.type("wrong")
        browser.press("Enter")
        browser.wait_for("!document.querySelector('#token-error').hidden")
        browser.type("secret")
        browser.press("Enter")
        browser.wait_for("document.querySelector('#model-a').value === 'tiny'")
        assert not browser.evaluate("document.querySelector('#token-box').open")
