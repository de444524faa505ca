"""A checkpoint of the lab without a training: the shipped teacher's weights, sealed with the record that the lab writes for a real job."""

import shutil
from pathlib import Path

from conftest import REPOSITORY, write_job

from distill import checkpoint, store
from distill.models import RUN_RECORD

METRICS = {"rows": 500, "steps": 64, "train_seconds": 12.5, "first_loss": 6.2, "last_loss": 1.83, "best_validation_loss": 2.575}


def sealed(folder: Path, rows: list[dict]) -> Path:
    """Write the job over 500 rows and 60 for validation in `folder`, and the checkpoint at `folder/student`."""
    job = store.read_json(write_job(folder, rows[:500], rows[500:560]))
    tokens = Path(job["dataset"]["labeled_path"])
    student = shutil.copytree(REPOSITORY / "data" / "micro" / "teacher", folder / "student")
    record = checkpoint.record(job, tokens.parent, checkpoint.identity(job, "builtin"), {}, {}, METRICS)
    store.write_manifest(student, record, name=RUN_RECORD, files=list(student.iterdir()))
    return student
