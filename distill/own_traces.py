"""Traces of one's own teacher, in place of a data set's: its questions, asked so that the teacher reasons first.

What comes out is a source for `prepare_system2_dataset`, which selects among traces whoever wrote them.
"""

from collections import Counter
from pathlib import Path

from . import stages, store
from .console import progress, say
from .errors import DataError
from .generation import MAX_NEW_TOKENS
from .label import label_rows, teacher_of
from .omnithought import FIELDS, OTHER_FORM, Schema, read_question
from .preparation import DUPLICATE, NO_DATA, argument_problems, check_places, contents_of, raise_problems, readable, why_nothing
from .prompt import is_trace, row_id
from .sources import Source, mix, parse_sources, settings_of
from .traces import OMNITHOUGHT


def write_traces(
    teacher_model,
    teacher_tokenizer=None,
    *,
    slice_str: str = "train[:20000]",
    source: str | list = OMNITHOUGHT,
    columns: dict | None = None,
    rows: int | None = 2000,
    max_new_tokens: int = MAX_NEW_TOKENS["system2"],
    seed: int = 42,
    out: str = "data/teacher_traces.json",
    fresh: bool = False,
) -> str:
    """Let a teacher reason about a source's questions; an interrupted run goes on where it stood, a finished one is not done again.

    teacher_model   a name or folder (loaded in 8-bit), a loaded model with its tokenizer, or an Endpoint
    slice_str, source, columns, seed  as in `prepare_system2_dataset`; only the questions are read
    rows            how many questions to ask; None asks all that are read
    max_new_tokens  limit of reasoning and answer together; a trace cut off there is dropped
    fresh           make them anew: read, and asked of the teacher, from the beginning
    Returns the path of the traces, `source` of `prepare_system2_dataset`. Raises DataError where no usable trace came.

    One row in:  {"question": "2+2?", …}
    One row out: {"id": "…", "instruction": "2+2?", "output": "<think>\\n2+2=4\\n</think>\\n\\n4", "teacher": "Qwen/Qwen2.5-7B-Instruct"}
    """
    raise_problems(argument_problems(rows, 0, seed))
    sources, place = parse_sources(source, columns, slice_str, FIELDS), store.resolve(out)
    check_places(sources, {"out": place})
    teacher = teacher_of(teacher_model, teacher_tokenizer)
    with store.lock(place):
        stage = _stage(sources, {"rows": rows, "max_new_tokens": max_new_tokens, "seed": seed}, teacher)
        if not stages.reuse(stage, place, fresh=fresh):
            _write(stage, sources, teacher, place, fresh)
    return str(place)


def _stage(sources: list[Source], settings: dict, teacher) -> stages.Stage:
    settings = settings | {"teacher_model": teacher.name} | settings_of(sources)
    inputs = contents_of(sources, "system2") | {"the teacher": store.hash_json(teacher.identity())}
    return stages.Stage("the teacher's traces", settings, inputs, stages.code(*stages.PREPARING["traces"], *stages.LABELLING))


def _write(stage: stages.Stage, sources: list[Source], teacher, place: Path, fresh: bool) -> None:
    """Read the questions, ask the teacher, write its traces. Raises DataError where no usable one came."""
    settings = stage.settings
    asked, dropped = _questions(sources, settings["rows"], settings["seed"], fresh)
    labeled = label_rows(list(asked.values()), teacher, mode="system2", max_new_tokens=settings["max_new_tokens"], fresh=fresh)
    kept = [row for row in labeled.rows if is_trace(row["output"])]
    dropped.update(labeled.dropped | ({OTHER_FORM: len(labeled.rows) - len(kept)} if len(kept) < len(labeled.rows) else {}))
    read = dropped.pop("read")
    if not kept:
        raise DataError(f"{NO_DATA['system2']}: {why_nothing(sources, read, dict(dropped))}")
    store.write_rows(place, kept)
    facts = {"teacher": teacher.name, "read": read, "kept": len(kept), "dropped": dict(dropped)}
    store.write_manifest(place, {**facts, "stage": stage.record(labeled.incomplete)})
    say(f"{len(kept):,} traces by {teacher.name}: {store.shown(place)}")


def _questions(sources: list[Source], rows: int | None, seed: int, fresh: bool) -> tuple[dict, Counter]:
    """Questions by id, up to `rows` of them; and how many source rows were read, and dropped by reason."""
    questions, schemas, counts = {}, {}, Counter(read=0)
    with progress("Reading questions", total=rows) as update:
        for source, raw in readable(mix(sources, seed, fresh=fresh), "system2"):
            schema = schemas.setdefault(id(source), _question_schema(source, raw))
            counts["read"] += 1
            question, reason = read_question(schema, raw)
            if not reason and row_id(question) in questions:
                reason = DUPLICATE
            if reason:
                counts[reason] += 1
                continue
            questions[row_id(question)] = {"id": row_id(question), "instruction": question, "input": ""}
            update(len(questions), note=f"{counts['read']:,} read")
            if len(questions) == rows:
                break
    return questions, counts


def _question_schema(source: Source, raw: dict) -> Schema:
    """What a source calls its questions; the rest of its columns does not matter."""
    name = next((name for name in (source.columns.get("instruction"), *FIELDS["instruction"]) if name in raw), None)
    if name is None:
        raise DataError(
            f"{NO_DATA['system2']}: {source.name} has no question ({', '.join(FIELDS['instruction'])}); it has "
            f"{', '.join(map(repr, raw)) or 'nothing'}. Say which it is, e.g. columns={{'instruction': 'problem'}}."
        )
    return Schema(nested=False, names={"instruction": name})
