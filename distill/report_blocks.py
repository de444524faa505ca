"""What a report consists of: plain blocks that hold texts as they came, for pages (HTML, Markdown, terminal) to show."""

from dataclasses import dataclass

from .plots import Plot
from .report_words import Cell


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Prose:
    text: str


@dataclass(frozen=True)
class Note:
    """Small print: under what condition a number was measured."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are texts or `Cell`s; the first of a row is its head. `numbers`: the others are aligned as numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str | Cell]]
    numbers: bool = True


@dataclass(frozen=True)
class Terms:
    """Pairs of a term and what belongs to it."""

    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Folded:
    summary: str
    blocks: list


@dataclass(frozen=True)
class Answer:
    title: str
    right: bool | None  # None where answers are not right or wrong, but near or far
    facts: str
    reasoning: str
    final: str


@dataclass(frozen=True)
class Case:
    title: str
    question: str
    reference: str
    answers: list[Answer]


@dataclass(frozen=True)
class Cases:
    """Answers side by side, most different first; a page shows as many as it has room for and says so."""

    of: str
    cases: list[Case]


@dataclass(frozen=True)
class Plots:
    plots: list[Plot]


@dataclass(frozen=True)
class Section:
    """`key` is its anchor."""

    key: str
    title: str
    blocks: list


@dataclass(frozen=True)
class Student:
    """A student's row of figures; `figures` are (label, number, lines under it), `diagnosis` what is wrong with it."""

    mode: str
    title: str
    name: str
    figures: list[tuple[str, str, list[str]]]
    diagnosis: list[dict]


@dataclass(frozen=True)
class Top:
    """What a reader sees in ten seconds."""

    kicker: str
    title: str
    lede: str
    students: list[Student]
    verdict: str
    targets: Table | None
