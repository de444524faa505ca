"""The report of an evaluation in a terminal: what a reader wants first."""

from .console import say, table, visible
from .report_blocks import Student, Table
from .report_top import top
from .report_words import Cell, count, cut

CELL_CHARACTERS = 400


def show(facts: dict) -> None:
    """Print the figures, diagnosis and targets of an evaluation (`report.json`'s dict)."""
    first = top(facts)
    for line in (first.title, first.lede, ""):
        say(_shown(line))
    for student in first.students:
        _show_student(student)
    if first.targets:
        _show_targets(first.verdict, first.targets)


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
