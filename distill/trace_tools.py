"""One's own traces, judged and shortened by a teacher behind an API: levels for the selection, and thoughts without detours.

Both read a file of rows, each a question with one trace, and write one that `prepare_system2_dataset` takes as its source. Both ask by
chunks and go on where an interrupted run stood.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import store
from .asking import answered, no_answer
from .console import say
from .endpoint import PROMPTS, SCORE_MAX_TOKENS, Endpoint, filled, generation, read_prompt, scoring
from .errors import ConfigError, DataError
from .label import CUT_OFF, Labeled
from .metrics import final_answer
from .omnithought import FIELDS, OTHER_FORM
from .prompt import REASONING_TAGS, is_trace, is_unicode

METRICS = ["reasoning_verbosity", "cognitive_difficulty", "logical_correctness"]
NO_SCORE = "a score that is not 0 to 9, or a verdict that is not 0 or 1"
SAME = "the same trace as an earlier row"
NO_REWRITE, NOT_SHORTER = "an answer without one <short>…</short>", "a rewriting that is not shorter"
PLACES = ("{instruction}", "{reasoning}", "{solution}")
LONG_TO_SHORT = PROMPTS / "long_to_short.txt"
REWRITE_MAX_TOKENS = 2048
# What was said of a trace is not true of another one; columns that repeat its parts neither.
ABOUT_A_TRACE = {name for field in ("rv", "cd", "correct") for name in FIELDS[field]} | {"RV", "CD", *METRICS}
PARTS = {"thought", "solution"}
NEEDED = ("instruction", "output")


def score_traces(source: str | Path, out: str | Path, endpoint: Endpoint, *, max_new_tokens: int = SCORE_MAX_TOKENS) -> Labeled:
    """Let a judge say of each trace how verbose it is (RV), how difficult (CD), and whether it is right; write the rows with that.

    source          JSON list or JSON lines of rows {"instruction", "output"}, or under other names that `prepare_system2_dataset` knows
    endpoint        the judge; EasyDistill 2.x asks it with its own prompts
    max_new_tokens  limit of what the judge says about one score
    Returns the rows written, and how many were dropped for which reason. Raises DataError where none is left, BackendError as `asking`.
    EasyDistill takes the first number of an answer that has no <score>, and any number but 0 for a verdict of "right".

    One row in:  {"instruction": "2+2?", "output": "<think>\\n2+2=4\\n</think>\\n\\n4"}
    One row out: the same with {"reasoning_verbosity": 1, "cognitive_difficulty": 0, "logical_correctness": 1}
    """
    return _work("scored", source, out, endpoint, lambda traces: _scored(traces, endpoint, max_new_tokens))


def shorten_traces(
    source: str | Path,
    out: str | Path,
    endpoint: Endpoint,
    *,
    max_new_tokens: int = REWRITE_MAX_TOKENS,
    temperature: float = 0.0,
    prompt_file: str | None = None,
) -> Labeled:
    """Let a teacher rewrite each trace's thought to a shorter one; the solution stays as it is, letter by letter.

    source       as in `score_traces`; levels that a row has are left out, since they are the long trace's
    prompt_file  a text with {instruction}, {reasoning} and {solution}; None takes configs/prompts/long_to_short.txt
    A rewriting that was cut off, is not between <short> and </short>, or is not shorter is dropped and counted.
    Returns and raises as `score_traces`.

    One row in:  {"instruction": "2+2?", "output": "<think>\\n2+2. Hm. 2+2=4. Yes, 4.\\n</think>\\n\\n4"}
    One row out: {"instruction": "2+2?", "output": "<think>\\n2+2=4\\n</think>\\n\\n4", "shortened_by": "Qwen/Qwen2.5-7B-Instruct"}
    """
    prompt = read_prompt(prompt_file or LONG_TO_SHORT, *PLACES)
    return _work("shortened", source, out, endpoint, lambda traces: _shortened(traces, endpoint, prompt, max_new_tokens, temperature))


@dataclass(frozen=True)
class _Trace:
    """A row, its question, its trace, and the column that the trace stands in."""

    row: dict
    column: str
    instruction: str
    output: str

    @property
    def parts(self) -> tuple[str, str]:
        """Thought and solution."""
        opened, closed = REASONING_TAGS
        thought, _, solution = self.output.removeprefix(opened).partition(closed)
        return thought.strip(), solution.strip()


def _work(done: str, source, out, endpoint: Endpoint, change) -> Labeled:
    """Read traces → change them → write what came out, and say what did not."""
    if not isinstance(endpoint, Endpoint):
        raise ConfigError(f"endpoint = {endpoint!r}: is no Endpoint. Write e.g. Endpoint('Qwen/Qwen2.5-7B-Instruct').")
    source, out = store.resolve(source), store.resolve(out)
    if source == out:
        raise ConfigError(f"out = {store.shown(out)} is the source, which is never changed; name another place.")
    endpoint.check()
    store.check_writable(out)
    with store.lock(out):
        traces, dropped, read = _read(source)
        rows, more, reused = change(traces) if traces else ([], Counter(), 0)
        made = Labeled(rows, dict(dropped + more), reused)
        if not rows:
            counted = ", ".join(f"{count:,} with {reason}" for reason, count in made.dropped.items())
            raise DataError(f"No trace of {store.shown(source)} could be {done}: {counted or 'it has none'}.")
        store.write_rows(out, rows)
        store.write_manifest(out, {"teacher": endpoint.name, "read": read, "dropped": made.dropped})
    say(f"{done} {len(rows):,} of {read:,} traces by {endpoint.name} ({reused:,} answered before): {store.shown(out)}")
    for reason, count in made.dropped.items():
        say(f"  dropped {count:,}: {reason}")
    if 2 * len(rows) < len(traces):
        say(
            f"note: less than half of what {endpoint.name} said could be used, so the rest may be chance too: look at some, or ask another."
        )
    return made


def _read(source: Path) -> tuple[list[_Trace], Counter, int]:
    """The traces of a file, why other rows are none, and how many rows there are."""
    traces, dropped, seen = [], Counter(), set()
    for row in store.read_rows(source):
        question, column = (next((name for name in FIELDS[field] if isinstance(row.get(name), str)), None) for field in NEEDED)
        if not question or not row[question].strip() or not is_unicode(row[question]):
            dropped["no question"] += 1
        elif not column or not is_unicode(row[column]) or not is_trace(row[column].strip()):
            dropped[OTHER_FORM] += 1
        elif (pair := (row[question], row[column].strip())) in seen:
            dropped[SAME] += 1
        else:
            seen.add(pair)
            traces.append(_Trace(row, column, *pair))
    return traces, dropped, len(traces) + dropped.total()


def _key(*texts: str) -> str:
    return store.hash_json(texts)[:16]


def _scored(traces: list[_Trace], endpoint: Endpoint, max_new_tokens: int) -> tuple[list[dict], Counter, int]:
    keys = [_key(trace.instruction, trace.output) for trace in traces]
    asked = [{"id": key, "instruction": one.instruction, "output": one.output} for key, one in zip(keys, traces, strict=True)]
    entries, reused = answered(endpoint, scoring("advanced_cot_distill", METRICS, max_new_tokens), asked, "scores")
    rows, dropped = [], Counter()
    for key, trace in zip(keys, traces, strict=True):
        levels = {metric: entries[key][metric] for metric in METRICS} if key in entries else None
        if levels is None or None in levels.values():
            dropped[NO_SCORE if levels else no_answer(endpoint)] += 1
        else:
            rows.append({**_without(trace.row, ABOUT_A_TRACE), **levels})
    return rows, dropped, reused


def _shortened(traces, endpoint: Endpoint, prompt: str, max_new_tokens: int, temperature: float) -> tuple[list[dict], Counter, int]:
    texts = []
    for trace in traces:
        thought, solution = trace.parts
        texts.append(filled(prompt, instruction=trace.instruction, reasoning=thought, solution=solution))
    asked = [{"id": _key(text), "instruction": text} for text in texts]
    entries, reused = answered(endpoint, generation(max_new_tokens, temperature), asked, "rewritings")
    rows, dropped = [], Counter()
    for question, trace in zip(asked, traces, strict=True):
        entry = entries.get(question["id"])
        output, reason = _rewritten(trace, entry) if entry else ("", no_answer(endpoint))
        if reason:
            dropped[reason] += 1
        else:
            rows.append({**_without(trace.row, ABOUT_A_TRACE | PARTS), trace.column: output, "shortened_by": endpoint.name})
    return rows, dropped, reused


def _rewritten(trace: _Trace, entry: dict) -> tuple[str, str]:
    """The shorter trace, or why there is none."""
    if not entry["stopped"]:
        return "", CUT_OFF
    found = re.findall(r"<short>(.*?)</short>", final_answer(entry["text"]), re.S)  # behind what the teacher thinks about it
    thought, solution = trace.parts
    opened, closed = REASONING_TAGS
    output = f"{opened}\n{found[0].strip()}\n{closed}\n\n{solution}" if len(found) == 1 else ""
    if not is_trace(output):
        return "", NO_REWRITE
    return (output, "") if len(found[0].strip()) < len(thought) else ("", NOT_SHORTER)


def _without(row: dict, names: set) -> dict:
    return {key: value for key, value in row.items() if key not in names}
