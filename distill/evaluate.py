"""Teacher and students on held-out questions: are they nearly as good, and how much faster? Every figure with its interval.

Models answer, are read and are timed in subprocesses, one in memory at a time, and what a model was asked before it is not asked again.
System 1 is asked plainly, system 2 with the sentence that asks for reasoning.
"""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from . import engine, models, store, students
from .config import is_hub_name, model_name
from .console import in_notebook, say
from .diagnosis import diagnose
from .examine import Examined, ask, references_read, score_answers, time_answers
from .generation import BATCH_TOKENS, MAX_NEW_TOKENS
from .harness import check_benchmarks, run_benchmarks
from .models import check_student
from .panel import check_arguments, panel_of, students_of
from .quality import beside_before, beside_teacher, cases, headline, quality, targets
from .questions import Questions, drawn, questions_for, read_questions
from .report import Evaluation
from .students import TITLES, Student

SPEED_RUNS = 20


def evaluate_student(
    *checkpoints: str | Path,
    teacher: str | None = None,
    before: str | Path | None = None,
    mode: str | None = None,
    questions: str | Path | dict | None = None,
    limit: int | None = None,
    teacher_bits: int | None = None,
    max_new_tokens: dict | None = None,
    batch_tokens: int = BATCH_TOKENS,
    speed_runs: int = SPEED_RUNS,
    benchmarks: tuple[str, ...] = (),
    benchmark_limit: int | None = None,
    seed: int = 0,
    out: str | Path = "reports/evaluation",
    extras: list[dict] = (),
    fresh: bool = False,
) -> Evaluation:
    """Examine one student, or both systems' together: beside the teacher and beside what each was before; write the report.

    checkpoints     a student's folder, or two, one of each system
    teacher         folder or hub name; None takes the one that the student's record names
    before, mode    of a checkpoint that the lab did not make: the model that it was before, "system1" or "system2"
    questions       held-out file, or {"system1": file, "system2": file}; None takes the validation rows of each student's data
    limit           questions a system, drawn by `seed`; None asks all
    teacher_bits    of a weight; None takes 8, or 4 where 8 do not fit
    max_new_tokens  mode → limit of an answer, in tokens
    batch_tokens    of a batch of questions and answers together
    speed_runs      answers that each model is timed on; 0 measures no speed
    benchmarks      public ones by name (`harness.PUBLIC`), put to teacher and students; benchmark_limit: questions of each
    seed            of the draw of questions and of every interval
    out             folder of report.json, report.html and report.md
    extras          further tables for the report: [{"title", "note", "columns", "rows"}]
    fresh           ask everything anew

    Questions that training saw, or near-duplicates of them, are removed and counted (`leakage`).
    Raises ConfigError for what cannot be examined, DataError for a file without usable questions, BackendError with the log's end.
    """
    check_arguments(seed, limit, teacher_bits, speed_runs, max_new_tokens)
    if benchmarks:
        check_benchmarks(benchmarks, benchmark_limit)
    examined = students_of(checkpoints, mode, before)
    out, run_folder = store.resolve(out), store.ROOT / "runs" / "evaluate"
    store.check_writable(out / "report.json")
    asked = {student.mode: questions_for(student, questions, limit, seed) for student in examined}
    rows = {mode: one.rows for mode, one in asked.items()}
    panel = panel_of(examined, teacher, teacher_bits)
    limits = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
    with store.lock(run_folder):
        answered = ask(panel, rows, limits, batch_tokens, run_folder, fresh)
        scored, bleu, versions = score_answers(panel, rows, answered, run_folder, fresh)
        speed, skipped = time_answers(panel, rows, speed_runs, run_folder) if speed_runs else (None, "it was not asked for")
    judged = {mode: headline([row["answer"] for row in rows[mode]], scored["teacher", mode]) for mode in rows}
    vocabularies = {one.name: store.hash_json(models.load_tokenizer(one.path, one.role).get_vocab()) for one in panel}
    facts = {
        name: _model_facts(one, answered[name], scored, bleu, judged, vocabularies[name] == vocabularies["teacher"], seed)
        for name, one in ((one.name, one) for one in panel)
    }
    systems = {student.mode: _system(student, asked[student.mode], scored, facts, judged, limits, seed) for student in examined}
    made = Evaluation(
        {
            "schema": 1,
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": _command(examined, facts["teacher"], questions, limit, limits, speed_runs, benchmarks, benchmark_limit, seed, out),
            "seed": seed,
            "out": store.shown(out),
            "title": f"{_last_name(facts['teacher']['path'])} → {', '.join(_last_name(student.path) for student in examined)}",
            "device": _device(answered["teacher"]),
            "versions": {**answered["teacher"]["versions"], **versions},
            "models": facts,
            "systems": systems,
            "speed": speed,
            "speed_skipped": skipped,
            "targets": targets(systems, facts, speed),
            "benchmarks": {},
            "judge": {},
            "ratings": {},
            "extras": list(extras),
        }
    )
    _publish(made, examined, out)
    for name, one, system in _benchmarked(panel) if benchmarks else ():
        say(f"{name}: {', '.join(benchmarks)}")
        found = run_benchmarks(one.path, list(benchmarks), limit=benchmark_limit, mode=system)
        made.facts["benchmarks"][name] = {**found["tasks"], "versions": found["versions"], "command": found["command"]}
        made.save(out)
    return made


def _publish(made: Evaluation, examined: list[Student], out: Path) -> None:
    """Write the report, leave the scores with the runs that they are of, and show what a reader wants first."""
    for student in examined:
        _register(student, made.facts)
    made.save(out)
    if not in_notebook():
        made.show()
    say(f"Report: {store.shown(out)}/report.html, .md and .json")


def _benchmarked(panel: list[Examined]) -> Iterator[tuple[str, Examined, str]]:
    """(name in the report, model, mode) of all that benchmarks are put to: each student, and the teacher asked as each of them is."""
    for one in panel:
        if one.role == "after":
            yield one.name, one, one.modes[0]
        for mode in one.modes if one.role == "teacher" else ():
            yield f"teacher, asked as {TITLES[mode]}", one, mode


# The report's parts


def _model_facts(one: Examined, answered: dict, scored: dict, bleu: dict, judged: dict, alike: bool, seed: int) -> dict:
    """The report's entry of one model, with its quality in each mode.

    alike  whether it cuts text into the same tokens as the teacher, so that next tokens can be compared
    """
    teachers = {mode: scored["teacher", mode] if one.role != "teacher" and alike else None for mode in one.modes}
    return {
        "name": one.name,
        "role": one.role,
        "title": one.title,
        "system": None if one.role == "teacher" else one.modes[0],
        "path": one.path if is_hub_name(one.path) else store.shown(one.path),
        "parameters": answered["parameters"],
        "weight_bytes": answered["weight_bytes"],
        "disk_bytes": models.disk_bytes(one.path),
        "bits": answered["bits"],
        "fingerprint": models.fingerprint(one.path),
        "same_tokens": alike,
        "quality": {
            mode: quality(scored[one.name, mode], bleu[one.name, mode], teachers[mode], judged[mode][0], seed) for mode in one.modes
        },
    }


def _system(student: Student, asked: Questions, scored: dict, facts: dict, judged: dict, limits: dict, seed: int) -> dict:
    """The report's entry of one system."""
    mode, before = student.mode, f"before_{student.mode}"
    own, teacher, former = (scored[name, mode] for name in (mode, "teacher", before))
    metric, reason = judged[mode]
    kept, differences = beside_teacher(own, teacher, seed)
    gained = beside_before(own, former, seed)
    tokenizer = models.load_tokenizer(student.path)
    known = {
        "not_finite": any(each["reference"] for each in teacher) and not any(each["reference"] for each in own),
        "template_differs": students.template_differs(student, tokenizer),
        "limit_tokens": limits[mode],
        "vocabulary": len(tokenizer),
        "mode": mode,
    }
    return {
        "mode": mode,
        "student": mode,
        "before": before,
        "teacher": "teacher",
        "headline": metric,
        "headline_reason": reason,
        "references_read": references_read(asked.rows, mode),
        "questions": asked.facts,
        "retained": kept,
        "against_teacher": differences,
        "against_before": gained,
        "training": students.training_facts(student),
        "cases": cases(asked.rows, {name: scored[name, mode] for name in ("teacher", before, mode)}, metric, mode, "teacher"),
        "diagnosis": diagnose(
            facts[mode]["quality"][mode], facts[before]["quality"][mode], {"retained": kept, "against_before": gained}, known
        ),
    }


def _register(student: Student, evaluation: dict) -> None:
    """Leave the scores in the run's folder, where `runs` finds them."""
    if not student.run_folder or "export" in student.record:  # a quantised copy's scores are not those of the run
        return
    system, mode = evaluation["systems"][student.mode], student.mode
    kept = {name: system[name] for name in ("retained", "headline", "questions", "against_before", "diagnosis")}
    own = {"mode": mode, "quality": evaluation["models"][mode]["quality"][mode], "teacher": evaluation["models"]["teacher"]["path"]}
    store.write_json(student.run_folder / "evaluation.json", {"made": evaluation["made"], "path": student.path, **own, **kept})


def _device(answered: dict) -> dict:
    kind = answered["device"].split(":")[0]
    cores = engine.usable_cores()
    return {"name": models.device()[1] if kind == "cuda" else f"CPU, {cores} cores", "kind": kind, "threads": cores}


def _last_name(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _command(
    examined: list[Student],
    teacher: dict,
    questions,
    limit: int | None,
    limits: dict,
    runs: int,
    benchmarks: tuple[str, ...],
    benchmark_limit: int | None,
    seed: int,
    out: Path,
) -> str:
    """The command line that makes this report again."""
    words = ["python", "distill_app.py", "evaluate", *[store.shown(student.path) for student in examined]]
    words += ["--teacher", teacher["path"], "--teacher-bits", teacher["bits"]]
    if not examined[0].record:
        words += ["--mode", examined[0].mode, "--before", examined[0].before]
    files = questions.items() if isinstance(questions, dict) else [(None, questions)] if questions else []
    for mode, file in files:
        words += ["--questions", f"{mode}={store.shown(file)}" if mode else store.shown(file)]
    for student in examined:
        words += ["--max-tokens", f"{student.mode}={limits[student.mode]}"]
    words += ["--limit", limit] if limit else []
    for task in benchmarks:
        words += ["--benchmark", task]
    words += ["--benchmark-limit", benchmark_limit] if benchmark_limit else []
    return shlex.join(map(str, [*words, "--speed-runs", runs, "--seed", seed, "--out", store.shown(out)]))


def compare_checkpoints(
    paths: dict[str, str],
    mode: str,
    questions: str | Path,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, dict]:
    """The quality of several checkpoints on the same questions, such as one before and after quantising; no report is written.

    paths      name → folder; the agreement of next tokens is with the first, whose own answers are read where a row has no whole one
    mode       how they are asked, "system1" or "system2"
    questions  held-out file (`questions.read_questions`)
    limit      questions, drawn by `seed`; None asks all
    Returns {name: what `quality.quality` returns}. Raises as `evaluate_student` does.
    """
    for path in paths.values():
        check_student(model_name(path))
    panel = [Examined(name, "after", name, model_name(path), (mode,)) for name, path in paths.items()]
    rows = {mode: drawn(list(read_questions(store.resolve(questions), mode)), limit, seed)}
    limits = {**MAX_NEW_TOKENS, **({mode: max_new_tokens} if max_new_tokens else {})}
    run_folder = store.ROOT / "runs" / "evaluate"
    with store.lock(run_folder):
        answered = ask(panel, rows, limits, BATCH_TOKENS, run_folder, False)
        scored, bleu, _ = score_answers(panel, rows, answered, run_folder, False)
    first = panel[0].name
    others = {one.name: scored[first, mode] if one.name != first else None for one in panel}
    metric, _ = headline([row["answer"] for row in rows[mode]], scored[first, mode])
    return {name: quality(scored[name, mode], bleu[name, mode], others[name], metric, seed) for name in paths}
