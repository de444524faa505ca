"""How an evaluation's numbers are written, and what its measures mean: the one place for both, whatever the page."""

from dataclasses import dataclass
from pathlib import Path

NOT_MEASURED = "–"
SYSTEM_TITLES = {"system1": "System 1", "system2": "System 2"}


@dataclass(frozen=True)
class Cell:
    """A number with what belongs under it; `bar` is (low, value, high), shares of 1, where a page can draw the interval."""

    text: str
    detail: str = ""
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Metric:
    """A measure: its name, how its numbers are written ("share", "points" or "number"), and its meaning in plain words."""

    name: str
    kind: str
    meaning: str


METRICS = {
    "exact_match": Metric("exact match", "share", "answers whose final answer is, letter for letter, the reference"),
    "math_verified": Metric("verified math", "share", "answers that math-verify finds equal to the reference as mathematics: 0.5 is 1/2"),
    "token_f1": Metric("token F1", "share", "how far the words of answer and reference are the same, in any order (SQuAD's measure)"),
    "rouge_l": Metric("ROUGE-L", "share", "how long a sequence of words answer and reference share, in order (rouge-score, F-measure)"),
    "bleu": Metric("BLEU", "points", "how many runs of one to four words of all answers stand in the references, 0 to 100 (sacrebleu)"),
    "agreement": Metric(
        "next token as the teacher's", "share", "positions of the references at which the model's likeliest next token is the teacher's"
    ),
    "perplexity": Metric(
        "perplexity", "number", "how many tokens the model wavers between while it reads the references; 1 is certainty, lower is better"
    ),
    "calibration": Metric(
        "calibration error", "share", "mean gap between how sure a model is of an answer and how often it is right (ECE), lower is better"
    ),
    "reasoned": Metric("reasons first", "share", "answers with a whole thought before what they say in the end"),
    "stopped": Metric("stops by itself", "share", "answers that end with the end-of-turn token instead of at the limit of tokens"),
    "repeating": Metric("repeats itself", "share", "answers of which more than half of the 4-grams stood in them before, lower is better"),
    "empty": Metric("empty answers", "share", "answers without a final answer, lower is better"),
    "tokens": Metric("length, tokens", "number", "mean length of an answer with its reasoning"),
}

OTHER_TERMS = {
    "kept": "the student's mean over the teacher's on the same questions; the interval resamples questions, in pairs",
    "95% interval": (
        "where the true value plausibly lies: Wilson's for shares of yes and no, by bootstrap over questions for means, differences "
        "and ratios. It covers the choice of questions, not the luck of one training"
    ),
    "p": "how often a difference this large would come of chance alone, were there none; McNemar's exact test for before against after",
    "p50, p95": "half, and 95 in 100, of the measured answers took at most this long",
    "first token": "time from the question to the first token of the answer",
    "RV, CD": "OmniThought's levels of a trace, 0 to 9: reasoning verbosity, and cognitive difficulty",
}

# How a kind of number is written: factor, decimals (None: by size), sign behind it
_KINDS = {"share": (100, 1, "%"), "points": (1, 1, ""), "number": (1, None, ""), "seconds": (1, None, " s"), "times": (1, 2, " ×")}


def measured(value: dict | None, kind: str, *, drawn: bool = False) -> Cell:
    """An interval {"value", "n", "ci"} as a cell: the number, and its interval under it."""
    if value is None or value["value"] is None:
        return Cell(NOT_MEASURED)
    factor, decimals, unit = _KINDS[kind]
    low_high = value.get("ci")
    bar = (low_high[0], value["value"], low_high[1]) if drawn and low_high else None
    return Cell(written(value["value"], kind), span(low_high, factor, _decimals(factor * value["value"], decimals)), bar)


def written(value: float, kind: str) -> str:
    """One number with its unit."""
    factor, decimals, unit = _KINDS[kind]
    return f"{_fixed(factor * value, _decimals(factor * value, decimals))}{unit}"


def span(low_high: list | None, factor: float = 1, decimals: int = 1) -> str:
    """An interval as `97.4–99.7`, or `−1.2 to 0.3` where a sign would be mistaken; empty where there is none."""
    if low_high is None:
        return ""
    low, high = (_fixed(factor * end, decimals) for end in low_high)
    return f"{low} to {high}" if "−" in low else f"{low}–{high}"


def difference(value: dict, kind: str) -> Cell:
    """A paired difference {"value", "ci", "p"}, in points of 100 for shares."""
    if value["value"] is None:
        return Cell(NOT_MEASURED)
    factor, decimals, _ = _KINDS[kind]
    decimals = _decimals(factor * value["value"], decimals)
    number = _fixed(factor * value["value"], decimals)
    return Cell(
        number if "−" in number else f"+{number}", ", ".join(filter(None, [span(value["ci"], factor, decimals), chance(value["p"])]))
    )


def chance(p: float) -> str:
    """A p value, no more exact than it deserves."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _decimals(value: float, fixed: int | None) -> int:
    """Three digits or so, unless their number is fixed."""
    if fixed is not None:
        return fixed
    size = abs(value)
    return next((decimals for limit, decimals in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if size >= limit), 4) if size else 0


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def count(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def parameters(number: int) -> str:
    """`0.66 M`, `494 M`, `7.62 B`."""
    size, unit = (number / 1e9, "B") if number >= 1e9 else (number / 1e6, "M")
    return f"{size:,.{0 if size >= 100 else 1 if size >= 10 else 2}f} {unit}"


def memory(number: int | None) -> str:
    """Bytes as MiB or GiB."""
    if number is None:
        return NOT_MEASURED
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.{0 if number >= 100 * 2**20 else 1}f} MiB"


def duration(seconds: float) -> str:
    """`85 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds) // 3600:,} h {round(seconds) % 3600 // 60} min"


def saved(share: float, less: str = "less") -> str:
    """A share that was saved, or lost, in words: `61.0% less`, `46.1% more`."""
    return f"{abs(share):.1%} {less if share >= 0 else 'more'}"


def short_path(path: str) -> str:
    """A model as one calls it: a relative path or hub name as it is, the last folder of another."""
    return Path(path).name if Path(path).is_absolute() else path.removeprefix("./")


def verdict(met: bool | None) -> str:
    """Whether a target is met, by a sign and in words."""
    return {True: "✓ met", False: "✗ not met", None: "○ not measured"}[met]


def cut(text: str, characters: int) -> str:
    """A text's beginning, with a note how much follows."""
    if len(text) <= characters:
        return text
    return f"{text[:characters]}\n… {len(text) - characters:,} more characters, whole in report.json"


def joined(*parts: str) -> str:
    """What there is of several remarks."""
    return "; ".join(part for part in parts if part)


def quality_of(facts: dict, system: dict, who: str) -> dict:
    """How a system's "teacher", "before" or "student" answered its questions."""
    return facts["models"][system[who]]["quality"][system["mode"]]
