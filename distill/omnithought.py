"""The adapter between data sets of reasoning traces and the lab: what a source calls its columns, and one row's question and traces.

A source row is a question with a list of traces (OmniThought's own schema), or with one (flat schemas). Names are decided once, by the
source's first row.
"""

import json
from collections import Counter
from dataclasses import dataclass

from .errors import DataError, shortened
from .prompt import REASONING_TAGS, format_prompt, is_trace, is_unicode
from .selection import HIGHEST, LOWEST, Limits, Trace, is_level
from .sources import Source

UNEXPECTED = "Unexpected OmniThought schema, please inspect omni[0]"
TRACE_LIST = "reasoning"
# Field → the names that it is known under: OmniThought's, EasyDistill 2's, those of other sets. The first that a source has is taken.
FIELDS = {
    "instruction": ("question", "instruction"),
    "output": ("full_response", "response", "output", "cot"),
    "thought": ("thought",),
    "solution": ("solution",),
    "rv": ("Reasoning_Verbosity", "reasoning_verbosity", "rv_score"),
    "cd": ("Cognitive_Difficulty", "cognitive_difficulty", "cd_score"),
    "correct": ("thought_correctness_verify", "logical_correctness"),
    "teacher": ("teacher",),
}
OTHER_FORM = "a trace that is not <think>…</think> and a solution"


@dataclass(frozen=True)
class Schema:
    """What a source calls the fields; None for one that it has not. nested: a row holds a list of traces, else it is one itself."""

    nested: bool
    names: dict


def read_schema(source: Source, raw: dict, limits: Limits) -> Schema:
    """The schema of a source by its first row. Raises DataError `Unexpected OmniThought schema, …` with what is missing and the row."""
    nested = isinstance(raw.get(TRACE_LIST), list)
    listed = raw[TRACE_LIST] if nested else [raw]
    trace = listed[0] if listed and isinstance(listed[0], dict) else {}
    names = {field: _name_of(field, source.columns, raw if field == "instruction" else trace) for field in FIELDS}
    if {"thought", "solution"} & source.columns.keys() and "output" not in source.columns:
        names["output"] = None  # told apart by the user, so a whole response is not looked for
    problems = _schema_problems(source, names, raw, trace, limits)
    if problems:
        shown = json.dumps(_cut(raw), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
        raise DataError(
            f"{UNEXPECTED}: {'; '.join(problems)}. Say which is which, e.g. columns={{'instruction': 'problem', 'output': 'answer'}}. "
            f"omni[0] of {source.name}: {shortened(shown, 600)}"
        )
    return Schema(nested, names)


def _name_of(field: str, columns: dict, holder: dict) -> str | None:
    return columns[field] if field in columns else next((name for name in FIELDS[field] if name in holder), None)


def _schema_problems(source: Source, names: dict, raw: dict, trace: dict, limits: Limits) -> list[str]:
    """What the selection needs and a source's first row has not."""
    problems = [
        f"no {column!r}, which columns names for {field}"
        for field, column in source.columns.items()
        if column not in (raw if field == "instruction" else trace)
    ]
    if not names["instruction"]:
        problems.append(f"no question ({', '.join(FIELDS['instruction'])})")
    if not names["output"] and not (names["thought"] and names["solution"]):
        problems.append(f"no trace ({', '.join(FIELDS['output'])}, or thought and solution, in the row or in its list {TRACE_LIST!r})")
    for field, window in (("rv", limits.rv), ("cd", limits.cd)):
        if not names[field]:
            known = f"no {field.upper()} level ({', '.join(FIELDS[field])})"
            if window != (LOWEST, HIGHEST):
                problems.append(f"{known}, which {field}_min and {field}_max need")
            elif field == "rv" and limits.long_share is not None:
                problems.append(f"{known}, which long_share needs")
    return problems


def _cut(value):
    """A value with long texts and lists cut short, so that every key of a row can be seen."""
    if isinstance(value, str):
        return shortened(value, 40)
    if isinstance(value, list):
        return [_cut(item) for item in value[:1]] + ([f"… {len(value) - 1} more"] if len(value) > 1 else [])
    return {str(key): _cut(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_question(schema: Schema, raw: dict) -> tuple[str, str | None]:
    """One row's question, as it will be asked; or why there is none."""
    question = raw.get(schema.names["instruction"])
    if question is not None and not isinstance(question, str):
        return "", "a question that is no text"
    if not (question or "").strip():
        return "", "no question"
    return (format_prompt(question), None) if is_unicode(question) else ("", "a question that is no valid Unicode")


def read_traces(schema: Schema, raw: dict) -> tuple[list[Trace], Counter]:
    """One row's traces of good form, and why the others are not."""
    listed = raw.get(TRACE_LIST) if schema.nested else [raw]
    traces, malformed = [], Counter()
    for values in listed if isinstance(listed, list) else []:
        trace = _read_trace(schema, values) if isinstance(values, dict) else "a trace that is no object"
        if isinstance(trace, Trace):
            traces.append(trace)
        else:
            malformed[trace] += 1
    return traces, malformed


def _read_trace(schema: Schema, values: dict) -> Trace | str:
    """One trace, or why it is of no use."""
    known = {field: values.get(name) for field, name in schema.names.items() if name and field != "instruction"}
    texts = [known["output"]] if schema.names["output"] else [known["thought"], known["solution"]]
    if not all(isinstance(text, str) for text in [*texts, known.get("teacher") or ""]):
        return "a trace or teacher that is no text"
    if not all(is_unicode(text) for text in [*texts, known.get("teacher") or ""]):
        return "a trace or teacher that is no valid Unicode"
    opened, closed = REASONING_TAGS
    output = texts[0].strip() if len(texts) == 1 else f"{opened}\n{texts[0].strip()}\n{closed}\n\n{texts[1].strip()}"
    if not is_trace(output):
        return OTHER_FORM
    levels = {field: _plain_value(known[field]) for field in ("rv", "cd") if field in known}
    if not all(map(is_level, levels.values())):
        return "an RV or CD that is no level from 0 to 9"
    correct = _plain_value(known["correct"]) if schema.names["correct"] else True
    if not isinstance(correct, bool | int | float):
        return "no verdict on its correctness"
    return Trace(output, correct >= 1, teacher=known.get("teacher") or None, **levels)


def _plain_value(value):
    """A level or verdict, out of {"judge": …, "level": 5} too."""
    return value.get("level") if isinstance(value, dict) else value
