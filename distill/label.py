"""Answers of a teacher as labels: batches in a subprocess, each answer on disk as it comes, continued where an interruption left it.

Answers are kept in a *journal*, `runs/labels/<key>.jsonl`. Its key hashes what decides an answer besides the question (the teacher's
files, the bits that were asked for, mode, limits, sampling, the lab's code that asks), so that the same request never asks twice and
another one never takes its answers.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from . import asking, models, stages, store
from .answers import answer_all, ask, in_bits_of_journal
from .config import is_hub_name, model_name
from .console import say
from .endpoint import Endpoint, generation
from .errors import ConfigError, DataError, shortened
from .prompt import MODES, chat_format, format_prompt, is_trace, is_unicode, row_id, tokenizer_hash
from .store import MODEL

CUT_OFF, EMPTY = "an answer cut off at max_new_tokens", "an empty answer"
NO_TRACE = "an answer that is not <think>…</think> and a solution"


@dataclass(frozen=True)
class Labeled:
    """What labelling gave.

    rows        the rows with the teacher's answers as "output" and its name as "teacher", in their order
    dropped     reason → rows
    reused      answers that an earlier run had given already
    unanswered  rows, among the dropped, that a teacher behind an API gave no answer to: asked once more, they may get one
    bits        of a weight of a teacher that was loaded by its name, as it answered
    """

    rows: list[dict]
    dropped: dict
    reused: int
    unanswered: int = 0
    bits: int | None = None

    @property
    def incomplete(self) -> str:
        """Why the labelling is not to be taken for finished; empty where it is."""
        return f"{self.unanswered:,} rows had no answer" if self.unanswered else ""


def label_with_teacher(
    teacher_model,
    teacher_tokenizer,
    items: list,
    batch_size: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    mode: str = "system1",
) -> list[dict]:
    """The teacher's answers to a list of questions; those cut off or empty are dropped, and said.

    teacher_model      a loaded model (then with its `teacher_tokenizer`); a name or folder, which is loaded in 8-bit in a subprocess; or an
                       Endpoint, which EasyDistill 2.x asks
    items              questions: rows {"instruction"} and, where wanted, "input" and "id"; or plain texts
    batch_size         questions a batch; None fills batches by a budget of tokens
    max_new_tokens     limit of an answer, in tokens
    temperature, top_p 0 is greedy; above, sampled
    mode               "system1" asks plainly, "system2" asks for reasoning first
    Returns the rows with "output" and "teacher". A second call with the same teacher and settings asks only what is not answered yet.
    Raises ConfigError `Invalid teacher model: …`, DataError for items that are no questions.

    One item in: "Is 1234 even or odd?"
    One row out: {"id": "…", "instruction": "Is 1234 even or odd?", "output": "even", "teacher": "data/micro/teacher"}
    """
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "batch_size": batch_size}
    return label_rows(rows_of(items), teacher_of(teacher_model, teacher_tokenizer), mode=mode, **limits).rows


def rows_of(items: list) -> list[dict]:
    """Items as rows with an id each. Raises DataError that names the first item that is no question."""
    rows = []
    for number, item in enumerate(items):
        row = {"instruction": item} if isinstance(item, str) else item
        text = row.get("instruction") if isinstance(row, dict) else None
        texts = [text, (row.get("input") or "") if isinstance(row, dict) else ""]
        if not all(isinstance(part, str) and is_unicode(part) for part in texts) or not text.strip():
            raise DataError(f"item {number} is no question: give a text, or a row with an instruction. It is {shortened(item, 80)}.")
        rows.append({"id": _key(row), **row})
    return rows


class _Named:
    """A teacher by name: its files say who it is, a subprocess loads it."""

    def __init__(self, name: str, bits: int | None) -> None:
        self.path = model_name(name)
        chat_format(models.check_model(self.path, "teacher"), "system1")
        self.bits = bits

    @property
    def name(self) -> str:
        return self.path if is_hub_name(self.path) else store.shown(self.path)

    def identity(self) -> list:
        return [models.fingerprint(self.path), self.bits]

    def answer(self, request: dict) -> None:
        journal = Path(request["journal"])
        teacher = {"name": "teacher", "role": "teacher", "path": self.path, **in_bits_of_journal(self.path, request, self.bits, journal)}
        folder = journal.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left; the journal's lock says that it is ours
        ask([{**teacher, **request}], folder, "Labelling")


class _Loaded:
    """A teacher that is loaded already: what it answers to a probe says who it is, whatever its name."""

    def __init__(self, model, tokenizer) -> None:
        chat_format(tokenizer, "system1")
        self.model, self.tokenizer = model, tokenizer
        self.name = str(getattr(model, "name_or_path", "") or type(model).__name__)

    def identity(self) -> list:
        return [models.probe(self.model), tokenizer_hash(self.tokenizer)]

    def answer(self, request: dict) -> None:
        names = [question["id"] for question in request["questions"]]

        def finished(answers: dict) -> None:
            for number, answer in answers.items():
                store.add_to_journal(request["journal"], {"id": names[number], **vars(answer)})

        answer_all(self.model, self.tokenizer, request, finished)


class _Behind:
    """A teacher behind an API: its address or the files that are served say who it is, EasyDistill 2.x asks it."""

    def __init__(self, endpoint: Endpoint) -> None:
        endpoint.check()
        self.endpoint, self.name = endpoint, endpoint.name

    def identity(self) -> list:
        return self.endpoint.identity()

    def answer(self, request: dict) -> None:
        ((mode, limit),) = request["max_new_tokens"].items()
        reasons = mode == "system2"
        task = generation(limit, request["temperature"], self.endpoint.prompt if reasons else None, traces=reasons)
        rows = [{"id": one["id"], "instruction": format_prompt(one["instruction"], one["input"])} for one in request["questions"]]
        asking.ask(self.endpoint, task, rows, Path(request["journal"]), "Labelling")


def teacher_of(model, tokenizer=None, bits: int | None = None):
    """A teacher to label with, checked: a name or folder, loaded in a subprocess; a loaded model with its tokenizer; Endpoint.

    bits  of a weight of the one that is loaded by its name; None takes 8, or 4 where 8 do not fit
    """
    if isinstance(model, Endpoint):
        return _Behind(model)
    if isinstance(model, str | Path):
        return _Named(str(model), bits)
    if tokenizer is None:
        raise ConfigError("A loaded teacher_model needs its teacher_tokenizer.")
    return _Loaded(model, tokenizer)


def label_rows(
    rows: list[dict],
    teacher,
    *,
    mode: str = "system1",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> Labeled:
    """`label_with_teacher` by a `teacher_of`; says what was dropped, and what an earlier run had answered already.

    fresh  ask every row anew
    """
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "batch_size": batch_size, "seed": seed}
    behind = teacher.endpoint if isinstance(teacher, _Behind) else None
    _check(mode, limits, behind)
    decisive = {"max_new_tokens": max_new_tokens} | (
        {"temperature": temperature, "top_p": float(top_p), "seed": seed} if temperature else {}
    )
    own = stages.code(*stages.LABELLING)
    journal = store.ROOT / "runs" / "labels" / f"{store.hash_json([teacher.identity(), mode, decisive, own])[:24]}.jsonl"
    store.make_folder(journal.parent)
    asked = {_key(row): row for row in rows}
    with store.lock(journal):
        known = set() if fresh else {entry["id"] for entry in store.read_journal(journal)} - {MODEL}
        waiting = [_question(key, row, mode) for key, row in asked.items() if key not in known]
        if waiting:
            sampling = {key: value for key, value in limits.items() if key != "max_new_tokens" and value is not None}
            sampling["seed"] = seed + len(known)  # going on with the same seed would draw the same luck again
            teacher.answer({"questions": waiting, "journal": str(journal), "max_new_tokens": {mode: max_new_tokens}, **sampling})
        answers = {entry["id"]: entry for entry in store.read_journal(journal)}
    reused = sum(key in known for key in asked)
    bits = answers.pop(MODEL, {}).get("bits")
    labeled = replace(_kept(rows, answers, teacher.name, reused, behind, traces=bool(behind) and mode == "system2"), bits=bits)
    say(f"labelled {len(labeled.rows):,} of {len(rows):,} rows by {teacher.name} ({labeled.reused:,} answered before)")
    for reason, count in labeled.dropped.items():
        say(f"  dropped {count:,}: {reason}")
    return labeled


def _key(row: dict) -> str:
    """What the journal calls a row: by its question, whatever its own id."""
    return row_id(row["instruction"], row.get("input") or "")


def _question(key: str, row: dict, mode: str) -> dict:
    return {"id": key, "instruction": row["instruction"], "input": row.get("input") or "", "mode": mode}


def _kept(rows: list[dict], answers: dict, teacher: str, reused: int, behind: Endpoint | None = None, traces: bool = False) -> Labeled:
    """Rows with their answers; `behind` may have left one without, `traces` wants each to reason between tags first."""
    kept, dropped, unanswered = [], Counter(), 0
    for row in rows:
        answer = answers.get(_key(row)) if behind else answers[_key(row)]
        unanswered += answer is None
        reason = asking.no_answer(behind) if answer is None else _why_dropped(answer, traces)
        if reason:
            dropped[reason] += 1
        else:
            kept.append({**row, "output": answer["text"].strip(), "teacher": teacher})
    return Labeled(kept, dict(dropped), reused, unanswered)


def _why_dropped(answer: dict, traces: bool) -> str | None:
    text = answer["text"].strip()
    if not answer["stopped"]:
        return CUT_OFF
    if not text:
        return EMPTY
    return NO_TRACE if traces and not is_trace(text) else None


def _check(mode: str, limits: dict, behind: Endpoint | None) -> None:
    problems = [] if mode in MODES else [f"mode = {mode!r}: is not one of {', '.join(MODES)}."]
    for key in ("max_new_tokens", "batch_size"):
        value = limits[key]
        if not (value is None and key == "batch_size") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            problems.append(f"{key} = {value!r}: give a whole number above 0.")
    for key, high in (("temperature", 10), ("top_p", 1)):
        value = limits[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high or (key == "top_p" and not value):
            problems.append(f"{key} = {value!r}: lies outside 0 to {high}.")
    if behind and limits["top_p"] != 1:
        problems.append(f"top_p = {limits['top_p']!r}: EasyDistill 2.x hands no top_p on to an endpoint. Leave it at 1.")
    if behind and limits["batch_size"] is not None:
        problems.append(f"batch_size = {limits['batch_size']!r}: an endpoint makes its own batches. Set its workers and chunk_rows.")
    if problems:
        raise ConfigError.from_problems("the labelling", problems)


def label_file(source: str | Path, teacher: str | Endpoint, out: str | Path, *, bits: int | None = None, **settings) -> Labeled:
    """Label a file of rows, and its validation rows where there are some; write `out` and its validation file whole.

    source    JSON list or JSON lines of rows {"instruction"}; an "output" that stands there is replaced
    teacher   its name or folder; bits: those it is loaded in, None for 8, or 4 where 8 do not fit; or an Endpoint
    settings  those of `label_rows`
    Raises DataError where no row gets a label; then nothing is written.
    """
    source, out = store.resolve(source), store.resolve(out)
    split, out_split = store.validation_path(source), store.validation_path(out)
    if {source, split} & {out, out_split}:
        raise ConfigError(f"out = {store.shown(out)} is the source, which labelling never changes; name another place.")
    store.check_writable(out)
    with store.lock(out):
        return _label_file({source: out} | ({split: out_split} if store.is_file(split) else {}), teacher, bits, settings)


def _label_file(places: dict[Path, Path], teacher: str | Endpoint, bits: int | None, settings: dict) -> Labeled:
    """Label the files of `places`, each to its own; the first is the training file."""
    source, out = next(iter(places.items()))
    rows = {place: rows_of(list(store.read_rows(place))) for place in places}
    asked = teacher_of(teacher, bits=bits)
    labeled = label_rows([row for part in rows.values() for row in part], asked, **settings)
    given = {_key(row): {name: row[name] for name in ("output", "teacher")} for row in labeled.rows}
    parts = {place: [{**row, **given[_key(row)]} for row in part if _key(row) in given] for place, part in rows.items()}
    if not parts[source]:
        raise DataError(f"No row of {store.shown(source)} has a label: {labeled.dropped}. Raise max_new_tokens.")
    if len(places) == 1 and store.is_file(store.validation_path(out)):
        store.remove_file(store.validation_path(out))  # of an earlier labelling, with questions that may be among these
    for place in reversed(places):  # the companion first, the manifest that binds them last
        store.write_rows(places[place], parts[place])
    behind = isinstance(teacher, Endpoint)
    who = {"teacher": teacher.name, "base_url": teacher.base_url} if behind else {"teacher": teacher, "bits": labeled.bits}
    said = {name: value for name, value in settings.items() if name != "fresh"}
    facts = {**who, "read": sum(map(len, rows.values())), "dropped": labeled.dropped, **said}
    store.write_manifest(out, facts, files=list(places.values()))
    say(f"  {store.shown(out)}")
    return labeled
