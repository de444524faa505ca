"""A folder of copies: each whole or absent, numbered, known by checksums, written by one session at a time.

    <folder>/.qwen-lab.json                                   which folder this is, and which session writes to it
    <folder>/project/data/train_labeled.json/v000007/         one copy: the item's files and `.copy.json`, which names them
    <folder>/project/distilled-qwen2.5-0.5b/v000012/

A copy is made under a temporary name, read back, and renamed; it never takes another's place, and its number is higher than all before it,
so that at every moment the last whole copy of an item is there and can be told, whatever the clocks say. An item's name is where its copies
lie. What stands in the folder is trusted no more than a download: names are checked, links are not followed.

There is no lock that works across machines on a drive. So the folder names the session that came last, and a session looks whether that is
still itself before and after each copy: the one before it stops copying and says so.
"""

import errno
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import items, store
from .errors import ConfigError, DataError, DistillError, shortened

MARKER = ".qwen-lab.json"
COPY = ".copy.json"  # hidden, so that no file of an item has its name
_VERSION = re.compile(r"v\d{6,12}")
_ROOTS = ("project", "hub")


class Vanished(OSError):
    """The folder is not there any more, or another stands in its place: a drive that is not mounted."""


class TakenOver(DistillError):
    """Another session writes to the folder now."""


@dataclass(frozen=True)
class Copy:
    """One whole copy of an item.

    kind    a key of items.KINDS
    number  higher than that of every copy made before it
    files   name → {"bytes", "sha256"}
    place   its folder
    """

    name: str
    kind: str
    number: int
    files: dict[str, dict]
    place: Path

    @property
    def size_bytes(self) -> int:
        return sum(fact["bytes"] for fact in self.files.values())


class CopyFolder:
    """The folder of copies, opened for this session.

    Raises ConfigError where `folder` can be none: its parent is missing (a drive that is not mounted), or others' files lie there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.session = folder, secrets.token_hex(8)
        self.id = _identity(folder) or _new_folder(folder)
        store.write_json(folder / MARKER, {"id": self.id, "session": self.session})
        self.sweep()
        self._number = 0  # the highest so far
        self._damaged: dict[str, list[Copy]] = {}
        self.copies, self.problems = self._catalogue()

    def check(self) -> None:
        """Raise Vanished where the folder is not the one that was opened, TakenOver where another session writes to it now."""
        marker = _read_marker(self.folder)
        if marker is None or marker.get("id") != self.id:
            raise Vanished(errno.ENODEV, "the folder is gone", str(self.folder))
        if marker.get("session") != self.session:
            raise TakenOver(f"{self.folder}: another session of the lab copies there now; this one's work is no longer copied.")

    # Looking

    def _catalogue(self) -> tuple[dict[str, list[Copy]], list[str]]:
        """Every item's copies, the oldest first; and what stands there that is none, in words."""
        copies, problems = {}, []
        for place in self._version_folders():
            self._number = max(self._number, int(place.name[1:]))
            try:
                copy = read_copy(place, self.folder)
            except DataError as error:
                problems.append(f"{place.relative_to(self.folder)}: {error}")
                continue
            copies.setdefault(copy.name, []).append(copy)
        for made in copies.values():
            made.sort(key=lambda copy: copy.number)
        return copies, problems

    def _version_folders(self) -> Iterator[Path]:
        for root in _ROOTS:
            for folder, folders, _ in os.walk(self.folder / root):
                versions = [name for name in folders if _VERSION.fullmatch(name)]
                yield from (Path(folder, name) for name in versions)
                folders[:] = [name for name in folders if name not in versions]

    def newest(self, name: str) -> Copy | None:
        """The last copy of an item, None where there is none."""
        made = self.copies.get(name)
        return made[-1] if made else None

    # Writing

    def write(self, item: items.Item, moved=lambda count: None) -> Copy:
        """Copy an item, read the copy back, and take older copies of it away.

        moved  called with the bytes of each piece that is written
        Raises SourceChanged where the item is being written or removed, DataError where it is damaged, Vanished, TakenOver, and any other
        OSError of the folder; then no copy is made.
        """
        self.check()
        self._number += 1
        # level by level: where this folder itself is gone, a drive is, and nothing may be made in its place
        folder = _folder_below(self.folder, item.name)
        temporary = folder / f".tmp-{self.session}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            place = folder / f"v{self._number:06d}"
            copy = Copy(item.name, item.kind, self._number, self._write_files(item, temporary, moved), place)
            self.check()
            temporary.rename(copy.place)
        except BaseException:
            with suppress(OSError):  # a folder that is gone takes its leftover with it; when it is back, `sweep` finds it
                remove(temporary)
            raise
        older, self.copies[item.name] = self.copies.get(item.name, []), [copy]
        for each in older + self._damaged.pop(item.name, []):
            self._discard(each)
        return copy

    def _write_files(self, item: items.Item, folder: Path, moved) -> dict[str, dict]:
        """Write an item's files and then `.copy.json` into a folder, and read them back. Returns name → {"bytes", "sha256"}."""
        with items.staged(item) as sources:
            for parent in sorted({name.rpartition("/")[0] for name in sources} - {""}):
                _folder_below(folder, parent)
            files = {name: _write_file(path, folder / name, limit, moved) for name, (path, limit) in sources.items()}
            items.check_seal(item, sources, files)
        with open(folder / COPY, "x", encoding="utf-8") as file:
            json.dump({"kind": item.kind, "session": self.session, "written": time.strftime("%F %T"), "files": files}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if changed := [name for name, fact in files.items() if not is_whole(folder / name, fact)]:
            raise OSError(errno.EIO, "what was written is read back otherwise", str(folder / changed[0]))
        return files

    def drop(self, name: str) -> None:
        """Take all copies of an item away, damaged ones too. Raises Vanished, TakenOver."""
        self.check()
        for copy in self.copies.pop(name, []) + self._damaged.pop(name, []):
            self._discard(copy)

    def drop_older(self) -> None:
        """Take away what a kill between a copy and the removal of the one before it has left."""
        for made in self.copies.values():
            while len(made) > 1:
                self._discard(made.pop(0))

    def forget(self, copy: Copy) -> None:
        """Count a damaged copy as none; it stays where it is until the item is copied anew."""
        self.copies[copy.name].remove(copy)
        self._damaged.setdefault(copy.name, []).append(copy)

    def _discard(self, copy: Copy) -> None:
        temporary = copy.place.with_name(f".tmp-{self.session}-{secrets.token_hex(4)}")
        copy.place.rename(temporary)  # first, so that a kill leaves no half of a copy
        remove(temporary)

    def sweep(self) -> None:
        """Remove what copies that were cut short left behind. Never called while one is made."""
        leftovers = [path for root in _ROOTS for path in (self.folder / root).rglob(".tmp-*")]
        for path in leftovers:
            if path.is_dir() and not path.is_symlink():
                remove(path)


def remove(folder: Path) -> None:
    """Remove a folder of copies for good: files are emptied first, since a drive's trash counts as used space."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if not path.is_symlink():
                os.truncate(path, 0)
            path.unlink()
        for name in folders:
            path = Path(place, name)
            path.unlink() if path.is_symlink() else path.rmdir()
    folder.rmdir()


# The marker


def _identity(folder: Path) -> str | None:
    marker = _read_marker(folder)
    return marker.get("id") if marker else None


def _read_marker(folder: Path) -> dict | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _new_folder(folder: Path) -> str:
    """Make a folder of copies, or take an empty one. Returns its identity."""
    if not store.is_dir(folder.parent):
        raise ConfigError(f"persist_to = {folder}: {folder.parent} does not exist. Mount the drive first, or make that folder.")
    with store.cannot_write(folder):
        folder.mkdir(exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name not in _ROOTS and path.name[0] != ".")
    if others:
        raise ConfigError(f"persist_to = {folder}: others' files lie there ({shortened(others[0], 60)}). Name a folder of its own.")
    return secrets.token_hex(8)


# One copy


def read_copy(place: Path, folder: Path) -> Copy:
    """The copy in a folder `v000012`, by its `.copy.json`; its files are not read. Raises DataError where it is none that the lab makes."""
    name = place.parent.relative_to(folder).as_posix()
    made = store.read_json(place / COPY)
    kind, files = (made.get(key) if isinstance(made, dict) else None for key in ("kind", "files"))
    if not items.is_kind(kind, name) or not isinstance(files, dict):
        raise DataError(f"is no copy that the lab makes (kind {shortened(repr(kind), 40)}).")
    wrong = [file for file, fact in files.items() if not _is_file_of(kind, name, file) or not _is_fact(fact)]
    if wrong:
        raise DataError(f"names a file that the lab copies nowhere: {shortened(repr(wrong[0]), 80)}.")
    return Copy(name, kind, int(place.name[1:]), files, place)


def _is_file_of(kind: str, name: str, file: str) -> bool:
    if kind in items.FOLDERS:
        return items.may_hold(file)
    return file == (items.LINKS if kind == "links" else name.rsplit("/", 1)[1])


def _is_fact(fact) -> bool:
    size_bytes = fact.get("bytes") if isinstance(fact, dict) else None
    return type(size_bytes) is int and size_bytes >= 0 and isinstance(fact.get("sha256"), str)


def read_file(copy: Copy, file: str, take=lambda chunk: None) -> None:
    """Read one file of a copy, piece by piece. Raises DataError where it is not what was written.

    take  called with each piece
    """
    if not is_whole(copy.place / file, copy.files[file], take):
        raise DataError(f"{copy.place / file} is missing or damaged: it is not what was written there.")


def is_whole(path: Path, fact: dict, take=lambda chunk: None) -> bool:
    """Whether a file, as far as `fact` goes, is what {"bytes", "sha256"} says; False too where it cannot be read."""
    try:
        return items.digest(path, fact["bytes"], take) == fact
    except items.SourceChanged:
        return False


def _write_file(source: Path, target: Path, limit_bytes: int | None, moved) -> dict:
    """Copy one file. Returns what was read of it: {"bytes", "sha256"}."""
    with open(target, "xb") as file:

        def take(chunk: bytes) -> None:
            file.write(chunk)
            moved(len(chunk))

        fact = items.digest(source, limit_bytes, take)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read back from the disk
    return fact


def _folder_below(place: Path, name: str) -> Path:
    """The folder `name` below a folder that is there, each level made where it is missing. Raises ConfigError for a link on the way."""
    for part in name.split("/"):
        place = place / part
        with suppress(FileExistsError):
            place.mkdir()
        if place.is_symlink():
            raise ConfigError(f"{place} is a link: nothing is copied through it. Remove it.")
    return place
