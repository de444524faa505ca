"""Which copies of training checkpoints serve somebody: of a training that has not ended, the last ones and the best so far.

A training is known by its run and by the `resume_key` that its checkpoints are sealed with, as the engine knows it.
Its end is what a published checkpoint records. `last/` tells nothing: it is written before the publication, which may be cut short, and
it stands there still when the same run is trained anew.
"""

from pathlib import Path

from . import items, store
from .copies import Copy, CopyFolder
from .errors import DataError

KEPT_CHECKPOINTS = 2  # the last ones, besides the best: one that a kill left half-written must not be the only one


def thin(folder: CopyFolder, count: int = KEPT_CHECKPOINTS) -> bool:
    """Drop all training checkpoints but the last `count` of each training and the best by one of them. Returns whether any was dropped."""
    needless = [copy for checkpoints in _trainings(folder) for copy in _needless(folder, checkpoints, count)]
    for copy in needless:
        folder.drop(copy.name)
    return bool(needless)


def make_room(folder: CopyFolder, roots: dict[str, Path]) -> bool:
    """Drop all but the newest checkpoint of each training, and those of runs that are no more here. Returns whether any was dropped."""
    gone = [copy for copy in _checkpoints(folder) if not items.place_of(run_of(copy.name), roots).exists()]
    for copy in gone:
        folder.drop(copy.name)
    return thin(folder, count=1) or bool(gone)


def drop_former(folder: CopyFolder, item: items.Item, roots: dict[str, Path], record: dict[str, dict]) -> None:
    """Drop a run's later checkpoints that were removed here, before an earlier one is copied: a training begun anew made that one.

    record  item → {"number", "files_sha256"}: what was last copied or restored here
    """
    for copy in _checkpoints(folder):
        is_later = run_of(copy.name) == run_of(item.name) and items.order(copy) > items.order(item)
        if is_later and was_removed(copy, items.place_of(copy.name, roots), record.get(copy.name)):
            folder.drop(copy.name)


def was_removed(copy: Copy, place: Path, last: dict | None) -> bool:
    """Whether what a copy holds was at its place here and is gone; what went on elsewhere since, or damage, is no removal.

    last  what was last copied from or restored to that place, {"number", "files_sha256"}; None where that never happened
    """
    return last is not None and last["number"] == copy.number and not place.exists()


def has_ended(folder: CopyFolder, checkpoint: Copy) -> bool:
    """Whether a training checkpoint's training was published: one that has a copy was made of the same job in the same run."""
    key, run = key_of(checkpoint), run_of(checkpoint.name).rpartition("/")[2]
    published = [made[-1] for made in folder.copies.values() if made and made[-1].kind == "published"]
    records = [_said(copy, items.SEALS["published"]) for copy in published]
    return key is not None and any(record.get("resume_key") == key and _run_of_record(record) == run for record in records)


def run_of(name: str) -> str:
    """The run that a training checkpoint is of: project/runs/x/checkpoints/checkpoint-10 → project/runs/x."""
    return name.rpartition("/checkpoints/")[0]


def key_of(checkpoint: Copy) -> str | None:
    """The key of the job that sealed a training checkpoint; None where that cannot be read."""
    return _said(checkpoint, store.MANIFEST).get("resume_key")


def _checkpoints(folder: CopyFolder) -> list[Copy]:
    """The newest copies of all training checkpoints."""
    return [made[-1] for made in folder.copies.values() if made and made[-1].kind == "training"]


def _trainings(folder: CopyFolder) -> list[list[Copy]]:
    """The checkpoints of each training, by step."""
    found: dict[tuple, list[Copy]] = {}
    for copy in sorted(_checkpoints(folder), key=items.order):
        found.setdefault((run_of(copy.name), key_of(copy)), []).append(copy)
    return list(found.values())


def _needless(folder: CopyFolder, checkpoints: list[Copy], count: int) -> list[Copy]:
    if has_ended(folder, checkpoints[-1]):
        return checkpoints
    if len(checkpoints) <= count:
        return []
    try:
        best = {best_of(copy.place) for copy in checkpoints[-count:]}
    except DataError:  # which one is the best cannot be known: none is dropped
        return []
    return [copy for copy in checkpoints[:-count] if copy.name.rpartition("/")[2] not in best]


def best_of(checkpoint: Path) -> str:
    """The name of the best checkpoint so far, which a training that goes on from this one may publish. Raises DataError."""
    place = checkpoint / "trainer_state.json"
    state = store.read_json(place) if place.is_file() else None
    return f"checkpoint-{state.get('best_global_step')}" if isinstance(state, dict) else ""


def _said(copy: Copy, file: str) -> dict:
    """What a JSON file of a copy says; nothing where it cannot be read: then no training has ended."""
    try:
        said = store.read_json(copy.place / file)
    except DataError:
        return {}
    return said if isinstance(said, dict) else {}


def _run_of_record(record: dict) -> str:
    """The name of the run's folder whose tokens a published checkpoint was trained on."""
    try:
        return Path(record["job"]["dataset"]["labeled_path"]).parent.name
    except (KeyError, TypeError):
        return ""
