"""Run a module of the lab as a subprocess in the engine's environment, so that its memory is free again when it ends.

The child reports through standard output, a line of JSON an event; everything it prints goes to a log file.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from . import process, store
from .environment import engine_python
from .errors import BackendError

EVENT = "@event "
_PARENT = "DISTILL_LAB_PARENT"


def run_module(
    module: str,
    arguments: list[str],
    log: Path,
    on_event: Callable[[dict], None],
    limit_seconds: float | None = None,
    append: bool = False,
) -> process.Ended:
    """Run `python -m module arguments…` to its end; it ends with the lab too.

    log            file that gets everything the child prints; `append` keeps what stands there
    on_event       called with each event, in order
    limit_seconds  wall-clock time that it may take
    """

    def hear(line: str) -> None:
        if line.startswith(EVENT):
            on_event(json.loads(line.removeprefix(EVENT)))

    command = [engine_python()[0], "-m", module, *arguments]
    environment = {**child_environment(), "PYTHONUNBUFFERED": "1", _PARENT: "1"}
    return process.run(command, log, hear, cwd=store.ROOT, env=environment, limit_seconds=limit_seconds, append=append)


def in_parallel(tasks: list[Callable]) -> list:
    """Run tasks that each start an engine's process, two at a time where two cores are there and no GPU; returns their results in order.

    Two processes with half of the cores each do about 1.5 times as much as one after the other. An error or an interrupt ends them all.
    """
    workers = 1 if gpu_is_visible() else min(2, usable_cores(), len(tasks))
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
                process.ask_all_to_end(signal.SIGTERM if time.monotonic() < patience_ends else signal.SIGKILL)
                time.sleep(0.1)
            raise


_processes_at_once = 1


@contextmanager
def _sharing_cores(processes: int) -> Iterator[None]:
    global _processes_at_once
    _processes_at_once = processes
    try:
        yield
    finally:
        _processes_at_once = 1


def gpu_is_visible() -> bool:
    """Whether NVIDIA's driver shows a GPU, known without loading torch."""
    return Path("/proc/driver/nvidia/gpus").is_dir() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def child_environment() -> dict:
    """The environment variables of a process that loads models: the user's own, one GPU, a fair share of the cores, quiet libraries."""
    return {**_defaults(), **os.environ, **_one_gpu()}


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


def emit(**event) -> None:
    """In the child: report one event; without a parent to read it, nothing is said."""
    if os.environ.get(_PARENT):
        sys.stdout.write(EVENT + json.dumps(event) + "\n")  # in one piece, so that no other line comes between
        sys.stdout.flush()


def failure(what: str, ended: process.Ended, log: Path) -> BackendError:
    """The error for a child that failed: how it ended in words, and the end of its log."""
    how = f"it was ended after {ended.seconds:.0f} s, its time limit" if ended.overdue else process.how_it_ended(ended.status)
    return BackendError("\n".join([f"{what} failed: {how}. The end of {store.shown(log)}:", *process.tail(log, skip=EVENT)]))
