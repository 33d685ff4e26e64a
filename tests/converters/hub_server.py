"""A local stand-in for the Hugging Face Hub: one model's files over HTTP, as `huggingface_hub` asks for them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `directory` as the model `repository`; `requested` are the files that were downloaded.

    denied: status and `X-Error-Code` of every answer to a request for a file
    """

    def __init__(self, repository: str, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.directory = repository, directory
        self.requested: list[str] = []
        self.denied: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[str]:
        found = (file for file in self.directory.rglob("*") if file.is_file())
        return sorted(file.relative_to(self.directory).as_posix() for file in found)


@contextmanager
def serving(repository: str, directory: Path) -> Iterator[Hub]:
    """The stand-in while the block runs."""
    hub = Hub(repository, directory)
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, repository = urlsplit(self.path).path, self.server.repository
        if path.startswith(f"/api/models/{repository}/tree/{COMMIT}"):
            self._send_json([self._entry(name) for name in self.server.files()])
        elif path in (f"/api/models/{repository}/revision/{revision}" for revision in ("main", "v1", COMMIT)):
            siblings = [{"rfilename": name} for name in self.server.files()]
            self._send_json({"id": repository, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{repository}/"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/{repository}/resolve/{COMMIT}/"):
            self._send_file(path.removeprefix(f"/{repository}/resolve/{COMMIT}/"), body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, name: str) -> dict[str, Any]:
        content = (self.server.directory / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_file(self, name: str, body: bool) -> None:
        if self.server.denied is not None:
            status, code = self.server.denied
            self._send(status, b"", {"X-Error-Code": code})
            return
        if body:
            self.server.requested.append(name)
        content = (self.server.directory / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(200, content, headers, body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests look at `requested`."""
