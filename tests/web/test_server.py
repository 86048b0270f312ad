import asyncio
import socket

import pytest

from web.server import HOST, SameOrigin, listen


async def application(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"page"})


def answer(**headers: str) -> tuple[int, dict]:
    """(status, headers) that a request with these headers gets."""
    sent = []

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(SameOrigin(application)({"type": "http", "headers": pairs}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "localhost"])
def test_the_own_page_is_served_and_may_load_nothing_from_elsewhere(host):
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        status, sent = answer(**headers)
        assert status == 200
        assert sent[b"a"] == b"b"
        assert sent[b"content-security-policy"].startswith(b"default-src 'self';")
        assert b"http" not in sent[b"content-security-policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.test:8000"},  # a name that another site has pointed here
        {"host": "127.0.0.1.evil.test"},
        {"host": ""},
        {},
        {"host": "localhost:8000", "origin": "http://evil.test"},
        {"host": "localhost:8000", "origin": "null"},
        {"host": "localhost:8000", "origin": "http://localhost:8001"},
        {"host": "localhost:8000", "origin": "https://localhost:8000"},
        {"host": "evil.test:8000", "origin": "http://evil.test:8000"},
    ],
)
def test_another_sites_page_is_refused(headers):
    status, _ = answer(**headers)
    assert status == 403


def test_what_is_no_request_goes_through():
    asyncio.run(SameOrigin(application)({"type": "lifespan"}, None, None))


def test_a_port_that_is_taken_is_one_line():
    with listen(0) as opened:
        host, port = opened.getsockname()
        assert host == HOST
        opened.listen()
        with pytest.raises(ValueError, match=f"--port {port}: .*choose another one"), listen(port):
            pass
    with pytest.raises(ValueError, match="--port 70000: "), listen(70000):
        pass
    with listen(port), socket.socket():
        pass  # it is free again
