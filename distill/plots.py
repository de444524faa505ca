"""Plots of an evaluation as SVG: pure functions of numbers, the same bytes for the same numbers.

An SVG stands inline in a page. Its ink is the page's own text colour, its series take the page's `--lab-…` colours, so that one drawing
serves light and dark; markers and lines tell the series apart without colour. Its title and description say what it shows in numbers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import wraps
from html import escape
from io import StringIO

from .console import visible
from .intervals import wilson

SIZE_INCHES = (5.2, 3.5)  # 374 points: at 400 px of width a label is as large as the page's small print
LENGTH_BINS = 5
# what matplotlib draws with → what the page shows; the hex values are the light page's
INK = "#1b1f23"
COLOURS = {"teacher": "#59626e", "system1": "#1a5fb4", "system2": "#a8480b"}
MARKERS = {"teacher": "D", "system1": "o", "system2": "s"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lab",
    "text.parse_math": False,
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Plot:
    """A drawing with its words: `description` says in numbers what `svg` shows."""

    name: str
    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class Series:
    """One model's points: `kind` is "teacher", "system1" or "system2" and gives colour and marker."""

    kind: str
    label: str
    points: list


def _styled(draw):
    """Draw with STYLE over matplotlib's defaults, whatever style the process around has chosen."""

    @wraps(draw)
    def styled(*args):
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args)

    return styled


@_styled
def loss(series: list[Series]) -> Plot:
    """Training (a line) and validation loss (dashed, hollow markers) over the steps.

    series  points is {"training": [[step, loss]], "validation": [[step, loss]]}, nats a token
    """
    figure, axes = _figure("Step", "Loss, nats a token (log)")
    axes.set_yscale("log")
    said = []
    for each in series:
        colour, marker = COLOURS[each.kind], MARKERS[each.kind]
        for part, looks in (("training", {"alpha": 0.85}), ("validation", {"ls": "--", "marker": marker, "mfc": "none"})):
            if points := each.points[part]:
                axes.plot(*zip(*points, strict=True), color=colour, label=f"{each.label}, {part}", **looks)
                (first, start), (last, end) = points[0], points[-1]
                said.append(f"{each.label}, {part}: {start:.3g} at step {first} to {end:.3g} at step {last}")
    _plain_ticks(axes.yaxis)
    axes.legend()
    return _plot("loss", "Loss over training", said, figure)


@_styled
def quality_speed(series: list[Series], metric: str) -> Plot:
    """Quality against speed, a point a model with both its intervals, and a line from each teacher to its student.

    series  of a system; points is [(label, speed, quality)], the student's last, each an interval {"value", "n", "ci"}
    """
    figure, axes = _figure("Tokens/s, one answer at a time", f"{metric}, %")
    said = []
    for each in series:
        *teachers, student = [(name, speed["value"], 100 * quality["value"]) for name, speed, quality in each.points]
        for _, speed, quality in teachers:
            axes.plot([speed, student[1]], [quality, student[2]], color=COLOURS[each.kind], lw=0.8, ls=":")
        for point in each.points:
            _cross(axes, each, point, filled=point is each.points[-1])
        said += [f"{each.label}, {name}: {speed:.3g} tokens/s, {quality:.1f}%" for name, speed, quality in [*teachers, student]]
    axes.margins(x=0.1, y=0.25)
    axes.set_xlim(left=0)
    axes.set_ylim(top=min(101.5, axes.get_ylim()[1]))
    _name_teachers(axes, series)
    axes.legend(title="hollow: teacher, filled: student", alignment="left", loc="lower left")
    return _plot("quality-speed", "Quality against speed", said, figure)


@_styled
def length_correctness(series: list[Series]) -> Plot:
    """Share of right answers by how long they are, with Wilson intervals; shorter to longer in groups of about the same size.

    series  points is [(tokens of the whole answer, whether it is right)]
    """
    figure, axes = _figure("Length of the answer with its reasoning, tokens", "Right, %")
    said = []
    for each in series:
        bins = length_bins(each.points)
        shares = [wilson(part["right"], part["n"]) for part in bins]
        _with_bars(axes, each, [part["mean"] for part in bins], shares)
        parts = "; ".join(f"{part['low']}–{part['high']} tokens {part['right']} of {part['n']}" for part in bins)
        said.append(f"{each.label}: {parts}")
    axes.set_ylim(-3, 103)
    axes.legend()
    return _plot("length", "Length of reasoning against correctness", said, figure)


def length_bins(points: Iterable[tuple[int, bool]], bins: int = LENGTH_BINS) -> list[dict]:
    """Answers by length, in at most `bins` groups of about the same size; equal lengths stay together.

    Returns [{"low", "high", "mean", "n", "right"}], tokens but for the counts.
    """
    ordered = sorted(points)
    groups: list[list] = [[]]
    for point in ordered:
        full = len(groups[-1]) >= len(ordered) / bins
        if full and point[0] != groups[-1][-1][0]:
            groups.append([])
        groups[-1].append(point)
    return [
        {
            "low": group[0][0],
            "high": group[-1][0],
            "mean": sum(tokens for tokens, _ in group) / len(group),
            "n": len(group),
            "right": sum(right for _, right in group),
        }
        for group in groups
        if group
    ]


@_styled
def reliability(name: str, title: str, series: list[Series]) -> Plot:
    """How often answers are right against how sure the model was; on the diagonal, it was as sure as it should be.

    series  points is a calibration's bins [{"low", "high", "n", "confidence", "accuracy"}]
    """
    figure, axes = _figure("Probability that the model gave its answer, %", "Right, %")
    axes.plot([0, 100], [0, 100], color=INK, lw=0.8, ls=":", label="perfect")
    said = []
    for each in series:
        shares = [wilson(round(part["accuracy"] * part["n"]), part["n"]) for part in each.points]
        _with_bars(axes, each, [100 * part["confidence"] for part in each.points], shares)
        parts = "; ".join(f"sure {part['confidence']:.0%}, right {part['accuracy']:.0%} of {part['n']}" for part in each.points)
        said.append(f"{each.label}: {parts}")
    axes.set(xlim=(-3, 103), ylim=(-3, 103))
    axes.legend(loc="best")
    return _plot(name, title, said, figure)


@_styled
def levels(joint: list[list[int]]) -> Plot:
    """A heat map of how many training rows have which reasoning verbosity (RV) and cognitive difficulty (CD).

    joint  [[rv, cd, count]], levels 0 to 9
    """
    figure, axes = _figure("CD, cognitive difficulty", "RV, reasoning verbosity")
    most = max(count for _, _, count in joint)
    for rv, cd, count in joint:
        # the strongest stays pale enough for the page's ink on it
        axes.fill_between([cd - 0.48, cd + 0.48], rv - 0.48, rv + 0.48, color=COLOURS["system2"], alpha=0.06 + 0.44 * count / most, lw=0)
        axes.annotate(f"{count:,}", (cd, rv), ha="center", va="center", fontsize=9)
    highest = [max(row[place] for row in joint) for place in (1, 0)]
    axes.set(xticks=range(highest[0] + 1), yticks=range(highest[1] + 1), xlim=(-0.6, highest[0] + 0.6), ylim=(-0.6, highest[1] + 0.6))
    axes.grid(visible=False)
    said = [f"RV {rv}, CD {cd}: {_count(count)}" for rv, cd, count in sorted(joint, key=lambda row: -row[2])]
    return _plot("levels", "RV and CD of the rows that were kept", said, figure)


def _count(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


# Drawing


def _figure(across: str, up: str):
    """A figure without pyplot, which would keep it and touch the kernel's own settings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.set(xlabel=across, ylabel=up)
    return figure, axes


def _bars(share: dict, scale: float = 1.0) -> list[list[float]]:
    """What matplotlib wants of an interval: how far it reaches below and above the value."""
    low, high = share["ci"] or (share["value"], share["value"])
    return [[max(0.0, scale * (share["value"] - low))], [max(0.0, scale * (high - share["value"]))]]


def _with_bars(axes, each: Series, across: list[float], shares: list[dict]) -> None:
    bars = [[_bars(share, 100)[side][0] for share in shares] for side in (0, 1)]
    looks = {"color": COLOURS[each.kind], "marker": MARKERS[each.kind], "ls": "--" if each.kind == "teacher" else "-"}
    axes.errorbar(across, [100 * share["value"] for share in shares], yerr=bars, elinewidth=1, label=each.label, **looks)


def _cross(axes, each: Series, point: tuple, filled: bool) -> None:
    """A point with both its intervals; the filled one stands for its series in the legend."""
    _, speed, quality = point
    colour = COLOURS[each.kind]
    looks = {"color": colour, "marker": MARKERS[each.kind], "mfc": colour if filled else "none", "elinewidth": 1.2, "markersize": 8}
    looks |= {"ls": "", "label": each.label if filled else "_"}
    axes.errorbar([speed["value"]], [100 * quality["value"]], xerr=_bars(speed), yerr=_bars(quality, 100), **looks)


def _name_teachers(axes, series: list[Series]) -> None:
    """Each form of the teacher by name, once, over the highest of its points."""
    highest: dict = {}
    for each in series:
        for name, speed, quality in each.points[:-1]:
            highest[name, speed["value"]] = max(100 * quality["value"], highest.get((name, speed["value"]), 0))
    for (name, speed), quality in highest.items():
        axes.annotate(name, (speed, quality), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9)


def _plain_ticks(axis) -> None:
    """Numbers as one writes them, on a logarithmic axis too, and only as many as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# SVG


def _plot(name: str, title: str, said: list[str], figure) -> Plot:
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    description = visible(". ".join(said))
    return Plot(name, title, description, _inline(file.getvalue(), name, title, description))


def _inline(drawn: str, name: str, title: str, description: str) -> str:
    """A drawing for the middle of a page: its ids its own, its colours the page's, its words for those who do not see it."""
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn))
    drawn = re.sub(r' id="([^"]*)"', lambda found: f' id="lab-{name}-{found[1]}"' if found[1] in used else "", drawn)
    drawn = re.sub(r'(href="#|url\(#)', rf"\1lab-{name}-", drawn)
    drawn = re.sub(r"<style.*?</style>| font-family: [^;]*;|(?<=>)\s+(?=<)", "", drawn, flags=re.DOTALL)
    drawn = re.sub("<[^>]+>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0]), drawn)
    drawn = drawn.replace(INK, "currentColor")
    for kind, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--lab-{kind}, {colour})")
    box = re.search(r'viewBox="[^"]*"', drawn)[0]
    opened = f'<svg class="plot" role="img" fill="currentColor" stroke-linejoin="round" {box} xmlns:xlink="http://www.w3.org/1999/xlink">'
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return opened + words + drawn[drawn.index(">") + 1 :].strip()
