"""From scored answers to figures with intervals: a model's quality, a student beside its teacher and beside what it was before, targets.

Pure functions of plain values. A *scored* answer is one question's answer by one model, with everything that was measured of it:
{"family", "text", "tokens", "stopped", "exact_match", "token_f1", "rouge_l", "math_verified", "repeated", "reference", "confidence"};
"reference" is what a forward pass over the reference answer found (`probing`), None where there was none; "confidence" the probability
of the final answer, None for an answer that has no end.
"""

import math
from collections import defaultdict
from statistics import median

from .intervals import bootstrap_mean, calibration, mcnemar, paired_difference, retained, wilson
from .metrics import final_answer, reasons_first, words

SHARES = ("exact_match", "token_f1", "rouge_l", "math_verified")  # metrics of a single answer, from 0 to 1; higher is better
MOST_NATS = 700  # a token; e to this is near the largest float
REPEATS = 0.5  # from this share of repeated runs of words on, an answer repeats itself
SHORT_WORDS = 10  # of a reference that an answer can be asked to equal
QUALITY, SPEED, REASONS = 0.90, 3.0, 0.80
P95_SECONDS = {"128": 2.0, "256": 3.0}
FIRSTSIGHT = {"speed": 5.16, "memory_saved": 0.679, "parameters_saved": 0.734}  # Qwen2-VL 8.3B → 2.2B, as FirstSight reports it


def quality(scored: list[dict], bleu: dict, teacher: list[dict] | None = None, metric: str = "exact_match", seed: int = 0) -> dict:
    """A model's quality on the questions of one system: the report's figures, each {"value", "n", "ci"} at 95%.

    scored   its answers, in the order of the questions; at least one
    bleu     corpus BLEU of them, as `textscores` gives it
    teacher  the teacher's, in the same order, for the agreement of next tokens; None for the teacher itself, and where they cut text
             into other tokens
    metric   the `headline`, which says what a right answer is for the calibration
    Shares have Wilson's interval, means one by resampling questions. "perplexity" is exp(nats per token) of the reference answers,
    "agreement" the share of their tokens at which student and teacher would go on alike; None where no reference could be read.
    """
    texts = [each["text"] for each in scored]
    return {
        "n": len(scored),
        "exact_match": _share([each["exact_match"] for each in scored]),
        **{name: _mean([each[name] for each in scored], seed) for name in ("token_f1", "rouge_l")},
        "bleu": bleu,
        "math_verified": _share([each["math_verified"] for each in scored if each["math_verified"] is not None]),
        "perplexity": _perplexity(scored, seed),
        "agreement": _agreement(scored, teacher, seed) if teacher else None,
        "reasoned": _share(map(reasons_first, texts)),
        "stopped": _share([each["stopped"] for each in scored]),
        "repeating": _share([each["repeated"] > REPEATS for each in scored]),
        "empty": _share([not final_answer(text) for text in texts]),
        "tokens": _mean([each["tokens"] for each in scored], seed),
        "calibration": _calibration(scored, metric),
        "families": _families(scored),
    }


def _share(hits) -> dict | None:
    hits = [bool(hit) for hit in hits]
    return wilson(sum(hits), len(hits)) if hits else None


def _mean(values: list[float], seed: int) -> dict:
    return bootstrap_mean(values, seed=seed)


def _perplexity(scored: list[dict], seed: int) -> dict | None:
    read = [each["reference"] for each in scored if each["reference"]]
    if not read:
        return None
    nats = retained([each["nll"] for each in read], [each["tokens"] for each in read], seed=seed)
    return {"value": _exp(nats["value"]), "n": nats["n"], "ci": [_exp(bound) for bound in nats["ci"]]}


def _exp(nats: float) -> float:
    """e to so many nats a token; badly scaled weights reach more than a float can hold."""
    return math.exp(min(nats, MOST_NATS))


def _agreement(scored: list[dict], teacher: list[dict], seed: int) -> dict | None:
    """Share of the references' tokens at which both put the same token first; None where their tokenizers differ."""
    pairs = [(own["reference"], other["reference"]) for own, other in zip(scored, teacher, strict=True)]
    pairs = [(own["top1"], other["top1"]) for own, other in pairs if own and other]
    if not pairs or any(len(own) != len(other) for own, other in pairs):
        return None
    alike = [sum(map(int.__eq__, own, other)) for own, other in pairs]
    return retained(alike, [len(own) for own, _ in pairs], seed=seed)


def _calibration(scored: list[dict], metric: str) -> dict | None:
    """None where no answer has an end, and where none can be said to be right."""
    sure = [each for each in scored if each["confidence"] is not None and is_right(each, metric) is not None]
    return calibration([each["confidence"] for each in sure], [is_right(each, metric) for each in sure]) if sure else None


def is_right(answer: dict, metric: str) -> bool | None:
    """Whether a scored answer is right by the metric that its questions are judged by; None where that knows no right and wrong."""
    return None if metric == "token_f1" or answer[metric] is None else bool(answer[metric])


def _families(scored: list[dict]) -> dict:
    by_family = defaultdict(list)
    for each in scored:
        if each["family"] is not None:
            by_family[each["family"]].append(each["exact_match"])
    return {family: _share(hits) for family, hits in by_family.items()}


def headline(references: list[str], scored: list[dict]) -> tuple[str, str]:
    """The metric that a set of questions is judged by, and why.

    references  final reference answers
    scored      anybody's scored answers to them
    """
    length = median(len(words(reference)) for reference in references)
    math_share = sum(each["math_verified"] is not None for each in scored) / len(scored)
    if length <= SHORT_WORDS:
        return "exact_match", f"the references are short (median length in words: {length:g})"
    if math_share >= 0.5:
        return "math_verified", f"{math_share:.0%} of the references hold a result that can be checked"
    return "token_f1", f"the references are texts (median length in words: {length:g}), which no good answer need equal"


def beside_teacher(student: list[dict], teacher: list[dict], seed: int = 0) -> tuple[dict, dict]:
    """A student beside its teacher, metric by metric: (what it retains, the differences with p), over the same questions."""
    pairs = {name: _paired(student, teacher, name) for name in SHARES}
    kept = {name: retained(*pair, seed=seed) for name, pair in pairs.items() if pair[0]}
    return kept, {name: paired_difference(*pair, seed=seed) for name, pair in pairs.items() if pair[0]}


def beside_before(after: list[dict], before: list[dict], seed: int = 0) -> dict:
    """A student beside what it was before its training: differences with p, and McNemar's test of exact match."""
    pairs = {name: _paired(after, before, name) for name in SHARES}
    found = {name: paired_difference(*pair, seed=seed) for name, pair in pairs.items() if pair[0]}
    return found | {"exact_match": {**found["exact_match"], "mcnemar": mcnemar(*pairs["exact_match"])}}


def _paired(one: list[dict], other: list[dict], name: str) -> tuple[list, list]:
    pairs = [(left[name], right[name]) for left, right in zip(one, other, strict=True) if None not in (left[name], right[name])]
    return [left for left, _ in pairs], [right for _, right in pairs]


def cases(questions: list[dict], scored: dict[str, list[dict]], metric: str, student: str, teacher: str) -> list[dict]:
    """Every question with every model's answer, the most different first: where one of student and teacher is right and the other wrong.

    scored  model → its scored answers
    """
    rows = [
        {
            "id": question["id"],
            "family": question.get("family"),
            "instruction": question["instruction"],
            "input": question.get("input") or "",
            "reference": question["answer"],
            "answers": {name: _case_answer(answers[number], metric) for name, answers in scored.items()},
        }
        for number, question in enumerate(questions)
    ]

    def difference(row: dict) -> tuple:
        own, other = row["answers"][student], row["answers"][teacher]
        return -abs(own["score"] - other["score"]), own["score"] - other["score"], own["text"] == other["text"]

    return sorted(rows, key=difference)


def _case_answer(answer: dict, metric: str) -> dict:
    known = {name: answer[name] for name in ("text", "tokens", "stopped")}
    score = answer["exact_match"] if answer[metric] is None else answer[metric]
    return {**known, "right": is_right(answer, metric), "score": score}


# Targets


def targets(systems: dict, models: dict, speed: dict | None) -> list[dict]:
    """What a lab of this kind is asked for, met or not: [{"name", "system", "wanted", "value", "shown", "ci", "met", "note"}].

    "met" is None where it was not measured; "note" says under which condition, and what the interval says.
    """
    found = []
    for mode, system in systems.items():
        found.append(_quality_target(mode, system))
        if mode == "system2":
            found.append(_reasoning_target(models[system["student"]]["quality"][mode]["reasoned"]))
        found += _speed_targets(mode, system["student"], speed)
    return found


def _quality_target(mode: str, system: dict) -> dict:
    kept = system["retained"][system["headline"]]
    name = "Quality kept, of the teacher's"
    return _target(
        name, mode, f"at least {QUALITY:.0%}", kept, "{:.1%}".format, lambda value: value >= QUALITY, system["headline"].replace("_", " ")
    )


def _reasoning_target(reasoned: dict) -> dict:
    return _target(
        "Answers that reason first", "system2", f"at least {REASONS:.0%}", reasoned, "{:.1%}".format, lambda value: value >= REASONS, ""
    )


def _speed_targets(mode: str, student: str, speed: dict | None) -> list[dict]:
    ratios = [each for each in (speed or {}).get("ratios", []) if each["student"] == student]
    fastest = min(ratios, key=lambda each: each["speed"]["value"], default=None)
    found = [
        _target(
            "Speed, of the teacher's",
            mode,
            f"at least {SPEED:g} ×",
            fastest and fastest["speed"],
            "{:.2f} ×".format,
            lambda value: value >= SPEED,
            _against(fastest["teacher"], len(ratios)) if fastest else "",
        )
    ]
    measured = speed["models"].get(student) if speed else None
    for length, limit in P95_SECONDS.items():
        p95 = measured and measured["seconds"].get(length, {}).get("p95")
        name = f"95% of answers of {length} tokens"
        found.append(_target(name, mode, f"below {limit:g} s", p95, "{:.2f} s".format, lambda value, limit=limit: value < limit, "batch 1"))
    return found


def _against(teacher: str, timed: int) -> str:
    return f"tokens a second at batch 1 against the {teacher}, the {'faster' if timed > 1 else 'only'} one that was timed"


def _target(name: str, mode: str, wanted: str, found: dict | None, show, good, note: str) -> dict:
    """One target. Its sign is the value's; where the interval reaches over the line, the note says so."""
    target = {"name": name, "system": mode, "wanted": wanted, "value": None, "shown": "not measured", "ci": None, "met": None, "note": note}
    if not found:
        return target
    if found["value"] is None:
        return {**target, "shown": "no figure", "note": "the teacher scores 0, of which nothing can be kept"}
    ends = [good(bound) for bound in found["ci"]] if found["ci"] else []
    unsure = ["its interval reaches over the line"] if len(set(ends)) > 1 else []
    words = "; ".join([part for part in [note] if part] + unsure)
    return {**target, "value": found["value"], "shown": show(found["value"]), "ci": found["ci"], "met": good(found["value"]), "note": words}
