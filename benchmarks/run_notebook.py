"""Execute notebook.ipynb headless, from the first cell to the last: `make notebook`.

By default in a copy of the project, so that data, runs and checkpoints of your own stay as they are, and with the micro world whatever
the machine. Leaves the executed notebook and its HTML in `reports/notebook/`; exit status 0 only where every cell ran.
"""

import argparse
import re
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", ".train-env", "runs", "reports", "distilled-*", "__pycache__", ".pytest_cache", ".ruff_cache")
CELL_SECONDS = 1800


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Execute notebook.ipynb headless.")
    parser.add_argument("--folder", type=Path, help="folder that holds notebook.ipynb, to run in (default: a copy of the project)")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "notebook", help="where the outputs go (default reports/notebook)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=TEXT", help="another text for a field of the form")
    options = parser.parse_args()
    fields = dict(assignment.split("=", 1) for assignment in options.set)
    if options.folder:
        sys.exit(run(options.folder, options.out, fields))
    with TemporaryDirectory() as temporary:
        copy = copy_project(Path(temporary) / "lab")
        sys.exit(run(copy, options.out, {"USE_MICRO_WORLD": "yes", **fields}))


def copy_project(to: Path) -> Path:
    """The project without what a run or an installation made, as a new folder."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for made in (to / "data").iterdir():
        if made.is_file():
            made.unlink()
    return to


def run(folder: Path, out: Path, fields: dict[str, str]) -> int:
    """Execute `folder`/notebook.ipynb with some fields of its form set, and save what it shows. Returns the exit status."""
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    for name, text in fields.items():
        set_field(notebook, name, text)
    started, failed = time.monotonic(), None
    try:
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=CELL_SECONDS, resources=place, on_cell_executed=Clock()).execute()
    except CellExecutionError as error:
        failed = error
    save(notebook, out)
    print(f"{time.monotonic() - started:.0f} s in all; {out}/notebook.ipynb and notebook.html")
    if failed:
        print(failed, file=sys.stderr)
    return 1 if failed else 0


def set_field(notebook, name: str, text: str) -> None:
    """Give a field of the form another text, as a user would."""
    field, found = re.compile(rf'^{name} = ".*?"', re.M), 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, count = field.subn(lambda match: f'{name} = "{text}"', cell.source)
            found += count
    if found != 1:
        raise SystemExit(f"{name} is a text field of the notebook's form {found} times; it must be one once.")


class Clock:
    """Says after each cell how long it took."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, cell, cell_index: int, **_) -> None:
        now = time.monotonic()
        print(f"  cell {cell_index:2d}  {now - self.last:6.1f} s  {cell.source.splitlines()[0][:70]}", flush=True)
        self.last = now


def save(notebook, out: Path) -> None:
    """Write the executed notebook and its HTML."""
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out / "notebook.ipynb")
    page, _ = HTMLExporter().from_notebook_node(notebook)
    (out / "notebook.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
