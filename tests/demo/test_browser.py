"""The page as a visitor has it: Chromium, real clicks."""

import shutil
from urllib.parse import urlparse

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: uv sync --extra dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
SECONDS = 60_000


@pytest.fixture
def browser_page(served):
    """(page, addresses it asked for); the page is open."""
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(SECONDS)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.address)
        yield page, asked
        browser.close()


def said(page) -> str:
    """What stands in the text box once something does."""
    page.wait_for_function("document.querySelector('#text textarea').value.length > 0")
    return page.input_value("#text textarea")


def test_a_visitor_uploads_clicks_asks_and_picks(served, browser_page, tmp_path):
    page, asked = browser_page
    page.set_input_files("#file input[type=file]", served.picture(5))
    page.wait_for_selector("#preview img")
    page.click("#say")
    caption = said(page)
    page.wait_for_selector("#tokens img")
    page.wait_for_selector("#facts >> text=/→ 9 in the prompt/")
    page.fill("#question textarea", "what color is the square?")
    page.click("#ask")
    page.wait_for_function("old => document.querySelector('#text textarea').value != old", arg=caption)
    # r: only once `as trained` is off
    assert page.is_disabled("#r input[type=number]")
    page.click("#trained input")
    page.wait_for_selector("#r input[type=number]:enabled")
    page.fill("#r input[type=number]", "8")
    page.press("#r input[type=number]", "Tab")
    page.click("#examples button.thumbnail-item >> nth=2")
    page.wait_for_selector("#file >> text=scene")
    page.click("#say")
    page.wait_for_selector("#facts >> text=/→ 5 in the prompt/")
    hosts = {urlparse(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {f"127.0.0.1:{served.port}"}, "the page asked another host"


def test_a_visitor_sees_why_a_file_is_refused(browser_page, tmp_path):
    page, _ = browser_page
    (tmp_path / "note.jpg").write_text("dear picture")
    page.set_input_files("#file input[type=file]", tmp_path / "note.jpg")
    page.wait_for_selector("text=note.jpg: looks like text, not a picture")
