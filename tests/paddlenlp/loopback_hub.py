"""A web server on the loopback interface that serves directories as PaddleNLP's hub and Hugging Face's do."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BOS_PATH = re.compile(r"/bos/models/community/(?P<repo>.+)/(?P<file>[^/]+)$")
HF_PATH = re.compile(r"/hf/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")
CDN_PATH = re.compile(r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<file>.+)$")


class Seen(NamedTuple):
    """One request: its method, the hub's part of the path, the file asked for, the first byte asked for."""

    method: str
    hub: str
    filename: str
    start: int


class LoopbackHub:
    """`bos` and `hf` map a repository's name to its directory; `cut[file]` closes a connection after so many bytes."""

    def __init__(self) -> None:
        self.bos: dict[str, Path] = {}
        self.hf: dict[str, Path] = {}
        self.cut: dict[str, int] = {}
        self.ignore_range = False
        self.seen: list[Seen] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What points PaddleNLP and huggingface_hub at this server and at caches under `home`."""
        return {
            "PPNLP_ENDPOINT": f"{self.url}/bos",
            "PPNLP_HOME": str(home / "ppnlp"),
            "HF_ENDPOINT": f"{self.url}/hf",
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def fetched(self, hub: str) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        return [seen.filename for seen in self.seen if seen.method == "GET" and seen.hub == hub]


class _Handler(BaseHTTPRequestHandler):
    state: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        for pattern, repositories, hub in ((BOS_PATH, self.state.bos, "bos"), (HF_PATH, self.state.hf, "hf")):
            match = pattern.match(self.path)
            if match:
                path = repositories.get(match["repo"], Path("/nonexistent")) / match["file"]
                self._note(hub, path.name)
                if not path.is_file():
                    missing = "EntryNotFound" if match["repo"] in repositories else "RepoNotFound"
                    return self._status(404, [("X-Error-Code", missing)])
                if hub == "hf" and path.suffix == ".safetensors":
                    return self._redirect(f"{match['repo']}/{match['file']}", path)
                return self._file(path, with_body, [("X-Repo-Commit", COMMIT)] if hub == "hf" else [])
        match = CDN_PATH.match(self.path)
        if match:
            path = self.state.hf[match["repo"]] / match["file"]
            self._note("cdn", path.name)
            return self._file(path, with_body, [])
        return self._status(404, [])

    def _note(self, hub: str, filename: str) -> None:
        self.state.seen.append(Seen(self.command, hub, filename, self._start()))

    def _start(self) -> int:
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match and not self.state.ignore_range else 0

    def _status(self, code: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(code)
        for name, value in [*headers, ("Content-Length", "0")]:
            self.send_header(name, value)
        self.end_headers()

    def _redirect(self, location: str, path: Path) -> None:
        """Large files of Hugging Face's hub live elsewhere; size and version come with the redirection."""
        self._status(
            302,
            [
                ("Location", f"{self.state.url}/cdn/{location}"),
                ("X-Repo-Commit", COMMIT),
                ("X-Linked-Etag", f'"{_version(path)}"'),
                ("X-Linked-Size", str(path.stat().st_size)),
            ],
        )

    def _file(self, path: Path, with_body: bool, headers: list[tuple[str, str]]) -> None:
        body, start = path.read_bytes(), self._start()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        for name, value in [*headers, ("ETag", f'"{_version(path)}"'), ("Content-Length", str(len(body) - start))]:
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        cut = self.state.cut.get(path.name)
        self.wfile.write(body[start:] if cut is None else body[start : max(start, cut)])
        if cut is not None:
            self.close_connection = True


def _version(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
