"""Scores with intervals: exact match by family on held-out questions, answers generated in batches until their end of turn.

`score` is the lab's side; models are loaded in a subprocess (`python -m distill.evaluate --request FILE`), one at a time.
A question is `{"id", "family", "system": 1 | 2, "instruction", "answer"}`; system 1 is asked plainly, system 2 with the CoT sentence.
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from . import engine, store
from .console import progress
from .errors import DataError, DistillError
from .models import device, generate, load_student
from .prompt import REASONING_TAGS, asked_ids

Z_95 = 1.959963984540054
MODE_OF_SYSTEM = {1: "system1", 2: "system2"}


def wilson(right: int, n: int) -> dict:
    """A proportion with its Wilson score interval at 95%: {"value", "n", "ci": [low, high]}.

    right  successes, 0 to n;  n  trials, at least 1
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if not 0 <= right <= n or n < 1:
        raise DataError(f"A share of {right} in {n} has no interval.")
    share, spread = right / n, Z_95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return {"value": share, "n": n, "ci": [max(0.0, middle - half), min(1.0, middle + half)]}


def final_answer(text: str) -> str:
    """What an answer says in the end: the text behind its reasoning, stripped; empty where the reasoning never ends.

    >>> final_answer("<think>\\n2 + 2 = 4\\n</think>\\n\\n4")
    '4'
    """
    opened, closed = REASONING_TAGS
    if closed in text:
        return text.rpartition(closed)[2].strip()
    return "" if opened in text else text.strip()


def exact_match(questions: list[dict], texts: list[str]) -> dict:
    """Exact match by family: {family: {"value", "n", "ci"}}, families in order of appearance."""
    right: dict = defaultdict(list)
    for question, text in zip(questions, texts, strict=True):
        right[question["family"]].append(final_answer(text) == question["answer"].strip())
    return {family: wilson(sum(hits), len(hits)) for family, hits in right.items()}


def mean_exact_match(scores: dict, families: list[str]) -> float:
    """Mean of exact match over families, each with the same weight."""
    return sum(scores["exact_match"][family]["value"] for family in families) / len(families)


def score(models: list[dict], questions: str | Path, run_folder: Path, max_new_tokens: dict) -> dict:
    """Score models on a held-out file, in one subprocess, one model in memory at a time.

    models          [{"name", "path", "mode"}]; mode None asks each question as its system says, "system1" asks all plainly
    questions       JSON-lines file of questions
    max_new_tokens  mode → limit of an answer, in tokens
    Returns {name: {"parameters", "exact_match": {family: {"value", "n", "ci"}}}}. Raises BackendError with the end of the log.
    """
    with TemporaryDirectory(dir=run_folder) as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "scores.json"
        store.write_json(request, {"models": models, "questions": str(questions), "max_new_tokens": max_new_tokens, "result": str(result)})
        with progress("Scoring") as update:

            def show(event: dict) -> None:
                update(event["done"], total=event["total"], note=event["name"])

            log = run_folder / "evaluate.log"
            status = engine.run_module("distill.evaluate", ["--request", str(request)], log, show)
        if status or not result.is_file():
            raise engine.failure("Scoring", status, log)
        return store.read_json(result)


# In the engine's process


def main() -> None:
    """Score the models of a request file and write the scores."""
    parser = argparse.ArgumentParser(prog="python -m distill.evaluate", description="Score models on held-out questions.")
    parser.add_argument("--request", required=True, help="JSON: models, questions, max_new_tokens, result")
    engine.end_with_parent()
    request = store.read_json(parser.parse_args().request)
    try:
        questions = list(store.read_rows(request["questions"]))
        total = len(questions) * len(request["models"])
        scores = {}
        for number, model in enumerate(request["models"]):
            done = number * len(questions)
            scores[model["name"]] = _score_one(model, questions, request["max_new_tokens"], done, total)
        store.write_json(request["result"], scores)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _score_one(asked_model: dict, questions: list[dict], max_new_tokens: dict, done: int, total: int) -> dict:
    place, reason = device()
    print(f"{asked_model['name']}: on {place} ({reason})")
    model, tokenizer = load_student(asked_model["path"])
    model.to(place).eval()
    texts: list[str] = [""] * len(questions)
    for mode, numbers in _by_mode(questions, asked_model.get("mode")).items():
        asked = [asked_ids(tokenizer, questions[number]["instruction"], mode=mode) for number in numbers]
        before = done

        def report(count: int, before: int = before) -> None:
            engine.emit(name=asked_model["name"], done=before + count, total=total)

        for number, answer in zip(numbers, generate(model, tokenizer, asked, max_new_tokens[mode], update=report), strict=True):
            texts[number] = answer.text
        done += len(numbers)
    return {"parameters": model.num_parameters(), "exact_match": exact_match(questions, texts)}


def _by_mode(questions: list[dict], mode: str | None) -> dict[str, list[int]]:
    """Question numbers by the mode they are asked in."""
    numbers: dict = defaultdict(list)
    for number, question in enumerate(questions):
        numbers[mode or MODE_OF_SYSTEM[question["system"]]].append(number)
    return numbers


if __name__ == "__main__":
    main()
