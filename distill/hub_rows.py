"""Rows of a data set on the hub: streamed, and kept on disk as they come.

What has come lies in a journal, `runs/sources/<key>.jsonl`, whose key hashes the data set's name, commit, split and first row. A
preparation that was killed, or that selects otherwise, reads it from there and streams the rest alone. Where the hub is busy (429), fails
(5xx) or is silent, `datasets` and `huggingface_hub` try a request again by themselves, with pauses.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import store
from .console import say
from .errors import ConfigError, DataError, DistillError, shortened
from .models import cannot_reach_hub, is_network_error


def read(name: str, revision: str | None, split: str, first: int, last: int | None, *, fresh: bool = False) -> Iterator[dict]:
    """Rows `first` to `last` (not included; None: to the end) of a split, as JSON has them: from disk, then from the hub.

    fresh  fetch them all anew
    Raises ConfigError where the hub cannot be reached, DataError for what it cannot give; what had come before is kept.
    """
    journal = store.ROOT / "runs" / "sources" / f"{store.hash_json([name, revision, split, first])[:24]}.jsonl"
    wanted, done = math.inf if last is None else last - first, 0
    if fresh:
        journal.unlink(missing_ok=True)
    if wanted <= 0:
        return
    for entry in store.replay_journal(journal):
        if "row" not in entry:  # the split ends here
            return
        yield entry["row"]
        done += 1
        if done == wanted:
            return
    before = f"{done:,} rows had been read before; " if done else ""
    say(f"{name}: {before}what is read is kept in {store.shown(journal)}")
    yield from _fetch(name, journal, done, wanted, _stream(name, revision, split, first + done))


def _fetch(name: str, journal: Path, done: int, wanted: float, rows: Iterator[dict]) -> Iterator[dict]:
    """Yield rows of the hub up to the number that is wanted, each kept in the journal before it is used; `done` are there already."""
    store.make_folder(journal.parent)
    keep = _keeper(journal)
    with _hub_errors(name, lambda: f" What came before is kept, {done:,} rows; the same call goes on behind them." if done else ""):
        for row in rows:
            row = json.loads(json.dumps(row, default=_unlike_json))  # as it will be read back
            keep({"number": done, "row": row})
            yield row
            done += 1
            if done == wanted:
                return
        keep({"number": done})


def _keeper(journal: Path):
    """A function that adds to a journal as long as nobody else does: another run that reads the same rows writes the same."""
    size_bytes = journal.stat().st_size if journal.exists() else 0

    def keep(entry: dict) -> None:
        nonlocal size_bytes
        if (journal.stat().st_size if journal.exists() else 0) == size_bytes:
            store.add_to_journal(journal, entry)
            size_bytes = journal.stat().st_size

    return keep


def _unlike_json(value) -> dict:
    """What stands for a value that JSON cannot hold, such as a picture: no text, so that nobody takes it for some."""
    return {"type": type(value).__name__}


@contextmanager
def _hub_errors(name: str, kept=lambda: "") -> Iterator[None]:
    """Within the block, an error of `datasets` or the network is one of the lab's that names the data set.

    kept  says what stays of the rows that had come
    """
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        if is_network_error(error):
            raise ConfigError(f"{cannot_reach_hub(name, error)}{kept()}") from error
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {shortened(error)}.{kept()}") from error


def _stream(name: str, revision: str | None, split: str, first: int) -> Iterator[dict]:
    """Rows from `first` on that `datasets` streams. Its own metadata are not checked: OmniThought's disagree with its files."""
    from datasets import load_dataset

    how = {"split": split, "streaming": True, "verification_mode": "no_checks"}
    files, first_there = _files_from(name, revision, split, first)
    if files:
        yield from load_dataset("parquet", data_files={split: files}, **how).skip(first_there)
    else:
        yield from load_dataset(name, revision=revision, **how).skip(first)


def _files_from(name: str, revision: str | None, split: str, first: int) -> tuple[list[str], int]:
    """The Parquet files of a split from the one that holds row `first`, and that row's number in it; none where all files are wanted.

    `datasets` would fetch every row that it skips.
    """
    files = _data_files(name, revision, split) if first else []
    if not all(file.endswith(".parquet") for file in files):
        return [], first
    for place, file in enumerate(files):
        count = _count_remote(file)
        if first < count:
            return (files[place:], first) if place else ([], first)
        first -= count
    return files[-1:], first + count if files else 0


def _data_files(name: str, revision: str | None, split: str) -> list[str]:
    from datasets import load_dataset_builder

    return [str(file) for file in load_dataset_builder(name, revision=revision).config.data_files.get(split) or []]


def _count_remote(file: str) -> int:
    """Rows of a Parquet file by its footer: a few kilobytes."""
    import fsspec
    import pyarrow.parquet

    with fsspec.open(file, "rb") as handle:
        return pyarrow.parquet.read_metadata(handle).num_rows


def count(name: str, revision: str | None, split: str) -> int:
    """How many rows a split has, by the footers of its Parquet files."""
    with _hub_errors(name):
        files = _data_files(name, revision, split)
        for file in files:
            if not file.endswith(".parquet"):
                raise ConfigError(
                    f"A share or a negative row number needs Parquet files, and {file} is none. Use row numbers such as train[:1000]."
                )
        return sum(map(_count_remote, files))
