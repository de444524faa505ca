"""Held-out questions of one system, without those that training saw.

A question is `{"id", "instruction", "answer"}` and, where known, "input", "family", "system" (1 or 2) and "output", its whole reference
answer; rows of the lab's data files are taken too. A row that names no system is a question for either.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import leakage, prompt, store
from .console import say
from .errors import ConfigError, DataError, shortened
from .metrics import final_answer
from .students import Student, learnt_rows

MODE_OF_SYSTEM = {1: "system1", 2: "system2"}
VALIDATION_NOTE = "the validation rows of its own data: not trained on, but the checkpoint was chosen by its loss on them"
EXAMPLES = 5  # of removed questions, in the report


@dataclass(frozen=True)
class Questions:
    """The questions of one system, and where they come from.

    rows   as they are asked, what training saw left out
    facts  the report's "questions"
    """

    rows: list[dict]
    facts: dict


def questions_for(student: Student, given: str | Path | dict | None, limit: int | None, seed: int) -> Questions:
    """A student's questions, each once, without those that its training saw.

    given  a file, or mode → file; None, of a mode too, takes the validation rows of the student's data
    limit  how many, drawn by `seed`; None takes all
    Raises ConfigError where there is no file, DataError where nothing in it can be asked.
    """
    labeled, validation = learnt_rows(student)
    place = _place(student, given, validation)
    read = list(read_questions(place, student.mode))
    if not read:
        raise DataError(f"{store.shown(place)} has no question for {student.mode}. Give a file of rows that say no system, or this one.")
    each = list({prompt.row_id(row["instruction"], row.get("input") or ""): row for row in reversed(read)}.values())[::-1]
    are_validation = validation is not None and store.hash_file(place) == store.hash_file(validation)
    # the validation rows, where they are what is asked, would each be their own duplicate
    seen = [rows for rows in (labeled, None if are_validation else validation) if rows]
    clean = leakage.clean(each, (row for rows in seen for row in store.read_rows(rows)))
    if not clean.kept:
        raise DataError(f"{store.shown(place)}: all {len(each):,} questions of {student.mode} stand in the training rows too. Give others.")
    rows = drawn(clean.kept, limit, seed)
    unchecked = None if labeled else "the rows that it learnt from are gone, or others stand there now"
    said = f"not checked: {unchecked}" if unchecked else f"{clean.checked_against:,} rows of its data looked at"
    count = f"{len(rows):,} of {len(each):,} held-out questions"
    say(f"{student.mode}: {count}; {len(clean.removed):,} that training saw are left out ({said})")
    facts = {"source": store.shown(place), "sha256": store.hash_file(place), "read": len(read), "rows": len(rows)}
    note = VALIDATION_NOTE if are_validation else ""
    return Questions(rows, {**facts, "merged": len(read) - len(each), "leakage": _leaked(clean, unchecked), "note": note})


def _leaked(clean: leakage.Leakage, unchecked: str | None) -> dict:
    """The report's "leakage"."""
    removed = {how: sum(one["how"] == how for one in clean.removed) for how in (leakage.SAME, leakage.N_GRAMS)}
    return {
        "checked_against": None if unchecked else clean.checked_against,
        "removed": len(clean.removed),
        "same": removed[leakage.SAME],
        "n_grams": removed[leakage.N_GRAMS],
        "examples": clean.removed[:EXAMPLES],
        "why_unchecked": unchecked,
    }


def _place(student: Student, given: str | Path | dict | None, validation: Path | None) -> Path:
    """The file of a student's questions."""
    if isinstance(given, dict):
        if student.mode not in given:
            raise ConfigError(f"questions: there is no file for {student.mode}. Write e.g. {{'{student.mode}': 'data/heldout.json'}}.")
        given = given[student.mode]
    if given is not None:
        return store.resolve(given)
    if validation is None:
        raise ConfigError(
            f"{store.shown(student.path)} has no validation rows here to be asked. Give questions = a file of held-out rows "
            "{'instruction', 'answer'}."
        )
    return validation


def read_questions(path: str | Path, mode: str) -> Iterator[dict]:
    """Yield a file's questions for one system; rows that say no system are for any.

    One row in:  {"instruction": "What is 2 + 2?", "output": "<think>\\n2+2=4\\n</think>\\n\\n4"}
    One row out: {…, "id": "…", "answer": "4", "mode": "system2"}
    Raises DataError that names the first row that is no question.
    """
    for number, row in enumerate(store.read_rows(path)):
        if row.get("system") not in (None, *MODE_OF_SYSTEM):
            raise DataError(f"row {number} of {store.shown(path)}: system = {shortened(repr(row['system']), 40)} is not 1 or 2.")
        if MODE_OF_SYSTEM.get(row.get("system"), mode) != mode:
            continue
        if not _is_question(row):
            raise DataError(f"row {number} of {store.shown(path)} is no question: it needs texts 'instruction' and 'answer' (or 'output').")
        answer = row["answer"] if "answer" in row else final_answer(row["output"])
        known = {"id": str(row.get("id", prompt.row_id(row["instruction"], row.get("input") or ""))), "answer": answer, "mode": mode}
        yield {**row, **known, "family": None if row.get("family") is None else str(row["family"])}


def _is_question(row: dict) -> bool:
    """Whether a row's texts are texts, and it asks something that has an answer, behind its reasoning too."""
    texts = [row.get("instruction"), row.get("input") or "", row.get("output") or "", row.get("answer", row.get("output"))]
    if not all(isinstance(text, str) and prompt.is_unicode(text) for text in texts):
        return False
    return bool(texts[0].strip() and (texts[-1] if "answer" in row else final_answer(texts[-1])).strip())


def drawn(rows: list[dict], limit: int | None, seed: int) -> list[dict]:
    """At most `limit` of the questions, drawn by lot, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"limit = {limit!r}: give a whole number above 0, or None for all.")
    chosen = random.Random(seed).sample(range(len(rows)), limit)
    return [rows[number] for number in sorted(chosen)]
