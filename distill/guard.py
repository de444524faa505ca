"""Run a command that knows nothing of the lab, and end it with the lab: `python guard.py COMMAND ARGUMENT…`, standard library alone.

The lab holds the other end of standard input. When that closes, because the lab was killed or its kernel was restarted, the guard ends
its whole process group: the command, and whatever the command started. Otherwise it ends as the command ends, by the same signal or
with the same status.
"""

import os
import signal
import subprocess
import sys
import threading

NOT_FOUND = 127


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
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
