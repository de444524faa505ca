"""Files that are whole or absent: atomic writes, content hashes, manifests, locks. Every other module writes through here.

A reader never sees half a file: text and folders are made under a temporary name beside their place and renamed into it.
A temporary name carries the writer's process id, so that the next writer sweeps away what a killed one left.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

from .console import say
from .errors import ConfigError, DataError, DistillError, shortened

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
READ_CHARS = 1 << 20
MAX_NAME_BYTES = 255
CHECK_DIGITS = 12
SEAL = "manifest_sha256"
MODEL = "model"  # id of the entry that says how all other answers of a journal were made
_BLANKS = {" ", "\t", "\r", "\n"}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def resolve(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the project's root, whatever the working directory."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"{path!r} is no path.")
    try:
        place = Path(os.path.normpath(ROOT / Path(path).expanduser()))
        longest_bytes = max(len(os.fsencode(part)) for part in place.parts)
    except (RuntimeError, ValueError) as error:  # ~somebody who has no home here; letters that no file name can have
        raise ConfigError(f"{shortened(repr(str(path)))} is no path: {shortened(error)}") from error
    if "\0" in str(place) or longest_bytes > MAX_NAME_BYTES:
        why = "it holds a NUL character" if "\0" in str(place) else f"a name in it is longer than {MAX_NAME_BYTES} bytes"
        raise ConfigError(f"{shortened(repr(str(path)))} is no path: {why}.")
    return place


def is_file(path: str | Path) -> bool:
    """Whether a file stands at `path`. Raises ConfigError where this user may not look."""
    with _cannot_look(path):
        return Path(path).is_file()


def is_dir(path: str | Path) -> bool:
    """Whether a folder stands at `path`. Raises ConfigError where this user may not look."""
    with _cannot_look(path):
        return Path(path).is_dir()


@contextmanager
def _cannot_look(path: str | Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"Cannot read {shown(path)}: {error.strerror}. Choose a place that is yours.") from error


def validation_path(path: str | Path) -> Path:
    """Where the validation rows of a data file lie: `train_labeled.json` → `train_labeled_validation.json`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_validation{path.suffix}")


def shown(path: str | Path) -> str:
    """A path as a message names it: relative to the project where it lies inside."""
    path = resolve(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# Writing


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator:
    """Open a temporary file that takes the name `path` when the block ends, and vanishes if the block raises.

    mode    "w" (UTF-8 text) or "wb"
    Raises ConfigError where the place cannot be written to.
    """
    path = resolve(path)
    with cannot_write(path), _folder_for(path) as temporary:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends, and vanishes if the block raises.

    A folder that stood at `path` is kept as `<path>.previous`; the one that stood there before is removed.
    """
    path = resolve(path)
    with cannot_write(path), _folder_for(path) as temporary:
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, path)


def publish_folder(temporary: Path, path: Path) -> None:
    """Rename a finished folder to `path`, keeping what stood there as `<path>.previous`."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    previous = _previous(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):  # an empty one is replaced at once, and nothing to keep
        temporary.rename(path)
        return
    outdated = _temporary_name(path)
    if previous.exists():
        previous.rename(outdated)
    try:
        path.rename(previous)
        temporary.rename(path)
    except BaseException:
        recover(path)
        raise
    shutil.rmtree(outdated, ignore_errors=True)


def empty_folder(folder: Path) -> None:
    """Remove what a folder holds, where there is one; its manifest first, so that a kill leaves no folder that seems whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for place in folder.iterdir() if folder.is_dir() else ():
        _remove(place)


def recover(path: Path) -> None:
    """Put `<path>.previous` back where a publication was cut short between its two renames; sweep up behind the dead.

    Only the folder that was to be published tells that from a `path` which its user removed.
    """
    cut_short = any(temporary.is_dir() for temporary in _temporaries(path))
    if cut_short and not path.exists() and _previous(path).exists():
        _previous(path).rename(path)
    sweep(path)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def check_writable(path: str | Path) -> None:
    """Raise ConfigError unless a file or folder could be made at `path`; nothing stays behind."""
    path = resolve(path)
    with cannot_write(path), _folder_for(path) as temporary:
        temporary.touch()


@contextmanager
def _folder_for(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, its parents made; on an error both are gone again."""
    made = [folder for folder in path.parents if not _is_there(folder)]
    temporary = _temporary_name(path)
    published = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        yield temporary
        published = path.exists()
    finally:
        if _is_there(temporary):
            _remove(temporary)
        if not published:
            for folder in made:
                if _is_there(folder) and not any(folder.iterdir()):
                    folder.rmdir()


def _is_there(path: Path) -> bool:
    """Whether a name stands for anything; False too for one that the disk cannot hold, where Path.exists may raise."""
    try:
        path.lstat()
    except OSError:
        return False
    return True


@contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Within the block, what fails in writing at `path` is a ConfigError that says so."""
    try:
        yield
    except OSError as error:
        if not _is_about(error, path):
            raise
        raise ConfigError(f"Cannot write {shown(path)}: {error.strerror}. Choose another folder or free some space.") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where it is not there. Raises ConfigError where that is not possible."""
    with cannot_write(path):
        path.mkdir(parents=True, exist_ok=True)


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk's own error (it is full, over a quota, read-only, broken) in an error or what caused it; None where there is none."""
    while error and not (type(error) is OSError and error.errno in _DISK_ERRORS):  # ssl.SSLError has numbers of its own, 5 too
        error = error.__cause__ or error.__context__
    return error


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error arose in writing at `path`, rather than in the block's own work."""
    if error.filename is None:
        return error.errno in _DISK_ERRORS
    place = Path(os.fsdecode(error.filename))
    return place.is_relative_to(path.parent) or place in path.parents


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def sweep(path: Path) -> None:
    """Remove the temporary files and folders that dead processes left for `path`."""
    for leftover in _temporaries(path):
        pid = leftover.name.rsplit(".tmp-", 1)[1].split("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not is_alive(int(pid)):
            _remove(leftover)


def _temporaries(path: Path) -> Iterator[Path]:
    """What stands under the temporary names of `path`, whoever's."""
    return path.parent.glob(f".{_glob_escape(path.name)}.tmp-*")


def _glob_escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# JSON and rows


def write_json(path: str | Path, value) -> Path:
    """Write one JSON value, indented, keys in their given order."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
    return resolve(path)


def read_json(path: str | Path):
    """Read one JSON value. Raises DataError that names the place of a mistake."""
    path = resolve(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)} does not exist.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{shown(path)} cannot be read as JSON: {shortened(error)}.") from error


def append_json_line(path: str | Path, value) -> None:
    """Add one JSON value as one line, in a single write, so that a reader never meets half of an earlier line."""
    with cannot_write(Path(path)), open(path, "ab", buffering=0) as file:
        file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows as a JSON list, one row a line, in memory that does not grow with their number. Returns how many."""
    count = 0
    with atomic_file(path) as file:
        file.write("[")
        for row in rows:
            file.write(("," if count else "") + "\n" + json.dumps(row, ensure_ascii=False))
            count += 1
        file.write("\n]\n")
    return count


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_parquet(path: str | Path, rows: list[dict]) -> None:
    """Write rows as one Parquet file, column types as the rows have them."""
    import pyarrow
    import pyarrow.parquet

    with atomic_file(path, "wb") as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="zstd")


def read_rows(path: str | Path) -> Iterator[dict]:
    """Yield the rows of a JSON list or a JSON-lines file, one at a time, in memory that does not grow with the file.

    Raises DataError naming the line or the character where the file stops being JSON objects.
    """
    path = resolve(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            first, blank_lines = file.read(1), 0
            while first.isspace():
                blank_lines += first == "\n"
                first = file.read(1)
            rows = _list_items(file) if first == "[" else _lines(file, first, blank_lines + 1)
            for number, row in enumerate(rows):
                if not isinstance(row, dict):
                    raise DataError(f"{shown(path)}: row {number} is no JSON object but {shortened(json.dumps(row), 60)}.")
                yield row
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)} does not exist.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{shown(path)} is not a JSON list or JSON lines: {shortened(error)}.") from error


def _lines(file, first: str, first_number: int) -> Iterator:
    """Rows of a JSON-lines file whose first character, on line `first_number`, has been read already."""
    for number, line in enumerate(file, start=first_number):
        line, first = first + line, ""
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _list_items(file) -> Iterator:
    """Items of a JSON list whose opening bracket has been read already."""
    decode, buffer, position, wanted = json.JSONDecoder().raw_decode, "", 0, READ_CHARS
    ended, comma = False, None  # comma: None before the first item, then whether one has come since the last
    while True:
        while (letter := buffer[position : position + 1]) in _BLANKS or (letter == "," and comma is False):
            comma = True if letter == "," else comma
            position += 1
        if letter == "]" and not comma:
            if (buffer[position + 1 :] + file.read()).strip():
                raise ValueError("text follows the list's end")
            return
        try:
            if comma is False and letter:
                raise ValueError("no comma")
            item, position = decode(buffer, position)
        except ValueError:
            if ended or (comma is False and letter):
                rest = buffer[position:]
                raise ValueError(f"breaks off near {shortened(rest, 60)!r}" if rest else "ends before its list does") from None
            # an item longer than the buffer: twice as much each time, so that a huge row costs linear time
            text = file.read(wanted)
            buffer, position, ended, wanted = buffer[position:] + text, 0, not text, wanted * 2
        else:
            wanted, comma = READ_CHARS, False
            yield item


def remove_file(path: Path) -> None:
    """Remove a file and its manifest."""
    _manifest_place(path, MANIFEST).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# Journals: JSON lines that only grow, each with a checksum of its own, so that a damaged one is known


def add_to_journal(path: str | Path, entry: dict) -> None:
    """Add one entry as one line with its checksum; a kill can cut short the last line alone."""
    text = json.dumps(entry, ensure_ascii=False).encode()
    with cannot_write(Path(path)), open(path, "ab") as file:
        file.write(_checked(text))


def _checked(text: bytes) -> bytes:
    """A journal's line: the JSON object `text` with its checksum as a last key."""
    return b'%s, "check": "%s"}\n' % (text[:-1], hashlib.sha256(text).hexdigest()[:CHECK_DIGITS].encode())


def _entry(line: bytes) -> dict | None:
    """The entry of a journal's line; None where the line was cut short or changed."""
    text = line[: len(line) - len(_checked(b"}"))] + b"}"
    return json.loads(text) if line == _checked(text) else None


def intact_lines(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict]]:
    """The lines of a journal that are as `add_to_journal` wrote them, each with its entry."""
    for line in lines:
        if (entry := _entry(line)) is not None:
            yield line, entry


def read_journal(path: Path) -> list[dict]:
    """The entries that `add_to_journal` wrote, none where there is no file. Damaged lines are taken off the file, and that is said.

    For a journal whose entries each stand for themselves: what a damaged one held is asked again.
    """
    if not is_file(path):
        return []
    with open(path, "rb") as file:
        lines = [(line, _entry(line)) for line in file]
    kept = [(line, entry) for line, entry in lines if entry is not None]
    if len(kept) < len(lines):
        with atomic_file(path, "wb") as file:
            file.writelines(line for line, _ in kept)
        say(f"{shown(path)}: {len(lines) - len(kept):,} damaged lines are dropped; what they held is made again")
    return [entry for _, entry in kept]


def replay_journal(path: Path) -> Iterator[dict]:
    """Yield the entries {"number": 0}, {"number": 1}, … of a journal whose order counts, in memory that does not grow with their number.

    At the first damaged line, or the first that does not follow from the one before, the file is cut off, and that is said.
    """
    if not is_file(path):
        return
    whole_bytes = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            entry = _entry(line)
            if entry is None or entry["number"] != number:
                os.truncate(path, whole_bytes)
                say(f"{shown(path)}: is damaged at byte {whole_bytes:,}; what followed is fetched again")
                return
            whole_bytes += len(line)
            yield entry


# Hashes and manifests


def hash_json(value) -> str:
    """SHA-256 (hex) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(target: Path, facts: dict, *, name: str = MANIFEST, files: Iterable[Path] | None = None) -> None:
    """Write the manifest that says `target` is complete; call it last.

    target  a folder (the manifest lies inside, as `name`) or a file (it lies beside, as `<file>.manifest.json`)
    files   what is hashed; by default all files of the folder, or the file itself
    """
    place = _manifest_place(target, name)
    files = sorted(files or ([f for f in target.rglob("*") if f.is_file() and f != place] if target.is_dir() else [target]))
    hashed = {str(file.relative_to(place.parent)): {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files}
    manifest = json.loads(json.dumps({**facts, "files": hashed}))  # as it will be read
    write_json(place, {**manifest, SEAL: hash_json(manifest)})


def read_manifest(target: str | Path, *, name: str = MANIFEST) -> dict | None:
    """The manifest of a folder or file; None where there is none. Raises DataError where it or a file of it is missing or changed."""
    place = _manifest_place(resolve(target), name)
    if not is_file(place):
        return None
    manifest = read_seal(place)
    for relative, fact in manifest["files"].items():
        file, fact = place.parent / relative, fact if isinstance(fact, dict) else {}
        if not file.is_file() or file.stat().st_size != fact.get("bytes") or hash_file(file) != fact.get("sha256"):
            raise DataError(
                f"{shown(file)} is missing or is not what {shown(place)} recorded: its making was interrupted, or it was changed since."
            )
    return manifest


def read_seal(place: Path) -> dict:
    """What a manifest says, the files that it lists unread. Raises DataError where it is not as it was written."""
    manifest = read_json(place)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise DataError(f"{shown(place)} is no manifest: it lists no files.")
    seal = manifest.pop(SEAL, None)
    if seal not in (None, hash_json(manifest)):
        raise DataError(f"{shown(place)} was changed since it was written.")
    if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise DataError(f"{shown(place)} is no manifest: it lists {shortened(outside[0], 60)}, which lies outside of its folder.")
    return manifest


def _manifest_place(target: Path, name: str) -> Path:
    return target / name if is_dir(target) else target.with_name(f"{target.name}.manifest.json")


# Locks


def _lock_folder() -> Path:
    """Where every process of this machine looks, whatever its TMPDIR says."""
    shared = Path("/tmp")
    return shared if os.access(shared, os.W_OK) else Path(gettempdir())


@contextmanager
def lock(target: str | Path) -> Iterator[None]:
    """Hold `target` for this process alone; a second run on the same place, by whatever name it goes, is refused at once.

    The lock goes with the process, so that a killed run leaves nothing locked. It holds on one machine.
    """
    from filelock import FileLock, Timeout

    target = resolve(target)
    place = _lock_folder() / f"qwen-lab-{hashlib.sha256(os.fsencode(os.path.realpath(target))).hexdigest()[:24]}.lock"
    try:
        with cannot_write(place):
            held = FileLock(place).acquire(blocking=False)
    except Timeout as error:
        raise DistillError(f"Another run is writing {shown(target)} now. Wait for it, or choose another place.") from error
    with held:
        yield
