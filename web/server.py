"""The page's server: this machine alone can reach it, and only its own page can use it."""

import contextlib
import socket
from collections.abc import Iterator

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by another name a foreign page could reach this machine
# Whatever a reply holds, a browser asks nobody else for it. gradio's page has scripts and styles
# inside.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-dns-prefetch-control", b"off"),
]


def is_own_name(host: str) -> bool:
    """Whether a request's Host, with or without a port, is this machine by its own name."""
    return host.partition(":")[0] in NAMES


class SameOrigin:
    """ASGI middleware: refuses what another site's page sends, and says what a page may load.

    A browser names the page that sends a request in Origin, with each POST. A name that another
    site has pointed at this machine stands in Host.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        host = headers.get(b"host", "")
        origin = headers.get(b"origin", f"http://{host}")
        if not is_own_name(host) or origin != f"http://{host}":
            return await _refuse(send)

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        return await self.app(scope, receive, send_with_policy)


async def _refuse(send):
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": b"Only this server's own page may do that."})


@contextlib.contextmanager
def listen(port: int) -> Iterator[socket.socket]:
    """A socket of the loopback address. Port 0 takes a free one.

    Raises:
        ValueError: the port is taken, or no port.
    """
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port}: {error}; choose another one.") from error
        yield opened


def serve_page(app, opened: socket.socket):
    """Serve until a signal comes."""
    import uvicorn

    # Its only errors are of the end: pages that are still open. gradio prints those of the page.
    config = uvicorn.Config(SameOrigin(app), log_level="critical", timeout_graceful_shutdown=1)
    print(f"http://{HOST}:{opened.getsockname()[1]} is the page; Ctrl-C ends it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[opened])
