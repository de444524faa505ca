"""The whole notebook, its kernel killed after each of its cells in turn and everything run again, against a run that nobody disturbed.

Usage: python benchmarks/bench_notebook_kills.py

Both run on the micro world in copies of the project. Prints how long each session took, and whether both end with the same report: the
students' weights and every answer of the comparison. Exit status 0 only where they do.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from run_notebook import CELL_SECONDS, copy_project, set_field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import store  # noqa: E402
from distill.models import RUN_RECORD  # noqa: E402

STUDENTS = ("distilled-micro-system1", "distilled-micro-cot")
MEASURED = ("seconds", "tokens_per_second")  # of an answer: another time each time


class Killed(Exception):
    """The kernel was killed, as was meant."""


def main() -> None:
    """Run undisturbed, run killed, compare."""
    with TemporaryDirectory() as temporary:
        undisturbed, disturbed = (copy_project(Path(temporary) / name) for name in ("undisturbed", "disturbed"))
        session(undisturbed, None)
        cells = [number for number, cell in enumerate(notebook_of(disturbed).cells) if cell.cell_type == "code"]
        for number in cells:
            session(disturbed, number)
        session(disturbed, None)
        differing = [name for name, both in reports(undisturbed, disturbed).items() if both[0] != both[1]]
    print(f"{len(cells)} kernels killed, one after each cell: " + (f"{', '.join(differing)} differ" if differing else "the same report"))
    sys.exit(bool(differing))


def session(folder: Path, killed_after: int | None) -> None:
    """Run the notebook from its first cell on, to its end or until the kernel is killed after a cell."""
    started, notebook = time.monotonic(), notebook_of(folder)
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}})

    def kill(cell, cell_index: int, **_) -> None:
        if cell_index == killed_after:
            os.kill(client.km.provisioner.pid, signal.SIGKILL)
            raise Killed

    client.on_cell_executed = kill
    with suppress(Killed):
        client.execute()
    how = "to its end" if killed_after is None else f"killed after cell {killed_after}"
    print(f"  {folder.name}: {how}, {time.monotonic() - started:.0f} s", flush=True)


def notebook_of(folder: Path):
    """The notebook, set to the micro world."""
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    set_field(notebook, "USE_MICRO_WORLD", "yes")
    return notebook


def reports(*folders: Path) -> dict[str, list]:
    """What a run ends with → of each folder."""
    return {
        **{name: [weights(folder / name) for folder in folders] for name in STUDENTS},
        "the comparison": [answers(folder) for folder in folders],
    }


def weights(student: Path) -> dict:
    """A checkpoint's weight files and their hashes."""
    files = store.read_manifest(student, name=RUN_RECORD)["files"]
    return {name: fact["sha256"] for name, fact in files.items() if name.endswith(".safetensors")}


def answers(folder: Path) -> list[dict]:
    """The comparison's answers, without what is measured anew each time."""
    made = store.read_json(folder / "reports" / "comparison" / "comparison.json")["answers"]
    return [{key: value for key, value in answer.items() if key not in MEASURED} for answer in made]


if __name__ == "__main__":
    main()
