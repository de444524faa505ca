"""Where rows come from: a hub dataset, a local JSON, JSON-lines or Parquet file or folder, or a weighted mixture of them.

Rows are streamed (`hub_rows` those of the hub), so memory does not grow with their number. `datasets` refuses slices of a stream, so a
slice is a skip and a take here.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from . import hub_rows, store
from .errors import ConfigError, DataError, did_you_mean, shortened
from .models import hub_info, is_network_error
from .stages import UNKNOWN

ROW_FIELDS = ("instruction", "input", "output")
ENTRY_KEYS = ("source", "columns", "weight", "slice")
JSON_SUFFIXES = (".json", ".jsonl")
READ_BYTES = 1 << 20
_SLICE = re.compile(r"(?P<split>\w[\w.-]*)(\[(?P<start>-?\d{1,15}%?)?:(?P<stop>-?\d{1,15}%?)?\])?")


@dataclass(frozen=True)
class Source:
    """One place to read rows from.

    name     hub name, or path of a file or folder
    columns  row field → column of the source, for those that differ
    weight   its share of a mixture, > 0
    slice    rows to read, e.g. "train[:1000]" or "train[10%:20%]"
    """

    name: str
    columns: dict
    weight: float
    slice: str

    def column(self, field: str) -> str:
        return self.columns.get(field, field)


def parse_sources(source, columns: dict | None, slice_str: str, fields: Iterable[str] = ROW_FIELDS) -> list[Source]:
    """The sources that a user's `source` means: a name or path, or a list of {source, columns, weight, slice} to mix.

    fields  what `columns` may name

    Raises ConfigError that lists every problem at once.
    """
    entries = source if isinstance(source, list) else [{"source": source, "columns": columns}]
    if isinstance(source, list) and columns:
        raise ConfigError("columns and a list of sources: give each source its own columns.")
    problems, sources = [], []
    for number, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {"source": entry}
        found = _entry_problems(entry, slice_str, fields)
        problems += [f"source {number}: {problem}" for problem in found]
        if not found:
            name, names = str(entry["source"]), dict(entry.get("columns") or {})
            sources.append(Source(name, names, float(entry.get("weight", 1)), entry.get("slice", slice_str)))
    if not entries:
        problems.append("source: the list is empty.")
    if problems:
        raise ConfigError.from_problems("source", problems)
    return sources


def _entry_problems(entry: dict, slice_str: str, fields: Iterable[str]) -> list[str]:
    problems = [f"{key}: no such key.{did_you_mean(key, ENTRY_KEYS)}" for key in entry if key not in ENTRY_KEYS]
    if not str(entry.get("source") or "").strip():
        problems.append("names no hub dataset, file or folder.")
    weight, columns = entry.get("weight", 1), entry.get("columns") or {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        problems.append(f"weight = {weight!r}: must be a number above 0.")
    if not isinstance(columns, dict):
        return [*problems, f"columns = {columns!r}: give a dict such as {{'instruction': 'question', 'output': 'answer'}}."]
    problems += [f"columns.{key}: a row has no such field.{did_you_mean(key, fields)}" for key in columns if key not in fields]
    problems += [f"columns.{key} = {name!r}: name a column." for key, name in columns.items() if not isinstance(name, str) or not name]
    text = entry.get("slice", slice_str)
    if not isinstance(text, str) or not _SLICE.fullmatch(text):
        problems.append(f"slice {text!r}: write train, train[:1000], train[500:1500] or train[10%:20%].")
    return problems


def settings_of(sources: list[Source]) -> dict:
    """What a user said of the sources, for a stage's settings: each a value of its own where there is one source, else a list."""
    said = {
        "source": [source.name for source in sources],
        "columns": [source.columns for source in sources],
        "weight": [source.weight for source in sources],
        "slice_str": [source.slice for source in sources],
    }
    return {name: values[0] if len(values) == 1 else values for name, values in said.items()}


def contents(sources: list[Source]) -> dict:
    """What a stage reads, source by source: the hash of a local one's files, the commit of one on the hub, UNKNOWN where the hub is silent.

    Raises ConfigError for a name that is neither here nor on the hub, DataError for a file of the lab's that was damaged or changed.
    """
    return {f"what {source.name} holds": _content(source.name) for source in sources}


def _content(name: str) -> str | None:
    files = local_files(name)
    if files:
        folder = store.resolve(name)
        for file in files:
            check_prepared(file)
        return store.hash_json([[str(file.relative_to(folder)), store.hash_file(file)] for file in files])
    try:
        return hub_revision(name)
    except ConfigError as error:
        if _is_silence(error.__cause__):
            return UNKNOWN
        raise


def _is_silence(error: BaseException | None) -> bool:
    """Whether the hub gave no answer, rather than one that says that there is no such data set."""
    from huggingface_hub.errors import RepositoryNotFoundError

    return error is not None and is_network_error(error) and not isinstance(error, RepositoryNotFoundError)


def mix(sources: list[Source], seed: int, *, fresh: bool = False) -> Iterator[tuple[Source, dict]]:
    """Draw rows from several sources in the shares of their weights, reproducibly; ends when one of them is used up.

    Ending there keeps the shares: going on would fill up with what is left.
    fresh  fetch rows of the hub anew, though they were read before
    """
    streams = [stream(source, fresh=fresh) for source in sources]
    weights = [source.weight for source in sources]
    draw = random.Random(seed)
    while True:
        (chosen,) = draw.choices(range(len(sources)), weights)
        row = next(streams[chosen], None)
        if row is None:
            return
        yield sources[chosen], row


def stream(source: Source, *, fresh: bool = False) -> Iterator[dict]:
    """The rows of one source's slice, one at a time, as the source has them.

    fresh  as in `mix`
    Raises DataError for a file that cannot be read, ConfigError for a name that is neither here nor on the hub.
    """
    split, start, stop = _SLICE.fullmatch(source.slice).group("split", "start", "stop")
    files = local_files(source.name)
    if files:
        _require_train(source, split)
        read, count = (_read_parquet, _count_parquet) if files[0].suffix == ".parquet" else (store.read_rows, _count_json)
        first, last = _bounds(start, stop, lambda: sum(map(count, files)))
        return islice(chain.from_iterable(map(read, files)), first, last)
    return _streamed(source.name, hub_revision(source.name), split, start, stop, fresh)


@lru_cache
def hub_revision(name: str) -> str:
    """The commit of a hub dataset that this process reads, so that its rows can say where they come from."""
    return hub_info("dataset", name).sha


def provenance(source: Source) -> dict:
    """What a row says of its origin: {"source"}, and {"revision"} for one from the hub."""
    return {"source": source.name} if local_files(source.name) else {"source": source.name, "revision": hub_revision(source.name)}


def local_files(name: str) -> list[Path]:
    """The data files that a path means, in order; empty for a hub name. Raises DataError for a path that is not there."""
    path = store.resolve(name)
    if store.is_dir(path):
        files = sorted(file for file in path.rglob("*") if file.suffix in (*JSON_SUFFIXES, ".parquet"))
        if not files:
            raise DataError(f"{store.shown(path)} holds no .parquet, .json or .jsonl file.")
        if len({file.suffix == ".parquet" for file in files}) > 1:
            raise DataError(f"{store.shown(path)} holds both Parquet and JSON files: name the files you mean, as a list of sources.")
        return files
    if store.is_file(path):
        if path.suffix not in (*JSON_SUFFIXES, ".parquet"):
            raise DataError(f"{store.shown(path)}: a data file is .parquet, .json or .jsonl.")
        return [path]
    if path.suffix in (*JSON_SUFFIXES, ".parquet") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"{store.shown(path)} does not exist.")
    return []


def check_prepared(path: Path) -> dict | None:
    """The manifest of a file of rows; None where there is none. Raises DataError where the file is not as the lab made it."""
    try:
        return store.read_manifest(path)
    except DataError as error:
        raise DataError(f"{error} To keep changes of your own, remove its manifest.") from error


def _require_train(source: Source, split: str) -> None:
    if split != "train":
        raise DataError(f"{source.name} has no split {split!r}: a local file has one, train.")


def _count_json(file: Path) -> int:
    return sum(1 for _ in store.read_rows(file))


def _read_parquet(file: Path) -> Iterator[dict]:
    """Rows of a Parquet file, a batch at a time; not through `datasets`, which reports every load to the hub, a local file's too."""
    import pyarrow
    import pyarrow.parquet

    try:
        # pre-buffering keeps every row group that was read; unbuffered, one is held whole; a row of traces may have 250 kB, so few a batch
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as parquet:
            for batch in parquet.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{store.shown(file)} cannot be read: {type(error).__name__}: {shortened(error)}.") from error


def _count_parquet(file: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{store.shown(file)} cannot be read: {type(error).__name__}: {shortened(error)}.") from error


def _streamed(name: str, revision: str | None, split: str, start: str | None, stop: str | None, fresh: bool = False) -> Iterator[dict]:
    first, last = _bounds(start, stop, lambda: hub_rows.count(name, revision, split))
    yield from hub_rows.read(name, revision, split, first, last, fresh=fresh)


def _bounds(start: str | None, stop: str | None, count: Callable[[], int]) -> tuple[int, int | None]:
    """A slice's bounds as row numbers; the rows are counted only where a share or a negative number asks for it."""
    marks = [mark for mark in (start, stop) if mark]
    total = count() if any("%" in mark or mark.startswith("-") for mark in marks) else None
    return _row_number(start, total) or 0, _row_number(stop, total)


def _row_number(mark: str | None, total: int | None) -> int | None:
    if not mark:
        return None
    number = round(total * int(mark[:-1]) / 100) if mark.endswith("%") else int(mark)
    if mark.startswith("-"):
        number += total
    return max(number, 0) if total is None else min(max(number, 0), total)


def following(slice_text: str, rows: int) -> str | None:
    """The slice of the `rows` rows behind another, or of one hundredth of the split behind a share; None where nothing is behind.

    >>> following("train[:1000]", 200), following("train[:10%]", 200), following("train", 200)
    ('train[1000:1200]', 'train[10%:11%]', None)
    """
    found = _SLICE.fullmatch(slice_text)
    split, stop = found.group("split", "stop") if found else (None, None)
    if not stop or stop.startswith("-") or stop == "100%":
        return None
    last = f"{int(stop.removesuffix('%')) + 1}%" if stop.endswith("%") else str(int(stop) + rows)
    return f"{split}[{stop}:{last}]"
