"""Sources → rows: one schema, duplicates merged, validation split off by id, provenance kept, every dropped row counted.

A row is `{"id", "instruction", "input", "output", "source"}`, with `"revision"` where it came from the hub; its `id` hashes instruction
and input as they are asked. Files are JSON lists of rows, one row a line. Rows pass through a temporary database on disk, so memory does
not grow with their number.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from . import stages, store
from .console import progress, say
from .errors import DataError, shortened
from .label import Labeled, label_rows, teacher_of
from .preparation import (
    DUPLICATE,
    NO_DATA,
    Prepared,
    Spool,
    argument_problems,
    check_places,
    contents_of,
    raise_problems,
    readable,
    reuse,
    why_nothing,
    write_prepared,
)
from .prompt import format_prompt, is_unicode, row_id, tokenizer_hash, trained_ids
from .sources import Source, check_prepared, mix, parse_sources, provenance, settings_of
from .store import validation_path

DISTILQWEN = "alibaba-pai/DistilQwen_100k"


def prepare_system1_dataset(
    slice_str: str = "train[:1000]",
    *,
    source: str | list = DISTILQWEN,
    columns: dict | None = None,
    rows: int | None = None,
    validation: float = 0.05,
    teacher_model=None,
    teacher_tokenizer=None,
    relabel_with_teacher: bool | int = False,
    seed: int = 42,
    out_instructions: str = "data/train_instructions.json",
    out_labeled: str = "data/train_labeled.json",
    fresh: bool = False,
) -> Prepared:
    """Write the labelled rows that System 1 is trained on. Where they stand already, and nothing has changed, nothing is done.

    slice_str   source rows to read, e.g. "train[:1000]", "train[10%:20%]"
    source      hub name, local JSON, JSONL or Parquet file or folder, or a list of {source, columns, weight, slice} to mix
    columns     row field → column of the source, e.g. {"instruction": "question", "output": "answer"}
    rows        how many to keep (validation rows included); reading stops there. None keeps all that are read
    validation  share split off by id, 0 to 0.5
    teacher_model, teacher_tokenizer  who relabels: a name or folder (loaded in 8-bit), a loaded model with its tokenizer, or an Endpoint
    relabel_with_teacher              True: every label is the teacher's, and the source needs none; a whole number: those of the first
                                      so many rows; False: the data set's own
    fresh       make them anew, whatever stands there: read, and asked of the teacher, from the beginning
    Raises DataError `No data for System 1 distillation: …`, ConfigError for settings that cannot work.

    One row in:  {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    One row out: {"id": "…", "instruction": "Add.\\n\\n2 and 2", "input": "", "output": "4", "source": "my.jsonl"}
    """
    raise_problems(argument_problems(rows, validation, seed) + _relabel_problems(teacher_model, relabel_with_teacher))
    sources = parse_sources(source, columns, slice_str)
    labeled, instructions = store.resolve(out_labeled), store.resolve(out_instructions)
    check_places(sources, {"out_instructions": instructions, "out_labeled": labeled})
    teacher = teacher_of(teacher_model, teacher_tokenizer) if relabel_with_teacher else None
    with store.lock(labeled):
        settings = {"rows": rows, "validation": validation, "relabel_with_teacher": relabel_with_teacher, "seed": seed}
        stage = _stage(sources, settings, teacher)
        prepared = reuse(stage, fresh, labeled, instructions)
        if not prepared:
            with closing(Spool()) as spool:
                facts = _fill(spool, sources, settings, teacher, fresh)
                spool.choose_validation(validation, seed)
                facts |= {"slice": slice_str, "seed": seed, "validation_share": validation}
                prepared = write_prepared(spool, stage.record(facts.pop("incomplete")), facts, labeled, instructions)
    say(str(prepared))
    return prepared


def _stage(sources: list[Source], settings: dict, teacher) -> stages.Stage:
    settings, inputs, modules = settings | settings_of(sources), contents_of(sources, "system1"), stages.PREPARING["system1"]
    if teacher:
        settings |= {"teacher_model": teacher.name}
        inputs |= {"the teacher": store.hash_json(teacher.identity())}
        modules += stages.LABELLING
    return stages.Stage("System 1's data", settings, inputs, stages.code(*modules))


def _fill(spool: Spool, sources: list[Source], settings: dict, teacher, fresh: bool) -> dict:
    """Read the sources and ask the teacher. Returns {"read", "dropped", "incomplete"}; raises DataError where no row is left."""
    relabel, incomplete = settings["relabel_with_teacher"], ""
    counts = _read_into(spool, mix(sources, settings["seed"], fresh=fresh), settings["rows"], with_labels=relabel is not True)
    if teacher and spool.count:
        labeled = _relabel(spool, teacher, None if relabel is True else relabel, fresh)
        incomplete = labeled.incomplete
        counts.update(labeled.dropped)
    read, dropped = counts.pop("read"), dict(counts)
    if not spool.count:
        raise DataError(f"{NO_DATA['system1']}: {why_nothing(sources, read, dropped)}")
    return {"read": read, "dropped": dropped, "incomplete": incomplete}


def _relabel_problems(teacher_model, relabel) -> list[str]:
    if not isinstance(relabel, bool | int) or relabel < 0:
        return [f"relabel_with_teacher = {relabel!r}: give True, False, or how many rows."]
    if relabel and teacher_model is None:
        return ["relabel_with_teacher needs a teacher_model, e.g. Qwen/Qwen2.5-7B-Instruct."]
    if teacher_model is not None and relabel is False:
        return ["teacher_model is given and relabel_with_teacher is not: say True, or how many rows."]
    return []


def _relabel(spool: Spool, teacher, first: int | None, fresh: bool) -> Labeled:
    """Put the teacher's answers in place of the labels of the first rows, all where `first` is None. Returns what labelling gave."""
    rows = list(islice(spool.rows(validation=False), first))
    labeled = label_rows(rows, teacher, fresh=fresh)
    kept = {row["id"] for row in labeled.rows}
    for row in rows:
        if row["id"] not in kept:
            spool.remove(row["id"])
    for row in labeled.rows:
        spool.replace(row)
    return labeled


def _read_into(spool: Spool, mixed: Iterable[tuple[Source, dict]], rows: int | None, with_labels: bool) -> Counter:
    """Read until `rows` are kept or the sources end. Returns how many were read, and dropped by reason.

    with_labels  whether a row needs an output; False takes none that a source may have
    """
    counts: Counter = Counter(read=0)
    origins: dict = {}
    with progress("Preparing rows", total=rows) as update:
        for source, raw in readable(mixed, "system1"):
            if id(source) not in origins:
                _require_columns(source, raw, ("instruction", "output") if with_labels else ("instruction",))
                origins[id(source)] = provenance(source)
            counts["read"] += 1
            row, reason = to_row(source, raw, origins[id(source)], with_labels)
            if row and not spool.add(row):
                reason = DUPLICATE
            if reason:
                counts[reason] += 1
            if spool.count % 200 == 0:
                update(spool.count, note=f"{counts['read']:,} read")
            if spool.count == rows:
                break
        update(spool.count, total=spool.count, note=f"{counts['read']:,} read")
    return counts


def _require_columns(source: Source, raw: dict, fields: tuple[str, ...]) -> None:
    """Raise DataError where the source's first row lacks a column that every row needs."""
    missing = [source.column(field) for field in fields if source.column(field) not in raw]
    if missing:
        raise DataError(
            f"{NO_DATA['system1']}: {source.name} has no column {' and no column '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, raw)) or 'none'}. "
            "Say which is which, e.g. columns={'instruction': 'question', 'output': 'answer'}."
        )


def to_row(source: Source, raw: dict, origin: dict, with_label: bool = True) -> tuple[dict | None, str | None]:
    """One source row as a row of the lab, its input folded into the instruction; or None and why it was dropped."""
    text = {field: raw.get(source.column(field)) for field in ("instruction", "input", *(["output"] if with_label else []))}
    text["input"] = text["input"] or ""
    for field, value in text.items():
        if value is not None and not isinstance(value, str):
            return None, f"{field} that is no text"
        if field != "input" and not (value or "").strip():
            return None, f"no {field}"
        if not is_unicode(value):
            return None, f"{field} that is no valid Unicode"
    folded = format_prompt(text["instruction"], text["input"])
    teacher = raw.get("teacher") if with_label else None  # as `label` names it: whose the answer is goes with the row
    if isinstance(teacher, str) and teacher.strip() and is_unicode(teacher):
        origin = {**origin, "teacher": teacher}
    return {"id": row_id(folded), "instruction": folded, "input": "", "output": text.get("output", "").strip(), **origin}, None


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
    """Raise DataError unless a prepared file is as it was made, and the validation rows beside it are of the same preparation."""
    manifest, split = check_prepared(path), validation_path(path)
    if manifest and store.is_file(split) and split.name not in manifest["files"]:
        raise DataError(
            f"{store.shown(split)} is not recorded in the manifest of {store.shown(path)}: another preparation left it, or it was added "
            "since. Remove it; to keep it, remove that manifest."
        )


def _check_rows(path: Path) -> int:
    """How many rows a file holds. Raises DataError for the first that cannot be trained on."""
    count = 0
    for count, row in enumerate(store.read_rows(path), start=1):
        missing = [field for field in ("instruction", "output") if not isinstance(row.get(field), str) or not row[field].strip()]
        if missing:
            has = shortened(", ".join(map(str, row)), 80)
            raise DataError(f"row {count - 1} of {store.shown(path)} has no {' and no '.join(missing)}; it has {has}.")
        texts = {field: row.get(field) or "" for field in ("instruction", "input", "output")}
        unusable = [field for field, text in texts.items() if not isinstance(text, str) or not is_unicode(text)]
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
    """Tokenize labelled rows for training: `id`, `instruction`, `output`, `input_ids`, `completion_mask`; where that is done, nothing is.

    max_length  in tokens; a row that does not fit whole is dropped and counted, never cut
    """
    made_for = tokens_made_for(tokenizer, max_length)
    inputs = {store.shown(labeled): store.hash_file(store.resolve(labeled)), "the student's tokenizer": made_for["tokenizer_sha256"]}
    stage = stages.Stage(f"Tokens of {out.name}", {"max_length": max_length, "mode": mode}, inputs, stages.code(*stages.TOKENIZING))
    if known := stages.reuse(stage, out):
        return Tokenized(out, **known["counts"])
    counts = _tokenize(labeled, tokenizer, max_length, mode, out)
    store.write_manifest(out, {**made_for, "counts": counts, "stage": stage.record()})
    return Tokenized(out, **counts)


def _tokenize(labeled: str | Path, tokenizer, max_length: int, mode: str, out: Path) -> dict:
    """Write the token file. Returns the counts of `Tokenized`."""
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
    return {key: seen[key] for key in ("kept", "too_long", "shortest", "longest", "supervised")}


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
