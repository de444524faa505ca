"""Ask models questions in a subprocess (`python -m distill.answers --request FILE`), one model in memory at a time.

Every answer is in its model's *journal* as soon as its batch is done: one JSON line `{"id", "text", "tokens", "stopped", "seconds"}`.
A journal that outlives the process is how labelling, comparing and scoring go on after an interruption.
"""

import argparse
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from . import engine, models, stages, store
from .console import progress, say
from .errors import DistillError
from .generation import Answer, generate
from .machine import teacher_settings
from .models import bits_for, device, load_to_answer
from .prompt import asked_ids
from .store import MODEL

FACTS = ("bits", "parameters", "weight_bytes", "device", "load_seconds", "versions")
PACKAGES = ("torch", "transformers", "tokenizers")


def ask(requests: list[dict], run_folder: Path, title: str = "Asking") -> dict[str, dict]:
    """Ask several models, each its own questions, in one subprocess.

    requests    [{"name", "path", "bits", "questions", "max_new_tokens"}] and, where wanted, "role", "journal", "temperature", "top_p",
                "seed", "batch_size", "batch_tokens" (`generation.generate`)
        bits            of a weight, 4, 8, 16 or 32; None: 16 on a GPU, 32 on a CPU
        role            "student" (the default) or "teacher": what a message calls the model
        questions       [{"instruction", "mode"}] and, where wanted, "input" and "id" (its name in the journal; its number otherwise)
        max_new_tokens  mode → limit of an answer, in tokens
        journal         a file that answers are added to; without one, a temporary file
    run_folder  where the log goes, answers.log
    Returns {name: {"bits", "parameters", "weight_bytes", "device", "load_seconds", "versions": {package: version},
    "answers": [{"text", "tokens", "stopped", "seconds"}]}}, answers in the order of the questions.
    Raises BackendError with the end of the log.
    """
    store.make_folder(run_folder)
    with TemporaryDirectory(dir=run_folder) as folder:
        file, facts = Path(folder) / "request.json", Path(folder) / "facts.json"
        requests = [{"journal": str(Path(folder) / f"{number}.jsonl"), **request} for number, request in enumerate(requests)]
        store.write_json(file, {"requests": requests, "facts": str(facts)})
        log = run_folder / "answers.log"
        with progress(title, total=sum(len(request["questions"]) for request in requests)) as update:
            arguments = ["--request", str(file)]
            ended = engine.run_module("distill.answers", arguments, log, lambda event: update(event["done"], note=event["name"]))
        if ended.status or not facts.is_file():
            raise engine.failure(title, ended, log)
        found = store.read_json(facts)
        return {request["name"]: {**found[request["name"]], "answers": _in_order(request)} for request in requests}


def ask_once(requests: list[dict], run_folder: Path, title: str = "Asking", *, fresh: bool = False) -> dict[str, dict]:
    """`ask` for greedy answers that are kept: what a model was asked before it is not asked again, also where that run was killed.

    requests  as `ask` takes them, without "journal", sampling, and ids of the questions; of a teacher, "bits" None takes those that
              its earlier answers were given in, else 8, or 4 where 8 do not fit
    fresh     ask all of it anew; a teacher's earlier answers go with the bits they were given in
    Returns what `ask` returns. The answers lie in `runs/answers/<key>.jsonl`; the key hashes the model's files, its role, the bits that
    were asked for, the kind of device and the lab's code that asks. Seconds and versions are those of the day on which an answer was given.
    Raises PreflightError where a teacher that is to be asked something does not fit.
    """
    kept = [_Kept(request) for request in requests]
    with ExitStack() as locks:
        for journal in {one.journal for one in kept}:
            store.make_folder(journal.parent)
            locks.enter_context(store.lock(journal))
        for one in kept:
            one.recall(fresh)
        waiting = [one.to_ask(fresh) for one in kept if one.is_waiting()]
        made = ask(waiting, run_folder, title) if waiting else {}
        return {one.request["name"]: one.with_answers(made.get(one.request["name"])) for one in kept}


def in_bits_of_journal(path: str, request: dict, bits: int | None, journal: Path, *, fresh: bool = False) -> dict:
    """`teacher_settings` on this machine, in the bits of a journal's earlier answers where it has some; the journal says which.

    request  what the teacher is to be asked, as `ask` takes it
    bits     those that you ask for; None takes the journal's, else 8, or 4 where 8 do not fit
    fresh    begin the journal anew, once it is known that the teacher fits
    """
    entries = {entry["id"]: entry for entry in store.read_journal(journal)}
    earlier = entries.pop(MODEL, {}).get("bits") if len(entries) > 1 and not fresh else None
    if earlier and not bits:
        say(f"teacher: {earlier} bits (those of its earlier answers)")
    held = teacher_settings(path, request, bits or earlier)
    if fresh:
        store.remove_file(journal)
    if not earlier:
        store.add_to_journal(journal, {"id": MODEL, "bits": held["bits"]})
    return held


class _Kept:
    """One model's questions, and which of them its journal has the answers to."""

    def __init__(self, request: dict) -> None:
        self.request, limits = request, request["max_new_tokens"]
        self.is_teacher = request.get("role") == "teacher"
        own = [self.is_teacher, request["bits"], engine.gpu_is_visible(), stages.code(*stages.ANSWERING)]
        decisive = [models.fingerprint(request["path"]), *own]
        self.journal = store.ROOT / "runs" / "answers" / f"{store.hash_json(decisive)[:24]}.jsonl"
        asked = [(each["mode"], each["instruction"], each.get("input") or "", limits[each["mode"]]) for each in request["questions"]]
        self.names = [store.hash_json(one)[:24] for one in asked]
        self.known: dict = {}

    def recall(self, fresh: bool) -> None:
        """Take up what the journal holds, and say how many answers that are."""
        self.known = {} if fresh else {entry.pop("id"): entry for entry in store.read_journal(self.journal)}
        if count := sum(name in self.known for name in self.names):
            say(f"{self.request['name']}: {count:,} of {len(self.names):,} answers had been given before ({store.shown(self.journal)})")

    def is_waiting(self) -> bool:
        """Whether the model has to be loaded: for answers, or for what is known of it alone."""
        return not (self.known.keys() >= set(self.names) and self.known.get(MODEL, {}).keys() >= set(FACTS))

    def to_ask(self, fresh: bool) -> dict:
        """The request for what is missing; a teacher's says how it is held."""
        path, bits = self.request["path"], self.request["bits"]
        request = {**self.request, "questions": list(self._missing().values()), "journal": str(self.journal)}
        return request | (in_bits_of_journal(path, request, bits, self.journal, fresh=fresh) if self.is_teacher else {})

    def _missing(self) -> dict:
        """Name → question of what has no answer yet, each once."""
        asked = zip(self.names, self.request["questions"], strict=True)
        return {name: {**question, "id": name} for name, question in asked if name not in self.known}

    def with_answers(self, made: dict | None) -> dict:
        """What is known of the model, with the answers in the order of its questions.

        made  what `ask` returned for `to_ask`; None where nothing was asked
        """
        if made:
            self.known |= dict(zip(self._missing(), made["answers"], strict=True))
            self.known[MODEL] = {key: made[key] for key in FACTS}
            store.add_to_journal(self.journal, {"id": MODEL, **self.known[MODEL]})
        return {**self.known[MODEL], "answers": [self.known[name] for name in self.names]}


def _in_order(request: dict) -> list[dict]:
    written = {entry.pop("id"): entry for entry in store.read_journal(Path(request["journal"]))}
    return [written[_name(number, question)] for number, question in enumerate(request["questions"])]


def _name(number: int, question: dict):
    return question.get("id", number)


def answer_all(model, tokenizer, request: dict, finished=lambda answers: None) -> dict:
    """Ask one loaded model, in this process. Returns what `ask` returns for a model, without "bits" and "load_seconds".

    finished  called with {question number: Answer} after each batch
    """
    questions = request["questions"]
    answers: list[Answer | None] = [None] * len(questions)
    for mode, numbers in _by_mode(questions).items():
        asked = [asked_ids(tokenizer, questions[number]["instruction"], questions[number].get("input") or "", mode) for number in numbers]

        def keep(done: dict[int, Answer], numbers: list[int] = numbers) -> None:
            named = {numbers[place]: answer for place, answer in done.items()}
            for number, answer in named.items():
                answers[number] = answer
            finished(named)

        sampling = {key: request[key] for key in ("temperature", "top_p", "seed", "batch_size", "batch_tokens") if key in request}
        generate(model, tokenizer, asked, request["max_new_tokens"][mode], finished=keep, **sampling)
    return {
        "parameters": model.num_parameters(),
        "weight_bytes": model.get_memory_footprint(),
        "device": str(model.device),
        "versions": {package: version(package) for package in PACKAGES},
        "answers": [asdict(answer) for answer in answers],
    }


def _by_mode(questions: list[dict]) -> dict[str, list[int]]:
    """Question numbers by the mode they are asked in."""
    numbers: dict = defaultdict(list)
    for number, question in enumerate(questions):
        numbers[question["mode"]].append(number)
    return numbers


# In the engine's process


def main() -> None:
    """Answer the questions of a request file into the journals, then write the models' facts."""
    parser = argparse.ArgumentParser(prog="python -m distill.answers", description="Ask models questions, one model at a time.")
    parser.add_argument("--request", required=True, help="JSON: {requests, facts}, as distill.answers.ask writes it")
    job = store.read_json(parser.parse_args().request)
    try:
        facts, done = {}, 0
        for request in job["requests"]:
            facts[request["name"]] = _answer_one(request, done)
            done += len(request["questions"])
        store.write_json(job["facts"], facts)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _answer_one(request: dict, before: int) -> dict:
    """Ask one model, then let it go; returns its facts."""
    started = time.perf_counter()
    place, reason = device()
    bits = bits_for(request["path"], request["bits"])
    model, tokenizer = load_to_answer(request["path"], request.get("role", "student"), bits)
    load_seconds = time.perf_counter() - started
    print(f"{request['name']}: {bits}-bit on {place} ({reason}), loaded in {load_seconds:.1f} s")
    done = before

    def finished(answers: dict[int, Answer]) -> None:
        nonlocal done
        for number, answer in answers.items():
            store.add_to_journal(request["journal"], {"id": _name(number, request["questions"][number]), **asdict(answer)})
        done += len(answers)
        engine.emit(name=request["name"], done=done)

    engine.emit(name=request["name"], done=done)
    made = answer_all(model, tokenizer, request, finished)
    return {key: {**made, "bits": bits, "load_seconds": load_seconds}[key] for key in FACTS}


if __name__ == "__main__":
    main()
