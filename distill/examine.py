"""Ask, read and time several models on the same questions, in subprocesses, one model in memory at a time; what is known is kept."""

from dataclasses import dataclass
from pathlib import Path

from . import prompt
from .answers import ask_once
from .console import say
from .errors import PreflightError
from .machine import teacher_settings
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


def _references(mode: str, asked: dict[str, list[dict]], answered: dict) -> list[str]:
    """What is read for perplexity and agreement: whole reference answers; where a row has its result alone, System 2's is the teacher's.

    answered  the teacher's answers, or those of the model that the others are compared with
    """
    return [
        row.get("output") or (row["answer"] if mode == "system1" else answer["text"] if answer["stopped"] else "")
        for row, answer in zip(asked[mode], answered["answers"][mode], strict=True)
    ]


def time_answers(panel: list[Examined], asked: dict[str, list[dict]], runs: int, run_folder: Path) -> tuple[dict | None, str | None]:
    """The speed of the teacher in TEACHER_BITS and of the students in STUDENT_BITS, and which teacher was left out and why."""
    requests, left_out = [], []
    for one in panel:
        prompts = [_question(row) for row in asked[one.modes[0]][:SPEED_BATCH]]
        known = {"path": one.path, "prompts": prompts, "model": one.name}
        if one.role == "after":
            requests.append({**known, "name": one.name, "role": "student", "bits": STUDENT_BITS})
        for bits in TEACHER_BITS if one.role == "teacher" else ():
            try:
                teacher_settings(one.path, {"questions": prompts, "max_new_tokens": dict.fromkeys(prompt.MODES, 256)}, bits)
            except PreflightError as error:
                left_out.append(f"the teacher in {bits} bits: {str(error).splitlines()[0]}")
                say(f"not timed: {left_out[-1]}")
            else:
                requests.append({**known, "name": f"teacher {bits}-bit", "role": "teacher", "bits": bits})
    speed = measure(requests, run_folder, runs=runs, batch_size=SPEED_BATCH)
    return speed, "; ".join(left_out) or None
