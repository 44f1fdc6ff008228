"""`explain --serve`: the page in the browser, for this machine alone."""

from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.parse import urlencode

import pytest

from clean_transformer.analysis.text_page import explain, render
from clean_transformer.cli.serving import MOST_BYTES, PageServer

from ..helpers import reading_model
from .running import assert_one_line, call

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def server() -> Iterator[PageServer]:
    def page(text: str, error: str) -> str:
        if len(text) > 20:
            raise ValueError("too long")
        return f"<{text}|{error}>"

    with PageServer(page, "first", 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: PageServer, text: str | None = None, path: str = "/", **headers: str):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    body = None if text is None else urlencode({"text": text})
    connection.request("GET" if text is None else "POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_only_this_machine_can_reach_it(server: PageServer):
    assert server.server_address[0] == "127.0.0.1"


def test_the_text_of_the_form_is_shown_and_stays(server: PageServer):
    assert ask(server) == (200, "<first|>")
    assert ask(server, "né\r\n<b>") == (200, "<né\n<b>|>")
    assert ask(server) == (200, "<né\n<b>|>")


@pytest.mark.parametrize(
    ("text", "error"), [("x" * 21, "too long"), ("", "the text is empty; give")]
)
def test_what_cannot_be_read_is_said_on_the_last_page(server: PageServer, text: str, error: str):
    status, page = ask(server, text)
    assert status == 400
    assert page.startswith(f"<first|{error}")
    assert ask(server) == (200, "<first|>")


def test_other_sites_are_refused(server: PageServer):
    assert ask(server, Host="example.org")[0] == 403
    assert ask(server, "text", Host=f"example.org:{server.server_port}")[0] == 403
    assert ask(server, "text", Origin="http://example.org")[0] == 403
    assert ask(server, "text", Origin=f"http://localhost:{server.server_port}")[0] == 200
    assert ask(server, path="/other")[0] == 404
    for length in (str(MOST_BYTES + 1), "-1", "many"):
        assert ask(server, "text", **{"Content-Length": length})[0] == 413
    assert ask(server) == (200, "<text|>")


def test_the_form_is_only_on_the_served_page():
    found = explain(reading_model(), "the cat")
    assert "<form" not in render(found)
    page = render(found, form="</textarea><b>", error="<i>")
    assert "&lt;/textarea&gt;&lt;b&gt;</textarea>" in page
    assert "&lt;i&gt;" in page


def test_the_command(monkeypatch: pytest.MonkeyPatch):
    pages = []
    monkeypatch.setattr(
        PageServer, "serve_forever", lambda self: pages.append(self.page("Once", ""))
    )
    result = call("explain", "--serve", "--port", 0, "--weights", "demo", "--device", "cpu")
    assert result.exit_code == 0
    assert result.stdout.startswith("serving http://127.0.0.1:")
    assert "<form method" in pages[0]


@pytest.mark.parametrize("arguments", [(), ("--serve", "--html", "page.html")])
def test_a_page_is_either_written_or_served(arguments: tuple[str, ...], tmp_path: Path):
    assert_one_line(call("explain", "text", *arguments), "give either --html FILE")


def test_a_port_without_a_server_is_refused(tmp_path: Path):
    result = call("explain", "text", "--html", tmp_path / "page.html", "--port", 80)
    assert_one_line(result, "--port is for --serve")
