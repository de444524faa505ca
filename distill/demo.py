"""`make demo`: the whole job on the micro world, with controls, scored on held-out questions.

The same code path as on Colab, with other names: prepare, label, distil both students, score, compare, report. Controls say what
the scores mean; each differs from a student in one thing (`CONTROLS`).
"""

import random
import time
from collections import Counter, defaultdict
from pathlib import Path

from . import engine, store
from .compare import compare_models
from .console import quiet, say, table
from .data import prepare_system1_dataset, validation_path
from .errors import DataError
from .evaluate import evaluate_student
from .metrics import final_answer
from .microlab import MAX_NEW_TOKENS, MICRO, SYSTEM1_FAMILIES, SYSTEM2_FAMILIES
from .microtasks import FAMILIES, question_of
from .models import RUN_RECORD
from .pipeline import run_easy_distill, write_system1_config, write_system2_config
from .report import Evaluation
from .scores import mean_exact_match, score
from .traces import prepare_system2_dataset

WORK = store.ROOT / "runs" / "demo"
REPORTS = store.ROOT / "reports" / "demo"
HELDOUT = MICRO / "heldout.jsonl"
TEACHER = str(MICRO / "teacher")
# What each control changes, and by that tells.
CONTROLS = {
    "shuffled_labels": "System 1 taught other questions' answers: what form and frequency give",
    "gold_labels": "System 1 taught exact answers: what the teacher's mistakes cost",
    "bare_answers": "System 2's questions with their answers alone, asked plainly: what a student learns without steps",
    "wrong_traces": "System 2 taught a question's wrong trace wherever the teacher wrote one: what it costs to keep them",
    "truncated_traces": "System 2's rows cut at their median length, half of them before their end: what it costs to cut",
}
# Of the shipped 4,500: more of them, which a plain answer cannot be learnt from, cost the System-1 student the families that it can
# learn (benchmarks/RESULTS.md). The control `bare_answers` learns as many as System 2 does.
REASONING_ROWS = 1500
RELABELED_ROWS = 1000
BATCH_TOKENS = 65_536  # models this small have room for it
SPEED_RUNS = 10
RV_MAX = 2  # students of this size learn from terse steps


def run_demo(seed: int = 0, *, fresh: bool = False) -> dict:
    """Distil the micro teacher into both students, with controls. Returns the report, which lies in `reports/demo/`.

    seed   of the validation split, the data order and the training
    fresh  do everything anew; else what an earlier run finished stays, and what it left unfinished goes on
    """
    started = time.monotonic()
    if store.read_manifest(MICRO) is None:
        raise DataError(f"{store.shown(MICRO)} is missing or incomplete: get the repository's files anew, or run build-micro.")
    with store.lock(WORK):  # its files have fixed names
        return _run(seed, fresh, started)


def _run(seed: int, fresh: bool, started: float) -> dict:
    say(f"Demo, seed {seed}: teacher and data from {store.shown(MICRO)}")
    labeled, cot = _prepare_system1(seed, fresh), _prepare_system2(seed, fresh)
    jobs = _jobs(labeled, cot, seed)
    say(f"\nTraining {len(jobs)} students: the two, and {len(CONTROLS)} controls")
    trained = engine.in_parallel([lambda job=job: run_easy_distill(job, fresh=fresh) for job in jobs.values()])
    checkpoints = {name: result.checkpoint for name, result in zip(jobs, trained, strict=True)}
    scores = _score(checkpoints, fresh)
    _compare(checkpoints, fresh)
    _show(report := _evaluate(checkpoints, scores, labeled, seed, fresh))
    say(f"{time.monotonic() - started:.0f} s in all. Report: {store.shown(REPORTS)}/report.html, .md and .json")
    return report


def _prepare_system1(seed: int, fresh: bool) -> Path:
    labeled = WORK / "data" / "train_labeled.json"
    prepare_system1_dataset(
        "train",
        source=str(_choose_rows(labeled.with_name("distilqwen.jsonl"))),
        teacher_model=TEACHER,
        relabel_with_teacher=RELABELED_ROWS,
        seed=seed,
        out_labeled=labeled,
        out_instructions=WORK / "data" / "train_instructions.json",
        fresh=fresh,
    )
    return labeled


def _prepare_system2(seed: int, fresh: bool) -> Path:
    cot = WORK / "data" / "cot.json"
    prepare_system2_dataset(
        "train",
        source=str(MICRO / "omnithought.parquet"),
        rows=None,
        rv_max=RV_MAX,
        student_model=str(MICRO / "student_system2"),
        max_length=256,
        seed=seed,
        out_cot=cot,
        fresh=fresh,
    )
    return cot


def _choose_rows(out: Path) -> Path:
    """The shipped rows that System 1 learns from: all of the instruction families, then REASONING_ROWS of the others.

    Those to be relabelled come first: asked plainly, the teacher knows the answers of the instruction families alone.
    """
    rows = _read_parquet("distilqwen.parquet")
    plain = [row for row in rows if question_of(row["instruction"]).system == 1]
    reasoning = [row for row in rows if question_of(row["instruction"]).system == 2]
    store.write_jsonl(out, plain + reasoning[:REASONING_ROWS])
    return out


def _read_parquet(name: str) -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(MICRO / name).to_pylist()


def _jobs(labeled: Path, cot: Path, seed: int) -> dict[str, str]:
    """Job files by student and control, the longest trainings first."""
    wrong = _with_outputs(cot, "wrong_traces.json", _wrong)
    bare = _with_outputs(cot, "bare_answers.json", lambda rows: [{**row, "output": final_answer(row["output"])} for row in rows])
    shuffled = _with_outputs(labeled, "shuffled_labels.json", lambda rows: _shuffled(rows, seed))
    gold = _with_outputs(labeled, "gold_labels.json", _gold)
    return {
        "system2": _job("system2", write_system2_config, "micro_system2", cot, seed),
        "wrong_traces": _job("wrong_traces", write_system2_config, "micro_system2", wrong, seed),
        "truncated_traces": _truncate(_job("truncated_traces", write_system2_config, "micro_system2", cot, seed)),
        "system1": _job("system1", write_system1_config, "micro_system1", labeled, seed),
        "shuffled_labels": _job("shuffled_labels", write_system1_config, "micro_system1", shuffled, seed),
        "gold_labels": _job("gold_labels", write_system1_config, "micro_system1", gold, seed),
        "bare_answers": _job("bare_answers", write_system1_config, "micro_system2", bare, seed),
    }


def _job(name: str, write_config, preset: str, rows: Path, seed: int) -> str:
    say(f"\n{name}: {CONTROLS.get(name, 'the student')}")
    places = {"labeled_path": rows, "out_dir": WORK / name, "config_path": store.ROOT / "configs" / f"kd_micro_{name}.json"}
    with quiet(name in CONTROLS):  # its settings are its student's
        return write_config({"preset": preset, **places, "seed": seed, "sample_answers": 0 if name in CONTROLS else 2})


def _with_outputs(path: Path, name: str, change) -> Path:
    """The prepared rows of both files with other outputs."""
    out = path.with_name(name)
    for source, place in ((path, out), (validation_path(path), validation_path(out))):
        store.write_rows(place, change(list(store.read_rows(source))))
    return out


def _gold(rows: list[dict]) -> list[dict]:
    return [{**row, "output": question_of(row["instruction"]).answer} for row in rows]


def _shuffled(rows: list[dict], seed: int) -> list[dict]:
    """Labels dealt out anew among the rows of a family, so that form and frequency stay and the meaning goes."""
    places = defaultdict(list)
    for number, row in enumerate(rows):
        places[question_of(row["instruction"]).family].append(number)
    shuffled, rng = list(rows), random.Random(seed)
    for numbers in places.values():
        dealt = rng.sample(numbers, len(numbers))
        for number, other in zip(numbers, dealt, strict=True):
            shuffled[number] = {**rows[number], "output": rows[other]["output"]}
    return shuffled


def _wrong(rows: list[dict]) -> list[dict]:
    """The same questions, each with a wrong trace of its own, as terse as the others, where it has one."""
    wrong = {
        row["question"]: trace["full_response"]
        for row in _read_parquet("omnithought.parquet")
        for trace in row["reasoning"]
        if not trace["thought_correctness_verify"] and trace["Reasoning_Verbosity"]["level"] <= RV_MAX
    }
    say(f"  {sum(row['instruction'] in wrong for row in rows):,} of {len(rows):,} rows have a wrong trace")
    return [{**row, "output": wrong.get(row["instruction"], row["output"])} for row in rows]


def _truncate(job: str) -> str:
    """Cut a job's rows at their median length, as a `max_length` that is too small does where rows are cut and not dropped."""
    tokens = Path(store.read_json(job)["dataset"]["labeled_path"])
    lengths = sorted(len(row["input_ids"]) for row in store.read_rows(tokens))
    limit, manifest = lengths[len(lengths) // 2], store.read_manifest(tokens)
    for path in (tokens, validation_path(tokens)):
        rows = list(store.read_rows(path))
        store.write_rows(path, [{**row, **{key: row[key][:limit] for key in ("input_ids", "completion_mask")}} for row in rows])
        # without "stage": these are not the tokens of its settings, so that the next run makes them anew and cuts them again
        store.write_manifest(path, {key: manifest[key] for key in ("tokenizer_sha256", "max_length")})
    say(f"  rows cut at {limit} tokens: {sum(length > limit for length in lengths):,} of {len(lengths):,} lose their end")
    return job


def _score(checkpoints: dict, fresh: bool) -> dict:
    """Exact match of every student and control: System 1's on all families, asked plainly; System 2's on the reasoning families."""
    plainly = {"before1": str(MICRO / "student_system1")} | {
        name: checkpoints[name] for name in ("system1", "shuffled_labels", "gold_labels", "bare_answers")
    }
    reasoning = {"before2": str(MICRO / "student_system2")} | {
        name: checkpoints[name] for name in ("system2", "wrong_traces", "truncated_traces")
    }
    models = [{"name": name, "path": path, "mode": "system1"} for name, path in plainly.items()]
    scores = score(models, HELDOUT, WORK, MAX_NEW_TOKENS, BATCH_TOKENS, fresh=fresh)
    questions = WORK / "data" / "heldout_system2.jsonl"
    store.write_jsonl(questions, [row for row in store.read_rows(HELDOUT) if row["system"] == 2])
    models = [{"name": name, "path": path, "mode": "system2"} for name, path in reasoning.items()]
    return scores | score(models, questions, WORK, MAX_NEW_TOKENS, BATCH_TOKENS, fresh=fresh)


def _evaluate(checkpoints: dict, scores: dict, labeled: Path, seed: int, fresh: bool) -> dict:
    """The report: teacher, students before and after, and the controls; `report.json` holds the demo's own figures too."""
    chance = _chance(labeled)
    evaluation = evaluate_student(
        *[checkpoints[system] for system in ("system1", "system2")],
        teacher=TEACHER,
        questions=HELDOUT,
        teacher_bits=32,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_tokens=BATCH_TOKENS,
        seed=seed,
        speed_runs=SPEED_RUNS,
        out=REPORTS,
        extras=_control_tables(scores, chance),
        fresh=fresh,
    ).to_dict()
    report = {**evaluation, **_figures(checkpoints, scores, evaluation, chance, seed), "command": "make demo"}
    Evaluation(report).save(REPORTS)
    return report


def _figures(checkpoints: dict, scores: dict, evaluation: dict, chance: dict, seed: int) -> dict:
    """The demo's own figures: exact match by family of all models, controls among them."""
    teacher = evaluation["models"]["teacher"]
    families = {family: found for quality in teacher["quality"].values() for family, found in quality["families"].items()}
    runs = {system: store.read_json(Path(checkpoints[system]) / RUN_RECORD) for system in ("system1", "system2")}
    return {
        "teacher": {"parameters": teacher["parameters"], "exact_match": families},
        "system1": {"before": scores["before1"], "after": scores["system1"]},
        "system2": {"before": scores["before2"], "after": scores["system2"]},
        "controls": {control: scores[control] for control in CONTROLS},
        "chance": chance,
        "versions": {**evaluation["versions"], **runs["system1"]["versions"]},
        "backend": runs["system1"]["backend"],
        "train_seconds": {system: run["metrics"]["train_seconds"] for system, run in runs.items()},
        "seed": seed,
    }


def _control_tables(scores: dict, chance: dict) -> list[dict]:
    """The controls beside the students, a table for each system."""
    first = {"student": "system1", "taught exact answers": "gold_labels", "shuffled answers": "shuffled_labels"}
    second = {"student": "system2", "bare answers": "bare_answers", "wrong traces kept": "wrong_traces", "traces cut": "truncated_traces"}
    return [
        _control_table("System 1", SYSTEM1_FAMILIES, {name: scores[key] for name, key in first.items()}, chance),
        _control_table("System 2", SYSTEM2_FAMILIES, {name: scores[key] for name, key in second.items()}, None),
    ]


def _control_table(system: str, families: list[str], columns: dict, chance: dict | None) -> dict:
    rows = []
    for family in families:
        found = [columns[name]["exact_match"][family] for name in columns]
        values = [f"{one['value']:.3f} ({one['ci'][0]:.2f} to {one['ci'][1]:.2f})" for one in found]
        rows.append([family, *values, *([f"{chance[family]:.3f}"] if chance else [])])
    n = found[0]["n"]
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in CONTROLS.items() if meaning.startswith(system))
    note = f"Exact match on {n} held-out questions a family, with its 95% interval. {meanings}."
    return {
        "title": f"Controls of {system}",
        "note": note + (" chance: always the family's commonest answer." if chance else ""),
        "columns": ["family", *columns, *(["chance"] if chance else [])],
        "rows": rows,
    }


def _chance(labeled: Path) -> dict:
    """By family, the share of the commonest label: what a student reaches that learnt form and frequency alone."""
    labels = defaultdict(Counter)
    for row in store.read_rows(labeled):
        labels[question_of(row["instruction"]).family][row["output"]] += 1
    return {family: max(labels[family].values(), default=0) / max(labels[family].total(), 1) for family in FAMILIES}


def _compare(checkpoints: dict, fresh: bool) -> None:
    """Teacher and students side by side on the first held-out question of some families."""
    first = {}
    for row in store.read_rows(HELDOUT):
        first.setdefault(row["family"], {"prompt": row["instruction"], "modes": [f"system{row['system']}"]})
    prompts = [first["reverse"], first["count_even"], {**first["add"], "modes": ["system1", "system2"]}, first["multiply"]]
    limits = dict.fromkeys(("max_tokens_teacher", "max_tokens_sys2"), MAX_NEW_TOKENS["system2"])
    limits["max_tokens_sys1"] = MAX_NEW_TOKENS["system1"]
    compare_models(prompts, TEACHER, checkpoints["system1"], checkpoints["system2"], **limits, fresh=fresh)


def retained(report: dict, system: str = "system1") -> float:
    """The student's mean exact match over its system's families as a share of the teacher's."""
    families = SYSTEM1_FAMILIES if system == "system1" else SYSTEM2_FAMILIES
    return mean_exact_match(report[system]["after"], families) / mean_exact_match(report["teacher"], families)


def margin(report: dict) -> float:
    """How far System 2 lies above the same questions learnt from bare answers: mean exact match over the reasoning families, absolute."""
    bare = max(mean_exact_match(scores, SYSTEM2_FAMILIES) for scores in (report["controls"]["bare_answers"], report["system1"]["after"]))
    return mean_exact_match(report["system2"]["after"], SYSTEM2_FAMILIES) - bare


def _show(report: dict) -> None:
    for extra in report["extras"]:
        table(extra["title"], extra["columns"], extra["rows"])
    after, n = report["system2"]["after"], report["system2"]["after"]["reasoned"]["n"]
    share = report["system1"]["after"]["parameters"] / report["teacher"]["parameters"]
    say(f"Students have {share:.0%} of the teacher's parameters. Of its exact match, System 1 keeps {retained(report):.1%} over its")
    say(f"{len(SYSTEM1_FAMILIES)} families, System 2 {retained(report, 'system2'):.1%} over its {len(SYSTEM2_FAMILIES)}.")
    say(f"System 2 lies {margin(report):.2f} above a student that learnt the same questions from bare answers. Of its {n} answers,")
    say(f"{after['reasoned']['value']:.1%} reason first and {after['stopped']['value']:.1%} stop by themselves.")
    for name, meaning in CONTROLS.items():
        say(f"  {name}: {meaning}")
    say("  chance: always the commonest answer.  In brackets: Wilson interval at 95%.\n")
