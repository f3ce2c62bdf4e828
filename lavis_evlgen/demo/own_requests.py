"""Protection of the page against requests that other web sites make (DNS rebinding, cross-site requests).

They reach a page on 127.0.0.1 through the visitor's own browser, which names them in the headers Host and Origin.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
REFUSED = "this page answers requests that are addressed to it and come from itself\n"


def hosts_of(host: str) -> frozenset[str]:
    """Allowed Hosts of a page served on `host`; where it is served on every address, this machine's name too."""
    own = _name(host)
    return LOOPBACK | {own} | ({socket.gethostname().lower()} if _is_every_address(own) else set())


class OwnRequestsOnly:
    """ASGI middleware: 403 for another Host than `host`'s names, and for another Origin than the Host.

    Ports are not compared: a tunnel may have changed the page's. Where the page is served on every address (0.0.0.0),
    any IP address is accepted as Host: DNS rebinding needs a name.
    """

    def __init__(self, app, host: str):
        self.app, self.hosts, self.every = app, hosts_of(host), _is_every_address(_name(host))

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket") or self.answers(scope["headers"]):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": REFUSED.encode()})

    def answers(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """headers: (name in lower case, value), as ASGI gives them."""
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if len(hosts) != 1 or len(origins) > 1 or not self._is_own(_name(hosts[0])):
            return False
        return not origins or urlsplit(origins[0]).netloc.lower() == hosts[0].lower()

    def _is_own(self, name: str) -> bool:
        return name in self.hosts or (self.every and _address(name) is not None)


def _name(host: str) -> str:
    """`localhost:7860` -> localhost; `[::1]:7860` and `::1` -> ::1; "" for what is no host."""
    if _address(host) is not None:
        return host.lower()
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _address(name: str):
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_every_address(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_unspecified
