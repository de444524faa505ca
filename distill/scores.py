"""Quick scores: exact match by family on held-out questions, answers generated in batches until their end of turn.

Models answer in a subprocess, one at a time (`answers`).
A question is `{"id", "family", "system": 1 | 2, "instruction", "answer"}`; system 1 is asked plainly, system 2 with the CoT sentence.
"""

from collections import defaultdict
from pathlib import Path

from . import metrics, store
from .answers import ask_once
from .config import model_name
from .generation import BATCH_TOKENS
from .intervals import wilson
from .metrics import reasons_first
from .models import check_student
from .questions import MODE_OF_SYSTEM


def exact_match(questions: list[dict], texts: list[str]) -> dict:
    """Exact match by family: {family: {"value", "n", "ci"}}, families in order of appearance."""
    right: dict = defaultdict(list)
    for question, text in zip(questions, texts, strict=True):
        right[question["family"]].append(metrics.exact_match(question["answer"], text))
    return {family: wilson(sum(hits), len(hits)) for family, hits in right.items()}


def mean_exact_match(scores: dict, families: list[str]) -> float:
    """Mean of exact match over families, each with the same weight."""
    return sum(scores["exact_match"][family]["value"] for family in families) / len(families)


def score(
    models: list[dict],
    questions: str | Path,
    run_folder: Path,
    max_new_tokens: dict,
    batch_tokens: int = BATCH_TOKENS,
    *,
    fresh: bool = False,
) -> dict:
    """Score models on a held-out file, in one subprocess, one model in memory at a time; none is asked twice (`answers.ask_once`).

    models          [{"name", "path", "mode"}]; mode None asks each question as its system says, "system1" asks all plainly
    questions       JSON-lines file of questions
    max_new_tokens  mode → limit of an answer, in tokens
    batch_tokens    tokens that a batch may come to; the more, the faster, as long as memory lasts
    fresh           ask everything anew
    Returns {name: {"parameters", "exact_match": {family: {"value", "n", "ci"}}, "reasoned", "stopped"}}; the last two are the shares of all
    answers that reason before they answer and that end by themselves.
    Raises ConfigError `Invalid student model: …`, DataError for a checkpoint of the lab that is damaged, BackendError with the log's end.
    """
    paths = [model_name(model["path"]) for model in models]
    for path in paths:
        check_student(path)
    rows = list(store.read_rows(questions))
    same = {"bits": None, "max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    requests = [
        {"name": model["name"], "path": path, "questions": _asked(rows, model["mode"]), **same}
        for model, path in zip(models, paths, strict=True)
    ]
    return {name: _scores(rows, made) for name, made in ask_once(requests, run_folder, "Scoring", fresh=fresh).items()}


def _asked(rows: list[dict], mode: str | None) -> list[dict]:
    return [{"instruction": row["instruction"], "mode": mode or MODE_OF_SYSTEM[row["system"]]} for row in rows]


def _scores(rows: list[dict], made: dict) -> dict:
    texts = [answer["text"] for answer in made["answers"]]
    return {
        "parameters": made["parameters"],
        "exact_match": exact_match(rows, texts),
        "reasoned": wilson(sum(map(reasons_first, texts)), len(texts)),
        "stopped": wilson(sum(answer["stopped"] for answer in made["answers"]), len(texts)),
    }
