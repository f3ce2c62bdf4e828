"""Requests that other sites could make through a visitor's browser are not answered, and nothing stays behind."""

import os
import signal
import tempfile

import pytest

from lavis_evlgen.demo.own_requests import OwnRequestsOnly
from tests.demo.conftest import tiny_visitors
from tests.processes import forked
from tests.run_tools import free_port


def answers(served_on: str, host: str | None, origin: str | None = None) -> bool:
    headers = [(b"accept", b"*/*")]
    headers += [(b"host", host.encode())] if host is not None else []
    headers += [(b"origin", origin.encode())] if origin is not None else []
    return OwnRequestsOnly(None, served_on).answers(headers)


@pytest.mark.parametrize(
    "served_on, host, origin",
    [
        ("127.0.0.1", "127.0.0.1:7860", None),
        ("127.0.0.1", "localhost:7860", "http://localhost:7860"),
        ("127.0.0.1", "LOCALHOST:8888", "http://localhost:8888"),  # through a tunnel
        ("127.0.0.1", "[::1]:7860", "http://[::1]:7860"),
        ("::1", "[::1]:7860", None),
        ("my-box.example", "my-box.example:7860", "http://my-box.example:7860"),
        ("0.0.0.0", "192.168.1.7:7860", "http://192.168.1.7:7860"),
        ("0.0.0.0", f"{os.uname().nodename}:7860", None),
    ],
)
def test_what_is_addressed_to_the_page_is_answered(served_on, host, origin):
    assert answers(served_on, host, origin)


@pytest.mark.parametrize(
    "served_on, host, origin",
    [
        ("127.0.0.1", "evil.example:7860", None),  # a name that leads to 127.0.0.1
        ("127.0.0.1", "evil.example:7860", "http://evil.example:7860"),
        ("127.0.0.1", "127.0.0.1.evil.example:7860", None),
        ("127.0.0.1", "localhost:7860", "https://evil.example"),  # a form on another site
        ("127.0.0.1", "localhost:7860", "http://localhost:3000"),  # another program of this machine
        ("127.0.0.1", "localhost:7860", "null"),
        ("127.0.0.1", "192.168.1.7:7860", None),
        ("127.0.0.1", "", None),
        ("127.0.0.1", None, None),
        ("127.0.0.1", "[::1", None),
        ("0.0.0.0", "evil.example", None),
    ],
)
def test_what_is_not_is_refused(served_on, host, origin):
    assert not answers(served_on, host, origin)


def test_the_served_page_refuses_other_hosts_and_origins(served):
    import httpx

    upload = {"url": f"{served.address}gradio_api/upload", "files": {"files": ("x.png", b"x")}}
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert httpx.get(served.address, headers=headers).status_code == 403
        assert httpx.post(**upload, headers=headers).status_code == 403
    own = {"Origin": served.address.rstrip("/")}
    assert httpx.get(served.address, headers=own).status_code == 200
    assert httpx.post(**upload, headers=own).status_code == 200


def test_nothing_stays_behind_when_it_is_terminated(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed: uv sync --extra demo")
    from lavis_evlgen.demo import page

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def serve():
        page._uploads.cache_clear()  # of this process's own page
        page.start(tiny_visitors(0.2), "127.0.0.1", free_port())

    with forked(serve, tmp_path / "words") as process:
        process.wait_for(lambda: "Ctrl-C ends it" in process.words)
        assert list(tmp_path.glob("evlgen_demo_*"))
        process.send(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM, process.words
    assert not list(tmp_path.glob("evlgen_demo_*")) and "Traceback" not in process.words
