"""An evaluation's report as Markdown: what the page shows, for a README, an issue or a terminal.

Texts of models and data stand in fences longer than any run of backticks in them; in other places no character of them is markup.
"""

from . import report_blocks as blocks
from .console import visible
from .markdown import fenced, plain
from .report_content import sections
from .report_top import top
from .report_words import Cell, count, cut

CASES = 5
TEXT_CHARACTERS = 4_000
CELL_CHARACTERS = 400


def markdown(facts: dict) -> str:
    """The report of an evaluation (`report.json`'s dict) as Markdown."""
    first = top(facts)
    lines = [f"# {_plain(first.title)}", "", _plain(first.kicker), "", _plain(first.lede), ""]
    for student in first.students:
        lines += _student(student)
    if first.targets:
        lines += [f"## {_plain(first.verdict)}", "", *_table(first.targets)]
    for section in sections(facts):
        lines += [f"## {_plain(section.title)}", "", *_blocks(section.blocks)]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return plain(visible(cut(str(text), CELL_CHARACTERS)))


def _text(text: str) -> str:
    return fenced(visible(cut(text, TEXT_CHARACTERS)))


def _student(student: blocks.Student) -> list[str]:
    lines = [f"## {_plain(student.title)}: {_plain(student.name)}", ""]
    if student.diagnosis:
        lines += [f"**✗ This student is broken: {count(len(student.diagnosis), 'fault')}**", ""]
        lines += [f"- **{_plain(each['what'])}**: {_plain(each['evidence'])} {_plain(each['advice'])}" for each in student.diagnosis]
        lines.append("")
    figures = [
        f"- {_plain(label)}: **{_plain(number)}** {_plain('; '.join(filter(None, under)))}" for label, number, under in student.figures
    ]
    return [*lines, *figures, ""]


def _blocks(those: list) -> list[str]:
    return [line for block in those for line in _RENDER[type(block)](block)]


def _table(table: blocks.Table) -> list[str]:
    side = "---:" if table.numbers else "---"
    head = f"| {' | '.join(map(_plain, table.columns))} |"
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
    return [f"*{_plain(table.caption)}*", "", head, f"| --- |{f' {side} |' * (len(table.columns) - 1)}", *rows, ""]


def _cell(cell: str | Cell) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(str(cell))
    return f"{_plain(cell.text)} ({_plain(cell.detail)})" if cell.detail else _plain(cell.text)


def _terms(terms: blocks.Terms) -> list[str]:
    return [*[f"- **{_plain(term)}**: {_plain(text)}" for term, text in terms.rows], ""]


def _folded(folded: blocks.Folded) -> list[str]:
    return [f"**{_plain(folded.summary)}**", "", *_blocks(folded.blocks)]


def _plots(plots: blocks.Plots) -> list[str]:
    """The plots are drawn in report.html; here stands what they say."""
    return [*[f"- **{_plain(plot.title)}**: {plain(plot.description)}" for plot in plots.plots], ""]


def _cases(cases: blocks.Cases) -> list[str]:
    shown = cases.cases[:CASES]
    lines = [f"{len(shown)} of {count(len(cases.cases), 'question')}, those on which the models differ most first.", ""]
    return [*lines, *[line for case in shown for line in _case(case)]]


def _case(case: blocks.Case) -> list[str]:
    lines = [f"#### {_plain(case.title)}", "", _text(case.question), "", "Reference:", "", _text(case.reference), ""]
    for answer in case.answers:
        mark = {True: ": ✓ correct", False: ": ✗ wrong", None: ""}[answer.right]
        lines += [f"**{_plain(answer.title)}{mark}**, {_plain(answer.facts)}", ""]
        lines += ["Reasoning:", "", _text(answer.reasoning), ""] if answer.reasoning else []
        lines += [_text(answer.final) if answer.final else "(no final answer)", ""]
    return lines


_RENDER = {
    blocks.Heading: lambda block: [f"### {_plain(block.text)}", ""],
    blocks.Prose: lambda block: [_plain(block.text), ""],
    blocks.Note: lambda block: [_plain(block.text), ""],
    blocks.Code: lambda block: [_text(block.text), ""],
    blocks.Table: _table,
    blocks.Terms: _terms,
    blocks.Folded: _folded,
    blocks.Plots: _plots,
    blocks.Cases: _cases,
}
