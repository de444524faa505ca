"""What this machine has: its GPU, as the engine's Python sees it, and what memory and disk are free; and whether a teacher fits it."""

import shutil
from pathlib import Path

from . import engine, environment, models, store, teacher
from .console import say
from .errors import ConfigError
from .memory import GIB, HALF
from .preflight import Disk, Machine, machine_of
from .prompt import asked_ids
from .shapes import Shape, find_shape

QUESTION_TOKENS, ANSWER_TOKENS = 512, 256  # of a question that a teacher is asked, and of its answer, where they are not known: assumed


def gpu() -> dict | None:
    """The GPU that the engine's torch sees, as `environment.probe` tells; asked in a process of its own, so that this one holds no memory
    of it, and only where a driver is there, since that takes seconds."""
    return environment.probe(environment.engine_python()[0])["gpu"] if engine.gpu_is_visible() else None


def this_machine(out_dir: Path | None = None, run_folder: Path | None = None) -> Machine:
    """The machine at hand, as `preflight` takes it, with the disks of `disks_of`."""
    return machine_of(gpu(), free_ram_gib(), disks_of(out_dir, run_folder))


def disks_of(out_dir: Path | None = None, run_folder: Path | None = None) -> tuple[Disk, ...]:
    """The file systems of the project's runs, of `out_dir` and of the hub's cache.

    What lies in a training's own folders counts as free, since a rerun takes its place.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    checkpoints = [out_dir, out_dir.with_name(f"{out_dir.name}.previous")] if out_dir else []
    own = {"runs": [run_folder] if run_folder else [], "out_dir": checkpoints, "HF_HOME": []}
    folders = {"runs": run_folder or store.ROOT / "runs", "out_dir": out_dir or store.ROOT, "HF_HOME": Path(HF_HUB_CACHE)}
    standing = {place: _standing(folder) for place, folder in folders.items()}
    found = []
    for device in dict.fromkeys(folder.stat().st_dev for folder in standing.values()):
        places = tuple(place for place, folder in standing.items() if folder.stat().st_dev == device)
        free_bytes = shutil.disk_usage(standing[places[0]]).free + sum(_bytes_in(own[place]) for place in places)
        found.append(Disk(free_bytes / GIB, places))
    return tuple(found)


def _standing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    folder = folder.resolve()
    return next(each for each in (folder, *folder.parents) if each.exists())


def _bytes_in(folders: list[Path]) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


# A teacher


def teacher_settings(name: str, request: dict, bits: int | None = None) -> dict:
    """How a teacher is held and asked on this machine, {"bits", "batch_tokens"}; what was chosen is said.

    name     a folder, or a name on the hub
    request  what it is asked, as `answers.ask` takes it: "questions", "max_new_tokens" and, where wanted, "batch_size"
    bits     those that you ask for; None takes 8, or 4 where 8 do not fit
    Raises PreflightError with the figures where it does not fit.
    """
    if not (shape := _shape(name)):
        return {"bits": bits or teacher.BITS[0]}
    coming = download_bytes(name, shape)
    fit = teacher.choose_teacher(shape, *_longest(name, request), this_machine(), bits, request.get("batch_size"), coming)
    if not bits and fit.bits[0] != teacher.BITS[0]:
        say(f"teacher: {fit.bits[0]} bits ({fit.bits[1]})")
    return {"bits": fit.bits[0], "batch_tokens": fit.batch_tokens[0]}


def check_served(name: str) -> None:
    """Raise PreflightError with the figures where a teacher that the lab is to serve itself does not fit this machine."""
    if shape := _shape(name):
        teacher.check_served(shape, QUESTION_TOKENS, ANSWER_TOKENS, this_machine(), download_bytes(name, shape))


def _shape(name: str) -> Shape | None:
    try:
        return find_shape(name)[0]
    except ConfigError as error:
        say(f"note: {error} So its memory is not checked.")
        return None


def _longest(name: str, request: dict) -> tuple[int, int]:
    """Tokens of the question that with its answer's limit takes the most, and that limit."""
    tokenizer, limits = models.load_tokenizer(name, "teacher"), request["max_new_tokens"]
    asked = [(each["instruction"], each.get("input") or "", each["mode"]) for each in request["questions"]]
    tokens = [(len(asked_ids(tokenizer, *question)), limits[question[-1]]) for question in asked]
    return max(tokens, key=sum, default=(QUESTION_TOKENS, ANSWER_TOKENS))


def download_bytes(name: str, shape: Shape) -> int:
    """What of a model has still to come from the hub, where weights mostly lie in 16 bits."""
    return 0 if models.is_here(name) else HALF * shape.parameters


# Memory


def free_ram_gib() -> float | None:
    """Memory that is free for a new process: the machine's, or what its container has left; None where unknown."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = ((group / name).read_text().strip() if (group / name).is_file() else "" for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used) + _reclaimable(group / "memory.stat"))
    return free / GIB


def _reclaimable(stat: Path) -> int:
    """Bytes of files' contents that a container keeps in memory and gives up when it needs the room."""
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
