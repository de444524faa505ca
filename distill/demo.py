"""`make demo`: the whole job on the micro world, with controls, scored on held-out questions.

The same code path as on Colab, with other names: prepare, distil, score. Two controls say what the scores mean: a student taught
shuffled labels (what the format alone gives) and one taught exact answers (what the teacher's mistakes cost).
"""

import random
import time
from collections import Counter, defaultdict
from pathlib import Path

from . import store
from .console import say, table
from .data import prepare_system1_dataset, validation_path
from .errors import DataError
from .evaluate import mean_exact_match, score
from .microlab import MAX_NEW_TOKENS, MICRO, SYSTEM1_FAMILIES, SYSTEM2_FAMILIES
from .microtasks import FAMILIES, question_of
from .pipeline import distill_system1

WORK = store.ROOT / "runs" / "demo"
REPORT = store.ROOT / "reports" / "demo" / "report.json"
CONTROLS = ("shuffled_labels", "gold_labels")
# Of the shipped 4,500: as many as System 2 gets. More of them, which a plain answer cannot be learnt from, cost the System-1 student the
# families that it can learn (benchmarks/RESULTS.md).
REASONING_ROWS = 1500


def run_demo(seed: int = 0) -> dict:
    """Distil the micro teacher into the System-1 student, with controls. Returns the report and writes it to `reports/demo/`.

    seed  of the validation split, the data order and the training
    """
    started = time.monotonic()
    if store.read_manifest(MICRO) is None:
        raise DataError(f"{store.shown(MICRO)} is missing or incomplete: get the repository's files anew, or run build-micro.")
    say(f"Demo, seed {seed}: teacher and data from {store.shown(MICRO)}")
    labeled = WORK / "data" / "train_labeled.json"
    prepare_system1_dataset(
        "train",
        source=str(_choose_rows(labeled.with_name("distilqwen.jsonl"))),
        seed=seed,
        out_labeled=labeled,
        out_instructions=WORK / "data" / "train_instructions.json",
    )
    files = {"system1": labeled} | {control: _control_rows(control, labeled, seed) for control in CONTROLS}
    checkpoints = {name: _distil(name, path, seed) for name, path in files.items()}
    report = _report(checkpoints, labeled, seed)
    store.write_json(REPORT, report)
    _show(report)
    say(f"{time.monotonic() - started:.0f} s in all. Report: {store.shown(REPORT)}")
    return report


def _choose_rows(out: Path) -> Path:
    """The shipped rows that the demo learns from: all of the instruction families, REASONING_ROWS of the others."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(MICRO / "distilqwen.parquet").to_pylist()
    chosen, reasoning = [], 0
    for row in rows:
        reasoning += question_of(row["instruction"]).system == 2
        if reasoning <= REASONING_ROWS or question_of(row["instruction"]).system == 1:
            chosen.append(row)
    store.write_jsonl(out, chosen)
    return out


def _distil(name: str, labeled: Path, seed: int) -> str:
    say(f"\nTraining {name}")
    places = {"labeled_path": labeled, "out_dir": WORK / name, "config_path": store.ROOT / "configs" / f"kd_black_box_micro_{name}.json"}
    return distill_system1({"preset": "micro_system1", **places, "seed": seed})


def _control_rows(control: str, labeled: Path, seed: int) -> Path:
    """The prepared rows with other labels: shuffled within each family, or exact."""
    out = labeled.with_name(f"{control}.json")
    for path in (labeled, validation_path(labeled)):
        rows = list(store.read_rows(path))
        place = validation_path(out) if path != labeled else out
        store.write_rows(place, _shuffled(rows, seed) if control == "shuffled_labels" else _gold(rows))
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


def _report(checkpoints: dict, labeled: Path, seed: int) -> dict:
    """Score teacher, student and controls on the held-out questions; the students are asked plainly, reasoning families too."""
    plainly = {"before": str(MICRO / "student_system1"), **checkpoints}
    models = [{"name": "teacher", "path": str(MICRO / "teacher"), "mode": None}]
    models += [{"name": name, "path": path, "mode": "system1"} for name, path in plainly.items()]
    say("")
    scores = score(models, MICRO / "heldout.jsonl", WORK, MAX_NEW_TOKENS)
    run = store.read_json(Path(checkpoints["system1"]) / "distill_run.json")
    return {
        "teacher": scores["teacher"],
        "system1": {"before": scores["before"], "after": scores["system1"]},
        "controls": {control: scores[control] for control in CONTROLS},
        "chance": _chance(labeled),
        "versions": run["versions"],
        "backend": run["backend"],
        "train_seconds": {"system1": run["metrics"]["train_seconds"]},
        "seed": seed,
    }


def _chance(labeled: Path) -> dict:
    """By family, the share of the commonest label: what a student reaches that learnt form and frequency alone."""
    labels = defaultdict(Counter)
    for row in store.read_rows(labeled):
        labels[question_of(row["instruction"]).family][row["output"]] += 1
    return {family: max(labels[family].values(), default=0) / max(labels[family].total(), 1) for family in FAMILIES}


def retained(report: dict, families: list[str] = SYSTEM1_FAMILIES) -> float:
    """The student's mean exact match over the families as a share of the teacher's."""
    return mean_exact_match(report["system1"]["after"], families) / mean_exact_match(report["teacher"], families)


def _show(report: dict) -> None:
    columns = {
        "teacher": report["teacher"],
        "before": report["system1"]["before"],
        "student": report["system1"]["after"],
        "gold": report["controls"]["gold_labels"],
        "shuffled": report["controls"]["shuffled_labels"],
    }
    rows = []
    for family in SYSTEM1_FAMILIES + SYSTEM2_FAMILIES:
        low, high = report["system1"]["after"]["exact_match"][family]["ci"]
        values = {name: f"{scores['exact_match'][family]['value']:.3f}" for name, scores in columns.items()}
        rows.append([family, *values.values(), f"{report['chance'][family]:.3f}", f"{low:.2f}-{high:.2f}"])
    n = next(iter(report["teacher"]["exact_match"].values()))["n"]
    table(f"Exact match on {n} held-out questions a family", ["family", *columns, "chance", "95%"], rows)
    share = report["system1"]["after"]["parameters"] / report["teacher"]["parameters"]
    say(f"System 1 keeps {retained(report):.1%} of the teacher's exact match over the {len(SYSTEM1_FAMILIES)} instruction families,")
    say(f"with {share:.0%} of its parameters. The reasoning families ({', '.join(SYSTEM2_FAMILIES)}), learnt from")
    say("bare answers, stay low: they are what System 2 is for.")
    say("gold: taught exact answers. shuffled: taught other questions' answers. chance: always the commonest answer.")
    say("95%: Wilson interval of the student.")
