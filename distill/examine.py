"""Ask, read and time several models on the same questions, in subprocesses, one model in memory at a time; what is known is kept."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from . import prompt
from .answers import ask_once
from .console import say
from .errors import BackendError, ConfigError, DataError, DistillError, PreflightError, shortened
from .machine import teacher_settings
from .models import stored_bits
from .probing import probe_all
from .textscores import score_groups
from .timing import measure

TEACHER_BITS = (8, 16)  # that a teacher's speed is measured in
STUDENT_BITS = 16
SPEED_BATCH = 8


@dataclass(frozen=True)
class Examined:
    """A model that is examined.

    name   "teacher", "system1", "before_system1", …
    role   "teacher", "after" or "before"
    modes  in which it is asked
    bits   of a weight; None takes what suits the device, of a teacher 8, or 4 where 8 do not fit
    """

    name: str
    role: str
    title: str
    path: str
    modes: tuple[str, ...]
    bits: int | None = None


def ask(panel: list[Examined], asked: dict[str, list[dict]], limits: dict, batch_tokens: int, run_folder: Path, fresh: bool) -> dict:
    """What `answers.ask_once` returns, with "answers" by mode."""
    requests = [
        {
            "name": one.name,
            "path": one.path,
            "role": "teacher" if one.role == "teacher" else "student",
            "bits": one.bits,
            "questions": [_question(row) for mode in one.modes for row in asked[mode]],
            "max_new_tokens": limits,
            "batch_tokens": batch_tokens,
        }
        for one in panel
    ]
    made = ask_once(requests, run_folder, "Asking teacher and students", fresh=fresh)
    return {one.name: {**made[one.name], "answers": _by_mode(one, asked, made[one.name]["answers"])} for one in panel}


def _question(row: dict) -> dict:
    return {"instruction": row["instruction"], "input": row.get("input") or "", "mode": row["mode"]}


def _by_mode(one: Examined, asked: dict[str, list[dict]], listed: list) -> dict[str, list]:
    """A list over a model's questions of all modes, cut into one for each mode."""
    cut, start = {}, 0
    for mode in one.modes:
        cut[mode] = listed[start : start + len(asked[mode])]
        start += len(asked[mode])
    return cut


def score_answers(
    panel: list[Examined], asked: dict[str, list[dict]], answered: dict, run_folder: Path, fresh: bool
) -> tuple[dict, dict, dict]:
    """Everything that is measured of each answer: ({(model, mode): scored answers}, {(model, mode): BLEU}, the libraries' versions)."""
    groups = {
        f"{one.name}/{mode}": [
            {"reference": row["answer"], "text": answer["text"]}
            for row, answer in zip(asked[mode], answered[one.name]["answers"][mode], strict=True)
        ]
        for one in panel
        for mode in one.modes
    }
    texts = score_groups(groups, run_folder)
    read = _read(panel, asked, answered, run_folder, fresh)
    scored, bleu = {}, {}
    for one in panel:
        for mode in one.modes:
            known = zip(
                asked[mode],
                answered[one.name]["answers"][mode],
                texts[f"{one.name}/{mode}"]["rows"],
                *read[one.name, mode],
                strict=True,
            )
            scored[one.name, mode] = [_scored(*parts) for parts in known]
            bleu[one.name, mode] = texts[f"{one.name}/{mode}"]["bleu"]
    return scored, bleu, next(iter(texts.values()))["versions"]


def _scored(row: dict, answer: dict, measured: dict, reference: dict | None, own: dict | None) -> dict:
    confidence = own["final_probability"] if own and answer["stopped"] else None
    known = {name: answer[name] for name in ("text", "tokens", "stopped")}
    return {"family": row.get("family"), **known, **measured, "reference": reference, "confidence": confidence}


def _read(panel: list[Examined], asked: dict[str, list[dict]], answered: dict, run_folder: Path, fresh: bool) -> dict:
    """(model, mode) → what forward passes found: (over the references, over the model's own answers), in the order of the questions."""
    requests = []
    for one in panel:
        texts = {mode: [answer["text"] for answer in answered[one.name]["answers"][mode]] for mode in one.modes}
        rows = [
            {**_question(row), "text": text}
            for mode in one.modes
            for row, text in zip(asked[mode], _references(mode, asked, answered[panel[0].name]), strict=True)
        ]
        rows += [{**_question(row), "text": text} for mode in one.modes for row, text in zip(asked[mode], texts[mode], strict=True)]
        role = "teacher" if one.role == "teacher" else "student"
        requests.append({"name": one.name, "path": one.path, "role": role, "bits": answered[one.name]["bits"], "rows": rows})
    found = probe_all(requests, run_folder, "Reading references and answers", fresh=fresh)
    halves = {one.name: len(found[one.name]) // 2 for one in panel}
    references = {one.name: _by_mode(one, asked, found[one.name][: halves[one.name]]) for one in panel}
    own = {one.name: _by_mode(one, asked, found[one.name][halves[one.name] :]) for one in panel}
    return {(one.name, mode): (references[one.name][mode], own[one.name][mode]) for one in panel for mode in one.modes}


def references_read(rows: list[dict], mode: str) -> str:
    """Whose texts perplexity and agreement are read over, in words."""
    own = sum(bool(row.get("output")) for row in rows)
    if mode == "system1" or own == len(rows):
        return "the reference answers"
    return "the teacher's own answers" if not own else f"the reference answers of {own:,} questions, the teacher's own of the others"


def _references(mode: str, asked: dict[str, list[dict]], answered: dict) -> list[str]:
    """What is read for perplexity and agreement: reference answers; where a row has its result alone, System 2's is the teacher's.

    answered  the teacher's answers, or those of the model that the others are compared with
    """
    if mode == "system1":
        return [row["answer"] for row in asked[mode]]
    given = zip(asked[mode], answered["answers"][mode], strict=True)
    return [row.get("output") or (answer["text"] if answer["stopped"] else "") for row, answer in given]


def time_answers(panel: list[Examined], asked: dict[str, list[dict]], runs: int, run_folder: Path) -> tuple[dict | None, str | None]:
    """The speed of the teacher and the students, all on the same questions, and what was left out of it and why.

    Where measuring fails there is no speed, but the answers before it, which took hours, are not lost.
    """
    prompts, requests, left_out = _timed_questions(asked), [], []
    needs = {"questions": prompts, "max_new_tokens": dict.fromkeys(prompt.MODES, 256), "batch_size": SPEED_BATCH}

    def leave_out(why: str) -> None:
        left_out.append(why)
        say(f"not timed: {why}")

    for one in panel:
        known = {"path": one.path, "prompts": prompts, "model": one.name}
        if one.role == "after":
            requests.append({**known, "name": one.name, "role": "student", "bits": STUDENT_BITS})
        for bits in _teacher_bits(one.path) if one.role == "teacher" else ():
            try:
                teacher_settings(one.path, needs, bits)
            except PreflightError as error:
                leave_out(f"the teacher in {bits} bits: {_in_a_line(error)}")
            else:
                requests.append({**known, "name": f"teacher {bits}-bit", "role": "teacher", "bits": bits})
    try:
        speed = measure(requests, run_folder, runs=runs, batch_size=SPEED_BATCH)
    except (ConfigError, DataError, PreflightError, BackendError) as error:
        speed = None
        leave_out(_in_a_line(error))
    return speed, "; ".join(left_out) or None


def _timed_questions(asked: dict[str, list[dict]]) -> list[dict]:
    """The shortest questions of the systems in turn, each asked as its own system is: what every model is timed on."""
    by_length = [sorted(map(_question, rows), key=lambda each: len(each["instruction"] + each["input"])) for rows in asked.values()]
    return [each for together in zip_longest(*by_length) for each in together if each][:SPEED_BATCH]


def _teacher_bits(path: str) -> tuple[int, ...]:
    """TEACHER_BITS, or those alone that a teacher was stored in."""
    stored = stored_bits(path)
    return (stored,) if stored else TEACHER_BITS


def _in_a_line(error: DistillError) -> str:
    """An error's first line and, where it goes on, its last, which holds the reason where that is the end of a log."""
    lines = str(error).splitlines()
    return shortened(" ".join(dict.fromkeys((lines[0], lines[-1]))), 500).rstrip(".")
