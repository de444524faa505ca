"""A sweep's results as a table in the terminal, Markdown and one page of HTML, and as a plot: pure functions of what sweep.json holds.

The page needs nothing else and runs nothing; names of models and errors are text in it, whatever they hold.
"""

import re
from html import escape
from io import StringIO
from pathlib import Path

from . import console, store
from .console import say, visible
from .errors import shortened
from .markdown import plain
from .plots import COLOURS, INK, STYLE
from .registry import with_interval
from .report_page import POLICY
from .sweep_plan import shown

LEGEND = "Shares are of all answers, with their 95% Wilson intervals; stopped: by themselves; seconds: of the training alone."


def varied(result: dict) -> list[str]:
    """The axes that have more than one value."""
    return [axis for axis, values in result["axes"].items() if len(values) > 1]


def columns(result: dict) -> list[str]:
    seeds = ["seed"] * (len({cell["seed"] for cell in result["cells"]}) > 1)
    return [*varied(result), *seeds, *(share.replace("_", " ") for share in shares(result)), "trained rows", "seconds"]


def shares(result: dict) -> list[str]:
    """The scores that are shown: whether an answer reasons is asked only where reasoning was."""
    may_reason = result["system"] == "system2" or "cot_sentence" in result["axes"]
    return ["exact_match", *(["reasoned"] if may_reason else []), "stopped"]


def rows(result: dict) -> list[list[str]]:
    """A row for each cell, under `columns`; a failed one has no scores."""
    table = []
    for cell in result["cells"]:
        named = [shown(cell["axes"][axis]) for axis in varied(result)] + [str(cell["seed"])] * ("seed" in columns(result))
        if cell["status"] == "done":
            scored = [with_interval(cell["scores"][name]) for name in shares(result)]
            table.append([*named, *scored, f"{cell['rows']:,}", f"{cell['train_seconds']:,.1f}"])
        else:
            table.append([*named, "failed", *["-"] * (len(columns(result)) - len(named) - 1)])
    return table


def failed_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """The cells that failed, and why."""
    failed = [cell for cell in result["cells"] if cell["status"] == "failed"]
    return ["cell", "error"], [[label(result, cell), visible(shortened(cell["error"], 500))] for cell in failed]


def family_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Exact match by family: the columns, and a row for each cell that was scored."""
    done = [cell for cell in result["cells"] if cell["status"] == "done"]
    families = list(dict.fromkeys(family for cell in done for family in cell["scores"]["families"]))
    table = [[label(result, cell), *(with_interval(cell["scores"]["families"][family]) for family in families)] for cell in done]
    return ["cell", *map(visible, families)], table


def seed_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Exact match over the seeds of each choice of the axes."""
    heads = [*varied(result), "seeds", "mean", "lowest", "highest"]
    table = [
        [
            *(shown(found["axes"][axis]) for axis in varied(result)),
            str(found["seeds"]),
            *(f"{found[name]:.3f}" for name in ("mean", "lowest", "highest")),
        ]
        for found in result["over_seeds"]
    ]
    return heads, table


def label(result: dict, cell: dict) -> str:
    """A cell in few words: the axes that have more than one value."""
    words = [f"{axis} {shown(cell['axes'][axis])}" for axis in varied(result)]
    return ", ".join([*words, *([f"seed {cell['seed']}"] if "seed" in columns(result) else [])])


def show(result: dict) -> None:
    """Print the table, and why cells failed."""
    asked = result["questions"]
    console.table(
        f"Sweep {result['name']}: {asked['rows']:,} held-out questions of {asked['source']}", columns(result), rows(result), "left"
    )
    for cell, error in failed_rows(result)[1]:
        say(f"{cell}: {error}")
    say(LEGEND)


def write(result: dict, folder: Path) -> dict:
    """Write sweep.json, .md, .html and .svg. Returns their paths by kind."""
    drawn = plot(result)
    texts = {"md": markdown(result), "html": html_page(result, drawn), "svg": drawn}
    places = {kind: folder / f"sweep.{kind}" for kind in ("json", *texts)}
    for kind, text in texts.items():
        with store.atomic_file(places[kind]) as file:
            file.write(text)
    store.write_json(places["json"], result)
    say(f"report: {store.shown(places['html'])}")
    return {kind: str(place) for kind, place in places.items()}


def _sections(result: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of the tables under the first."""
    sections = [
        ("Failed cells", *failed_rows(result)),
        ("Exact match over the seeds", *seed_rows(result)),
        ("Exact match by family", *family_rows(result)),
    ]
    return [section for section in sections if section[2]]


def _facts(result: dict) -> list[str]:
    asked, axes = result["questions"], result["axes"]
    design = "every combination" if result["design"] == "grid" else "one axis at a time from the first value of each"
    same = [f"{axis} {shown(values[0])}" for axis, values in axes.items() if axis not in varied(result)]
    settings = f"Training preset {result['preset']}" + (f", in every cell {', '.join(same)}" if same else "")
    facts = [result["note"], f"{asked['rows']:,} held-out questions of {asked['source']}; {design}. {settings}.", LEGEND]
    return [visible(fact) for fact in [*facts, f"Made {result['made']} by: {result['command']}"] if fact]


# Markdown


def markdown(result: dict) -> str:
    """The tables as Markdown, the plot beside it as sweep.svg."""
    lines = [f"# Sweep {plain(result['name'])}", "", *_markdown_table(columns(result), rows(result)), "", f"![{title(result)}](sweep.svg)"]
    for heading, heads, cells in _sections(result):
        lines += ["", f"## {heading}", "", *_markdown_table(heads, cells)]
    return "\n".join([*lines, "", *(f"- {plain(fact)}" for fact in _facts(result)), ""])


def _markdown_table(heads: list[str], cells: list[list[str]]) -> list[str]:
    lines = [[plain(head) for head in heads], ["---"] * len(heads), *([plain(cell) for cell in row] for row in cells)]
    return [f"| {' | '.join(line)} |" for line in lines]


# HTML


def html_page(result: dict, drawn: str) -> str:
    """The whole page, light or dark as the reader's system is; it may load nothing and run nothing."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>Sweep {escape(result['name'])}</title><style>body{{margin:0}}{_style()}</style>"
    )
    parts = [f"<h1>Sweep {escape(result['name'])}</h1>", _html_table("Every cell", columns(result), rows(result))]
    parts.append(f"<figure><figcaption>{escape(title(result))}</figcaption>{_inline(drawn, result)}</figure>")
    parts += [_html_table(*section) for section in _sections(result)]
    parts += [f'<p class="note">{escape(fact)}</p>' for fact in _facts(result)]
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main class="lab-report">{"".join(parts)}</main></body></html>\n'


def _style() -> str:
    """The report's own, so that both pages look alike."""
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _inline(drawn: str, result: dict) -> str:
    """The plot for the middle of the page, in the page's colours."""
    colour = COLOURS[result["system"]]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = drawn.replace(INK, "currentColor").replace(colour, f"var(--lab-{result['system']}, {colour})")
    return drawn.replace("<svg ", f'<svg class="plot" role="img" aria-label="{escape(title(result))}" ', 1)


def _html_table(caption: str, heads: list[str], cells: list[list[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(map(_html_row, cells))
    kind = "texts" if "error" in heads else "numbers"
    table = f'<table class="{kind}"><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    # focusable, so that the keyboard can scroll it
    return f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {escape(caption)}">{table}</div>'


def _html_row(row: list[str]) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


# The plot


def title(result: dict) -> str:
    return f"Exact match on {result['questions']['rows']:,} held-out questions, with 95% intervals"


def plot(result: dict) -> str:
    """A whole SVG: a line for each cell, its exact match with its interval; the same bytes for the same numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    done = [cell for cell in result["cells"] if cell["status"] == "done"]
    file = StringIO()
    with rc_context(STYLE | {"svg.hashsalt": result["name"]}):
        figure = Figure(figsize=(7, 1.2 + 0.3 * max(1, len(done))), layout="constrained")
        axes = figure.subplots()
        for place, cell in enumerate(done):
            share = cell["scores"]["exact_match"]
            low, high = share["ci"]
            reach = [[100 * max(0, share["value"] - low)], [100 * max(0, high - share["value"])]]
            axes.errorbar([100 * share["value"]], [place], xerr=reach, fmt="o", color=COLOURS[result["system"]], capsize=3)
        axes.set_yticks(range(len(done)), [label(result, cell) for cell in done])
        axes.set(xlim=(-2, 102), ylim=(len(done) - 0.5, -0.5), xlabel="Exact match, %")
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=unsaid | {"Title": title(result)})
    return file.getvalue()
