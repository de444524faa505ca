"""The report of an evaluation: shown in a notebook or terminal, and written as HTML, Markdown and the JSON behind both."""

from dataclasses import dataclass
from pathlib import Path

from . import report_markdown, report_page, store
from .console import say, table, visible
from .report_blocks import Student, Table
from .report_top import top
from .report_words import Cell, count, cut

CELL_CHARACTERS = 400


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What was measured of teacher and students. It shows itself in Jupyter; `show()` prints it, `save(folder)` keeps it.

    facts  the dict of report.json
    """

    facts: dict

    def to_dict(self) -> dict:
        """Everything as plain values that JSON can hold; `Evaluation(values)` is the way back."""
        return self.facts

    def show(self) -> None:
        """Print what a reader wants first: figures, diagnosis, targets. The pages hold the rest."""
        first = top(self.facts)
        for line in (first.title, first.lede, ""):
            say(_shown(line))
        for student in first.students:
            _show_student(student)
        if first.targets:
            _show_targets(first.verdict, first.targets)

    def save(self, folder: str | Path) -> dict[str, str]:
        """Write report.json, report.html (a page that stands alone) and report.md. Returns their paths by kind."""
        return write(self.facts, folder)

    def _repr_html_(self) -> str:
        return report_page.fragment(self.facts)

    def __repr__(self) -> str:
        return f"<Evaluation of {_shown(self.facts['title'])}; .show(), .to_dict(), .save(folder)>"


def write(evaluation: dict, out: str | Path) -> dict[str, str]:
    """Write an evaluation's report into a folder.

    evaluation  the dict of report.json
    out         the folder, made where it is missing
    Returns {"json", "html", "markdown"}: the paths of report.json, report.html and report.md.
    """
    folder = store.resolve(out)
    pages = {"html": ("report.html", report_page.page), "markdown": ("report.md", report_markdown.markdown)}
    written = {"json": str(store.write_json(folder / "report.json", evaluation))}
    for kind, (name, made_by) in pages.items():
        with store.atomic_file(folder / name) as file:
            file.write(made_by(evaluation))
        written[kind] = str(folder / name)
    return written


def _show_student(student: Student) -> None:
    for number, each in enumerate(student.diagnosis):
        if not number:
            say(f"✗ {_shown(student.title)} is broken: {count(len(student.diagnosis), 'fault')}")
        say(f"  {_shown(each['what'])}: {_shown(each['evidence'])} {_shown(each['advice'])}")
    rows = [[label, number, _shown("; ".join(filter(None, lines)))] for label, number, lines in student.figures]
    table(f"{_shown(student.title)}: {_shown(student.name)}", ["", "measured", "conditions"], rows, justify="left")


def _show_targets(verdict: str, targets: Table) -> None:
    rows = [[_shown(f"{cell.text} ({cell.detail})" if cell.detail else cell.text) for cell in _cells(row)] for row in targets.rows]
    table(verdict, targets.columns, rows, justify="left")


def _cells(row: list) -> list[Cell]:
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]


def _shown(text: str) -> str:
    """A text from anywhere as one line of a terminal, in which nothing acts."""
    return visible(" ".join(cut(str(text), CELL_CHARACTERS).split()))
