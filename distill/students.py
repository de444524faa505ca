"""What is known of a student's checkpoint: how it is asked, what it was before, which rows it learnt from, how its training went."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import store
from .config import model_name
from .errors import ConfigError, DataError
from .models import RUN_RECORD, check_student
from .prompt import MODES, tokenizer_hash
from .store import validation_path

TITLES = {"system1": "System-1 student", "system2": "System-2 student"}
LOSSES = {"training": "loss", "validation": "eval_loss"}


@dataclass(frozen=True)
class Student:
    """A student to be examined.

    mode    how it is asked, "system1" or "system2"
    path    its checkpoint's folder, or a name on the hub
    before  the model that it was before its training; None where that is not known
    record  its distill_run.json; empty where it was not made by the lab
    """

    mode: str
    path: str
    before: str | None
    record: dict

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that made it; None where that is not known or gone."""
        folder = Path(self.record["job"]["dataset"]["labeled_path"]).parent if self.record else None
        return folder if folder and store.is_dir(folder) else None


def student_at(path: str | Path, mode: str | None = None, before: str | None = None) -> Student:
    """A student by its checkpoint, which must be whole.

    mode, before  where the checkpoint's record does not say, or you want it otherwise
    Raises ConfigError `Invalid student model: …`, or where nothing says how it is asked; DataError for a damaged checkpoint.
    """
    name = model_name(path)
    check_student(name)
    record = store.read_manifest(name, name=RUN_RECORD) if store.is_dir(name) else None
    mode = mode or (record or {}).get("mode")
    if mode not in MODES:
        raise ConfigError(
            f"{store.shown(name)} does not say how it is asked: its {RUN_RECORD} is missing or older. Give mode = 'system1' or 'system2'."
        )
    return Student(mode, name, model_name(before) if before else record and record["job"]["models"]["student"], record or {})


def learnt_rows(student: Student) -> tuple[Path | None, Path | None]:
    """The files of the rows that a student learnt from and of those that it was chosen by (validation), each as it was then; else None."""
    data = student.record.get("data", {})
    labeled = Path(data.get("labeled_path", "none"))
    return _as_it_was(labeled, data.get("labeled_sha256")), _as_it_was(validation_path(labeled), data.get("validation_sha256"))


def _as_it_was(rows: Path, sha256: str | None) -> Path | None:
    return rows if sha256 and store.is_file(rows) and store.hash_file(rows) == sha256 else None


def template_differs(student: Student, tokenizer) -> bool | None:
    """Whether a checkpoint's tokenizer or chat template is another than that which its training rows were made with; None: not known."""
    tokens = student.run_folder and student.run_folder / "train_tokenized.json"
    manifest = store.read_manifest(tokens) if tokens and store.is_file(tokens) else None
    return manifest and manifest["tokenizer_sha256"] != tokenizer_hash(tokenizer)


def read_losses(checkpoint: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The losses of the run that made a checkpoint as (step, loss): {"training": […], "validation": […]}.

    Raises ConfigError for a folder that is no checkpoint of the lab, DataError where the run's metrics are gone.
    """
    record = store.resolve(checkpoint) / RUN_RECORD
    if not store.is_file(record):
        raise ConfigError(f"{store.shown(checkpoint)} holds no {RUN_RECORD}: give the folder that a distillation returned.")
    return _losses(Path(store.read_json(record)["job"]["dataset"]["labeled_path"]).parent)


def _losses(run_folder: Path) -> dict[str, list[tuple[int, float]]]:
    lines = list(store.read_rows(run_folder / "metrics.jsonl"))
    return {name: [(line["step"], line[key]) for line in lines if key in line] for name, key in LOSSES.items()}


def training_facts(student: Student) -> dict | None:
    """How a student was trained, for a report; None for one that the lab did not train. What is gone since is left empty.

    Returns {"rows", "validation_rows", "epochs", "steps", "seconds", "backend", "labels_by", "loss", "loss_reduction", "settings",
    "source", "levels"}.
    """
    if not student.record:
        return None
    record, data = student.record, student.record.get("data", {})
    losses = _losses(student.run_folder) if student.run_folder and store.is_file(student.run_folder / "metrics.jsonl") else {}
    source = _source(data)
    return {
        "rows": data.get("train", {}).get("kept", record["metrics"]["rows"]),
        "validation_rows": data.get("validation", {}).get("kept", 0),
        "epochs": record["job"]["training"]["num_train_epochs"],
        "steps": record["metrics"]["steps"],
        "seconds": record["metrics"]["train_seconds"],
        "backend": record["backend"],
        "labels_by": ", ".join(f"{name} ({rows:,})" for name, rows in source.get("teachers", {}).items()),
        "loss": {name: [list(point) for point in losses.get(name, [])] for name in LOSSES},
        "loss_reduction": {name: _reduction([loss for _, loss in losses.get(name, [])]) for name in LOSSES},
        "settings": record.get("settings", {}),
        "source": source,
        "levels": _levels(data) if source else None,
    }


def _reduction(losses: list[float]) -> dict | None:
    """How far a loss fell, from its first value to its last."""
    return {"first": losses[0], "last": losses[-1], "share": 1 - losses[-1] / losses[0]} if losses and losses[0] else None


def _source(data: dict) -> dict:
    """What the preparation recorded of the rows; empty where they are gone or others stand there now."""
    labeled = Path(data.get("labeled_path", ""))
    if not store.is_file(labeled) or store.hash_file(labeled) != data.get("labeled_sha256"):
        return {}
    manifest = _manifest(labeled)
    known = {name: manifest[name] for name in ("slice", "read", "dropped", "teachers", "traces", "limits", "seed") if name in manifest}
    return {**known, "sources": _sources(labeled)}


def _manifest(labeled: Path) -> dict:
    try:
        return store.read_manifest(labeled) or {}
    except DataError:  # its validation rows were changed since; the rows themselves are those that were learnt
        return {}


def _sources(labeled: Path) -> dict:
    """Source and, from a hub, its revision → rows."""
    counts = Counter(" at ".join(str(row[key]) for key in ("source", "revision") if row.get(key)) for row in store.read_rows(labeled))
    return {store.shown(name) if Path(name).is_absolute() else name: rows for name, rows in counts.items() if name}


def _levels(data: dict) -> dict | None:
    """How many of the rows have which reasoning verbosity and cognitive difficulty; None where none says."""
    found = Counter(_levels_of(Path(data["labeled_path"])))
    if not found:
        return None
    marginals = {name: Counter() for name in ("rv", "cd")}
    for (rv, cd), rows in found.items():
        marginals["rv"][rv] += rows
        marginals["cd"][cd] += rows
    by_level = {name: {str(level): rows for level, rows in sorted(counts.items())} for name, counts in marginals.items()}
    return {**by_level, "joint": [[rv, cd, rows] for (rv, cd), rows in sorted(found.items())]}


def _levels_of(labeled: Path) -> Iterator[tuple]:
    for row in store.read_rows(labeled):
        if row.get("RV") is not None and row.get("CD") is not None:
            yield int(row["RV"]), int(row["CD"])  # levels; a column with gaps holds them as floats
