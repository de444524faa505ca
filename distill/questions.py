"""Held-out questions of one system, without those that training saw.

A question is `{"id", "instruction", "answer"}` and, where known, "input", "family", "system" (1 or 2) and "output", its whole reference
answer; rows of the lab's data files are taken too. A row that names no system is a question for either.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import leakage, prompt, store, students
from .console import say
from .errors import ConfigError, DataError
from .metrics import final_answer
from .students import Student

MODE_OF_SYSTEM = {1: "system1", 2: "system2"}
VALIDATION_NOTE = "the validation rows of its own data: not trained on, but the checkpoint was chosen by its loss on them"
EXAMPLES = 5  # of removed questions, in the report


@dataclass(frozen=True)
class Questions:
    """The questions of one system, and where they come from.

    rows   as they are asked, what training saw removed
    facts  the report's "questions"
    """

    rows: list[dict]
    facts: dict


def questions_for(student: Student, given: str | Path | dict | None, limit: int | None, seed: int) -> Questions:
    """A student's questions, without those that its training saw.

    given  a file, or mode → file; None takes the validation rows of the student's data
    limit  how many, drawn by `seed`; None takes all
    Raises ConfigError where there is no file, DataError where nothing in it can be asked.
    """
    place, note = _place(student, given)
    read, learnt = list(read_questions(place, student.mode)), students.learnt_rows(student)
    # the validation rows, where they are what is asked, would each be their own duplicate
    seen = (row for rows in learnt or [] if rows != place for row in store.read_rows(rows))
    clean = leakage.clean(read, seen)
    if not clean.kept:
        raise DataError(f"{store.shown(place)}: all {len(read):,} questions of {student.mode} stand in the training rows too. Give others.")
    rows = drawn(clean.kept, limit, seed)
    unchecked = None if learnt else "the rows that it learnt from are gone, or others stand there now"
    said = f"not checked: {unchecked}" if unchecked else f"{clean.checked_against:,} rows looked at"
    count = f"{len(rows):,} of {len(read):,} held-out questions"
    say(f"{student.mode}: {count}; {len(clean.removed):,} that training saw are left out ({said})")
    removed = {how: sum(one["how"] == how for one in clean.removed) for how in ("same", "n-grams")}
    leaked = {
        "checked_against": None if unchecked else clean.checked_against,
        "removed": len(clean.removed),
        "same": removed["same"],
        "n_grams": removed["n-grams"],
        "examples": clean.removed[:EXAMPLES],
        "why_unchecked": unchecked,
    }
    facts = {"source": store.shown(place), "sha256": store.hash_file(place), "read": len(read), "rows": len(rows)}
    return Questions(rows, {**facts, "leakage": leaked, "note": note})


def _place(student: Student, given: str | Path | dict | None) -> tuple[Path, str]:
    """The file of a student's questions, and what there is to say of it."""
    if isinstance(given, dict):
        given = given.get(student.mode)
        if given is None:
            raise ConfigError(f"questions: there is no file for {student.mode}. Write e.g. {{'{student.mode}': 'data/heldout.json'}}.")
    if given is not None:
        return store.resolve(given), ""
    learnt = students.learnt_rows(student) or []
    if len(learnt) < 2:
        raise ConfigError(
            f"{store.shown(student.path)} has no validation rows here to be asked. Give questions = a file of held-out rows "
            "{'instruction', 'answer'}."
        )
    return learnt[1], VALIDATION_NOTE


def read_questions(path: str | Path, mode: str) -> Iterator[dict]:
    """Yield a file's questions for one system; rows that say no system are for any.

    One row in:  {"instruction": "What is 2 + 2?", "output": "<think>\\n2+2=4\\n</think>\\n\\n4"}
    One row out: {…, "id": "…", "answer": "4", "mode": "system2"}
    Raises DataError that names the first row that is no question.
    """
    for number, row in enumerate(store.read_rows(path)):
        if MODE_OF_SYSTEM.get(row.get("system"), mode) != mode:
            continue
        texts = [row.get("instruction"), row.get("answer", row.get("output")), row.get("input") or ""]
        if not all(isinstance(text, str) and prompt.is_unicode(text) for text in texts) or not texts[0].strip() or not texts[1].strip():
            raise DataError(f"row {number} of {store.shown(path)} is no question: it needs texts 'instruction' and 'answer' (or 'output').")
        answer = row["answer"] if "answer" in row else final_answer(row["output"])
        yield {**row, "id": row.get("id") or prompt.row_id(texts[0], texts[2]), "answer": answer, "mode": mode}


def drawn(rows: list[dict], limit: int | None, seed: int) -> list[dict]:
    """At most `limit` of the questions, drawn by lot, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"limit = {limit!r}: give a whole number above 0, or None for all.")
    chosen = random.Random(seed).sample(range(len(rows)), limit)
    return [rows[number] for number in sorted(chosen)]
