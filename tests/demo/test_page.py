"""The served page: many visitors at once, refusals as messages, nothing from another host."""

import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed: uv sync --extra demo")

import gradio  # noqa: E402
import httpx  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from lavis_evlgen.config import ConfigError  # noqa: E402
from lavis_evlgen.demo.describing import Settings  # noqa: E402
from lavis_evlgen.demo.page import start  # noqa: E402
from tests.datasets.helpers import png_of  # noqa: E402
from tests.demo.conftest import MEGABYTES  # noqa: E402


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    downloads = str(tmp_path_factory.mktemp("downloads"))
    return Client(served.address, verbose=False, analytics_enabled=False, download_files=downloads)


def chosen(r: int | None) -> list:
    """as trained, r, prompt, beams, shortest, longest, style"""
    return [r is None, r or 0, "", 1, 1, 6, "outline"]


def test_twenty_requests_at_once_get_their_own_answers(served, client):
    wanted = [(seed, (None, 0, 2, 5, 8)[seed % 5]) for seed in range(20)]
    jobs = [
        client.submit(handle_file(served.picture(seed)), *chosen(r), api_name="/caption") for seed, r in wanted
    ]
    texts = set()
    for (seed, r), job in zip(wanted, jobs, strict=True):
        text, facts, tokens = job.result(timeout=120)
        settings = Settings(r=r, prompt="", num_beams=1, max_length=6)
        expected = served.visitors.look(str(served.picture(seed)), settings, "outline")
        assert text == expected[0]
        left = {None: 9, 0: 17, 2: 13, 5: 7, 8: 5}[r]
        assert f"**17** visual tokens → **{left}** in the prompt" in facts
        assert Path(tokens).stat().st_size > 1000
        texts.add(text)
    assert len(texts) > 10, "answers of one and the same text would not show a mix-up"


def test_questions(served, client):
    path = served.picture(3)
    text, facts, _ = client.predict(
        handle_file(path), *chosen(4), "what color is the square?", 5, api_name="/answer"
    )
    settings = Settings(r=4, num_beams=1, max_length=5, question="what color is the square?")
    assert text == served.visitors.look(str(path), settings, "outline")[0] and "→ **9** in the prompt" in facts


def test_refusals_are_messages(served, client, tmp_path):
    (tmp_path / "note.jpg").write_text("dear picture")
    (tmp_path / "large.png").write_bytes(png_of(20_000, 10_000))
    for path, says in (("note.jpg", "note.jpg: looks like text"), ("large.png", "large.png: too many pixels")):
        with pytest.raises(AppError, match=says):
            client.predict(handle_file(tmp_path / path), *chosen(None), api_name="/caption")
    with pytest.raises(AppError, match="give a picture or a clip first"):
        client.predict(None, *chosen(None), api_name="/caption")
    with pytest.raises(AppError, match="ask a question first"):
        client.predict(handle_file(served.picture()), *chosen(None), "", 5, api_name="/answer")
    with pytest.raises(AppError, match="9"):
        client.predict(handle_file(served.picture()), *chosen(9), api_name="/caption")
    stranger = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError):
        client.predict(stranger, *chosen(None), api_name="/caption")
    text, _, _ = client.predict(handle_file(served.picture()), *chosen(None), api_name="/caption")
    assert text, "it goes on after errors"


def test_large_uploads_are_cut_off(served):
    address = f"{served.address}gradio_api/upload"
    for size, status in ((int(MEGABYTES * 1e6) - 1, 200), (int(MEGABYTES * 1e6) + 1, 413)):
        assert httpx.post(address, files={"files": ("x.png", b"x" * size)}).status_code == status


class Loads(HTMLParser):
    """Addresses that a browser would fetch or open a connection to on its own."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe", "source", "audio", "video", "embed", "object"):
            self.found += [value for name, value in attrs if name in ("src", "href", "data") and value]


def elsewhere(address: str) -> bool:
    return bool(re.match(r"(https?:)?//(?!127\.0\.0\.1[:/])", address))


def test_the_page_loads_nothing_from_another_host(served):
    loads = Loads()
    loads.feed(httpx.get(served.address).text)
    assert loads.found and not [address for address in loads.found if elsewhere(address)]
    styles = [httpx.get(f"{served.address}theme.css").raise_for_status().text]
    styles += [path.read_text() for path in Path(gradio.__file__).parent.glob("templates/frontend/**/*.css")]
    assert len(styles) > 5 and "--body-background-fill" in styles[0]
    fetched = re.compile(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)")
    assert not [address for style in styles for address in fetched.findall(style) if elsewhere(address)]
    config = httpx.get(f"{served.address}config").json()
    assert config["analytics_enabled"] is False
    assert not [address for address in config.get("stylesheets") or [] if elsewhere(address)]


def test_what_looks_elsewhere_is_found():
    loads = Loads()
    loads.feed('<link href="https://fonts.googleapis.com/css2"><script src="./x.js"></script><a href="https://x.org">')
    assert [elsewhere(address) for address in loads.found] == [True, False]


def test_only_its_own_address_is_served(served):
    socket.create_connection(("127.0.0.1", served.port), 5).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", served.port), 5)


def test_a_taken_port_is_one_clear_error(served):
    with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {served.port}: cannot serve there, the port is ta"):
        start(served.visitors, "127.0.0.1", served.port, block=False)
    assert httpx.get(served.address).status_code == 200
