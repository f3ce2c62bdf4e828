"""Requests that other sites could make through a visitor's browser are not answered, and nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavis_evlgen.demo.own_requests import OwnRequestsOnly
from tests.run_tools import ROOT


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


SERVE = """
import sys
from tests.demo.conftest import tiny_visitors
from lavis_evlgen.demo import page
visitors = tiny_visitors(0.2)
page._uploads()
page.start(visitors, "127.0.0.1", int(sys.argv[1]))
"""


def test_nothing_stays_behind_when_it_is_terminated(served, tmp_path):
    from tests.run_tools import free_port

    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    words = tmp_path / "words"
    with open(words, "w") as out:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(free_port())], env=env, cwd=ROOT, stdout=out,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while "Ctrl-C ends it" not in words.read_text():
                assert process.poll() is None and time.monotonic() < deadline, words.read_text()
                time.sleep(0.1)
            assert list(tmp_path.glob("evlgen_demo_*"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not list(tmp_path.glob("evlgen_demo_*")) and Path(words).exists()
