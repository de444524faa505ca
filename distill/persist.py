"""Work that outlives the session: `persist_to` takes back what an earlier session left in a folder, and from then on copies there.

What is kept: prepared data, answers and other journals, runs with their training checkpoints, checkpoints in the lab's folder, reports, and
the models that the hub gave. Never the hub's token, which lies elsewhere in its cache, and nothing outside these two folders.
"""

import atexit
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from . import items, store
from .console import progress, say
from .copies import CopyFolder
from .errors import ConfigError, DataError, shortened
from .mirror import Mirror, some
from .restore import Restored, restore

DRIVE = "/content/drive"
WAIT_SECONDS = 600
_active: Mirror | None = None
_held = ExitStack()


def persist_to(folder: str | Path) -> Mirror:
    """Restore what a folder holds of an earlier session, and copy there in the background what this one makes, until it ends.

    folder  on a drive, such as "/content/drive/MyDrive/qwen-lab"; made where it is missing, its parent is not
    Returns the Mirror: `flush(timeout_seconds)` waits for the copies, `status()` says how they stand, `close()` ends them. The same folder
    again returns the same Mirror.
    Raises ConfigError for a folder that can be none, DistillError where another run of this machine copies there now.
    """
    global _active
    place = store.resolve(folder)
    if _active and not _active.stopped and _active.folder.folder == place:
        return _active
    _end()
    roots = _roots()
    _check(place, roots)
    with ExitStack() as held:
        held.enter_context(store.lock(place))
        with store.cannot_write(place):
            target = CopyFolder(place)
            store.sweep(roots["project"] / "runs" / items.STAGE)
            record = _read_record(target.id, roots["project"])
            _tell(target, _restore(target, roots, record))
        _held.push(held.pop_all())
    _active = Mirror(target, roots, record, _remember(target.id, roots["project"])).start()
    atexit.register(_end)
    return _active


def wait_for_copies(timeout_seconds: float = WAIT_SECONDS) -> None:
    """Wait until all that the lab made is copied, and say so, or what is not; without `persist_to`, say that nothing is."""
    if _active is None:
        say("nothing is copied (PERSIST_TO is empty): what this session made ends with the machine")
        return
    left = _active.flush(timeout_seconds)
    now = _active.status()
    done = f"{now.copies} copies, {now.size_bytes / 2**30:.2f} GiB"
    say(f"{now.folder}: {done}, not copied yet: {some(left)} ({now.state})" if left else f"{now.folder}: {done}, everything is copied")


def mount_drive(folder: str | Path) -> None:
    """Ask Colab for Google Drive where `folder` lies on it and it is not mounted yet."""
    if "google.colab" in sys.modules and store.resolve(folder).is_relative_to(DRIVE) and not Path(DRIVE).is_mount():
        from google.colab import drive

        drive.mount(DRIVE)


def _end() -> None:
    """Copy what is left, for a while, and let the folder go."""
    global _active
    atexit.unregister(_end)
    if _active:
        _active.close()
    _active = None
    _held.close()


def _roots() -> dict[str, Path]:
    from huggingface_hub import constants

    return {"project": store.ROOT, "hub": Path(constants.HF_HUB_CACHE)}


def _check(place: Path, roots: dict[str, Path]) -> None:
    if place.is_relative_to(DRIVE) and not Path(DRIVE).is_mount():
        raise ConfigError(
            f"persist_to = {place}: Google Drive is not mounted. Run `from google.colab import drive; drive.mount({DRIVE!r})`."
        )
    for root in roots.values():
        if place.is_relative_to(root) or root.is_relative_to(place):
            raise ConfigError(f"persist_to = {place}: lies in what is copied, or over it ({root}). Name a folder elsewhere.")


def _restore(target: CopyFolder, roots: dict[str, Path], record: dict[str, dict]) -> Restored:
    if not target.copies:
        return Restored()
    with progress("Restoring") as update:
        return restore(target, roots, record, lambda name, done, total: update(done, total=total, note=name))


def _tell(target: CopyFolder, restored: Restored) -> None:
    """Say what came back, and what did not."""
    for problem in target.problems:
        say(f"{target.folder}: left alone: {shortened(problem)}")
    for problem in restored.damaged:
        say(f"damaged copy: {problem} What it lacks is made anew, unless it is here.")
    if restored.kept:
        say(f"kept as they are here: {some(restored.kept)}")
    found = f"restored {len(restored.names)} items, {restored.size_bytes / 2**20:,.1f} MiB" if restored.names else "nothing to restore"
    say(f"{target.folder}: {found}; what this session makes is copied there")


# What was last copied or restored here


def _read_record(folder_id: str, project: Path) -> dict[str, dict]:
    """Item → {"number", "files_sha256"} of this folder of copies; nothing where the last one was another."""
    place = project / "runs" / items.RECORD
    try:
        known = store.read_json(place) if store.is_file(place) else {}
    except DataError:  # without it, what is here counts as newer
        known = {}
    return dict(known["items"]) if isinstance(known, dict) and known.get("id") == folder_id else {}


def _remember(folder_id: str, project: Path) -> Callable[[dict], object]:
    return lambda record: store.write_json(project / "runs" / items.RECORD, {"id": folder_id, "items": record})
