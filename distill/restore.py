"""What a new session takes back from a folder of copies: what is missing here, does not verify, or was gone on with elsewhere.

Newer work is never overwritten by older, and no clock is asked: a copy takes a place here only where nothing whole stands there, where it
goes on from what stands there, or where what stands there is what was copied last and another session has copied since. Journals whose
entries each stand for themselves become one. Of one training the later checkpoint counts, wherever it was made; the figures follow it.
"""

import shutil
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from . import copies, items, rotation, store
from .errors import DataError
from .hub_cache import write_links
from .store import MODEL

SOURCES = "project/runs/sources"
FIRST = ("published", "training")  # an ended training's checkpoints are of no use; a run's figures follow its checkpoints


@dataclass
class Restored:
    """What came back: names of items and their bytes; and in words, which copies are damaged and what was left as it is here."""

    names: list[str] = field(default_factory=list)
    size_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    stood: dict[str, Path | None] = field(default_factory=dict)  # run → its last whole training checkpoint before


def is_wanted(copy: copies.Copy, local: dict | None, last: dict | None, continues: bool) -> bool:
    """Whether a copy is to take the place of what is here.

    local      what is here by content, name → {"bytes", "sha256"}; None where there is nothing whole
    last       what was last copied from or restored to here, {"number", "files_sha256"}; None where that never happened
    continues  whether the copy begins with all that is here and has more (a journal)
    """
    if local is None or continues:
        return True
    unchanged = last is not None and last["files_sha256"] == store.hash_json(local)
    return unchanged and copy.number > last["number"] and local != copy.files


def restore(source: copies.CopyFolder, roots: dict[str, Path], record: dict[str, dict], show=lambda name, done, total: None) -> Restored:
    """Bring back what is wanted of a folder of copies, each file checked and renamed into its place.

    roots   {"project": …, "hub": …}
    record  item → {"number", "files_sha256"}: what was last copied or restored; brought up to date
    show    called with the name of each item that comes next, how many were looked at, and how many there are
    Raises Vanished where the folder goes away meanwhile, ConfigError where this disk cannot be written to.
    """
    found = Restored()
    known = [items.Item(name, made[-1].kind, items.place_of(name, roots)) for name, made in source.copies.items()]
    for done, item in enumerate(sorted(known, key=lambda item: (item.kind not in FIRST, items.order(item)))):
        show(item.name, done, len(known))
        _restore_item(source, item, record, found)
    show("", len(known), len(known))
    return found


def _restore_item(source: copies.CopyFolder, item: items.Item, record: dict, found: Restored) -> None:
    """The newest copy of an item that is whole, where one is wanted; a damaged one is told of, and the one before looked at."""
    while copy := source.newest(item.name):
        try:
            if item.kind == "training" and _serves_nobody(source, copy, item, record, found.stood):
                return
            if theirs := _entries(copy.place / item.place.name) if item.kind == "journal" and not item.place.is_symlink() else {}:
                _merge(theirs, copy, item, record, found)
                return
            wanted, why_not = _wants(copy, item, record.get(item.name), found)
            if why_not:
                found.kept.append(f"{item.name}: {why_not}")
            if not wanted:
                return
            _place(copy, item)
        except DataError as error:
            source.check()  # a folder that is gone is no damaged copy
            found.damaged.append(str(error))
            source.forget(copy)
            continue
        found.names.append(item.name)
        found.size_bytes += copy.size_bytes
        record[item.name] = {"number": copy.number, "files_sha256": store.hash_json(copy.files)}
        return


def _wants(copy: copies.Copy, item: items.Item, last: dict | None, found: Restored) -> tuple[bool, str]:
    """Whether a copy is wanted, and what is to be said of it otherwise. found  what came back before it"""
    if item.place.is_symlink():
        return False, "a link stands here"
    if item.kind == "links":
        return _whole_content(item) != copy.files, ""  # only what is missing is made
    if item.kind == "blob":
        return not item.place.is_file() or item.place.stat().st_size != copy.size_bytes, ""  # its name is its content
    if item.kind == "published" and item.place.exists() and not (item.place / items.SEALS["published"]).is_file():
        return False, "something stands here that is no checkpoint of the lab"
    local = _whole_content(item)
    if is_wanted(copy, local, last, item.kind == "journal" and _goes_on(copy, item, local, found)):
        return True, ""
    return False, "" if local == copy.files else "what is here is newer, or another"


def _goes_on(copy: copies.Copy, item: items.Item, local: dict | None, found: Restored) -> bool:
    """Whether a journal whose order counts goes on from what is here: rows of a source, the longer; figures, with their training."""
    folder, _, _ = item.name.rpartition("/")
    if folder == SOURCES:
        return copy.size_bytes > sum(fact["bytes"] for fact in (local or {}).values())
    before = found.stood.get(folder)
    stood_at = _step(before) if before else 0
    went_on = any(rotation.run_of(name) == folder and _step(Path(name)) > stood_at for name in found.names)
    return (went_on and local != copy.files) or _continues(copy, local)


def _serves_nobody(source: copies.CopyFolder, copy: copies.Copy, item: items.Item, record: dict, stood: dict) -> bool:
    """Whether a training checkpoint is of no use here: its training has ended, was begun anew here, or stands here further on.

    stood  run → the last whole checkpoint that was here before; filled in
    """
    if rotation.has_ended(source, copy):
        return True
    run = rotation.run_of(item.name)
    if run not in stood:
        stood[run] = _last_whole(item.place.parent)
    here = stood[run]
    if here is None:
        return False
    if rotation.was_removed(copy, item.place, record.get(item.name)):
        return True
    if store.read_json(here / store.MANIFEST).get("resume_key") != rotation.key_of(copy):
        return False  # which of two trainings goes on is for the engine to say
    return _step(item.place) <= _step(here) and not _is_best(source, run, here, item.place.name)


def _last_whole(checkpoints: Path) -> Path | None:
    """The last training checkpoint in a folder that is whole."""
    for place in sorted(checkpoints.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            if store.read_manifest(place):
                return place
        except DataError:  # the engine says so
            continue
    return None


def _is_best(source: copies.CopyFolder, run: str, here: Path, name: str) -> bool:
    """Whether a training checkpoint was the best so far by the last one here or by a copy; True too where that cannot be read."""
    later = [made[-1].place for other, made in source.copies.items() if made and rotation.run_of(other) == run]
    try:
        return name in {rotation.best_of(place) for place in [here, *later]}
    except DataError:
        return True


def _step(place: Path) -> int:
    digits = place.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _whole_content(item: items.Item) -> dict | None:
    """What is here by content; None where there is nothing, or where its manifest says that it is damaged."""
    if not item.place.exists():
        return None
    try:
        if item.kind == "file":
            store.read_manifest(item.place)
        return items.content(item)
    except (DataError, items.SourceChanged):
        return None


def _entries(journal: Path) -> dict[str, bytes]:
    """The whole lines of a journal by their entries' ids; none where its entries have no ids, or where it cannot be read."""
    try:
        lines = BytesIO(b"".join(items.chunks(journal)))
    except items.SourceChanged:
        return {}
    return {entry["id"]: line for line, entry in store.intact_lines(lines) if isinstance(entry.get("id"), str)}


def _merge(theirs: dict[str, bytes], copy: copies.Copy, item: items.Item, record: dict, found: Restored) -> None:
    """Add a copy's entries that are missing here; where both answer, what is here counts. Of a damaged copy the whole lines are taken.

    Where the copy's answers were made otherwise (a teacher in 4 bits, not in 8), the journal that has more entries is the one.
    """
    ours = _entries(item.place)
    is_alike = MODEL not in ours or theirs.get(MODEL, ours[MODEL]) == ours[MODEL]
    merged = theirs | ours if is_alike else max(ours, theirs, key=len)
    if merged != ours:
        with store.atomic_file(item.place, "wb") as file:
            file.writelines(merged.values())
        found.names.append(item.name)
        found.size_bytes += sum(map(len, merged.values())) - sum(map(len, ours.values()))
    try:
        copies.read_file(copy, item.place.name)
    except DataError as error:
        raise DataError(f"{error} Its {len(theirs):,} whole lines are taken.") from error
    record[item.name] = {"number": copy.number, "files_sha256": store.hash_json(copy.files)}


def _continues(copy: copies.Copy, local: dict | None) -> bool:
    """Whether a journal's copy begins with what is here and is longer."""
    if not local:
        return False
    ((file, here),) = local.items()
    return here["bytes"] < copy.size_bytes and copies.is_whole(copy.place / file, here)


def _place(copy: copies.Copy, item: items.Item) -> None:
    """Put a copy's files where the item lies. Raises DataError for a damaged one; then nothing here has changed."""
    if item.kind == "links":
        _place_links(copy, item.place)
    elif item.kind in items.FOLDERS:
        with store.atomic_folder(item.place) as folder:
            for file in copy.files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                with open(folder / file, "xb") as target:
                    copies.read_file(copy, file, target.write)
            if item.kind == "training":  # not sealed, or damaged: of no use to anybody
                store.empty_folder(item.place)
    else:
        if item.kind == "file" and item.place.exists():  # whoever changed it by hand finds it again
            shutil.copyfile(item.place, item.place.with_name(f"{item.place.name}.replaced"))
        with store.atomic_file(item.place, "wb") as target:
            copies.read_file(copy, item.place.name, target.write)


def _place_links(copy: copies.Copy, model: Path) -> None:
    copies.read_file(copy, items.LINKS)
    write_links(model, store.read_json(copy.place / items.LINKS))
