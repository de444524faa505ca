"""Which copies of training checkpoints serve somebody: of a training that has not ended, the last ones and the best so far.

Its end is what a published checkpoint records. `last/` tells nothing: it is written before the publication, which may be cut short, and
it stands there still when the same run is trained anew.
"""

from pathlib import Path

from . import items, store
from .copies import Copy, CopyFolder
from .errors import DataError

KEPT_CHECKPOINTS = 2


def thin(folder: CopyFolder, count: int = KEPT_CHECKPOINTS) -> bool:
    """Drop all training checkpoints but the last `count` of each training and the best by one of them. Returns whether any was dropped."""
    needless = [copy for checkpoints in _trainings(folder).values() for copy in _needless(folder, checkpoints, count)]
    for copy in needless:
        folder.drop(copy.name)
    return bool(needless)


def make_room(folder: CopyFolder, roots: dict[str, Path]) -> bool:
    """Drop all but the newest checkpoint of each training, and those of runs that are no more here. Returns whether any was dropped."""
    gone = [copy for run, checkpoints in _trainings(folder).items() if not items.place_of(run, roots).exists() for copy in checkpoints]
    for copy in gone:
        folder.drop(copy.name)
    return thin(folder, count=1) or bool(gone)


def drop_former(folder: CopyFolder, item: items.Item, roots: dict[str, Path]) -> None:
    """Drop a run's later checkpoints that are no more here, before an earlier one is copied: a training begun anew made that one."""
    for copy in _trainings(folder).get(run_of(item.name), []):
        if items.order(copy) > items.order(item) and not items.place_of(copy.name, roots).exists():
            folder.drop(copy.name)


def has_ended(folder: CopyFolder, checkpoint: Copy) -> bool:
    """Whether a training checkpoint's training was published: one that has a copy was made of the same job in the same run."""
    key, run = _said(checkpoint, store.MANIFEST).get("resume_key"), run_of(checkpoint.name).rpartition("/")[2]
    published = [made[-1] for made in folder.copies.values() if made and made[-1].kind == "published"]
    records = [_said(copy, items.SEALS["published"]) for copy in published]
    return key is not None and any(record.get("resume_key") == key and _run_of_record(record) == run for record in records)


def run_of(name: str) -> str:
    """The run that a training checkpoint is of: project/runs/x/checkpoints/checkpoint-10 → project/runs/x."""
    return name.rpartition("/checkpoints/")[0]


def _trainings(folder: CopyFolder) -> dict[str, list[Copy]]:
    """Run → its training checkpoints, by step."""
    found: dict[str, list[Copy]] = {}
    for copy in sorted((made[-1] for made in folder.copies.values() if made and made[-1].kind == "training"), key=items.order):
        found.setdefault(run_of(copy.name), []).append(copy)
    return found


def _needless(folder: CopyFolder, checkpoints: list[Copy], count: int) -> list[Copy]:
    if has_ended(folder, checkpoints[-1]):
        return checkpoints
    if len(checkpoints) <= count:
        return []
    try:
        best = {_best_of(copy) for copy in checkpoints[-count:]}
    except DataError:  # which one is the best cannot be known: none is dropped
        return []
    return [copy for copy in checkpoints[:-count] if copy.name.rpartition("/")[2] not in best]


def _best_of(checkpoint: Copy) -> str:
    """The name of the best checkpoint so far, which a training that goes on from this one may publish."""
    place = checkpoint.place / "trainer_state.json"
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
