"""A local replacement for the Hugging Face hub, which serves folders as repositories."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves each folder `repos/owner/name` as the repository "owner/name".

    `faults` maps the name of a file or repository to a fault. For a file, "cut" closes the
    connection after half of the file, at every attempt; "short" sends half of the file as if it
    were complete; "other" sends another content of the same length; "gone" answers 404 although
    the file is listed. For a repository, a number is the status of the answer, "failing" answers
    503, "silent" does not answer, and a text in brackets is the body of the answer. "long" and
    "slow" send an endless answer, fast or one byte at a time. `downloaded` collects the names of
    the files sent.

    For a repository that does not exist, the real hub answers 404 to users who are logged in, and
    401 to others, so that they cannot find out which repositories are private. The answer of this
    server is `status_of_unknown`.
    """

    def __init__(self, repos: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos = repos
        self.faults: dict[str, str] = {}
        self.status_of_unknown = 401
        self.downloaded: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", owner, name, *_]:
                self.send_listing(f"{owner}/{name}")
            case [owner, name, "resolve", _, file]:
                self.send_file(self.server.repos / owner / name / file)
            case ["cdn", owner, name, file]:
                self.send_bytes(self.server.repos / owner / name / file)
            case _:
                self.send_reply(404)

    do_HEAD = do_GET

    def send_listing(self, repo: str) -> None:
        folder = self.server.repos / repo
        if not folder.is_dir():
            return self.send_reply(self.server.status_of_unknown)
        match self.server.faults.get(repo):
            case "failing":
                return self.send_reply(503)
            case str(status) if status.isdigit():
                return self.send_reply(int(status))
            case "silent":
                sleep(3)
                self.close_connection = True
                return None
            case "long" | "slow" as endless:
                return self.send_endlessly(0.1 if endless == "slow" else 0)
            case str(body) if body[:1] in ("[", "{"):
                return self.send_reply(200, {}, body.encode())
        siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        listing = {"id": repo, "sha": COMMIT, "siblings": siblings}
        self.send_reply(200, {"Content-Type": "application/json"}, json.dumps(listing).encode())

    def send_endlessly(self, seconds: float) -> None:
        self.send_reply(200, {"Content-Length": str(2**40)}, b"[")
        with suppress(OSError):
            while True:
                sleep(seconds)
                self.wfile.write(b" " * (1 if seconds else 2**20))

    def send_file(self, path: Path) -> None:
        """Send a small file directly, and a redirect for weights, as the real hub does."""
        if self.server.faults.get(path.name) == "gone" or not path.is_file():
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return self.send_reply(404, missing)
        if path.suffix == ".json" or path.suffix == ".txt":
            return self.send_bytes(path)
        owner, name = path.parts[-3:-1]
        location = {
            "Location": f"{self.server.url}/cdn/{owner}/{name}/{path.name}",
            "X-Linked-Size": str(path.stat().st_size),
            "X-Linked-Etag": etag(path),
            "X-Repo-Commit": COMMIT,
        }
        self.send_reply(302, location)

    def send_bytes(self, path: Path) -> None:
        content = path.read_bytes()
        fault = self.server.faults.get(path.name)
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        headers = {"ETag": etag(path), "X-Repo-Commit": COMMIT}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.server.downloaded.append(path.name)
            if fault == "other":
                content = bytes(byte ^ 1 for byte in content)
            if fault == "short":
                content = content[: len(content) // 2]
        headers["Content-Length"] = str(len(content) - start)
        stop = len(content) // 2 if fault == "cut" else len(content)
        self.send_reply(206 if start else 200, headers, content[start:stop])
        self.close_connection = fault == "cut"

    def send_reply(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests clean."""


def etag(path: Path) -> str:
    """The hash of a file: of Git for small files, and of Git LFS for weights."""
    hash = sha1 if path.suffix in (".json", ".txt") else sha256
    return f'"{hash(path.read_bytes()).hexdigest()}"'


@contextmanager
def serving(repos: Path) -> Iterator[HubServer]:
    """A running server for these repositories."""
    with HubServer(repos) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
