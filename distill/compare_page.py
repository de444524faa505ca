"""A comparison as Markdown, HTML and terminal text: pure functions of `Comparison.to_dict()`.

Prompts and answers are hostile text. Whatever the page, they are shown as the letters they consist of: escaped, fenced, never taken for
markup, and with control characters and overrides of the writing direction replaced by signs that one sees (`visible`).
"""

import re
from html import escape

from rich.box import HORIZONTALS, SIMPLE_HEAD
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .console import visible
from .markdown import fenced, plain
from .students import TITLES as STUDENTS

TITLES = {"teacher": "Teacher", **STUDENTS}
MODE_TITLES = {"system1": "System 1, asked for the answer at once", "system2": "System 2, asked to reason first"}
SUMMARY = ("model", "parameters", "stopped", "tokens", "tokens/s", "seconds")
NOTE = (
    "stopped: answers that ended by themselves. tokens, seconds: mean of an answer. tokens/s: one answer's pace in its batch; "
    "seconds count from the start of the batch."
)
SIDE_BY_SIDE_CELLS = 120
REASONING_LINES = 8


# What all pages show


def headline(facts: dict) -> str:
    """How many prompts and models, in words."""
    return f"Comparison of {_count(len(facts['columns']), 'model')} on {_count(len(facts['prompts']), 'prompt')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def summary_rows(facts: dict) -> list[list[str]]:
    """A row for each model, under SUMMARY: means over its answers."""
    return [
        _summary_row(column, [answer for answer in facts["answers"] if answer["role"] == column["role"]]) for column in facts["columns"]
    ]


def _summary_row(column: dict, answers: list[dict]) -> list[str]:
    count = len(answers)
    tokens, seconds = (sum(answer[key] for answer in answers) for key in ("tokens", "seconds"))
    stopped = sum(answer["stopped"] for answer in answers)
    pace = f"{tokens / seconds:,.1f}" if seconds else "-"
    parameters = f"{column['parameters'] / 1e6:,.1f} M"
    return [visible(column["name"]), parameters, f"{stopped}/{count}", f"{tokens / count:,.1f}", pace, f"{seconds / count:.2f}"]


def _model_line(column: dict) -> str:
    """Where a model came from and how it was held in memory."""
    bits = f"{column['bits']} bits" if column["bits"] else "as it was given"
    loaded = f", loaded in {column['load_seconds']:.1f} s" if column["load_seconds"] is not None else ""
    size = f"{column['weight_bytes'] / 2**20:,.1f} MiB of weights, {bits}, on {column['device']}{loaded}"
    return visible(f"{column['name']}: {column['path']} ({size}, answers of at most {column['max_new_tokens']:,} tokens)")


def _missing_lines(facts: dict) -> list[str]:
    return [f"{TITLES[role]}, left out: {_brief(message)}" for role, message in facts["missing"].items()]


def _brief(message: str) -> str:
    """A message without the log that may stand in its middle; JSON keeps it whole."""
    lines = visible(message).split("\n")
    return "\n".join(lines if len(lines) < 4 else [lines[0], "  …", lines[-1]])


def _made_line(facts: dict) -> str:
    by_model = [", ".join(f"{name} {version}" for name, version in column["versions"].items()) for column in facts["columns"]]
    return visible(f"Made {facts['made']} with {'; '.join(dict.fromkeys(by_model))}.")


def _sections(facts: dict) -> list[tuple[str, str, list[dict]]]:
    """(title, prompt, answers side by side) for each prompt and mode in which anybody answered."""
    sections = []
    for number, asked in enumerate(facts["prompts"]):
        for mode in asked["modes"]:
            answers = [answer for answer in facts["answers"] if (answer["prompt"], answer["mode"]) == (number, mode)]
            if answers:
                sections.append((f"Prompt {number + 1} · {MODE_TITLES[mode]}", visible(asked["prompt"]), answers))
    return sections


def _answer_line(answer: dict) -> str:
    """An answer's measures in one line."""
    pace = f"{answer['tokens_per_second']:,.1f} tokens/s" if answer["tokens_per_second"] is not None else "no pace"
    end = "stopped by itself" if answer["stopped"] else "cut off at its limit"
    return f"{_count(answer['tokens'], 'token')} · {answer['seconds']:.2f} s · {pace} · {end}"


def _final(answer: dict) -> tuple[str, bool]:
    """What to show as the answer, and whether it is the model's own words rather than a remark of ours."""
    if answer["final"]:
        return visible(answer["final"]), True
    return ("no answer: the reasoning was cut off" if answer["reasoning"] and not answer["stopped"] else "empty answer"), False


def _reasoning_size(answer: dict) -> str:
    return f"Reasoning, {_count(len(answer['reasoning']), 'character')}"


# Markdown


def markdown(facts: dict) -> str:
    """The whole comparison as Markdown; texts stand in fences longer than any run of backticks in them."""
    lines = [f"# {headline(facts)}", "", f"| {' | '.join(SUMMARY)} |", f"| --- |{' ---: |' * (len(SUMMARY) - 1)}"]
    lines += [f"| {' | '.join(map(plain, row))} |" for row in summary_rows(facts)]
    lines += ["", NOTE, ""]
    lines += [f"- {plain(_model_line(column))}" for column in facts["columns"]]
    for role, message in facts["missing"].items():
        lines += ["", f"{TITLES[role]}, left out:", "", fenced(_brief(message))]
    for title, text, answers in _sections(facts):
        lines += ["", f"## {title}", "", fenced(text)]
        for answer in answers:
            lines += ["", f"### {TITLES[answer['role']]}", "", _answer_line(answer), "", *_markdown_answer(answer)]
    return "\n".join([*lines, "", plain(_made_line(facts)), ""])


def _markdown_answer(answer: dict) -> list[str]:
    reasoning = [f"{_reasoning_size(answer)}:", "", fenced(visible(answer["reasoning"])), ""] if answer["reasoning"] else []
    text, own = _final(answer)
    return [*reasoning, fenced(text) if own else f"*({text})*"]


# HTML


def html(facts: dict) -> str:
    """The comparison as an HTML fragment that needs nothing else: it takes the colours of the page it stands in."""
    summary = _html_row("th", SUMMARY) + "".join(_html_row("td", row) for row in summary_rows(facts))
    models = "".join(f"<li>{escape(line)}</li>" for line in map(_model_line, facts["columns"]))
    models += "".join(f'<li class="missing">{escape(line)}</li>' for line in _missing_lines(facts))
    parts = [
        f"<h2>{escape(headline(facts))}</h2>",
        f'<table class="summary">{summary}</table>',
        f"<p>{escape(NOTE)}</p>",
        f"<ul>{models}</ul>",
    ]
    parts += [_html_section(*section) for section in _sections(facts)]
    parts.append(f"<p>{escape(_made_line(facts))}</p>")
    return f'<div class="lab-comparison"><style>{_STYLE}</style>{"".join(parts)}</div>'


def html_page(facts: dict) -> str:
    """The fragment as a whole page, light or dark as the reader's system is; it may load nothing and run nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(headline(facts))}</title>'
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{html(facts)}</body></html>\n'


def _html_row(tag: str, cells) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _html_section(title: str, text: str, answers: list[dict]) -> str:
    heads = "".join(f"<th>{escape(TITLES[answer['role']])}</th>" for answer in answers)
    cells = "".join(f"<td>{_html_answer(answer)}</td>" for answer in answers)
    table = f'<table class="answers"><tr>{heads}</tr><tr>{cells}</tr></table>'
    return f"<h3>{escape(title)}</h3>{_html_text(text, 'prompt')}{table}"


def _html_answer(answer: dict) -> str:
    reasoning = ""
    if answer["reasoning"]:
        thought = _html_text(visible(answer["reasoning"]), "reasoning")
        reasoning = f"<details><summary>{escape(_reasoning_size(answer))}</summary>{thought}</details>"
    text, own = _final(answer)
    shown = _html_text(text, "final") if own else f"<p><em>({escape(text)})</em></p>"
    end = "" if answer["stopped"] else " cut"
    return f'<div class="measures{end}">{escape(_answer_line(answer))}</div>{reasoning}{shown}'


def _html_text(text: str, kind: str) -> str:
    """A block whose direction follows its own first letters and touches nothing around it."""
    return f'<div class="text {kind}" dir="auto">{escape(text)}</div>'


# every rule under the fragment's own class, so that the notebook around it keeps its looks
_STYLE = re.sub(
    r"\n\s*",
    "",
    """
    .lab-comparison {color: inherit; font: 14px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 0 .5rem;}
    .lab-comparison h2 {font-size: 1.4em; margin: .8em 0 .4em;}
    .lab-comparison h3 {font-size: 1.1em; margin: 2em 0 .5em;}
    .lab-comparison p, .lab-comparison li, .lab-comparison .measures, .lab-comparison summary {font-size: .9em;}
    .lab-comparison .measures, .lab-comparison .reasoning {opacity: .75;}
    .lab-comparison ul {padding-left: 1.2em; overflow-wrap: anywhere;}
    .lab-comparison .missing {white-space: pre-wrap; font-weight: 600;}
    .lab-comparison table {border-collapse: collapse; width: 100%; margin: .5em 0; font-size: inherit; color: inherit;}
    .lab-comparison th, .lab-comparison td {border: 1px solid rgba(127, 127, 127, .4); padding: .4em .6em; background: none;}
    .lab-comparison .summary {width: auto;}
    .lab-comparison .summary th, .lab-comparison .summary td {text-align: right;}
    .lab-comparison .summary th:first-child, .lab-comparison .summary td:first-child {text-align: left;}
    .lab-comparison .answers {table-layout: fixed;}
    .lab-comparison .answers th, .lab-comparison .answers td {text-align: left; vertical-align: top; overflow-wrap: anywhere;}
    .lab-comparison .text {white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; text-align: start; margin-top: .4em;}
    .lab-comparison .prompt {border-inline-start: 3px solid rgba(127, 127, 127, .6); padding-inline-start: .7em;}
    .lab-comparison .reasoning {font-size: .92em;}
    .lab-comparison .cut {font-weight: 600; opacity: 1;}
    .lab-comparison summary {cursor: pointer;}
    """,
)


# Terminal


def terminal(facts: dict, width: int) -> Group:
    """The comparison for a terminal of `width` cells: answers side by side from SIDE_BY_SIDE_CELLS on, else one below the other."""
    summary = Table(title=headline(facts), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(SUMMARY):
        summary.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in summary_rows(facts):
        summary.add_row(*[_words(cell) for cell in row])
    parts = [summary, _words(NOTE, "dim"), Text()]
    parts += [_words(line) for line in map(_model_line, facts["columns"])] + [_words(line, "bold") for line in _missing_lines(facts)]
    for title, text, answers in _sections(facts):
        parts += [Text(), _words(title, "bold reverse"), _words(text)]
        parts.append(_answer_panels(answers, width))
    return Group(*parts)


def _answer_panels(answers: list[dict], width: int):
    if width < SIDE_BY_SIDE_CELLS or len(answers) == 1:
        return Group(*[_answer_panel(answer, width) for answer in answers])
    each = (width - 2 * (len(answers) - 1)) // len(answers)
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in answers:
        grid.add_column(width=each)
    grid.add_row(*[_answer_panel(answer, each) for answer in answers])
    return grid


def _answer_panel(answer: dict, width: int) -> Panel:
    """Rules above and below, none at the sides: a terminal that turns right-to-left text around would move those."""
    parts = [_words(_answer_line(answer), "" if answer["stopped"] else "bold")]
    if answer["reasoning"]:
        parts += [_words(f"{_reasoning_size(answer)}:", "dim italic"), _cut_reasoning(answer, width), _words("Answer:", "dim italic")]
    text, own = _final(answer)
    parts.append(_words(text) if own else _words(f"({text})", "italic"))
    return Panel(Group(*parts), box=HORIZONTALS, title=_words(TITLES[answer["role"]], "bold"), title_align="left", padding=0, width=width)


def _cut_reasoning(answer: dict, width: int) -> Text:
    """The first lines of the reasoning as this width wraps them, and how many follow."""
    lines = _words(visible(answer["reasoning"]), "dim").wrap(Console(width=width), width, tab_size=8)
    shown = Text("\n").join(lines[:REASONING_LINES])
    if len(lines) > REASONING_LINES:
        shown.append(f"\n… {_count(len(lines) - REASONING_LINES, 'more line')} of reasoning", "dim italic")
    return shown


def _words(text: str, style: str = "") -> Text:
    """Text in which no bracket is markup, and whose longest words are folded."""
    return Text(text, style, overflow="fold")
