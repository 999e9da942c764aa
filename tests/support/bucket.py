"""A bucket in this process: the part of Google's JSON API that gcsfs and tensorstore use."""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any  # the Server below

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def about(self, name: str) -> dict[str, str]:
        data, generation = self.server.held[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00Z",
            "timeCreated": "2026-01-01T00:00:00Z",
        }

    def put(self, name: str, data: bytes) -> None:
        self.server.written.append(name)
        self.server.held[name] = (data, len(self.server.written))
        self.send_json(self.about(name))

    def do_GET(self) -> None:
        path, ask = self.parts()
        if path.endswith("/o"):
            return self.list(ask)
        name = self.named(path)
        if name is None:
            return self.send_json({"kind": "storage#bucket", "name": "bucket", "location": "HERE"})
        if name not in self.server.held:
            return self.answer(404, b"{}")
        if ask.get("alt") != "media":
            return self.send_json(self.about(name))
        data, generation = self.server.held[name]
        headers = {"x_goog_generation": str(generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self.answer(200, data, **headers)
        if span[1]:
            first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        else:
            first, last = max(0, len(data) - int(span[2])), len(data) - 1
        if first >= len(data):
            return self.answer(416, b"", Content_Range=f"bytes */{len(data)}")
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], **headers)

    def list(self, ask: dict[str, str]) -> None:
        prefix, mark = ask.get("prefix", ""), ask.get("delimiter", "")
        items, folders = [], set()
        for name in sorted(self.server.held):
            low, high = ask.get("startOffset", ""), ask.get("endOffset")
            if not name.startswith(prefix) or name < low or (high and name >= high):
                continue
            rest = name[len(prefix) :]
            if mark and mark in rest:
                folders.add(prefix + rest.split(mark)[0] + mark)
            else:
                items.append(self.about(name))
        self.send_json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def do_POST(self) -> None:
        path, ask = self.parts()
        if path.startswith("/session/"):
            return self.do_PUT()
        body = self.body()
        if path.startswith("/upload/"):
            if ask.get("uploadType") == "media":
                return self.put(ask["name"], body)
            name = ask["name"]
            self.server.begun[name] = b""
            where = f"http://{self.headers['Host']}/session/{urllib.parse.quote(name, safe='')}"
            return self.answer(200, b"", Location=where)
        if "/rewriteTo/" in path or "/copyTo/" in path:
            come, go = re.split("/rewriteTo/|/copyTo/", path)
            data = self.server.held[self.named(come)][0]
            self.server.held[self.named(go)] = (data, len(self.server.written))
            return self.send_json({"done": True, "resource": self.about(self.named(go))})
        self.send_json({})

    def do_PUT(self) -> None:
        name = urllib.parse.unquote(self.parts()[0].removeprefix("/session/"))
        self.server.begun[name] += self.body()
        span = self.headers.get("Content-Range", "")
        if span.endswith("/*"):
            return self.answer(308, b"", Range=f"bytes=0-{len(self.server.begun[name]) - 1}")
        self.put(name, self.server.begun.pop(name))

    def do_DELETE(self) -> None:
        found = self.server.held.pop(self.named(self.parts()[0]), None)
        self.answer(204 if found else 404)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def parts(self) -> tuple[str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        return path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    @staticmethod
    def named(path: str) -> Any:
        _, held, name = path.partition("/o/")
        return urllib.parse.unquote(name) if held else None


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Handler)
        self.held: dict[str, tuple[bytes, int]] = {}  # name -> data, generation
        self.written: list[str] = []
        self.begun: dict[str, bytes] = {}

    def handle_error(self, *_: object) -> None:
        pass  # a client that has gone

    @property
    def variables(self) -> dict[str, str]:
        """Returns variables that make gcsfs and tensorstore look for gs://bucket here."""
        address = f"http://localhost:{self.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


@contextlib.contextmanager
def bucket() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
