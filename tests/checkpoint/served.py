"""A server of files by ranges, on this machine, that counts what it sends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(SimpleHTTPRequestHandler):
    """Files and directory listings; one range of bytes where it is asked for."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.exists():
            self.send_error(404)
        elif path.is_dir():
            links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in sorted(path.iterdir()))
            self.send(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"}, body)
        else:
            self.send_file(path, body=body)

    def send_file(self, path: Path, *, body: bool) -> None:
        data, asked = path.read_bytes(), self.headers.get("Range")
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        kind["ETag"] = f'"{path.stat().st_mtime_ns}"'
        if asked is None:
            self.send(200, data, kind, body)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        kind["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self.send(206, part, kind, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.server.sent += len(data)  # before whoever asked goes on
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        sent: bytes of files and listings so far.
        url: where it is.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[Handler] = Handler) -> None:
        self.folder, self.sent = folder, 0
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def finish_request(self, request: Any, address: Any) -> None:
        self.RequestHandlerClass(request, address, self, directory=str(self.folder))  # type: ignore[call-arg]


@contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[Server]:
    """Run it in a thread."""
    with Server(folder, handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
