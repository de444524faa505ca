"""Run a command that knows nothing of the lab, and end it with the lab: `python guard.py COMMAND ARGUMENT…`, standard library alone.

The lab holds the other end of standard input. When that closes, because the lab was killed or its kernel was restarted, the guard ends
the command and whatever the command started: its own process group, and all that bear its mark. Otherwise it ends as the command ends, by
the same signal or with the same status.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

NOT_FOUND = 127
MARK = "QWEN_LAB_RUN"  # the environment variable that tells whose a process is


def main() -> None:
    """Run the command of the arguments."""
    threading.Thread(target=_end_group_with_the_lab, daemon=True).start()
    try:
        status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", flush=True)
        status = NOT_FOUND
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _end_group_with_the_lab() -> None:
    while os.read(0, 1024):
        pass
    for pid in marked(os.environ.get(MARK, "")):
        if pid != os.getpid():
            send(pid, signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """The processes that bear a mark and have not ended, in whatever session and under whatever parent."""
    return [int(place.name) for place in Path("/proc").glob("[0-9]*") if mark and _bears(place, mark)]


def _bears(place: Path, mark: str) -> bool:
    try:
        if place.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX":
            return False
        return f"{MARK}={mark}".encode() in place.joinpath("environ").read_bytes()
    except OSError:  # it has ended since, or is somebody else's
        return False


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended since."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
