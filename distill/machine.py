"""What this machine has: its GPU, as the engine's Python sees it, and what memory and disk are free."""

import shutil
from pathlib import Path

from . import engine, environment, store
from .console import say
from .errors import ConfigError
from .preflight import TEACHER_BITS, Machine, choose_teacher, machine_of
from .shapes import find_shape

QUESTION_TOKENS, ANSWER_TOKENS = 512, 256  # of a question that a teacher is asked, and of its answer: assumed


def gpu() -> dict | None:
    """The GPU that the engine's torch sees, as `environment.probe` tells; asked in a process of its own, so that this one holds no memory
    of it, and only where a driver is there, since that takes seconds."""
    return environment.probe(environment.engine_python()[0])["gpu"] if engine.gpu_is_visible() else None


def this_machine() -> Machine:
    """The machine at hand, as `preflight` takes it."""
    return machine_of(gpu(), free_ram_gib(), shutil.disk_usage(store.ROOT).free / 2**30)


def teacher_settings(name: str, bits: int | None = None) -> dict:
    """How a teacher is held and asked on this machine, {"bits", "batch_tokens"}; what was chosen is said.

    name  a folder, or a name on the hub
    bits  those that you ask for; None takes 8, or 4 where 8 do not fit
    Raises PreflightError with the figures where it does not fit.
    """
    try:
        shape, _ = find_shape(name)
    except ConfigError as error:
        say(f"note: {error} So its memory is not checked.")
        return {"bits": bits or TEACHER_BITS[0]}
    fit = choose_teacher(shape, QUESTION_TOKENS, ANSWER_TOKENS, this_machine(), bits)
    if not bits and fit.bits[0] != TEACHER_BITS[0]:
        say(f"teacher: {fit.bits[0]} bits ({fit.bits[1]})")
    return {"bits": fit.bits[0], "batch_tokens": fit.batch_tokens[0]}


def free_ram_gib() -> float | None:
    """Memory that is free for a new process: the machine's, or what its container has left; None where unknown."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = ((group / name).read_text().strip() if (group / name).is_file() else "" for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used) + _reclaimable(group / "memory.stat"))
    return free / 2**30


def _reclaimable(stat: Path) -> int:
    """Bytes of files' contents that a container keeps in memory and gives up when it needs the room."""
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
