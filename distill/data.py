"""Sources → rows: one schema, duplicates merged, validation split off by id, provenance kept, every dropped row counted.

A row is `{"id", "instruction", "input", "output", "source"}`, with `"revision"` where it came from the hub; its `id` hashes instruction
and input as they are asked. Files are JSON lists of rows, one row a line. Rows pass through a temporary database on disk, so memory does
not grow with their number.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from . import store
from .console import progress, say
from .errors import ConfigError, DataError, shortened
from .prompt import format_prompt, tokenizer_hash, trained_ids
from .sources import Source, mix, parse_sources, provenance

NO_DATA = {"system1": "No data for System 1 distillation"}
DISTILQWEN = "alibaba-pai/DistilQwen_100k"


@dataclass(frozen=True)
class Prepared:
    """What a preparation read, kept and dropped, and where it lies.

    path, validation_path, instructions_path  files; validation_path is None where nothing was split off
    read        source rows read
    kept        rows in `path`, validation rows not counted
    validation  rows in `validation_path`
    dropped     reason → rows
    """

    path: str
    validation_path: str | None
    instructions_path: str
    read: int
    kept: int
    validation: int
    dropped: dict

    def __str__(self) -> str:
        lines = [f"read {self.read:,} rows, kept {self.kept:,} for training and {self.validation:,} for validation"]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in sorted(self.dropped.items())]
        return "\n".join([*lines, f"  {store.shown(self.path)}"])


def prepare_system1_dataset(
    slice_str: str = "train[:1000]",
    *,
    source: str | list = DISTILQWEN,
    columns: dict | None = None,
    rows: int | None = None,
    validation: float = 0.05,
    seed: int = 42,
    out_instructions: str = "data/train_instructions.json",
    out_labeled: str = "data/train_labeled.json",
) -> Prepared:
    """Write the labelled rows that System 1 is trained on.

    slice_str   source rows to read, e.g. "train[:1000]", "train[10%:20%]"
    source      hub name, local JSON, JSONL or Parquet file or folder, or a list of {source, columns, weight, slice} to mix
    columns     row field → column of the source, e.g. {"instruction": "question", "output": "answer"}
    rows        how many to keep (validation rows included); reading stops there. None keeps all that are read
    validation  share split off by id, 0 to 0.5
    Raises DataError `No data for System 1 distillation: …`, ConfigError for settings that cannot work.

    One row in:  {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    One row out: {"id": "…", "instruction": "Add.\\n\\n2 and 2", "input": "", "output": "4", "source": "my.jsonl"}
    """
    _check_arguments(rows, validation, seed)
    sources = parse_sources(source, columns, slice_str)
    _check_places(sources, store.resolve(out_instructions), store.resolve(out_labeled))
    with store.lock(out_labeled), closing(_Spool()) as spool:
        try:
            counts = _read_into(spool, mix(sources, seed), rows)
        except DataError as error:
            raise DataError(f"{NO_DATA['system1']}: {error}") from error
        if not spool.count:
            raise DataError(f"{NO_DATA['system1']}: {_why_nothing(sources, counts)}")
        spool.choose_validation(validation, seed)
        facts = {"read": counts.pop("read"), "dropped": dict(counts), "slice": slice_str, "seed": seed, "validation_share": validation}
        prepared = _write(spool, store.resolve(out_instructions), store.resolve(out_labeled), facts)
    say(str(prepared))
    return prepared


def _check_arguments(rows, validation, seed) -> None:
    problems = []
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        problems.append(f"rows = {rows!r}: give a whole number above 0, or None for all.")
    if isinstance(validation, bool) or not isinstance(validation, int | float) or not 0 <= validation <= 0.5:
        problems.append(f"validation = {validation!r}: give a share from 0 to 0.5.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(f"seed = {seed!r}: give a whole number.")
    if problems:
        raise ConfigError.from_problems("the data settings", problems)


def _check_places(sources: list[Source], instructions: Path, labeled: Path) -> None:
    """Raise ConfigError unless the files can be written, each at a place of its own and over no source."""
    places = [instructions, validation_path(instructions), labeled, validation_path(labeled)]
    problems = []
    if len(set(places)) < len(places):
        problems.append(f"out_instructions = {store.shown(instructions)} and out_labeled = {store.shown(labeled)}: name two files.")
    problems += [f"{store.shown(place)} is a folder; name a file." for place in places if place.is_dir()]
    read = {store.resolve(source.name) for source in sources}
    problems += [
        f"{store.shown(place)} is (in) the source, which a preparation never changes; name another place."
        for place in places
        if any(place.is_relative_to(source) for source in read)
    ]
    if problems:
        raise ConfigError.from_problems("the places to write to", problems)
    for path in (instructions, labeled):
        store.check_writable(path)


def _why_nothing(sources: list[Source], counts: Counter) -> str:
    names = ", ".join(f"{source.name} {source.slice}" for source in sources)
    if not counts["read"]:
        return f"{names} selects no rows: the source is empty, or ends before the slice begins. Widen the slice, e.g. train[:1000]."
    dropped = ", ".join(f"{count:,} with {reason}" for reason, count in counts.items() if reason != "read")
    return f"none of the {counts['read']:,} rows of {names} can be used: {dropped}."


def _read_into(spool: "_Spool", mixed: Iterable[tuple[Source, dict]], rows: int | None) -> Counter:
    """Read until `rows` are kept or the sources end. Returns how many were read, and dropped by reason."""
    counts: Counter = Counter(read=0)
    origins: dict = {}
    with progress("Preparing rows", total=rows) as update:
        for source, raw in mixed:
            if id(source) not in origins:
                _require_columns(source, raw)
                origins[id(source)] = provenance(source)
            counts["read"] += 1
            row, reason = to_row(source, raw, origins[id(source)])
            if row and not spool.add(row):
                reason = "the same question as an earlier row"
            if reason:
                counts[reason] += 1
            if spool.count % 200 == 0:
                update(spool.count, note=f"{counts['read']:,} read")
            if spool.count == rows:
                break
        update(spool.count, total=spool.count, note=f"{counts['read']:,} read")
    return counts


def _require_columns(source: Source, raw: dict) -> None:
    """Raise DataError where the source's first row lacks a column that every row needs."""
    missing = [source.column(field) for field in ("instruction", "output") if source.column(field) not in raw]
    if missing:
        raise DataError(
            f"{source.name} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(map(repr, raw)) or 'none'}. "
            "Say which is which, e.g. columns={'instruction': 'question', 'output': 'answer'}."
        )


def to_row(source: Source, raw: dict, origin: dict) -> tuple[dict | None, str | None]:
    """One source row as a row of the lab, its input folded into the instruction; or None and why it was dropped."""
    text = {field: raw.get(source.column(field)) for field in ("instruction", "input", "output")}
    text["input"] = text["input"] or ""
    for field, value in text.items():
        if value is not None and not isinstance(value, str):
            return None, f"{field} that is no text"
        if field != "input" and not (value or "").strip():
            return None, f"no {field}"
        if not _is_unicode(value):
            return None, f"{field} that is no valid Unicode"
    folded = format_prompt(text["instruction"], text["input"])
    return {"id": store.hash_json(folded)[:16], "instruction": folded, "input": "", "output": text["output"].strip(), **origin}, None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can smuggle in and UTF-8 cannot hold
        return False
    return True


class _Spool:
    """Rows on their way, in a temporary database that SQLite keeps on disk and deletes by itself."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, json TEXT, lot TEXT, validation INTEGER DEFAULT 0)")
        self.count = 0

    def add(self, row: dict) -> bool:
        """Keep a row; False where its id is known already."""
        values = (row["id"], json.dumps(row, ensure_ascii=False))
        added = self._database.execute("INSERT OR IGNORE INTO rows (id, json) VALUES (?, ?)", values).rowcount == 1
        self.count += added
        return added

    def choose_validation(self, share: float, seed: int) -> None:
        """Mark the share of rows whose ids, hashed with the seed, come first; at least one, never all."""
        wanted = min(max(round(self.count * share), 1), self.count - 1) if share else 0
        self._database.create_function("lot", 1, lambda row_id: store.hash_json([seed, row_id]), deterministic=True)
        self._database.execute("UPDATE rows SET lot = lot(id)")
        self._database.execute("UPDATE rows SET validation = 1 WHERE id IN (SELECT id FROM rows ORDER BY lot LIMIT ?)", (wanted,))

    def rows(self, validation: bool) -> Iterator[dict]:
        """The training or the validation rows, in the order they came."""
        for (text,) in self._database.execute("SELECT json FROM rows WHERE validation = ? ORDER BY rowid", (validation,)):
            yield json.loads(text)

    def close(self) -> None:
        self._database.close()


def validation_path(path: str | Path) -> Path:
    """Where the validation rows of a data file lie: `train_labeled.json` → `train_labeled_validation.json`."""
    path = Path(path)
    return path.with_name(f"{path.stem}_validation{path.suffix}")


def _write(spool: _Spool, instructions: Path, labeled: Path, facts: dict) -> Prepared:
    """Write the four files; the labelled one after its companions, the manifest that binds them last."""
    written = {}
    for validation in (True, False):
        for path, labels in ((instructions, False), (labeled, True)):
            place = validation_path(path) if validation else path
            left_out = () if labels else ("output",)
            chosen = ({key: value for key, value in row.items() if key not in left_out} for row in spool.rows(validation))
            written[place] = store.write_rows(place, chosen)
    for place in [place for place, count in written.items() if not count]:
        place.unlink()
        del written[place]
    store.write_manifest(labeled, facts, files=[place for place in written if place in (labeled, validation_path(labeled))])
    split = validation_path(labeled)
    return Prepared(
        path=str(labeled),
        validation_path=str(split) if split in written else None,
        instructions_path=str(instructions),
        read=facts["read"],
        kept=written[labeled],
        validation=written.get(split, 0),
        dropped=facts["dropped"],
    )


# From labelled rows to tokens


def check_labeled(path: str | Path, system: str) -> int:
    """How many rows a labelled file holds. Raises DataError `No data for …` unless every one can be trained on."""
    path = store.resolve(path)
    try:
        _check_manifest(path)
        count = _check_rows(path)
        if not count:
            raise DataError(f"{store.shown(path)} is empty.")
        if store.is_file(validation_path(path)):
            _check_rows(validation_path(path))
    except DataError as error:
        raise DataError(f"{NO_DATA[system]}: {error} Prepare it: python distill_app.py prepare-{system}") from error
    return count


def _check_manifest(path: Path) -> None:
    try:
        store.read_manifest(path)
    except DataError as error:
        raise DataError(f"{error} To keep changes of your own, remove its manifest.") from error


def _check_rows(path: Path) -> int:
    """How many rows a file holds. Raises DataError for the first that cannot be trained on."""
    count = 0
    for count, row in enumerate(store.read_rows(path), start=1):
        missing = [field for field in ("instruction", "output") if not isinstance(row.get(field), str) or not row[field].strip()]
        if missing:
            has = shortened(", ".join(map(str, row)), 80)
            raise DataError(f"row {count - 1} of {store.shown(path)} has no {' and no '.join(missing)}; it has {has}.")
        texts = {field: row.get(field) or "" for field in ("instruction", "input", "output")}
        unusable = [field for field, text in texts.items() if not isinstance(text, str) or not _is_unicode(text)]
        if unusable:
            raise DataError(f"row {count - 1} of {store.shown(path)}: its {' and '.join(unusable)} is no valid text.")
    return count


@dataclass(frozen=True)
class Tokenized:
    """A run's own token file, lengths in tokens.

    kept, too_long      rows
    shortest, longest   of all rows, and of those kept
    supervised          tokens that the loss covers
    """

    path: Path
    kept: int
    too_long: int
    shortest: int
    longest: int
    supervised: int


def write_tokenized(labeled: str | Path, tokenizer, max_length: int, mode: str, out: Path) -> Tokenized:
    """Tokenize labelled rows for training: `id`, `instruction`, `output`, `input_ids`, `completion_mask`.

    max_length  in tokens; a row that does not fit whole is dropped and counted, never cut
    """
    seen = Counter(shortest=0)

    def tokenized() -> Iterator[dict]:
        for number, row in enumerate(store.read_rows(labeled), start=1):
            ids, mask = trained_ids(tokenizer, row["instruction"], row["output"], row.get("input") or "", mode)
            seen["shortest"] = min(seen["shortest"] or len(ids), len(ids))
            if number % 200 == 0:
                update(number)
            if len(ids) > max_length:
                seen["too_long"] += 1
                continue
            seen["kept"] += 1
            seen["supervised"] += sum(mask)
            seen["longest"] = max(seen["longest"], len(ids))
            yield {"id": row.get("id"), **_text_of(row), "input_ids": ids, "completion_mask": mask}

    with progress("Tokenizing") as update:
        store.write_rows(out, tokenized())
        update(seen["kept"], total=seen["kept"])
    store.write_manifest(out, tokens_made_for(tokenizer, max_length))
    return Tokenized(out, **{key: seen[key] for key in ("kept", "too_long", "shortest", "longest", "supervised")})


def tokens_made_for(tokenizer, max_length: int) -> dict:
    """What decides a token file besides its rows; its manifest holds it, so that no job trains on tokens made for another."""
    return {"tokenizer_sha256": tokenizer_hash(tokenizer), "max_length": max_length}


def _text_of(row: dict) -> dict:
    return {"instruction": row["instruction"], "output": row["output"]}


def require_rows(tokenized: Tokenized, labeled: str | Path, max_length: int, mode: str) -> None:
    """Raise DataError `No data for …` where no row fits `max_length`."""
    if not tokenized.kept:
        raise DataError(
            f"{NO_DATA[mode]}: all {tokenized.too_long:,} rows of {store.shown(labeled)} are longer than max_length = {max_length} "
            f"tokens. Raise max_length; the shortest row has {tokenized.shortest:,}."
        )
