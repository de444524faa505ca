"""Every training run that lies in `runs/`: what it was made of, how far it came, what it scored; and how some of them differ.

Nothing is kept beside the runs: a run is what its own folder says (`plan.json`, `metrics.jsonl`, `evaluation.json`) and the record of the
checkpoint that it left. A folder that cannot be read is named and passed over.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from . import store
from .console import say, table, visible
from .errors import ConfigError, DataError, did_you_mean, shortened
from .models import RUN_RECORD
from .resume import saved, step_of

PLACES = ("labeled_path", "out_dir", "config_path")  # where a run reads and writes; its rows are compared by their content
ASKED = ("source", "sha256", "rows")  # what says which questions scores are of
THERE, REPLACED, GONE, NONE_YET = "there", "replaced by another run", "gone", "none yet"
_NAME = re.compile(r"system[12]-[\w-]+")


@dataclass(frozen=True)
class Run:
    """One training run.

    id                the name of its folder in `runs/`; checkpoint_id: what its checkpoint calls itself
    system            "system1" or "system2"
    labels            who wrote the answers that it learns → rows; empty where the data's manifest is gone
    rows              rows trained on
    state             "finished", "cut short at step n of m" (which may still be running), "cut short before its first figure", "prepared"
    best_validation_loss  nats per supervised token;  train_seconds: of the training alone
    checkpoint        the folder it is published at;  checkpoint_state: THERE, REPLACED, GONE, NONE_YET, or what is wrong with it
    scores            what `evaluate` left of this checkpoint: {"made", "path", "mode", "quality", "retained", "headline", "questions"}
    when              ISO time of its last figure, else of its plan
    settings, data    name → value, of what decides it
    """

    id: str
    system: str
    student: str
    teacher: str | None
    labels: dict
    rows: int
    state: str
    best_validation_loss: float | None
    train_seconds: float | None
    backend: str | None
    checkpoint: str
    checkpoint_state: str
    checkpoint_id: str | None
    scores: dict | None
    when: str
    settings: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)


def list_runs() -> list[Run]:
    """Every training run in `runs/`, the oldest first; a folder that cannot be read as one is named in a line and passed over.

    A checkpoint's files are looked at by name and size: hashing the weights of every run would take minutes.
    """
    runs, damaged = _scan()
    _say_passed_over(damaged)
    return runs


def show_runs() -> dict:
    """Print a table of the runs. Returns {"runs": [the facts of each], "passed_over": {folder: why}}."""
    runs, damaged = _scan()
    _show_table(f"{len(runs):,} runs in {store.shown(_folder())}", [_row(run) for run in runs])
    _say_passed_over(damaged)
    if len(runs) > 1:
        say(f"What differs between two: python distill_app.py runs {runs[-2].id} {runs[-1].id}")
    return {"runs": [asdict(run) for run in runs], "passed_over": damaged}


def compare_runs(*ids: str) -> dict:
    """Print how runs differ: settings and data where they do, scores with their intervals side by side, and of which questions they are.

    ids  names of two runs or more, or beginnings that only one run has ("system1-3f", "3f")
    Returns {"runs": [id], "settings": {name: [a value for each run]}, "data": {…}, "questions": {"source", "sha256", "rows": […]},
    "scores": {metric: [{"value", "n", "ci"} or None]}}.
    Raises ConfigError for a name that no run has, or several.
    """
    known, damaged = _scan()
    runs = [_find(name, known) for name in ids]
    if len({run.id for run in runs}) < 2:
        raise ConfigError("Comparing needs two different runs: python distill_app.py runs lists them.")
    found = {
        "runs": [run.id for run in runs],
        "settings": _differing([run.settings for run in runs]),
        "data": _differing([run.data for run in runs]),
        "questions": _questions(runs),
        "scores": _scores(runs),
    }
    _say_passed_over({place: why for place, why in damaged.items() if Path(place).parent.name in found["runs"]})
    _show(found)
    return found


# Reading


def _folder() -> Path:
    return store.ROOT / "runs"


def _scan() -> tuple[list[Run], dict[str, str]]:
    """The runs, and place → why it is passed over: folders named or made like a run, and evaluations, that cannot be used."""
    runs, damaged = [], {}
    for folder in sorted(_folder().iterdir()) if store.is_dir(_folder()) else []:
        if not folder.is_dir() or folder.suffix == ".former" or not (_NAME.fullmatch(folder.name) or (folder / "plan.json").is_file()):
            continue
        with _passing_over(folder, damaged):
            run = _read(folder)
            with _passing_over(folder / "evaluation.json", damaged):
                run = replace(run, scores=_evaluation(folder, run.checkpoint))
            runs.append(run)
    return sorted(runs, key=lambda run: (run.when, run.id)), damaged


@contextmanager
def _passing_over(place: Path, damaged: dict[str, str]) -> Iterator[None]:
    """Note why a place cannot be read, where it cannot."""
    try:
        yield
    except (DataError, ConfigError) as error:
        damaged[store.shown(place)] = str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        damaged[store.shown(place)] = f"it is no run of this lab: {type(error).__name__}: {shortened(error, 80)}"


def _read(folder: Path) -> Run:
    plan = store.read_json(folder / "plan.json")
    settings = {name: setting["value"] for name, setting in plan["settings"].items()}
    out_dir, figures = Path(settings["out_dir"]), _figures(folder)
    record = _record(folder, out_dir)
    metrics = record["metrics"] if record else {}
    labels, data = _data(plan["data"])
    return Run(
        id=folder.name,
        system=plan["mode"],
        student=settings["student_model"],
        teacher=settings.get("teacher_model"),
        labels=labels,
        rows=plan["data"]["train"]["kept"],
        state="finished" if record or figures["ended"] else _how_far(folder, figures),
        best_validation_loss=metrics.get("best_validation_loss", figures["best_validation_loss"]),
        train_seconds=metrics.get("train_seconds", figures["train_seconds"]),
        backend=record and record["backend"],
        checkpoint=str(out_dir),
        checkpoint_state=_checkpoint_state(out_dir, folder, bool(figures["ended"])),
        checkpoint_id=record and record["run_id"],
        scores=None,
        when=_iso(figures["time"] or (folder / "plan.json").stat().st_mtime),
        settings={name: value for name, value in settings.items() if name not in PLACES},
        data=data,
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _figures(folder: Path) -> dict:
    """What a run's metrics come to: how far it came, whether it ended, its best validation loss, its seconds, the last figure's time."""
    found: dict = dict.fromkeys(("step", "steps", "time", "best_validation_loss", "train_seconds"))
    place = folder / "metrics.jsonl"
    for line in store.read_rows(place) if store.is_file(place) else ():
        found |= {name: line[name] for name in ("step", "steps", "time") if name in line}
        if "eval_loss" in line:
            known = found["best_validation_loss"]
            found["best_validation_loss"] = line["eval_loss"] if known is None else min(known, line["eval_loss"])
        found["train_seconds"] = line.get("train_runtime")
    return found | {"ended": found["train_seconds"] is not None}


def _how_far(folder: Path, figures: dict) -> str:
    """The state of a run that did not end."""
    step, steps = figures["step"] or 0, figures["steps"]
    for place in saved(folder / "checkpoints"):
        if step_of(place) >= step and store.is_file(place / "trainer_state.json"):
            step, steps = step_of(place), store.read_json(place / "trainer_state.json")["max_steps"]
    if steps:
        return f"cut short at step {step:,} of {steps:,}"
    return "cut short before its first figure" if store.is_file(folder / "train.log") else "prepared"


def _record(folder: Path, out_dir: Path) -> dict | None:
    """The record of the checkpoint that a run published: where it stands now, or where a later one has pushed it aside."""
    for place in (out_dir, out_dir.with_name(f"{out_dir.name}.previous")):
        record = store.read_json(place / RUN_RECORD) if store.is_file(place / RUN_RECORD) else None
        if record and Path(record["job"]["dataset"]["labeled_path"]).parent == folder:
            return record
    return None


def _checkpoint_state(out_dir: Path, folder: Path, ended: bool) -> str:
    place = out_dir / RUN_RECORD
    if not store.is_file(place):
        return GONE if ended else NONE_YET
    record = store.read_seal(place)
    if Path(record["job"]["dataset"]["labeled_path"]).parent != folder:
        return REPLACED if ended else NONE_YET
    wrong = [name for name, fact in record["files"].items() if not _is_whole(out_dir / name, fact["bytes"])]
    return f"damaged: {', '.join(wrong)}" if wrong else THERE


def _is_whole(file: Path, size_bytes: int) -> bool:
    return file.is_file() and file.stat().st_size == size_bytes


def _data(planned: dict) -> tuple[dict, dict]:
    """Who wrote the labels, and the facts of the rows by which runs are compared: as planned, and as the rows' manifest has them still."""
    facts = {"rows kept": planned["train"]["kept"], "rows too long": planned["train"]["too_long"]}
    facts |= {"validation rows": planned.get("validation", {}).get("kept", 0), "content (SHA-256)": planned["labeled_sha256"][:12]}
    labeled = Path(planned["labeled_path"])
    place = labeled.with_name(f"{labeled.name}.manifest.json")
    manifest = store.read_seal(place) if store.is_file(place) else {"files": {}}
    if manifest["files"].get(labeled.name, {}).get("sha256") != planned["labeled_sha256"]:
        return {}, facts  # prepared anew since: what that manifest says is not of these rows
    return manifest.get("teachers", {}), facts | manifest.get("stage", {}).get("settings", {})


def _evaluation(folder: Path, checkpoint: str) -> dict | None:
    """The scores of a run's own checkpoint, None where it was not evaluated. Raises DataError for what is none of them."""
    place = folder / "evaluation.json"
    if not store.is_file(place):
        return None
    found = store.read_json(place)
    if not _is_evaluation(found):
        raise DataError(f"It is no evaluation of this lab. Evaluate {store.shown(checkpoint)} again.")
    if store.resolve(found["path"]) != store.resolve(checkpoint):
        raise DataError(f"It is of {shortened(found['path'], 120)}, not of this run's checkpoint, {store.shown(checkpoint)}.")
    return found


def _is_evaluation(found) -> bool:
    """Whether a value has all that is shown of an evaluation."""
    needed = {"path": str, "headline": str, "quality": dict, "retained": dict, "questions": dict}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in needed.items()):
        return False
    headline = found["quality"].get(found["headline"])
    return (headline is None or _is_interval(headline)) and found["questions"].keys() >= set(ASKED)


# Finding and comparing


def _find(name: str, runs: list[Run]) -> Run:
    """The run of a name, whole or begun; with or without its system."""
    exact = [run for run in runs if run.id == name]
    found = exact or [run for run in runs if name and (run.id.startswith(name) or run.id.partition("-")[2].startswith(name))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"run = {name!r}: {len(found)} runs begin so: {', '.join(run.id for run in found[:5])}. Give more letters.")
    raise ConfigError(
        f"run = {name!r}: there is no such run.{did_you_mean(name, [run.id for run in runs])} `python distill_app.py runs` lists them."
    )


def _differing(sides: list[dict]) -> dict:
    """Name → the value of each side, None where one has none, of all names whose values differ."""
    names = dict.fromkeys(name for side in sides for name in side)
    values = {name: [side.get(name) for side in sides] for name in names}
    return {name: each for name, each in values.items() if len({store.hash_json(value) for value in each}) > 1}


def _questions(runs: list[Run]) -> dict:
    """What each run was asked, None where it was not evaluated; nothing where none was."""
    sides = [run.scores["questions"] if run.scores else {} for run in runs]
    return {name: [side.get(name) for side in sides] for name in ASKED} if any(sides) else {}


def _scores(runs: list[Run]) -> dict:
    """Metric → {"value", "n", "ci"} for each run, None where it was not measured; what no run has is left out."""
    sides = [_intervals(run.scores or {}) for run in runs]
    return {name: [side.get(name) for side in sides] for name in dict.fromkeys(name for side in sides for name in side)}


def _intervals(scores: dict) -> dict:
    quality = {name: value for name, value in scores.get("quality", {}).items() if _is_interval(value)}
    return quality | {f"retained {name}": value for name, value in scores.get("retained", {}).items() if _is_interval(value)}


def _is_interval(value) -> bool:
    if not isinstance(value, dict) or not value.keys() >= {"value", "ci"}:
        return False
    ends = value["ci"] or [0, 0]
    return isinstance(ends, list) and len(ends) == 2 and all(isinstance(one, int | float) for one in (value["value"] or 0, *ends))


# Showing


def _say_passed_over(damaged: dict) -> None:
    for folder, why in damaged.items():
        say(f"note: {folder} is passed over: {why}")


def _show_table(title: str, rows: list[dict]) -> None:
    """A table without the columns that no row has anything in: a terminal is narrow."""
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    table(title, columns, [[row[name] for name in columns] for row in rows], justify="left")


def _row(run: Run) -> dict[str, str]:
    headline = (run.scores or {}).get("headline")
    kept = "" if run.checkpoint_state == THERE else f" ({run.checkpoint_state})"
    return {
        "run": run.id,
        "state": run.state,
        "student": visible(Path(run.student).name),
        "rows": f"{run.rows:,}",
        "val. loss": "" if run.best_validation_loss is None else f"{run.best_validation_loss:.4f}",
        "seconds": "" if run.train_seconds is None else f"{run.train_seconds:,.0f}",
        "score": f"{headline} {with_interval(run.scores['quality'].get(headline))}" if headline else "",
        "checkpoint": f"{visible(Path(run.checkpoint).name)}{kept}",
    }


def _short(path: str) -> str:
    return visible(store.shown(path) if Path(path).is_absolute() else path)


def with_interval(score: dict | None) -> str:
    """A score as a table shows it: `0.934 [0.91, 0.95]`."""
    if not score or score["value"] is None:
        return "-"
    return f"{score['value']:.3f}" + (f" [{score['ci'][0]:.2f}, {score['ci'][1]:.2f}]" if score["ci"] else "")


def _show(found: dict) -> None:
    for title, shown in (("settings", _value), ("data", _value), ("scores", with_interval)):
        if found[title]:
            rows = [[name, *map(shown, values)] for name, values in found[title].items()]
            table(f"{title.capitalize()}{' that differ' * (title != 'scores')}", [title, *found["runs"]], rows, justify="left")
        else:
            say(f"{title}: {'none was evaluated' if title == 'scores' else 'no difference, places apart'}")
    if found["questions"]:
        _show_questions(found["runs"], found["questions"])


def _show_questions(ids: list[str], asked: dict) -> None:
    """Of which questions the scores are, and a warning where they are not the same ones."""
    table("Questions", ["questions", *ids], [[name, *map(_value, values)] for name, values in asked.items()], justify="left")
    different = {store.hash_json(each) for each in zip(asked["sha256"], asked["rows"], strict=True) if each != (None, None)}
    if len(different) > 1:
        say("warning: these scores are of different questions and do not compare. Evaluate each on the same --questions FILE.")


def _value(value) -> str:
    return "-" if value is None else _short(shortened(value, 120))
