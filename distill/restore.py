"""What a new session takes back from a folder of copies: what is missing here, does not verify, or was gone on with elsewhere.

Newer work is never overwritten by older, and no clock is asked: a copy takes a place here only where nothing whole stands there, where it
goes on from what stands there (a journal), or where what stands there is what was copied last and another session has copied since.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from . import copies, items, rotation, store
from .errors import DataError
from .hub_cache import write_links


@dataclass
class Restored:
    """What came back: names of items and their bytes; and in words, which copies are damaged and what was left as it is here."""

    names: list[str] = field(default_factory=list)
    size_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


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
    for done, item in enumerate(sorted(known, key=items.order)):
        show(item.name, done, len(known))
        _restore_item(source, item, record, found)
    show("", len(known), len(known))
    return found


def _restore_item(source: copies.CopyFolder, item: items.Item, record: dict, found: Restored) -> None:
    """The newest copy of an item that is whole, where one is wanted; a damaged one is told of, and the one before looked at."""
    while copy := source.newest(item.name):
        try:
            if item.kind == "training" and _serves_nobody(source, copy, item, record, found.names):
                return
            wanted, why_not = _wants(copy, item, record.get(item.name))
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


def _wants(copy: copies.Copy, item: items.Item, last: dict | None) -> tuple[bool, str]:
    """Whether a copy is wanted, and what is to be said of it otherwise."""
    if item.place.is_symlink():
        return False, "a link stands here"
    if item.kind == "links":
        return _whole_content(item) != copy.files, ""  # only what is missing is made
    if item.kind == "blob":
        return not item.place.is_file() or item.place.stat().st_size != copy.size_bytes, ""  # its name is its content
    if item.kind == "published" and item.place.exists() and not (item.place / items.SEALS["published"]).is_file():
        return False, "something stands here that is no checkpoint of the lab"
    local = _whole_content(item)
    if is_wanted(copy, local, last, item.kind == "journal" and _continues(copy, local)):
        return True, ""
    return False, "" if local == copy.files else "what is here is newer, or another"


def _serves_nobody(source: copies.CopyFolder, copy: copies.Copy, item: items.Item, record: dict, restored: list[str]) -> bool:
    """Whether a training checkpoint is of no use here: its training has ended, a later one is here, or one of a training begun anew.

    restored  names of what came back just now
    """
    others = [place for place in item.place.parent.glob("checkpoint-*") if (place / store.MANIFEST).is_file() and place != item.place]
    latest = max(others, key=_step, default=None)
    if rotation.has_ended(source, copy) or (latest and _step(latest) > _step(item.place)):
        return True
    if latest is None or (item.place / store.MANIFEST).is_file():
        return False
    name = f"{item.name.rpartition('/')[0]}/{latest.name}"
    if name in restored:
        return False
    here = _whole_content(items.Item(name, "training", latest))
    return not is_wanted(copy, here, record.get(name), continues=False)  # nobody went on from what is here: it is the newer


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
        if item.kind == "training" and item.place.exists():  # not sealed, or damaged: of no use to anybody
            shutil.rmtree(item.place)
        with store.atomic_folder(item.place) as folder:
            for file in copy.files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                with open(folder / file, "xb") as target:
                    copies.read_file(copy, file, target.write)
    else:
        if item.kind == "file" and item.place.exists():  # whoever changed it by hand finds it again
            shutil.copyfile(item.place, item.place.with_name(f"{item.place.name}.replaced"))
        with store.atomic_file(item.place, "wb") as target:
            copies.read_file(copy, item.place.name, target.write)


def _place_links(copy: copies.Copy, model: Path) -> None:
    copies.read_file(copy, items.LINKS)
    write_links(model, store.read_json(copy.place / items.LINKS))
