"""Run a module of the lab as a subprocess in the engine's environment, so that its memory is free again when it ends.

The child reports through standard output, a line of JSON an event; everything it prints goes to a log file. It lives in a process
group of its own and ends with its parent: interrupting the parent ends the group, and the child watches its standard input, which
closes when the parent dies.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

from . import store
from .environment import engine_python
from .errors import BackendError, shortened

EVENT = "@event "
LOG_TAIL_LINES = 20
_PARENT = "DISTILL_LAB_PARENT"


def run_module(module: str, arguments: list[str], log: Path, on_event: Callable[[dict], None]) -> int:
    """Run `python -m module arguments…` to its end; returns its exit status, negative for a signal.

    log       file that gets everything the child prints
    on_event  called with each event, in order
    """
    command = [engine_python()[0], "-m", module, *arguments]
    environment = {**_defaults(), **os.environ, **_one_gpu(), "PYTHONUNBUFFERED": "1", _PARENT: "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    child = subprocess.Popen(command, cwd=store.ROOT, env=environment, start_new_session=True, encoding="utf-8", errors="replace", **pipes)
    _children.add(child)
    try:
        with open(log, "w", encoding="utf-8") as file:
            for line in child.stdout:
                if line.startswith(EVENT):
                    on_event(json.loads(line.removeprefix(EVENT)))
                file.write(line)
                file.flush()
        return child.wait()
    finally:
        _end_group(child)
        _children.discard(child)


def in_parallel(tasks: list[Callable]) -> list:
    """Run tasks that each start an engine's process, two at a time where two cores are there and no GPU; returns their results in order.

    Two processes with half of the cores each do about 1.5 times as much as one after the other. An error or an interrupt ends them all.
    """
    workers = 1 if _visible_gpu() else min(2, usable_cores(), len(tasks))
    with _sharing_cores(workers), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises what a task raised
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            patience_ends = time.monotonic() + 10
            while not all(future.done() for future in futures):  # a task may be about to start its process
                for child in list(_children):
                    _signal_group(child, signal.SIGTERM if time.monotonic() < patience_ends else signal.SIGKILL)
                time.sleep(0.1)
            raise


_children: set[subprocess.Popen] = set()
_processes_at_once = 1


@contextmanager
def _sharing_cores(processes: int) -> Iterator[None]:
    global _processes_at_once
    _processes_at_once = processes
    try:
        yield
    finally:
        _processes_at_once = 1


def _visible_gpu() -> bool:
    """Whether NVIDIA's driver shows a GPU, known without loading torch."""
    return Path("/proc/driver/nvidia/gpus").is_dir() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def _defaults() -> dict:
    """Settings that a user's own environment may override."""
    return {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // _processes_at_once)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # a bar's every state would be a line of the log
    }


def usable_cores() -> int:
    """CPU cores that this process may run on; a container is often given fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_gpu() -> dict:
    """The first visible GPU alone: one process with several would split each batch, which TRL refuses."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[0]}


def _end_group(child: subprocess.Popen) -> None:
    """End the child and whatever it started; first politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            break
        try:
            _signal_group(child, number)
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
    child.stdin.close()
    child.stdout.close()


def _signal_group(child: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself since
        os.killpg(child.pid, number)


def emit(**event) -> None:
    """In the child: report one event; without a parent to read it, nothing is said."""
    if os.environ.get(_PARENT):
        sys.stdout.write(EVENT + json.dumps(event) + "\n")  # in one piece, so that no other line comes between
        sys.stdout.flush()


def end_with_parent() -> None:
    """In the child: exit at once when the parent is gone, so that a killed lab leaves no orphan at work."""
    if os.environ.get(_PARENT):
        threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def failure(what: str, status: int, log: Path) -> BackendError:
    """The error for a child that failed: its exit status in words and the end of its log."""
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    tail = [line for line in tail if line.strip() and not line.startswith(EVENT)][-LOG_TAIL_LINES:]
    if status < 0:
        how = f"it was ended by {signal.Signals(-status).name}"
        how += ", as happens when memory runs out" if -status == signal.SIGKILL else ""
    else:
        how = f"exit status {status}"
    return BackendError(
        "\n".join([f"{what} failed: {how}. The end of {store.shown(log)}:", *[f"  | {shortened(line, 300)}" for line in tail]])
    )
