"""What both preparations share: settings checked, rows spooled on disk, validation split off by id, files written, the outcome shown."""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import stages, store
from .errors import ConfigError, DataError, shortened
from .sources import Source, contents
from .store import validation_path

NO_DATA = {"system1": "No data for System 1 distillation", "system2": "No data for System 2 distillation"}
DUPLICATE = "the same question as an earlier row"
SHOWN = ("read", "kept", "validation", "dropped", "teachers", "traces", "histograms", "advice")  # of a manifest, in Prepared
TEACHERS_SHOWN = 8
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Prepared:
    """What a preparation read, kept and dropped, and where it lies.

    path, validation_path, instructions_path  files; None for one that there is not
    read        source rows read
    kept        rows in `path`, validation rows not counted
    validation  rows in `validation_path`
    dropped     reason → rows; with `kept` and `validation` they add up to `read`
    teachers    who wrote the labels → rows
    traces      System 2: {"read", "kept", "dropped": reason → traces}
    histograms  System 2: {"RV": {"before", "after"}, "CD": …}, each the traces of levels 0 to 9; before: all of good form, after: kept
    advice      System 2, where too little was kept: what would bring more, and how much
    """

    path: str
    validation_path: str | None
    instructions_path: str | None
    read: int
    kept: int
    validation: int
    dropped: dict
    teachers: dict = field(default_factory=dict)
    traces: dict = field(default_factory=dict)
    histograms: dict = field(default_factory=dict)
    advice: list = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"read {self.read:,} rows, kept {self.kept:,} for training and {self.validation:,} for validation"]
        lines += _dropped_lines(self.dropped)
        if self.traces:
            lines += [f"  of {self.traces['read']:,} traces, kept {self.traces['kept']:,}", *_dropped_lines(self.traces["dropped"], "    ")]
        lines += _histogram_lines(self.histograms) if self.histograms else []
        lines += [f"  labels by: {_shares(self.teachers)}", "  (not by the teacher of the comparison, unless it is named here)"]
        lines += [f"  advice: {line}" for line in self.advice]
        return "\n".join([*lines, f"  {store.shown(self.path)}"])


def _dropped_lines(dropped: dict, indent: str = "  ") -> list[str]:
    return [f"{indent}dropped {count:,}: {reason}" for reason, count in sorted(dropped.items())]


def _shares(teachers: dict) -> str:
    total = sum(teachers.values())
    names = {name: shortened(name if name.isprintable() else repr(name), 60) for name in teachers}
    return ", ".join(f"{names[name]} ({count / total:.0%})" for name, count in teachers.items())


def _histogram_lines(histograms: dict) -> list[str]:
    """A line of ten small bars with their counts for each histogram, in 80 columns."""
    lines = ["  level      " + "".join(f"{level:>6}" for level in range(10))]
    for name, both in histograms.items():
        for when, counts in both.items():
            highest = max([*counts, 1])
            # a count above 0 never looks like none
            bars = [_BARS[-(-count * (len(_BARS) - 1) // highest)] for count in counts]
            lines.append(f"  {name} {when:<8}" + "".join(f" {bar}{_short(count):>4}" for bar, count in zip(bars, counts, strict=True)))
    return lines


def _short(count: int) -> str:
    """A count in at most four characters: 950, 9.5k, 950k, 9.5M."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 9.95 * size else f"{count // size}{unit}"
    return str(count)


# What is checked before anything is read


def argument_problems(rows, validation, seed) -> list[str]:
    """What is wrong with the settings that both preparations have."""
    problems = []
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        problems.append(f"rows = {rows!r}: give a whole number above 0, or None for all.")
    if isinstance(validation, bool) or not isinstance(validation, int | float) or not 0 <= validation <= 0.5:
        problems.append(f"validation = {validation!r}: give a share from 0 to 0.5.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(f"seed = {seed!r}: give a whole number.")
    return problems


def raise_problems(problems: list[str]) -> None:
    """Raise ConfigError with all problems of a preparation's settings, if there are any."""
    if problems:
        raise ConfigError.from_problems("the data settings", problems)


def check_places(sources: list[Source], outputs: dict[str, Path]) -> None:
    """Raise ConfigError unless the files can be written, each at a place of its own and over no source.

    outputs  name of the argument → file; its validation rows lie beside it
    """
    places = [place for path in outputs.values() for place in (path, validation_path(path))]
    problems = []
    if len(set(places)) < len(places):
        problems.append(" and ".join(f"{name} = {store.shown(path)}" for name, path in outputs.items()) + ": name two files.")
    problems += [f"{store.shown(place)} is a folder; name a file." for place in places if place.is_dir()]
    read = {store.resolve(source.name) for source in sources}
    problems += [
        f"{store.shown(place)} is (in) the source, which a preparation never changes; name another place."
        for place in places
        if any(place.is_relative_to(source) for source in read)
    ]
    if problems:
        raise ConfigError.from_problems("the places to write to", problems)
    for path in outputs.values():
        store.check_writable(path)


# Reading


def readable(mixed: Iterable[tuple[Source, dict]], system: str) -> Iterator[tuple[Source, dict]]:
    """The rows of a mixture; a source that cannot be read is `No data for …`."""
    with _no_data(system):
        yield from mixed


def contents_of(sources: list[Source], system: str) -> dict:
    """`sources.contents`; a source that cannot be read is `No data for …`."""
    with _no_data(system):
        return contents(sources)


@contextmanager
def _no_data(system: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{NO_DATA[system]}: {error}") from error


def why_nothing(sources: list[Source], read: int, dropped: dict) -> str:
    """Why not one row was kept, in words."""
    names = ", ".join(f"{source.name} {source.slice}" for source in sources)
    if not read:
        return f"{names} selects no rows: the source is empty, or ends before the slice begins. Widen the slice, e.g. train[:1000]."
    reasons = ", ".join(f"{count:,} with {reason}" for reason, count in dropped.items())
    return f"none of the {read:,} rows of {names} can be used: {reasons}."


class Spool:
    """Rows on their way, in a temporary database that SQLite keeps on disk and deletes by itself.

    Beside the rows it knows the *missed*: ids of questions that were not kept, with the changes of settings that would have kept them.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._write("CREATE TABLE rows (id TEXT PRIMARY KEY, json TEXT, kind TEXT, lot TEXT, validation INTEGER DEFAULT 0)")
        self._write("CREATE TABLE missed (change TEXT, id TEXT, PRIMARY KEY (change, id)) WITHOUT ROWID")
        self.count = 0

    def _write(self, statement: str, values: tuple = ()) -> int:
        """Change the database. Returns how many rows changed."""
        with _cannot_spool():
            return self._database.execute(statement, values).rowcount

    def _read(self, query: str, values: tuple = ()) -> Iterator[tuple]:
        with _cannot_spool():  # reading makes room in memory by writing what has changed
            found = self._database.execute(query, values)
            while (row := found.fetchone()) is not None:  # `yield from` would close the cursor, maybe of a database that is closed
                yield row

    def add(self, row: dict, kind: str | None = None) -> bool:
        """Keep a row, of a kind that `trim` can ask for; False where its id is known already."""
        values = (row["id"], json.dumps(row, ensure_ascii=False), kind)
        added = self._write("INSERT OR IGNORE INTO rows (id, json, kind) VALUES (?, ?, ?)", values) == 1
        self.count += added
        return added

    def replace(self, row: dict) -> None:
        """Put a row in place of the one of its id."""
        self._write("UPDATE rows SET json = ? WHERE id = ?", (json.dumps(row, ensure_ascii=False), row["id"]))

    def remove(self, row_id: str) -> None:
        """Take a row out."""
        self.count -= self._write("DELETE FROM rows WHERE id = ?", (row_id,))

    def has(self, row_id: str) -> bool:
        """Whether a row of this id is kept."""
        return next(self._read("SELECT 1 FROM rows WHERE id = ?", (row_id,)), None) is not None

    def miss(self, row_id: str, changes: Iterable[str]) -> None:
        """Remember which changes of settings, each alone, would have kept a question."""
        for change in changes:
            self._write("INSERT OR IGNORE INTO missed VALUES (?, ?)", (change, row_id))

    def missed(self) -> Counter:
        """Change → questions, each once, that it alone would bring on top of those kept."""
        found = self._read("SELECT change, COUNT(*) FROM missed WHERE id NOT IN (SELECT id FROM rows) GROUP BY change")
        return Counter(dict(found))

    def trim(self, kind: str, size: int, seed: int, change: str) -> int:
        """Keep `size` rows of a kind, drawn by their hashed ids; the others are missed for want of `change`. Returns how many went."""
        # the salt: drawn by the validation split's own lots, those that stay would all be validation rows
        self._draw_lots(seed, "trim")
        surplus = "SELECT id FROM rows WHERE kind = ? ORDER BY lot LIMIT -1 OFFSET ?"
        self._write(f"INSERT OR IGNORE INTO missed SELECT ?, id FROM ({surplus})", (change, kind, size))
        removed = self._write(f"DELETE FROM rows WHERE id IN ({surplus})", (kind, size))
        self.count -= removed
        return removed

    def choose_validation(self, share: float, seed: int) -> None:
        """Mark the share of rows whose ids, hashed with the seed, come first; at least one, never all."""
        wanted = min(max(round(self.count * share), 1), self.count - 1) if share else 0
        self._draw_lots(seed)
        self._write("UPDATE rows SET validation = 1 WHERE id IN (SELECT id FROM rows ORDER BY lot LIMIT ?)", (wanted,))

    def _draw_lots(self, *salt) -> None:
        self._database.create_function("draw", 1, lambda row_id: store.hash_json([*salt, row_id]), deterministic=True)
        self._write("UPDATE rows SET lot = draw(id)")

    def count_by(self, key: str) -> Counter:
        """Value of a key → rows; rows without it are counted under None."""
        return Counter(dict(self._read("SELECT json_extract(json, '$.' || ?) AS value, COUNT(*) FROM rows GROUP BY value", (key,))))

    def teachers(self) -> dict:
        """Who wrote the labels → rows, the busiest first and the rest together; where a row names nobody, its source stands for them."""
        named = "COALESCE(json_extract(json, '$.teacher'), 'whoever wrote ' || json_extract(json, '$.source'))"
        query = f"SELECT {named} AS name, COUNT(*) AS rows FROM rows GROUP BY name ORDER BY rows DESC, name LIMIT ?"
        counts = dict(self._read(query, (TEACHERS_SHOWN,)))
        rest = self.count - sum(counts.values())
        return counts | ({"others": rest} if rest else {})

    def rows(self, validation: bool) -> Iterator[dict]:
        """The training or the validation rows, in the order they came."""
        for (text,) in self._read("SELECT json FROM rows WHERE validation = ? ORDER BY rowid", (validation,)):
            yield json.loads(text)

    def close(self) -> None:
        self._database.close()


@contextmanager
def _cannot_spool() -> Iterator[None]:
    """Within the block, what SQLite cannot write is a ConfigError that names its folder for temporary files."""
    try:
        yield
    except sqlite3.OperationalError as error:
        folder = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108, as SQLite chooses it
        message = f"Cannot write {folder}, the folder for temporary files: {error}. Set TMPDIR to another folder or free some space."
        raise ConfigError(message) from error


# Writing, and what stands written already


def reuse(stage: stages.Stage, fresh: bool, labeled: Path, instructions: Path | None = None) -> Prepared | None:
    """What the preparation gave that wrote these files before, where nothing has changed since; None where it is to be done."""
    manifest = stages.reuse(stage, *[path for path in (labeled, instructions) if path], fresh=fresh)
    return manifest and _prepared(manifest, labeled, instructions)


def _prepared(facts: dict, labeled: Path, instructions: Path | None) -> Prepared:
    shown = {name: facts[name] for name in SHOWN if name in facts}
    split = str(validation_path(labeled)) if facts["validation"] else None
    return Prepared(str(labeled), split, str(instructions) if instructions else None, **shown)


def write_prepared(spool: Spool, made: dict, facts: dict, labeled: Path, instructions: Path | None = None) -> Prepared:
    """Write a preparation's files: the labelled one after its companions, the manifest that binds them last.

    made   the record of the preparation (`Stage.record`)
    facts  what Prepared shows of how the rows came about ("read", "dropped", …), and what the manifest alone keeps
    """
    written = {}
    for validation in (True, False):
        for path, left_out in ((instructions, ("output",)), (labeled, ())):
            if path:
                place = validation_path(path) if validation else path
                chosen = ({key: value for key, value in row.items() if key not in left_out} for row in spool.rows(validation))
                written[place] = store.write_rows(place, chosen)
    for place in [place for place, count in written.items() if not count]:
        place.unlink()
        del written[place]
    counts = {"kept": written[labeled], "validation": written.get(validation_path(labeled), 0)}
    facts = {**facts, **counts, "teachers": spool.teachers(), "stage": made}
    for path, known in ((instructions, {"stage": made}), (labeled, facts)):
        if path:
            store.write_manifest(path, known, files=[place for place in written if place in (path, validation_path(path))])
    return _prepared(facts, labeled, instructions)
