"""An evaluation's report as HTML: a fragment that needs nothing else, and a whole page that may load nothing and run nothing.

Every text goes through `_words`: it is shown as the letters that it consists of, whatever it would like to be.
"""

import re
from functools import cache
from html import escape
from pathlib import Path

from . import report_blocks as blocks
from .console import visible
from .report_content import sections
from .report_top import top
from .report_words import Cell, count, cut, verdict

CASES = 20
CASES_OPEN = 4
TEXT_CHARACTERS = 4_000
CELL_CHARACTERS = 400
SCROLLED_CHARACTERS = 600
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(facts: dict) -> str:
    """The report of an evaluation (`report.json`'s dict) as a page that stands alone."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{_words(facts['title'], CELL_CHARACTERS)}</title><style>body{{margin:0}}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>{fragment(facts)}</main></body></html>\n'


def fragment(facts: dict) -> str:
    """The report for the middle of another page, such as a notebook: it brings its own colours and touches nothing around it."""
    parts = sections(facts)
    shown = [_top(top(facts)), _contents(parts), *map(_section, parts)]
    return f'<article class="lab-report" lang="en" dir="ltr"><style>{_style()}</style>{"".join(shown)}</article>'


@cache
def _style() -> str:
    text = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/|\n\s*", "", text)


def _words(text: str, characters: int = TEXT_CHARACTERS) -> str:
    """A text from anywhere, for the middle of a page: cut, its control characters made visible, nothing in it markup."""
    return escape(visible(cut(str(text), characters)))


# The top


def _top(first: blocks.Top) -> str:
    lines = f'<p class="kicker">{_words(first.kicker)}</p><h1>{_words(first.title, CELL_CHARACTERS)}</h1>'
    targets = f'<section class="targets"><h2>{_words(first.verdict)}</h2>{_table(first.targets)}</section>' if first.targets else ""
    return f'<header>{lines}<p class="lede">{_words(first.lede)}</p></header>{"".join(map(_student, first.students))}{targets}'


def _student(student: blocks.Student) -> str:
    figures = "".join(
        f'<div><dt>{_words(label)}</dt><dd class="number{" first" if not place else ""}">{_words(number)}</dd>'
        f'<dd class="detail">{"<br>".join(_words(line, CELL_CHARACTERS) for line in lines if line)}</dd></div>'
        for place, (label, number, lines) in enumerate(student.figures)
    )
    head = f"<h2>{_words(student.title)} <small>{_words(student.name, CELL_CHARACTERS)}</small></h2>"
    return f'<section class="student {student.mode}">{head}{_alarm(student)}<dl class="figures">{figures}</dl></section>'


def _alarm(student: blocks.Student) -> str:
    """What is wrong with a broken student, before its figures."""
    if not student.diagnosis:
        return ""
    found = "".join(
        f"<li><strong>{_words(each['what'])}</strong> {_words(each['evidence'])} {_words(each['advice'])}</li>"
        for each in student.diagnosis
    )
    return f'<div class="alarm"><h3>✗ This student is broken: {count(len(student.diagnosis), "fault")}</h3><ul>{found}</ul></div>'


def _contents(sections: list[blocks.Section]) -> str:
    links = "".join(f'<li><a href="#lab-{each.key}">{_words(each.title)}</a></li>' for each in sections)
    return f'<nav aria-label="Contents of the report"><ol>{links}</ol></nav>'


# Blocks


def _section(section: blocks.Section) -> str:
    return f'<section class="part"><h2 id="lab-{section.key}">{_words(section.title)}</h2>{_blocks(section.blocks)}</section>'


def _blocks(those: list) -> str:
    return "".join(_RENDER[type(block)](block) for block in those)


def _table(table: blocks.Table) -> str:
    heads = "".join(f'<th scope="col">{_words(column, CELL_CHARACTERS)}</th>' for column in table.columns)
    rows = "".join(f"<tr>{''.join(_cell(cell, not place, table.numbers) for place, cell in enumerate(row))}</tr>" for row in table.rows)
    kind = "numbers" if table.numbers else "texts"
    shown = f'<table class="{kind}"><caption>{_words(table.caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    # focusable, so that the keyboard can scroll it
    return f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {_words(table.caption)}">{shown}</div>'


def _cell(cell: str | Cell, head: bool, number: bool) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(str(cell))
    looks = ' scope="row"' if head else "" if number else ' dir="auto"'
    looks += _VERDICTS.get(cell.text, "")
    detail = f"<small>{_words(cell.detail, CELL_CHARACTERS)}</small>" if cell.detail else ""
    tag = "th" if head else "td"
    return f"<{tag}{looks}>{_words(cell.text, CELL_CHARACTERS)}{detail}{_range(cell.bar)}</{tag}>"


_VERDICTS = {verdict(True): ' class="met"', verdict(False): ' class="missed"'}


def _range(bar: tuple | None) -> str:
    """An interval drawn from 0 to 100%, for the eye alone: the numbers stand above it."""
    if bar is None:
        return ""
    low, value, high = (100 * end for end in bar)
    line = f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i><b style="left:{value:.1f}%"></b>'
    return f'<span class="range" aria-hidden="true">{line}</span>'


def _terms(terms: blocks.Terms) -> str:
    rows = "".join(
        f'<dt>{_words(term, CELL_CHARACTERS)}</dt><dd dir="auto">{_words(text, CELL_CHARACTERS)}</dd>' for term, text in terms.rows
    )
    return f'<dl class="terms">{rows}</dl>'


def _folded(folded: blocks.Folded) -> str:
    return f"<details><summary>{_words(folded.summary)}</summary>{_blocks(folded.blocks)}</details>"


def _plots(plots: blocks.Plots) -> str:
    figures = "".join(
        f"<figure><figcaption>{_words(plot.title)}</figcaption>{plot.svg}"
        f"<details><summary>In numbers</summary><p>{_words(plot.description)}</p></details></figure>"
        for plot in plots.plots
    )
    return f'<div class="plots">{figures}</div>'


# Answers side by side


def _cases(cases: blocks.Cases) -> str:
    shown = [_case(case) for case in cases.cases[:CASES]]
    more = "".join(shown[CASES_OPEN:])
    folded = f"<details><summary>{count(len(shown) - CASES_OPEN, 'more case')}</summary>{more}</details>" if more else ""
    total = f"{len(shown)} of {count(len(cases.cases), 'question')}, those on which the models differ most first; all stand in report.json."
    return f'<p class="note">{_words(total)}</p>{"".join(shown[:CASES_OPEN])}{folded}'


def _case(case: blocks.Case) -> str:
    answers = "".join(map(_answer, case.answers))
    reference = f'<div class="reference"><span>Reference</span>{_text(case.reference, "")}</div>'
    head = f"<h4>{_words(case.title, CELL_CHARACTERS)}</h4>{_text(case.question, 'question')}{reference}"
    return f'<div class="case">{head}<div class="answers">{answers}</div></div>'


def _answer(answer: blocks.Answer) -> str:
    kind, mark = {True: ("met", "✓ correct"), False: ("missed", "✗ wrong"), None: ("unknown", "")}[answer.right]
    head = f'<h5>{_words(answer.title)} <span class="{kind}">{mark}</span></h5><p>{_words(answer.facts)}</p>'
    thought = ""
    if answer.reasoning:
        size = count(len(answer.reasoning), "character")
        thought = f"<details><summary>Reasoning, {size}</summary>{_text(answer.reasoning, 'reasoning')}</details>"
    final = _text(answer.final, "final") if answer.final else "<p>(no final answer)</p>"
    return f'<div class="answer {kind}-by">{head}{thought}{final}</div>'


def _text(text: str, kind: str) -> str:
    """A block whose direction follows its own letters and touches nothing around it; a long one scrolls, by the keyboard too."""
    long = f' role="group" tabindex="0" aria-label="Text, {count(len(text), "character")}"' if len(text) > SCROLLED_CHARACTERS else ""
    return f'<div class="text {kind}{" long" * bool(long)}" dir="auto"{long}>{_words(text)}</div>'


_RENDER = {
    blocks.Heading: lambda block: f"<h3>{_words(block.text)}</h3>",
    blocks.Prose: lambda block: f"<p>{_words(block.text)}</p>",
    blocks.Note: lambda block: f'<p class="note">{_words(block.text)}</p>',
    blocks.Code: lambda block: f"<pre><code>{_words(block.text)}</code></pre>",
    blocks.Table: _table,
    blocks.Terms: _terms,
    blocks.Folded: _folded,
    blocks.Plots: _plots,
    blocks.Cases: _cases,
}
