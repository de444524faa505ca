"""What a session of the lab leaves that is worth keeping, as *items*: a file, a journal or a folder, each copied and restored as one.

An item's name is its place below one of two roots: `project/…`, the lab's own folder, or `hub/…`, the hub's cache. What a name stands for
follows from the name alone (`KINDS`), in copying and in restoring alike: nothing else of a folder of copies is ever written here.
"""

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import store
from .errors import DataError
from .hub_cache import PART, is_plain, leaves, read_links

# In the order of copying: what is small and dear first, what the hub would give again last; a link after what it points to.
KINDS = {
    "journal": rf"project/runs/{PART}/{PART}\.jsonl",
    "file": rf"project/(data/(?!micro/)({PART}/)*{PART}\.json|runs/{PART}/(checkpoints/)?{PART}\.json|"
    rf"reports/({PART}/)*{PART}\.(json|md|html|png))",
    "published": rf"project/{PART}(/{PART}){{0,4}}",
    "last": rf"project/runs/{PART}/last",
    "training": rf"project/runs/{PART}/checkpoints/checkpoint-\d+",
    "blob": r"hub/models--[\w.-]+/blobs/[\w-]+",
    "links": r"hub/models--[\w.-]+",
}
SEALS = {"published": "distill_run.json", "training": store.MANIFEST}
FOLDERS = ("published", "last", "training")
# no code: a folder that comes back may lie on Python's path
SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model", ".safetensors", ".pt", ".pth", ".bin")
LINKS = "links.json"
STAGE = "persist"
RECORD = f".{STAGE}.json"  # in runs/: what was last copied or restored here
CHUNK_BYTES = 4 << 20
BLOCK_BYTES = 1 << 16


class SourceChanged(Exception):
    """What is to be copied is being written, renamed or removed; it is looked at again."""


@dataclass(frozen=True)
class Item:
    """One thing to keep: its name, its kind (a key of KINDS), and where it lies here."""

    name: str
    kind: str
    place: Path


def is_kind(kind, name: str) -> bool:
    """Whether `name` can be an item of this kind; no name that leaves its root is."""
    return kind in KINDS and is_plain(name) and re.fullmatch(KINDS[kind], name) is not None


def may_hold(file) -> bool:
    """Whether a folder that is an item may hold a file of this name."""
    return is_plain(file) and Path(file).suffix in SUFFIXES


def place_of(name: str, roots: dict[str, Path]) -> Path:
    """Where an item lies here. roots  {"project": …, "hub": …}"""
    root, _, rest = name.partition("/")
    return roots[root] / rest


# What there is


def found(roots: dict[str, Path], models: set[str]) -> list[Item]:
    """All items that are here now and whole, in the order of copying.

    models  the folders of the hub's cache (`models--owner--name`) that count
    """
    return sorted([*_in_project(roots["project"]), *_in_hub(roots["hub"], models)], key=order)


def order(item: Item) -> tuple:
    """A key that sorts items in the order of copying and restoring, checkpoint-9 before checkpoint-10."""
    name = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", item.name)]
    return list(KINDS).index(item.kind), name


def _in_project(root: Path) -> Iterator[Item]:
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        kept = []
        for name in folders:
            place, item = Path(folder, name), (Path("project") / inside / name).as_posix()
            kind = _folder_kind(place, item)
            if kind:
                yield Item(item, kind, place)
            elif _is_walked(place):
                kept.append(name)
        folders[:] = kept
        for name in files:
            item = (Path("project") / inside / name).as_posix()
            kind = next((kind for kind in ("journal", "file") if is_kind(kind, item)), None)
            if kind and not Path(folder, name).is_symlink():
                yield Item(item, kind, Path(folder, name))


def _is_walked(place: Path) -> bool:
    """Whether items may lie in a folder: not behind a link, nor in what is hidden, kept of a former run, or not sealed yet."""
    return not (place.name.startswith(".") or place.name.endswith(".previous") or place.is_symlink() or (place / "pyvenv.cfg").exists())


def _folder_kind(place: Path, name: str) -> str | None:
    """The kind of a folder that is an item as a whole; a checkpoint without its seal is being written."""
    if place.is_symlink() or place.name.endswith(".previous"):
        return None
    if is_kind("last", name):
        return "last"
    kind = "training" if is_kind("training", name) else "published"
    return kind if is_kind(kind, name) and (place / SEALS[kind]).is_file() else None


def _in_hub(root: Path, models: set[str]) -> Iterator[Item]:
    for model in sorted(models):
        name = f"hub/{model}"
        if is_kind("links", name) and (root / model / "snapshots").is_dir():
            for blob in (root / model / "blobs").glob("*"):
                if is_kind("blob", f"{name}/blobs/{blob.name}") and blob.is_file() and not blob.is_symlink():
                    yield Item(f"{name}/blobs/{blob.name}", "blob", blob)
            yield Item(name, "links", root / model)


# What an item holds


def signature(item: Item) -> tuple:
    """What changes whenever an item's files do, without reading them; for comparing within one process. Raises SourceChanged."""
    try:
        return tuple((name, *_stamp(path.lstat())) for name, path in sorted(_files(item).items()))
    except OSError as error:
        raise SourceChanged(str(error)) from error


def _stamp(facts: os.stat_result) -> tuple:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _files(item: Item) -> dict[str, Path]:
    """The files that make an item, by their names in it."""
    if item.kind in FOLDERS:
        files = [path for path in item.place.rglob("*") if path.is_file() and not path.is_symlink()]
        return {name: path for path in files if may_hold(name := path.relative_to(item.place).as_posix())}
    if item.kind == "links":
        return {path.relative_to(item.place).as_posix(): path for part in ("refs", "snapshots") for path in leaves(item.place / part)}
    return {item.place.name: item.place}


def content(item: Item) -> dict[str, dict]:
    """An item's files by what they hold: name → {"bytes", "sha256"}; of a journal, its whole lines. Raises SourceChanged, DataError."""
    with staged(item) as files:
        found = {name: digest(path, limit_bytes) for name, (path, limit_bytes) in files.items()}
        check_seal(item, files, found)
    return found


def check_seal(item: Item, files: dict, found: dict[str, dict]) -> None:
    """Raise DataError where a checkpoint's files are not what its own manifest recorded, SourceChanged where that is gone.

    files  as `staged` yields them
    found  what was read: name → {"bytes", "sha256"}
    """
    if item.kind in SEALS:
        if SEALS[item.kind] not in files:
            raise SourceChanged(f"{item.place} is being removed")
        sealed = store.read_seal(files[SEALS[item.kind]][0])["files"]
        if changed := [name for name, fact in sealed.items() if found.get(name) != fact]:
            raise DataError(f"{store.shown(item.place)} is not what its manifest recorded ({changed[0]}): it is not copied.")


@contextmanager
def staged(item: Item) -> Iterator[dict[str, tuple[Path, int | None]]]:
    """Yield an item's files to read: name → (path, how many of its bytes; None for all). Raises SourceChanged where they are going away.

    A folder's are hard links, where the disk has them: it may then be removed while it is copied, and what is read stays whole.
    """
    place = store.ROOT / "runs" / f".{STAGE}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if item.kind == "journal":
            yield {item.place.name: (item.place, _whole_lines_bytes(item.place))}
        elif item.kind == "links":
            yield {LINKS: (store.write_json(place / LINKS, _links(item.place)), None)}
        elif item.kind in FOLDERS:
            linked = _linked(_files(item), place)
            if linked.keys() != _files(item).keys():
                raise SourceChanged(f"{item.place} is being written or removed")
            yield {name: (path, None) for name, path in linked.items()}
        else:
            yield {item.place.name: (item.place, None)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _links(model: Path) -> dict:
    try:
        return read_links(model)
    except OSError as error:
        raise SourceChanged(str(error)) from error


def _linked(files: dict[str, Path], place: Path) -> dict[str, Path]:
    """Hard links to files, below `place`; the files themselves on a disk without hard links."""
    links = {}
    try:
        for name, path in files.items():
            links[name] = place / name
            links[name].parent.mkdir(parents=True, exist_ok=True)
            os.link(path, links[name], follow_symlinks=False)
    except FileNotFoundError as error:
        raise SourceChanged(str(error)) from error
    except OSError:
        return files
    return links


def _whole_lines_bytes(path: Path) -> int:
    """How long a journal is up to its last newline: behind it a line may be half written."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - BLOCK_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    return start + newline + 1
                end = start
    except OSError as error:
        raise SourceChanged(str(error)) from error
    return 0


def digest(path: Path, limit_bytes: int | None = None, take: Callable[[bytes], object] = lambda chunk: None) -> dict:
    """{"bytes", "sha256"} of a regular file, or of its first bytes. Raises SourceChanged.

    take  called with each piece that is read
    """
    hashed, done = hashlib.sha256(), 0
    for chunk in chunks(path, limit_bytes):
        take(chunk)
        hashed.update(chunk)
        done += len(chunk)
    return {"bytes": done, "sha256": hashed.hexdigest()}


def chunks(path: Path, limit_bytes: int | None = None) -> Iterator[bytes]:
    """A regular file's bytes, or its first ones, piece by piece.

    Raises SourceChanged where it cannot be read, is a link, ends too soon, or, read as a whole, became another meanwhile.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            before = os.fstat(file.fileno())
            left = before.st_size if limit_bytes is None else limit_bytes
            while left > 0 and stat.S_ISREG(before.st_mode):
                chunk = file.read(min(CHUNK_BYTES, left))
                left = left - len(chunk) if chunk else -1
                yield chunk
            if not stat.S_ISREG(before.st_mode) or left or (limit_bytes is None and _stamp(os.fstat(file.fileno())) != _stamp(before)):
                raise SourceChanged(f"{path} is no regular file, or changed while it was read")
    except OSError as error:
        raise SourceChanged(str(error)) from error
