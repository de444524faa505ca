"""Rate it yourself: blind pairs of answers, the teacher's and the student's, in a notebook cell that needs no widgets.

A person reads the pairs that one call shows, writes a sign for each, and calls again with the signs.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import store
from .console import in_notebook, say, visible
from .errors import ConfigError, DataError
from .metrics import final_answer, reasoning
from .preference import STUDENT, TEACHER, TIE, facts_of, in_words, is_equal, pair_hash, pairs_of, share, shares
from .prompt import format_prompt
from .report import add

SIGNS = {"A": "A", "B": "B", "=": TIE, "-": None}
SIDES = ("A", "B")
JUDGED = "reports/preference.json"
BOX = "padding:8px;border:1px solid #8886;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:30em;overflow:auto"
GRID = "display:grid;grid-template-columns:repeat(auto-fit,minmax(min(18em,100%),1fr));gap:8px;margin:8px 0 24px"


@dataclass(frozen=True, repr=False)
class Rated:
    """Pairs to rate and what came of it; a notebook shows it, a terminal too. Which model is which it does not tell.

    shown   [{"number", "question", "A", "B"}], texts
    result  what `rate_answers` keeps as JSON, without names; None until each pair has a sign: a result would tell whose the others are
    note    what to do next
    """

    shown: list[dict]
    result: dict | None
    note: str

    def show(self) -> None:
        """Print the pairs, or what came of them."""
        pairs = [f"Pair {one['number']}: {one['question']}\n\n[A]\n{one['A']}\n\n[B]\n{one['B']}" for one in self.shown]
        say("\n\n".join(map(visible, [*pairs, *self._lines()])))

    def __repr__(self) -> str:
        return f"<{len(self.shown)} pairs to rate; .show()>"

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{escape(visible(line))}</p>" for line in self._lines())
        return f"<div>{''.join(map(_pair_html, self.shown))}{lines}</div>"

    def _lines(self) -> list[str]:
        return [*(_result_lines(self.result) if self.result else []), self.note]


def rate_answers(
    evaluation,
    ratings: str = "",
    *,
    mode: str | None = None,
    pairs: int = 10,
    seed: int = 0,
    preference: dict | str | Path | None = None,
    out: str | Path = "reports/ratings.json",
) -> Rated:
    """Show pairs of answers without saying whose they are, and keep what a person finds better.

    evaluation  what `evaluate_student` returned, its `to_dict()`, or the path of report.json
    ratings     a sign a pair, in order: A or B is better, = a tie, - skipped, e.g. "A B = A - B"; blanks, commas and case do not
                matter. Empty: the pairs are only shown
    mode        "system1" or "system2"; None takes the first that was evaluated
    pairs       how many are shown; more of the same seed begin with the same ones
    seed        of which pairs are shown, and of which answer is A
    preference  what `prefer` returned, or its file; None takes reports/preference.json where that is there
    out         JSON with every rating and what follows from them; a later call adds to it. A sign of that call replaces an earlier one
                of the same pair, a - takes it back
    The result is told, and stands in the evaluation's report, as soon as every pair shown has a sign. Each rating is kept at once.
    The file holds {"schema", "evaluation" (hash), "mode", "models": {"student", "teacher"}, "ratings": [{"id", "sha256", "A", "B" (whose),
    "verdict", "time"}], "n", "student", "teacher", "tie", "preferred" (as `prefer` says them), "agreement": None or {"judge", "value", "n",
    "ci", "kappa"}, over the pairs that both rated}. Pairs of the same text are not shown.
    Raises ConfigError for signs that are none and for a file with ratings of other answers, DataError where no pair can be rated.
    """
    facts = facts_of(evaluation)
    found = pairs_of(facts, mode)
    chosen = _choose(found["pairs"], pairs, seed)
    signs = parse_ratings(ratings, len(chosen))
    if not signs:
        note = f"Write a sign for each pair into ratings, in order, and call again: {_signs_in_words()}. E.g. ratings='A B = A'."
        return _shown(Rated(_pages(chosen), None, note))
    answers = sorted(map(pair_hash, found["pairs"]))
    about = {"schema": 1, "evaluation": store.hash_json(answers), "mode": found["mode"], "models": found["models"]}
    kept = _kept(store.resolve(out), about, signs, chosen)
    result = {**about, "ratings": kept, "n": len(kept), **shares([one["verdict"] for one in kept])}
    result["agreement"] = agreement(kept, _judged(preference))
    store.write_json(out, result)
    rated = {one["sha256"] for one in kept}
    missing = [page for page, pair in zip(_pages(chosen), chosen, strict=True) if pair_hash(pair) not in rated]
    skipped = {number for number, sign in enumerate(signs, start=1) if sign is None}
    if left := len([page for page in missing if page["number"] not in skipped]):
        note = f"{len(chosen) - len(missing):,} rated, {left:,} left: add their signs to ratings and call again; the result follows then."
        return _shown(Rated(missing, None, f"{note} Kept in {store.shown(out)}."))
    add(evaluation, facts, "ratings", found["mode"], result)
    more = "To rate the pairs above, put signs in place of - and call again. " if missing else ""
    named = {key: result[key] for key in ("n", STUDENT, TEACHER, TIE, "preferred", "agreement")}
    return _shown(Rated(missing, named, f"{more}Kept in {store.shown(out)}."))


def _shown(rated: Rated) -> Rated:
    """Print it where nobody else shows what a cell returns."""
    if not in_notebook():
        rated.show()
    return rated


# Pairs


def _choose(candidates: list[dict], count: int, seed: int) -> list[dict]:
    """The pairs to rate, each with "A" and "B" saying whose answer that is."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"pairs = {count!r}: give a whole number above 0.")
    different = {pair_hash(pair): pair for pair in candidates if not is_equal(pair)}
    if not different:
        raise DataError(f"There is nothing to rate: teacher and student give the same answer to all {len(candidates):,} questions.")
    names = sorted(different)
    random.Random(seed).shuffle(names)
    return [{**pair, **_sides(pair, seed)} for pair in map(different.get, names[:count])]


def _sides(pair: dict, seed: int) -> dict:
    """Whose answer is A and whose is B, by the pair itself, so that it stays so however many are shown."""
    roles = [TEACHER, STUDENT]
    random.Random(f"{seed} {pair_hash(pair)}").shuffle(roles)
    return dict(zip(SIDES, roles, strict=True))


def _pages(chosen: list[dict]) -> list[dict]:
    """What of the pairs may be seen: no id, no name."""
    return [
        {"number": number, "question": format_prompt(pair["instruction"], pair["input"]), **{side: pair[pair[side]] for side in SIDES}}
        for number, pair in enumerate(chosen, start=1)
    ]


# Ratings


def parse_ratings(text: str, pairs: int) -> list[str | None]:
    """The signs of a text, in order: "A", "B", "tie", or None for a pair that is skipped.

    pairs  how many may be rated
    Raises ConfigError that names every sign that is none.

    >>> parse_ratings("a, B =-", 10)
    ['A', 'B', 'tie', None]
    """
    signs = [sign for sign in text if not sign.isspace() and sign != ","]
    problems = [f"rating {place} is {sign!r}: {_signs_in_words()}." for place, sign in enumerate(signs, 1) if sign.upper() not in SIGNS]
    if len(signs) > pairs:
        problems.append(f"{len(signs):,} ratings are given, and {pairs:,} pairs are shown.")
    if problems:
        raise ConfigError.from_problems("the ratings", problems)
    return [SIGNS[sign.upper()] for sign in signs]


def _signs_in_words() -> str:
    return "A or B for the better answer, = for a tie, - to skip"


def _kept(place: Path, about: dict, signs: list[str | None], chosen: list[dict]) -> list[dict]:
    """The ratings of the file, with those of this call. Raises ConfigError where the file's are of other answers."""
    known = _earlier(place, about) if store.is_file(place) else {}
    for sign, pair in zip(signs, chosen, strict=False):  # there may be fewer signs
        name = pair_hash(pair)
        verdict = sign if sign in (TIE, None) else pair[sign]
        if verdict is None:
            known.pop(name, None)
        elif known.get(name, {}).get("verdict") != verdict:
            sides = {side: pair[side] for side in SIDES}
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            known[name] = {"id": pair["id"], "sha256": name, **sides, "verdict": verdict, "time": now}
    return list(known.values())


def _earlier(place: Path, about: dict) -> dict[str, dict]:
    """The ratings of a file, by the pair's hash."""
    found = store.read_json(place)
    if not isinstance(found, dict) or not isinstance(found.get("ratings"), list):
        raise ConfigError(f"{store.shown(place)} holds no ratings: give another out.")
    if found.get("evaluation") != about["evaluation"]:
        raise ConfigError(
            f"{store.shown(place)} holds {len(found['ratings']):,} ratings of other answers ({found.get('mode')}): a sign belongs to the "
            "pair that was shown with it. Look at the pairs anew (ratings=''), and give another out, or move that file away."
        )
    return {one["sha256"]: one for one in found["ratings"]}


# What follows from them


def _judged(preference: dict | str | Path | None) -> dict | None:
    """A judge's preference; None where none is given and none lies at its usual place."""
    if preference is None and not store.is_file(store.resolve(JUDGED)):
        return None
    found = preference if isinstance(preference, dict) else store.read_json(preference or JUDGED)
    if not isinstance(found, dict) or not found.keys() >= {"judge", "pairs"}:
        raise DataError("This is no preference of the lab: give what prefer returned, or the path of its preference.json.")
    return found


def agreement(ratings: list[dict], judged: dict | None) -> dict | None:
    """How often a person and a judge say the same of a pair: {"judge", "value", "n", "ci", "kappa"}; None without a pair of both.

    ratings  [{"sha256", "verdict"}];  judged  what `prefer` returned
    """
    said = {row["sha256"]: row["verdict"] for row in judged["pairs"] if row["verdict"]} if judged else {}
    both = [(one["verdict"], said[one["sha256"]]) for one in ratings if one["sha256"] in said]
    if not both:
        return None
    return {"judge": judged["judge"], **share(sum(own == other for own, other in both), len(both)), "kappa": kappa(both)}


def kappa(both: list[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two raters: (observed − chance) / (1 − chance); 1 is full agreement, 0 what chance brings.

    both  a pair of verdicts for each thing that both rated, at least one
    Returns None where both say one and the same of all: chance alone would agree always.
    Source: Cohen 1960, doi:10.1177/001316446002000104.
    """
    n = len(both)
    observed = sum(first == second for first, second in both)
    firsts, seconds = (Counter(rater) for rater in zip(*both, strict=True))
    chance = sum(firsts[verdict] * seconds[verdict] for verdict in firsts)  # times n², so that whole numbers decide
    return (observed * n - chance) / (n * n - chance) if chance < n * n else None


def _result_lines(result: dict) -> list[str]:
    value, interval = in_words(result["preferred"])
    ties, _ = in_words(result[TIE])
    better = f"The student's answer is better in {value} of {result['preferred']['n']:,} that are no tie (95%: {interval})."
    lines = [f"{result['n']:,} rated. {better} Ties: {ties}."]
    if found := result["agreement"]:
        value, interval = in_words(found)
        chance = "no kappa" if found["kappa"] is None else f"Cohen's kappa {found['kappa']:.2f}"
        lines.append(f"{found['judge']} agrees on {value} of {found['n']:,} pairs that both rated (95%: {interval}; {chance}).")
    return lines


# The page


def _pair_html(page: dict) -> str:
    answers = "".join(f"<div><b>{side}</b>{_answer_html(page[side])}</div>" for side in SIDES)
    return f'<section><h4>Pair {page["number"]}</h4>{_text_html(page["question"])}<div style="{GRID}">{answers}</div></section>'


def _answer_html(text: str) -> str:
    thought, final = reasoning(text), final_answer(text)
    folded = f"<details><summary>reasoning</summary>{_text_html(thought)}</details>" if thought else ""
    return folded + (_text_html(final) if final else "<p><em>(no answer)</em></p>")


def _text_html(text: str) -> str:
    return f'<div dir="auto" tabindex="0" style="{BOX}">{escape(visible(text))}</div>'
