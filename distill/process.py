"""Run commands: an argument list, never a shell; a process group of its own, which ends with the command, its time or the lab.

Ending only the process that was started would leave those that it started at work: EasyDistill's command line, killed, leaves its
training behind, and a training on several GPUs puts each worker into a session of its own. So all that a command started is ended, whether
its first process is still there or not: its group, and every process that bears its mark, which a child inherits in its environment.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import store
from .errors import shortened
from .guard import MARK, marked, send

LOG_TAIL_LINES = 20
PATIENCE_SECONDS = 10  # between asking a group to end and ending it
GUARD = Path(__file__).with_name("guard.py")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    status   its exit status, negative for a signal
    overdue  "", or which limit ended it: "limit" (wall-clock time) or "silence" (no output)
    seconds  how long it ran
    """

    status: int
    overdue: str
    seconds: float


def run(
    command: list[str],
    log: Path,
    on_line: Callable[[str], bool | None] = lambda line: None,
    *,
    cwd: str | Path | None = None,
    env: dict | None = None,
    append: bool = False,
    limit_seconds: float | None = None,
    silence_seconds: float | None = None,
    clean: Callable[[str], str] = lambda line: line,
) -> Ended:
    """Run a command to its end, under a guard that ends it with the lab.

    log              file that gets everything the command prints; `append` keeps what stands there
    on_line          called with each line, without its end; one for which it returns False is not logged
    clean            applied to each line before anybody sees it
    limit_seconds    wall-clock time after which the group is ended
    silence_seconds  time without a line after which the group is ended
    An exception in `on_line`, and an interrupt, end the group too. Raises ConfigError where the log cannot be written.
    """
    started = time.monotonic()
    with store.cannot_write(log), open(log, "a" if append else "w", encoding="utf-8") as file:
        child = start(command, cwd=cwd, env=env, output=subprocess.PIPE)
        try:
            with _watch(child, limit_seconds, silence_seconds) as watch:
                for line in child.stdout:
                    watch.heard_at = time.monotonic()
                    line = clean(line)
                    if on_line(line.rstrip("\n")) is not False:
                        file.write(line)
                        file.flush()
                child.wait()
        finally:
            end(child)
    return Ended(child.returncode, watch.overdue, time.monotonic() - started)


def start(command: list[str], *, cwd=None, env: dict | None = None, output) -> subprocess.Popen:
    """Start a command under a guard, in a group of its own; the caller ends it with `end`.

    output  an open file, or subprocess.PIPE: standard output and error together
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT}
    guarded = [sys.executable, "-I", str(GUARD), *map(str, command)]
    env = dict(os.environ if env is None else env)
    env[MARK] = mark = f"{os.environ.get(MARK, '')}/{secrets.token_hex(8)}"  # what a marked process starts bears both marks
    child = subprocess.Popen(guarded, cwd=cwd, env=env, start_new_session=True, encoding="utf-8", errors="replace", **pipes)
    _running[child] = mark
    return child


_running: dict[subprocess.Popen, str] = {}


def ask_all_to_end(number: int = signal.SIGTERM) -> None:
    """Send a signal to every group that this process has started and not ended; whoever waits for one goes on."""
    for child, mark in list(_running.items()):
        _signal(child, mark, number)


def end(child: subprocess.Popen) -> None:
    """End all that a child started, and close what connects it. Returns when none of it is at work."""
    _end_all_of(child)
    child.wait()
    _running.pop(child, None)
    for pipe in (child.stdin, child.stdout):
        if pipe:
            with suppress(BrokenPipeError):
                pipe.close()


def _end_all_of(child: subprocess.Popen) -> None:
    """First politely, then not."""
    mark = _running.get(child, "")
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(child, mark, number)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while _is_at_work(child, mark) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not _is_at_work(child, mark):
            return


def _signal(child: subprocess.Popen, mark: str, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)
    for pid in marked(mark):
        send(pid, number)


def _is_at_work(child: subprocess.Popen, mark: str) -> bool:
    """Whether any process that a child started has not ended. One that has, and that nobody has asked about, is in its group still."""
    child.poll()
    return bool(marked(mark))


@dataclass
class _Watch:
    heard_at: float
    overdue: str = ""


@contextmanager
def _watch(child: subprocess.Popen, limit_seconds: float | None, silence_seconds: float | None) -> Iterator[_Watch]:
    """Within the block, end a child's group when it runs or is silent for too long, or when the child itself has ended."""
    started = time.monotonic()
    watch, over = _Watch(heard_at=started), threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            now = time.monotonic()
            if limit_seconds and now - started > limit_seconds:
                watch.overdue = "limit"
            elif silence_seconds and now - watch.heard_at > silence_seconds:
                watch.overdue = "silence"
            if watch.overdue or child.poll() is not None:  # what the command left behind would keep its output open
                _end_all_of(child)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def tail(log: Path, lines: int = LOG_TAIL_LINES, skip: str | None = None) -> list[str]:
    """The end of a log, each line cut and marked, blank ones and those that begin with `skip` left out."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    kept = [line for line in text if line.strip() and not (skip and line.startswith(skip))]
    return [f"  | {shortened(line, 300)}" for line in kept[-lines:]]


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    return f"it was ended by {signal.Signals(-status).name}" + (", as happens when memory runs out" if -status == signal.SIGKILL else "")
