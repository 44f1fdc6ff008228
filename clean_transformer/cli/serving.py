"""Serves the page of `explain` on this machine, with a form for another text."""

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs

# The largest text of the form, in bytes as the browser sends them. GPT-2 reads about 5000.
MOST_BYTES = 1_000_000

# A function that returns the page of a text. The second argument is an error to show, or "".
Page = Callable[[str, str], str]


class PageServer(HTTPServer):
    """A server of the page. Only programs on this machine can reach the server.

    `page(text, error)` returns the HTML page of a text, and raises `ValueError` for a text that the
    model cannot read. `text` is the first text. `port` 0 lets the system choose a port.
    """

    def __init__(self, page: Page, text: str, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.page, self.text = page, text

    @property
    def hosts(self) -> list[str]:
        """The names by which a browser may call this server.

        Other names are refused, so that no web page can reach the server under a name of its own.
        """
        return [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]


class Handler(BaseHTTPRequestHandler):
    """Answers a request with the page. A text that was posted becomes the text of the server."""

    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page of the last text."""
        if self.allowed():
            self.answer(HTTPStatus.OK, self.server.page(self.server.text, ""))

    def do_POST(self) -> None:
        """Answer with the page of the text in the form, or with the last page and an error."""
        if not self.allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        text = form.get("text", [""])[0].replace("\r\n", "\n")
        try:
            if not text:
                raise ValueError("the text is empty; give at least one character")
            page, status = self.server.page(text, ""), HTTPStatus.OK
            self.server.text = text
        except ValueError as error:
            page = self.server.page(self.server.text, str(error))
            status = HTTPStatus.BAD_REQUEST
        self.answer(status, page)

    def allowed(self) -> bool:
        """Whether the request is for the page, and comes from the page. Otherwise, refuse it."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        ours = origin is None or origin in [f"http://{host}" for host in hosts]
        if self.headers.get("Host") not in hosts or not ours:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            return True
        return False

    def answer(self, status: HTTPStatus, page: str) -> None:
        """Send the HTML `page`, with the HTTP status `status`."""
        content = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing, because the terminal shows the address."""
