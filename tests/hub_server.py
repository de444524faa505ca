"""A model hub of one's own, on this machine: one data set, spoken to by the real `huggingface_hub` and `datasets` (HF_ENDPOINT).

`busy_after` makes it answer 429 to every request for content once so many bytes of it have gone out; `silent` ends every connection.
"""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "acme/rows"


class Hub:
    """Serves the files of a folder as the data set `acme/rows`, at `url`."""

    def __init__(self, folder: Path, commit: str = "a" * 40) -> None:
        self.folder, self.commit, self.busy_after, self.silent, self.sent_bytes, self.refused = folder, commit, None, False, 0, 0
        self.fetched: Counter = Counter()  # content requests by file
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> list[dict]:
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{number:040x}"}
            for number, file in enumerate(sorted(self.folder.iterdir()))
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.hub.silent:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        if path in (f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/{self.hub.commit}"):
            siblings = [{"rfilename": file["path"]} for file in self.hub.files()]
            self._json({"id": NAME, "sha": self.hub.commit, "private": False, "tags": [], "siblings": siblings})
        elif path.startswith(f"/api/datasets/{NAME}/tree/{self.hub.commit}"):
            self._json(self.hub.files())
        elif path.startswith(f"/datasets/{NAME}/resolve/{self.hub.commit}/"):
            self._content(self.hub.folder / path.rpartition("/")[2])
        else:
            self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).get("paths", [])
        self._json([file for file in self.hub.files() if file["path"] in asked])

    def _json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _content(self, file: Path) -> None:
        if not file.is_file():
            self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        wanted = (self.headers.get("Range") or "bytes=-").removeprefix("bytes=").split("-")
        first, last = int(wanted[0] or 0), int(wanted[1] or len(content) - 1)
        piece = content[first : last + 1]
        if self.command == "GET":
            if self.hub.busy_after is not None and self.hub.sent_bytes + len(piece) > self.hub.busy_after:
                self.hub.refused += 1
                self._json({"error": "Too Many Requests"}, 429, {"Retry-After": "0"})
                return
            self.hub.sent_bytes += len(piece)
            self.hub.fetched[file.name] += 1
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206 if "Range" in self.headers else 200, piece, headers)

    def _answer(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
