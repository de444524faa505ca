"""Scores that a model gives to answers, those of teacher and students alike, with an interval each: EasyDistill 2.x asks the judge.

Plain answers are judged by `instruct_eval`, answers that reason first by `cot_eval`. A judge's score is an opinion: where answers can be
checked, exact match (`evaluate`) says more.
"""

from collections import defaultdict
from pathlib import Path

from . import store
from .asking import answered
from .compare import Comparison
from .console import say, table
from .endpoint import LEVELS, SCORE_MAX_TOKENS, VERDICTS, Endpoint, scoring
from .errors import ConfigError, DataError, shortened
from .intervals import wilson
from .prompt import MODES, is_unicode
from .trace_tools import METRICS as OF_TRACES

JOBS = {"system1": "instruct_eval", "system2": "cot_eval"}
METRICS = {"system1": ["informativeness", "helpfulness", "generalization", "correctness"], "system2": OF_TRACES}
NEEDED = ("model", "instruction", "output")


def judge(
    answers,
    endpoint: Endpoint,
    *,
    metrics: dict | None = None,
    max_new_tokens: int = SCORE_MAX_TOKENS,
    out: str | Path = "reports/judge.json",
) -> dict:
    """Let a model score answers; print a table and write it as JSON.

    answers         a comparison (`compare_models`' or its saved comparison.json), or rows {"model", "mode", "instruction", "output"}, as a
                    list or a file; mode is "system1" (asked plainly) or "system2" (asked to reason)
    endpoint        the judge
    metrics         mode → metrics; None takes all that EasyDistill has a prompt for (METRICS)
    max_new_tokens  limit of what the judge says about one score
    Returns {"judge", "scores": {model: {mode: {metric: {"value", "n", "ci", "malformed", "unanswered"}}}}, "empty"}: value is the mean of
    the scores 0 to 9, or the share of answers found correct; n counts the scores in it. "empty" counts answers without text, per model.
    Raises ConfigError or DataError for what cannot be judged, BackendError where the judge cannot be asked.
    """
    if not isinstance(endpoint, Endpoint):
        raise ConfigError(f"endpoint = {endpoint!r}: is no Endpoint. Write e.g. Endpoint('gpt-4o', 'https://api.openai.com/v1').")
    wanted = {**METRICS, **(metrics or {})}
    _check_metrics(wanted)
    rows = _rows(answers)
    endpoint.check()
    store.check_writable(out)
    judged = [row for row in rows if row["output"].strip()]
    results, empty = {}, defaultdict(int)
    for row in rows:
        empty[row["model"]] += not row["output"].strip()
    for mode in MODES:
        part = [row for row in judged if row["mode"] == mode]
        if part and wanted[mode]:
            _add(results, mode, part, _ask(part, mode, wanted[mode], endpoint, max_new_tokens), wanted[mode])
    if not results:
        raise DataError("There is nothing to judge: no answer has text.")
    report = {"judge": endpoint.name, "scores": results, "empty": {model: count for model, count in empty.items() if count}}
    _show(report)
    say(f"  {store.shown(store.write_json(out, report))}")
    return report


def _check_metrics(wanted: dict) -> None:
    problems = [f"metrics: {mode!r} is not one of {', '.join(MODES)}." for mode in wanted if mode not in MODES]
    for mode in MODES:
        unknown = [name for name in wanted[mode] if name not in METRICS[mode]]
        problems += [f"metrics[{mode!r}]: {name!r} is not one of {', '.join(METRICS[mode])}." for name in unknown]
    if problems:
        raise ConfigError.from_problems("the judging", problems)


def _rows(answers) -> list[dict]:
    """Answers as rows {"model", "mode", "instruction", "output"}. Raises DataError that names the first that is none."""
    if isinstance(answers, str | Path):
        answers = _read(store.resolve(answers))
    if isinstance(answers, Comparison):
        answers = answers.to_dict()
    if isinstance(answers, dict):
        answers = _of_comparison(answers)
    for number, row in enumerate(answers):
        texts = [row.get(name) for name in NEEDED] if isinstance(row, dict) else [None]
        good = all(isinstance(text, str) and is_unicode(text) for text in texts)
        if not good or row.get("mode", "system1") not in MODES or not row["instruction"].strip():
            raise DataError(f"answer {number} is no row {{'model', 'mode', 'instruction', 'output'}}. It is {shortened(row, 120)}.")
    return [{"mode": "system1", **row} for row in answers]


def _read(place: Path) -> dict | list[dict]:
    """What a file holds: a comparison, or rows."""
    try:
        value = store.read_json(place)
    except DataError:  # not one JSON value, so JSON lines or nothing good
        return list(store.read_rows(place))
    return value if isinstance(value, list) or (isinstance(value, dict) and "prompts" in value) else [value]


def _of_comparison(comparison: dict) -> list[dict]:
    try:
        names = {column["role"]: column["path"] for column in comparison["columns"]}
        return [
            {
                "model": names[answer["role"]],
                "mode": answer["mode"],
                "instruction": comparison["prompts"][answer["prompt"]]["prompt"],
                "output": answer["text"],
            }
            for answer in comparison["answers"]
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError("This is no comparison of the lab: give comparison.json as `compare` writes it, or rows of answers.") from error


def _key(row: dict) -> str:
    """Two models that answer the same get the same score, asked once."""
    return store.hash_json([row["instruction"], row["output"]])[:16]


def _ask(rows: list[dict], mode: str, metrics: list[str], endpoint: Endpoint, max_new_tokens: int) -> dict[str, dict]:
    asked = {_key(row): {"id": _key(row), "instruction": row["instruction"], "output": row["output"]} for row in rows}
    entries, reused = answered(endpoint, scoring(JOBS[mode], metrics, max_new_tokens), list(asked.values()), "judgements")
    say(
        f"judged {sum(key in entries for key in asked):,} of {len(asked):,} answers of {mode} by {endpoint.name} ({reused:,} judged before)"
    )
    return entries


def _add(results: dict, mode: str, rows: list[dict], entries: dict, metrics: list[str]) -> None:
    of_model = defaultdict(list)
    for row in rows:
        of_model[row["model"]].append(entries.get(_key(row)))
    for model, found in of_model.items():
        results.setdefault(model, {})[mode] = {metric: _summary(metric, found) for metric in metrics}


def _summary(metric: str, found: list[dict | None]) -> dict:
    """One metric of one model: its mean with an interval, and how many answers have no score, and why."""
    given = [entry[metric] for entry in found if entry is not None]
    scores = [score for score in given if score is not None]
    lost = {"malformed": len(given) - len(scores), "unanswered": len(found) - len(given)}
    return {**mean_score(scores, 1 if metric in VERDICTS else LEVELS[-1]), **lost}


def mean_score(scores: list[int], highest: int) -> dict:
    """The mean of scores 0 to `highest`: {"value", "n", "ci": [low, high]}, value and ci None where there is none.

    The interval is Wilson's for the mean's share of the scale. For a verdict that is exact; for a score it is on the safe side, since no
    scores vary more than those that are all 0 or `highest`.
    """
    if not scores:
        return {"value": None, "n": 0, "ci": None}
    found = wilson(sum(scores) / highest, len(scores))
    return {"value": found["value"] * highest, "n": found["n"], "ci": [bound * highest for bound in found["ci"]]}


def _show(report: dict) -> None:
    """A table of both ways of asking: a row a model and metric."""
    rows = []
    for model, modes in report["scores"].items():
        for mode, metrics in modes.items():
            for metric, found in metrics.items():
                shown = ["–", "–"] if found["value"] is None else [f"{found['value']:.2f}", "{:.2f} to {:.2f}".format(*found["ci"])]
                rows.append([model, mode, metric, *shown, found["n"], found["malformed"], found["unanswered"]])
    table(f"Scores by {report['judge']}", ["model", "asked", "metric", "mean", "95%", "n", "malformed", "no answer"], rows)
    for model, count in report["empty"].items():
        say(f"  {count:,} answers of {model} have no text")
