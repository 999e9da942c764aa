"""Serves a report on this machine, made anew when the files that it shows change."""

import http.server
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.reporting import page, read
from distill.runtime import paths
from models.errors import UserError

POLL_SECONDS = 2
_HOSTS = ("127.0.0.1", "localhost")
_SHOWN = ("*.json", "*.jsonl", "rollouts/*.jsonl", "eval/*.json*", "eval/*/*.json*")
_SHOWN += ("eval/*/*/*.json*",)

# Asks for the state of the files, and loads the page again, in its place, when they have changed.
_SCRIPT = """"use strict";
restorePlace(JSON.parse(sessionStorage.getItem("place") ?? "{}"));
setInterval(async () => {
  const answer = await fetch("state").catch(() => null);
  if (!answer?.ok || (await answer.text()) === "STATE") return;
  sessionStorage.setItem("place", JSON.stringify(readPlace()));
  location.reload();
}, POLL);
"""
_POLICY = "; connect-src 'self'"  # for the question above


def read_state(names: Sequence[str]) -> str:
    """Returns a text that changes when a file that a report shows does."""
    found = []
    for name in names:
        for pattern in _SHOWN:
            for path in sorted(Path(name).glob(pattern)):
                try:
                    status = path.stat()
                except OSError:  # gone since
                    continue
                found.append((str(path), status.st_mtime_ns, status.st_size))
    return f"{hash(tuple(found)) & (2**64 - 1):x}"


def serve(names: Sequence[str], port: int, max_transcripts: int) -> None:
    """Serves the report of directories until the process is interrupted.

    Args:
      port: 0: any that is free. It is printed.
      max_transcripts: of each run.

    Raises:
      UserError: if a directory is neither a run nor an evaluation, or is in a bucket; if the port
        is taken.
    """
    if remote := next(filter(paths.is_remote, names), None):
        raise UserError(f"--watch: {remote}: only local directories are followed")
    lock, pages = threading.Lock(), dict[str, bytes]()

    def make_page() -> bytes:
        with lock:
            state = read_state(names)
            if state not in pages:
                report = page.make_report(*read.read_directories(names, max_transcripts))
                script = _SCRIPT.replace("STATE", state).replace("POLL", str(1000 * POLL_SECONDS))
                pages.clear()
                pages[state] = page.render_page(report, script, _POLICY).encode()
            return pages[state]

    make_page()  # what is wrong now ends the verb

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in _HOSTS:  # a page elsewhere that leads its own name here
                self.send_error(403)
            elif self.path == "/":
                try:
                    self._answer("text/html; charset=utf-8", make_page())
                except UserError as error:  # a directory that is gone
                    self.send_error(503, explain=str(error))
            elif self.path == "/state":
                self._answer("text/plain", read_state(names).encode())
            else:
                self.send_error(404)

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer((_HOSTS[0], port), Handler)
    except OSError as error:
        raise UserError(f"--port={port}: {error.strerror}") from None
    server.daemon_threads = True
    with server:
        print(f"watching  http://{_HOSTS[0]}:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            while True:
                time.sleep(3600)
        finally:
            server.shutdown()
