"""OmniThought and sets like it → the rows that System 2 is trained on: of each question the one trace that suits the student best.

Each trace is judged in this order: correct → fits `max_length` whole → RV and CD windows → `long_share` → RV nearest to what its CD asks
for (`selection`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from . import models, stages, store
from .config import model_name
from .console import progress, say
from .errors import DataError
from .omnithought import FIELDS, TRACE_LIST, Schema, read_question, read_schema, read_traces
from .preparation import (
    DUPLICATE,
    NO_DATA,
    Prepared,
    Spool,
    argument_problems,
    check_places,
    contents_of,
    raise_problems,
    readable,
    reuse,
    why_nothing,
    write_prepared,
)
from .prompt import chat_format, row_id, tokenizer_hash, trained_ids
from .selection import (
    HIGHEST,
    KINDS,
    WITHOUT_SHARE,
    Limits,
    Trace,
    advise,
    balanced,
    choose,
    gained,
    question_refusal,
    read_window,
    refusal,
    share_problems,
    widenings,
)
from .sources import Source, mix, parse_sources, provenance, settings_of

OMNITHOUGHT = "alibaba-pai/OmniThought"
NO_TRACE = "no trace"
NOT_NEAREST, OF_DUPLICATE = "another trace of its question is nearer", "of the same question as an earlier row"


def prepare_system2_dataset(
    slice_str: str = "train[:20000]",
    *,
    source: str | list = OMNITHOUGHT,
    columns: dict | None = None,
    rows: int | None = 2000,
    rv_min: float = 0,
    rv_max: float = 9,
    cd_min: float = 0,
    cd_max: float = 9,
    long_share: float | None = None,
    student_model: str = "Qwen/Qwen2.5-1.5B-Instruct",
    max_length: int = 4096,
    validation: float = 0.05,
    seed: int = 42,
    out_cot: str = "data/omnithought_cot.json",
    fresh: bool = False,
) -> Prepared:
    """Write the rows that System 2 is trained on: one trace a question, whole, correct, in the windows asked for.

    Where they stand already, and nothing has changed, nothing is done.

    slice_str         source rows to read, e.g. "train[:20000]"
    source            hub name, local JSON, JSONL or Parquet file or folder, or a list of {source, columns, weight, slice} to mix
    columns           instruction, output, thought, solution, rv, cd, correct or teacher → the source's own name, where no known one fits
    rows              how many to keep (validation rows included); reading stops there. None keeps all that are read
    rv_min … cd_max   levels 0 to 9, both included; one between 0 and 1 is a share of that scale (0.6 → 5.4)
    long_share        share of rows with RV ≥ 6, 0 to 1, the rest shorter; None takes what comes
    student_model     whose tokenizer says what fits
    max_length        tokens of a row, question included; a trace that does not fit whole is never cut
    validation        share split off by id, 0 to 0.5
    fresh             make them anew, whatever stands there
    Raises DataError `No data for System 2 distillation: …`, `Unexpected OmniThought schema, …`; ConfigError for settings that cannot work.

    One row in:  {"question": "2+2?", "reasoning": [{"full_response": "<think>\\n2+2=4\\n</think>\\n\\n4", …}]}
    One row out: {"id": "…", "instruction": "2+2?", "input": "", "output": "<think>\\n2+2=4\\n</think>\\n\\n4", "source": "omni.jsonl",
                  "teacher": "DeepSeek-R1", "RV": 2, "CD": 1}
    """
    windows = {name: read_window(name, low, high) for name, low, high in (("RV", rv_min, rv_max), ("CD", cd_min, cd_max))}
    problems = argument_problems(rows, validation, seed) + _own_problems(long_share, student_model, max_length)
    problems += [problem for _, _, found in windows.values() for problem in found]
    raise_problems(problems or share_problems(long_share, windows["RV"][0]))
    limits = Limits(max_length, windows["RV"][0], windows["CD"][0], long_share, rows)
    sources, cot = parse_sources(source, columns, slice_str, FIELDS), store.resolve(out_cot)
    check_places(sources, {"out_cot": cot})
    tokenizer = models.check_student(model_name(student_model))
    chat_format(tokenizer, "system2")  # a student without a template is refused before anything is read
    for note in [note for _, notes, _ in windows.values() for note in notes]:
        say(note)
    with store.lock(cot):
        stage = _stage(sources, limits, {"validation": validation, "seed": seed}, tokenizer)
        prepared = reuse(stage, fresh, cot)
        if not prepared:
            with closing(Spool()) as spool, _counting(tokenizer, fresh) as counts:
                facts = _fill(spool, sources, limits, seed, counts, fresh)
                spool.choose_validation(validation, seed)
                facts |= {"slice": slice_str, "seed": seed, "validation_share": validation, "student_model": student_model}
                facts |= {"tokenizer_sha256": tokenizer_hash(tokenizer)}
                prepared = write_prepared(spool, stage.record(), facts, cot)
    say(str(prepared))
    return prepared


def _stage(sources: list[Source], limits: Limits, others: dict, tokenizer) -> stages.Stage:
    bounds = {"rv_min": limits.rv[0], "rv_max": limits.rv[1], "cd_min": limits.cd[0], "cd_max": limits.cd[1]}
    settings = {"rows": limits.rows, "long_share": limits.long_share, "max_length": limits.max_length, **others, **settings_of(sources)}
    settings |= {name: float(level) for name, level in bounds.items()}
    inputs = contents_of(sources, "system2") | {"the student's tokenizer": tokenizer_hash(tokenizer)}
    return stages.Stage("System 2's data", settings, inputs, stages.code(*stages.PREPARING["system2"]))


def _fill(spool: Spool, sources: list[Source], limits: Limits, seed: int, counts: "_TokenCounts", fresh: bool) -> dict:
    """Choose among the traces of the sources. Returns the selection's facts; raises DataError where no row is left."""
    chosen = _Selection(spool, limits, counts)
    chosen.read_all(readable(mix(sources, seed, fresh=fresh), "system2"))
    chosen.balance(seed)
    facts = chosen.facts()
    if not spool.count:
        raise DataError(f"{NO_DATA['system2']}: {' '.join([why_nothing(sources, facts['read'], facts['dropped']), *_in_one(facts)])}")
    return facts


def _own_problems(long_share, student_model, max_length) -> list[str]:
    problems = []
    if long_share is not None and (isinstance(long_share, bool) or not isinstance(long_share, int | float) or not 0 <= long_share <= 1):
        problems.append(f"long_share = {long_share!r}: give a share from 0 to 1, or None.")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        problems.append(f"max_length = {max_length!r}: give a whole number of tokens above 0.")
    if not str(student_model or "").strip():
        problems.append(f"student_model = {student_model!r}: give a hub name or the path of a folder.")
    return problems


def _in_one(facts: dict) -> list[str]:
    return [f"To keep more: {'; '.join(facts['advice'])}."] if facts["advice"] else []


# The selection, a source row at a time


class _TokenCounts:
    """Tokens of questions with their traces, on disk as they are counted: a preparation that was killed counts none of them again.

    They lie in a journal, `runs/tokens/<key>.jsonl`, whose key hashes the tokenizer and the lab's code that counts; an entry's id hashes
    the texts.
    """

    def __init__(self, tokenizer, fresh: bool) -> None:
        """fresh  count all anew"""
        key = store.hash_json([tokenizer_hash(tokenizer), stages.code("prompt.py")])
        self._tokenizer, self._journal = tokenizer, store.ROOT / "runs" / "tokens" / f"{key[:24]}.jsonl"
        if fresh:
            self.remove()
        self._known = {entry["id"]: entry["tokens"] for entry in store.read_journal(self._journal)}
        if self._known:
            say(f"the traces of {len(self._known):,} questions were counted before, see {store.shown(self._journal)}")

    def of(self, question: str, outputs: list[str]) -> list[int]:
        """Tokens of the row that a question makes with each of some traces."""
        texts = store.hash_json([question, outputs])[:24]
        if texts in self._known:
            return self._known[texts]
        tokens = [len(trained_ids(self._tokenizer, question, output, mode="system2")[0]) for output in outputs]
        if outputs:
            store.make_folder(self._journal.parent)
            store.add_to_journal(self._journal, {"id": texts, "tokens": tokens})
        return tokens

    def remove(self) -> None:
        """Forget what was counted."""
        self._journal.unlink(missing_ok=True)
        for folder in (self._journal.parent, self._journal.parent.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _counting(tokenizer, fresh: bool) -> Iterator[_TokenCounts]:
    """Token counts that go once the block has ended, well or for data that will not do; a kill and a hub that goes away leave them."""
    counts = _TokenCounts(tokenizer, fresh)
    try:
        yield counts
    except DataError:
        counts.remove()
        raise
    counts.remove()


class _Selection:
    """Takes the best trace of each question into a spool, and counts what it does not take."""

    def __init__(self, spool: Spool, limits: Limits, counts: _TokenCounts) -> None:
        self.spool, self.limits, self.counts = spool, limits, counts
        self.wider = widenings(limits)
        self.read, self.dropped, self.refused, self.taken = 0, Counter(), Counter(), Counter(dict.fromkeys(KINDS, 0))
        self.shortest: int | None = None
        self.before = {name: [0] * (HIGHEST + 1) for name in ("RV", "CD")}

    def read_all(self, mixed: Iterable[tuple[Source, dict]]) -> None:
        """Read until the rows that are wanted are kept, or the sources end."""
        schemas: dict = {}
        with progress("Choosing traces", total=self.limits.rows) as update:
            for source, raw in mixed:
                if id(source) not in schemas and raw.get(TRACE_LIST) == []:
                    self.read, self.dropped = self.read + 1, self.dropped + Counter({NO_TRACE: 1})  # it shows no schema yet
                    continue
                if id(source) not in schemas:
                    schemas[id(source)] = read_schema(source, raw, self.limits), provenance(source)
                    if not schemas[id(source)][0].names["correct"]:
                        say(f"{source.name} does not say which traces are correct: all are taken for it.")
                self.read += 1
                reason = self._take(raw, *schemas[id(source)])
                self.dropped.update([reason] if reason else [])
                if self.read % 50 == 0:
                    update(self.spool.count, note=f"{self.read:,} read")
                if self.spool.count == self.limits.rows:
                    break
            update(self.spool.count, total=self.spool.count, note=f"{self.read:,} read")

    def _take(self, raw: dict, schema: Schema, origin: dict) -> str | None:
        """Keep one source row's best trace. Returns why none was kept, or None."""
        question, reason = read_question(schema, raw)
        if reason:
            return reason
        traces, malformed = read_traces(schema, raw)
        self.refused.update(malformed)
        if not traces:
            return next(iter(malformed), NO_TRACE)
        self._count_levels(traces)
        question_id = row_id(question)
        if self.spool.has(question_id):
            self.refused[OF_DUPLICATE] += len(traces)
            return DUPLICATE
        trace, reason = self._best(question, question_id, traces)
        if trace:
            levels = {name: level for name, level in (("RV", trace.rv), ("CD", trace.cd)) if level is not None}
            named = {"teacher": trace.teacher} if trace.teacher else {}
            row = {"id": question_id, "instruction": question, "input": "", "output": trace.output, **origin, **named, **levels}
            kind = trace.kind if self.limits.long_share is not None else None
            self.spool.add(row, kind)
            self.taken[kind] += 1
        return reason

    def _best(self, question: str, question_id: str, traces: list[Trace]) -> tuple[Trace | None, str | None]:
        """The trace to take, or why none is."""
        tokens = self.counts.of(question, [trace.output for trace in traces if trace.correct])
        self.shortest = min(tokens + ([self.shortest] if self.shortest else []), default=None)
        counted = iter(tokens)
        traces = [replace(trace, tokens=next(counted)) if trace.correct else trace for trace in traces]
        refusals = [refusal(trace, self.limits) for trace in traces]
        self.refused.update(reason for reason in refusals if reason)
        fitting = [trace for trace, reason in zip(traces, refusals, strict=True) if not reason]
        if not fitting:
            self.spool.miss(question_id, gained(traces, self.wider))
            return None, question_refusal(refusals, self.limits)
        best = choose(fitting, self.taken, self.limits)
        if best is None:
            self.spool.miss(question_id, [WITHOUT_SHARE])
            self.refused[_too_many(fitting[0].kind)] += len(fitting)
            return None, _too_many(fitting[0].kind)
        self.refused[NOT_NEAREST] += len(fitting) - 1
        return best, None

    def _count_levels(self, traces: list[Trace]) -> None:
        for trace in traces:
            for name, level in (("RV", trace.rv), ("CD", trace.cd)):
                if level is not None:
                    self.before[name][int(level)] += 1

    def balance(self, seed: int) -> None:
        """Where the sources ended before both quotas of `long_share` were full, drop what one kind has too much of."""
        if self.limits.long_share is None or self.spool.count == self.limits.rows:
            return
        for kind, size in balanced(self.taken, self.limits.long_share).items():
            removed = self.spool.trim(kind, size, seed, WITHOUT_SHARE)
            if removed:
                say(f"{removed:,} {kind} traces are dropped, as there are too few others for long_share = {self.limits.long_share:g}.")
                self.dropped[_too_many(kind)] += removed
                self.refused[_too_many(kind)] += removed

    def facts(self) -> dict:
        """What Prepared shows, and the limits, for the manifest."""
        kept, limits = self.spool.count, self.limits
        short = not kept or (limits.rows is not None and kept < limits.rows)
        refused = {reason: count for reason, count in self.refused.items() if count}
        return {
            "read": self.read,
            "dropped": dict(self.dropped),
            "traces": {"read": kept + sum(refused.values()), "kept": kept, "dropped": refused},
            "histograms": {name: {"before": before, "after": self._levels_kept(name)} for name, before in self.before.items()},
            "advice": advise(limits, self.read, kept, self.spool.missed(), self.shortest) if short else [],
            "limits": {
                "rv": limits.rv,
                "cd": limits.cd,
                "max_length": limits.max_length,
                "long_share": limits.long_share,
                "rows": limits.rows,
            },
        }

    def _levels_kept(self, name: str) -> list[int]:
        counts = [0] * (HIGHEST + 1)
        for level, rows in self.spool.count_by(name).items():
            if level is not None:
                counts[int(level)] += rows
        return counts


def _too_many(kind: str) -> str:
    return f"a {kind} trace more than long_share has place for"
