"""The real EasyDistill 1.x against the built-in engine: both systems of the micro world at equal settings and seed, last checkpoints.

Usage: EASYDISTILL_HOME=… python benchmarks/bench_easydistill.py [--seeds 0 1 2] [--systems 1 2]

Each system is trained three times on one token file: by the built-in engine; by EasyDistill; and by EasyDistill on rows laid out such that
its shuffle puts them into the built-in engine's order, which shows what is left of the difference when the order is the same. The intervals
are over questions; how much a training varies by itself, the seeds show.
Prints Markdown tables, as in benchmarks/RESULTS.md, and writes `reports/bench-easydistill/seed<N>.json`.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import easydistill, launch, store, train  # noqa: E402
from distill.answers import ask  # noqa: E402
from distill.console import say  # noqa: E402
from distill.data import prepare_system1_dataset  # noqa: E402
from distill.intervals import wilson  # noqa: E402
from distill.metrics import final_answer  # noqa: E402
from distill.microlab import MAX_NEW_TOKENS, MICRO  # noqa: E402
from distill.microtasks import FAMILIES, phrase, question_of, sample_questions  # noqa: E402
from distill.pipeline import write_system1_config, write_system2_config  # noqa: E402
from distill.traces import prepare_system2_dataset  # noqa: E402

WORK = store.ROOT / "runs" / "bench-easydistill"
REPORTS = store.ROOT / "reports" / "bench-easydistill"
SYSTEM1_ROWS = 6000
EPOCHS = {1: 4, 2: 5}
QUESTIONS = {1: 200, 2: 400}  # a family: 1,400 and 1,200 in all
LIMITS = {"system1": MAX_NEW_TOKENS["system1"], "system2": 150}
RESAMPLES = 10_000
FIRST = 10  # logged losses, of 10 steps each: before rounding has grown into another training


def main() -> None:
    """Train, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    arguments = parser.parse_args()
    installation = easydistill.require(1)
    report = {}
    for seed in arguments.seeds:
        found = {system: compare(system, seed, installation) for system in arguments.systems}
        store.write_json(REPORTS / f"seed{seed}.json", {"versions": installation.versions, **found})
        report |= {(system, seed): figures for system, figures in found.items()}
    say(tables(dict(sorted(report.items()))))


def compare(system: int, seed: int, installation: easydistill.Installation) -> dict:
    """Three trainings of one system and what they come to: {"training": {name: figures}, "pairs": {name: against the built-in}}."""
    job = Path(write_job(system, seed))
    tokens = Path(store.read_json(job)["dataset"]["labeled_path"])
    same_order = in_its_order(job, tokens, seed)
    runs = {}
    for name, path in (("built-in", job), ("EasyDistill", job), ("EasyDistill, same order", same_order)):
        place = WORK / f"seed{seed}-system{system}-{name.replace(', ', '-').replace(' ', '-')}"
        place.mkdir(parents=True, exist_ok=True)
        settings = store.read_json(path)
        settings["training"]["output_dir"] = str(place / "out")
        own = store.write_json(place / "job.json", settings)
        made = train.run(own, place, "benchmark") if name == "built-in" else launch.run(own, place, "benchmark", installation)
        runs[name] = {"folder": place, "metrics": made.metrics, "losses": losses(place / "metrics.jsonl")}
    right = answers(system, runs)
    training = {
        name: {**run["metrics"], "exact_match": wilson(int(right[name].sum()), len(right[name])), "losses": run["losses"]}
        for name, run in runs.items()
    }
    others = [name for name in runs if name != "built-in"]
    return {"training": training, "pairs": {name: {**paired(right["built-in"], right[name]), **gaps(runs, name)} for name in others}}


def write_job(system: int, seed: int) -> str:
    """Prepared rows and their job; no validation, so that both backends publish the last checkpoint."""
    student, source = str(MICRO / f"student_system{system}"), WORK / "distilqwen.jsonl"
    if system == 1:
        store.write_jsonl(source, _instruction_rows())
        labeled = prepare_system1_dataset("train", source=str(source), validation=0, seed=seed, out_labeled=WORK / "system1.json",
                                          out_instructions=WORK / "instructions.json").path  # fmt: skip
    else:
        labeled = prepare_system2_dataset("train", source=str(MICRO / "omnithought.parquet"), rows=None, rv_max=2, student_model=student,
                                          max_length=256, validation=0, seed=seed, out_cot=WORK / "system2.json").path  # fmt: skip
    write = {1: write_system1_config, 2: write_system2_config}[system]
    places = {
        "labeled_path": labeled,
        "out_dir": WORK / f"out{system}",
        "config_path": store.ROOT / "configs" / f"kd_bench_system{system}.json",
    }
    equal = {"group_by_length": False, "num_epochs": EPOCHS[system], "logging_steps": 10, "seed": seed}
    return write({"preset": f"micro_system{system}", "student_model": student, **places, **equal})


def _instruction_rows() -> list[dict]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(MICRO / "distilqwen.parquet").to_pylist()
    return [row for row in rows if question_of(row["instruction"]).system == 1][:SYSTEM1_ROWS]


def in_its_order(job: Path, tokens: Path, seed: int) -> Path:
    """A job on the same rows, laid out such that the shuffle of `datasets`, which EasyDistill calls, gives back the order of `tokens`."""
    rows = list(store.read_rows(tokens))
    laid_out: list = [None] * len(rows)
    for place, row in zip(numpy.random.default_rng(seed).permutation(len(rows)), rows, strict=True):
        laid_out[place] = row
    settings = store.read_json(job)
    settings["dataset"]["labeled_path"] = str(tokens.with_name("train_tokenized_same_order.json"))
    store.write_rows(settings["dataset"]["labeled_path"], laid_out)
    return store.write_json(WORK / f"{job.stem}_same_order.json", settings)


def losses(metrics: Path) -> list[float]:
    return [row["loss"] for row in store.read_rows(metrics) if "loss" in row]


def answers(system: int, runs: dict) -> dict:
    """By run, whether each held-out question is answered exactly: {name: (n,) bool}."""
    rng, mode = random.Random("bench-easydistill"), f"system{system}"
    questions = [
        {"instruction": phrase(question, rng), "mode": mode, "answer": question.answer}
        for name, family in FAMILIES.items()
        if family.system == system
        for question in sample_questions(name, QUESTIONS[system], 1, "heldout")
    ]
    asked = [{key: question[key] for key in ("instruction", "mode")} for question in questions]
    same = {"bits": 32, "max_new_tokens": LIMITS, "batch_tokens": 65_536, "questions": asked}
    made = ask([{"name": name, "path": str(run["folder"] / "last"), **same} for name, run in runs.items()], WORK, f"System {system}")
    return {
        name: numpy.array([final_answer(answer["text"]) == question["answer"].strip()
                           for question, answer in zip(questions, made[name]["answers"], strict=True)])
        for name in runs
    }  # fmt: skip


def paired(ours: numpy.ndarray, theirs: numpy.ndarray) -> dict:
    """The difference in exact match over the same questions, theirs less ours, with a bootstrap interval of 95% over questions."""
    difference, n = theirs.astype(int) - ours.astype(int), len(ours)
    drawn = numpy.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    low, high = numpy.percentile(difference[drawn].mean(1), [2.5, 97.5])
    only = {"only_built_in": int((difference < 0).sum()), "only_easydistill": int((difference > 0).sum())}
    return {"n": n, "difference": float(difference.mean()), "ci": [float(low), float(high)], **only}


def gaps(runs: dict, name: str) -> dict:
    """How far the logged losses lie apart: in the first 100 steps, in all, and over the last half, with the means there."""
    ours, theirs = (numpy.array(runs[each]["losses"]) for each in ("built-in", name))
    half = len(ours) // 2
    apart = numpy.abs(ours - theirs)
    return {
        "largest_gap_first": float(apart[:FIRST].max()),
        "largest_gap": float(apart.max()),
        "largest_gap_last_half": float(apart[half:].max()),
        "mean_gap_last_half": float(apart[half:].mean()),
        "means_last_half": [float(ours[half:].mean()), float(theirs[half:].mean())],
    }


def tables(report: dict) -> str:
    """Two Markdown tables: the trainings; EasyDistill against the built-in engine."""
    lines = ["| system | seed | trained by | rows | steps | training s | first loss | last loss | exact match (95%) |", "|" + "---|" * 9]
    for (system, seed), found in report.items():
        for name, run in found["training"].items():
            low, high = run["exact_match"]["ci"]
            score = f"{run['exact_match']['value']:.3f} ({low:.3f}–{high:.3f})"
            cells = [system, seed, name, f"{run['rows']:,}", f"{run['steps']:,}", f"{run['train_seconds']:.0f}"]
            lines.append(_line([*cells, f"{run['losses'][0]:.3f}", f"{run['losses'][-1]:.3f}", score]))
    heads = ["system", "seed", "against the built-in engine", "n", "difference (95%)", "only built-in right", "only EasyDistill right"]
    heads += ["largest loss gap, first 100 steps", "largest", "largest, last half", "mean gap, last half", "mean loss, last half"]
    lines += ["", _line(heads), "|" + "---|" * len(heads)]
    for (system, seed), found in report.items():
        for name, pair in found["pairs"].items():
            low, high = pair["ci"]
            cells = [system, seed, name, f"{pair['n']:,}", f"{pair['difference']:+.4f} ({low:+.4f} to {high:+.4f})", pair["only_built_in"]]
            gap = [pair[key] for key in ("largest_gap_first", "largest_gap", "largest_gap_last_half", "mean_gap_last_half")]
            cells += [pair["only_easydistill"], *(f"{value:.4f}" for value in gap)]
            lines.append(_line([*cells, "{:.4f} and {:.4f}".format(*pair["means_last_half"])]))
    return "\n".join(lines)


def _line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
