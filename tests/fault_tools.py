"""What faults are made with: a small disk, damage to files, and a server that speaks the hub's protocol and fails as a test wants it to."""

import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

# Disks


class Disk:
    """A file system in memory, mounted at `place` until the block ends. Skips the test where this user may not mount.

    size_kib  of the disk, files' names and folders included
    """

    def __init__(self, place: Path, size_kib: int) -> None:
        self.place, self.size_kib = place, size_kib
        self._filler = place / "filler"

    def __enter__(self) -> "Disk":
        self.place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={self.size_kib}k", "tmpfs", str(self.place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting needs more rights than this user has: {done.stderr.strip()}")
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=True)

    @property
    def free_kib(self) -> int:
        found = os.statvfs(self.place)
        return found.f_bavail * found.f_frsize // 1024

    def fill(self, leave_kib: int = 0) -> None:
        """Write a file that leaves so much."""
        self.free()
        with open(self._filler, "wb") as file:
            file.write(bytes(1024 * (self.free_kib - leave_kib)))

    def free(self) -> None:
        """Remove what `fill` wrote."""
        self._filler.unlink(missing_ok=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Within the block, nothing can be written."""
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def grow(self, size_kib: int) -> None:
        """Make the disk larger."""
        self._remount(f"size={size_kib}k")

    def _remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.place)], check=True)


# Damage


def flip(file: Path) -> None:
    """Change one bit in the midst of a file: its length and its times stay."""
    times, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def truncate(file: Path) -> None:
    """Cut off the second half of a file."""
    os.truncate(file, file.stat().st_size // 2)


def tree(folder: Path) -> dict:
    """File → hash of its content, below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "filler"
    }


# A hub

COMMIT = "5" * 40
_PATHS = re.compile(
    r"(?:/api)?/(?:(?P<kind>models|datasets)/)?(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<what>revision|tree|paths-info|resolve)/(?P<rest>.*))?"
)


class Fault:
    """What a hub does in place of an answer.

    paths   regular expression of the paths that it is for
    status  of the answer; 0 cuts the connection
    times   how often, then it answers again; None: until it is taken away
    """

    def __init__(self, paths: str, status: int, times: int | None = None) -> None:
        self.paths, self.status, self.times = re.compile(paths), status, times

    def strikes(self, path: str) -> bool:
        if self.times == 0 or not self.paths.search(path):
            return False
        self.times = self.times and self.times - 1
        return True


class Hub:
    """Serve folders as the repositories of a hub while the block runs: what is known of them, lists of files, files in parts.

    models, datasets  name → folder of files
    """

    def __init__(self, models: dict | None = None, datasets: dict | None = None) -> None:
        self.folders = {"models": models or {}, "datasets": datasets or {}}
        self.faults: list[Fault] = []
        self.pause_seconds = 0.0  # before each answer
        self.asked: list[str] = []  # the path of every request, in order
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, path: str) -> Fault | None:
        """What a request meets, noted down."""
        with self.lock:
            self.asked.append(path)
            return next((fault for fault in self.faults if fault.strikes(path)), None)

    def files(self, kind: str, name: str) -> list[dict]:
        """A repository's files as the hub lists them."""
        folder = self.folders[kind][name]
        return [
            {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _oid(file)}
            for file in sorted(folder.iterdir())
        ]


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()  # noqa: S324


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def _answer(self) -> None:
        time.sleep(self.hub.pause_seconds)
        if fault := self.hub.fault(self.path):
            return self._fail(fault.status)
        found = _PATHS.fullmatch(unquote(urlsplit(self.path).path))
        kind, name = (found["kind"] or "models", found["name"]) if found else ("models", "")
        if name not in self.hub.folders[kind]:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        _, _, rest = (found["rest"] or "").partition("/")
        if found["what"] == "resolve":
            return self._file(self.hub.folders[kind][name] / rest)
        files = self.hub.files(kind, name)
        if found["what"] == "tree" and rest:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if found["what"] == "tree":
            return self._json(files)
        if found["what"] == "paths-info":
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            return self._json([file for file in files if file["path"] in asked])
        facts = {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
        return self._json(facts | {"siblings": [{"rfilename": file["path"]} for file in files]})

    def _fail(self, status: int) -> None:
        if status:
            self._json({"error": "as a test wants it"}, status)
        else:
            self.close_connection = True
            self.connection.close()

    def _json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _file(self, file: Path) -> None:
        if not file.is_file():
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        return self._send(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _send(self, status: int, content: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass

    def finish(self) -> None:
        with suppress(OSError, ValueError):  # the connection that was cut above
            super().finish()
