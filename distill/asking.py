"""Ask a teacher behind an API by way of EasyDistill 2.x, chunk by chunk; what one call of it brought is on disk before the next begins.

EasyDistill ends with exit status 0 whatever is missing, writes only at its end, and cannot go on where it stood. So ids are compared in
and out, what is missing is asked again, and answers go to a journal: one JSON line `{"id", …, "seconds"}` each. A chunk has as many rows
as are answered in CHUNK_SECONDS at the pace seen, so that a kill loses no more than that.
"""

import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import easydistill, process, stages, store
from .config import model_name
from .console import progress, say
from .easydistill import Installation
from .endpoint import INPUT, OUTPUT, Endpoint, Task
from .errors import BackendError, shortened
from .server import Server, serving, without_proxy

JOB = "job.json"
NAME, REAL_NAME = "LAB_MODEL", "LAB_MODEL_NAME"  # EasyDistill expands what $LAB_MODEL says once more, and what that says no more
PRIVATE = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONPATH", "PYTHONHOME")  # no business of EasyDistill's
ANSWERED = re.compile(r'HTTP Request: POST .*"HTTP/1\.1 200')
RETRIES = 3  # of EasyDistill's own, at most, each as long as an answer may take
PAUSES_SECONDS = (1, 5, 15)  # before each further attempt
GRACE_SECONDS = 60
SAID_LINES = 500
CHUNK_SECONDS = 180  # of a chunk, which a kill loses
PROOF_ROWS = 8  # so many without an answer, one after another, are the server's fault and not theirs


def no_answer(endpoint: Endpoint) -> str:
    """The reason for which a row without an answer is dropped."""
    return f"no answer from the server after {endpoint.attempts} attempts"


def answered(endpoint: Endpoint, task: Task, rows: list[dict], kind: str) -> tuple[dict[str, dict], int]:
    """Every row's entry by its id, asked now or by an earlier run; and how many were known before. A row without an answer is left out.

    rows  [{"id", …}], ids distinct
    kind  the folder of the journal, runs/<kind>; the journal's name hashes what decides an answer besides the row
    """
    own = [stages.code(*stages.ASKING), *[store.hash_file(place) for place in [_prompts_of(easydistill.require(2), task)] if place]]
    decisive = [endpoint.identity(), task.job, task.files, own]
    journal = store.ROOT / "runs" / kind / f"{store.hash_json(decisive)[:24]}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with store.lock(journal):
        known = {entry["id"] for entry in store.read_journal(journal)}
        if waiting := [row for row in rows if row["id"] not in known]:
            ask(endpoint, task, waiting, journal, title=kind.capitalize())
        entries = {entry["id"]: entry for entry in store.read_journal(journal)}
    return entries, sum(row["id"] in known for row in rows)


def ask(endpoint: Endpoint, task: Task, rows: list[dict], journal: Path, title: str) -> None:
    """Ask for what `rows` (each {"id", …}, ids distinct) need, and add an entry for each to the journal, whose lock is held.

    A row that stays without an answer gets no entry, so that the next run asks it again.
    Raises BackendError where EasyDistill 2.x is missing, PROOF_ROWS stay without an answer, or none of the first is of any use.
    """
    installation = easydistill.require(2)
    _prompts_of(installation, task)
    folder = journal.with_suffix("")
    with _working_folder(folder), _server(endpoint, journal) as server, progress(title, total=len(rows)) as update:
        size = _ChunkSize(endpoint.workers, endpoint.chunk_rows)
        asker = _Asker(endpoint, task, installation, server, folder, journal.with_suffix(".log"), update, size, len(rows))
        asker.log.unlink(missing_ok=True)
        keeper = _Keeper(endpoint, task, journal, in_use=bool(store.read_journal(journal)))
        while asker.done < len(rows):
            for entries in asker.ask(rows[asker.done : asker.done + size.rows]):
                keeper.keep(entries)
        keeper.end()


@contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    """An empty folder while the block runs. What a killed run left is removed: the journal's lock says that it is nobody's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server(endpoint: Endpoint, journal: Path) -> Iterator[Server | None]:
    """The server that the lab runs for an endpoint without an address; None where there is an address."""
    if endpoint.base_url:
        yield None
        return
    with serving(model_name(endpoint.model), journal.with_suffix(".server.log")) as server:
        yield server


def _prompts_of(installation: Installation, task: Task) -> Path | None:
    """EasyDistill's own prompt file that a task needs. Raises BackendError where the installation lacks it."""
    if not task.prompts:
        return None
    place = installation.home / "configs" / "prompts" / task.prompts
    if not store.is_file(place):
        raise BackendError(
            f"EasyDistill {installation.version} in {store.shown(installation.home)} comes without its judge's prompts "
            f"(configs/prompts/{task.prompts}), which only a checkout has. Let {easydistill.HOME} name a checkout of "
            f"{easydistill.TAGS[2]}, or run `{easydistill.setup_call(2)}` without it."
        )
    return place


@dataclass
class _Keeper:
    """Puts entries into the journal; those of a new one wait until one of them is of use, so that a wrong setting leaves no labels."""

    endpoint: Endpoint
    task: Task
    journal: Path
    in_use: bool
    waiting: list = field(default_factory=list)

    def keep(self, entries: list[dict]) -> None:
        """Keep what one call brought. Raises BackendError where chunk_rows answers came and none is of any use."""
        self.waiting += entries
        self.in_use = self.in_use or not all(map(self.task.fault, entries))
        if self.in_use:
            for entry in self.waiting:
                store.add_to_journal(self.journal, entry)
            self.waiting = []
        elif len(self.waiting) >= self.endpoint.chunk_rows:
            self.end()

    def end(self) -> None:
        """Raise BackendError where all answers were of no use."""
        if not self.waiting:
            return
        counted = ", ".join(f"{count} {what}" for what, count in Counter(map(self.task.fault, self.waiting)).items())
        raise BackendError(
            f"None of the first {len(self.waiting)} answers of {self.endpoint.name} can be used: {counted}. The rest is not asked. Raise "
            "max_new_tokens where answers are cut off; where they lack <think>…</think>, let prompt_file ask for it in words that this "
            "teacher understands, and have the server leave the reasoning in the answer: no reasoning parser; `transformers serve` has one "
            "for Qwen's models, unless the lab itself starts it. "
            f"The first answer begins: {shortened(self.waiting[0].get('text', ''), 200)!r}"
        )


class _ChunkSize:
    """How many rows to ask next: at first one a worker, then what is answered in CHUNK_SECONDS at the pace seen."""

    def __init__(self, workers: int, most: int) -> None:
        """most  rows of a chunk, however fast they are answered"""
        self.workers, self.most = workers, most
        self.rows, self.least = min(workers, most), 1
        self._before = (0, 0.0)

    def learn(self, rows: int, answered: int, seconds: float) -> None:
        """Choose the next chunk's size by how many rows of one were answered, and in what time."""
        if not answered:
            return
        rows_before, seconds_before = self._before
        if rows < rows_before <= self.workers and seconds / seconds_before > (1 + rows / rows_before) / 2:
            self.least = rows_before  # fewer took nearly as long: the server answers so many side by side
        self._before = rows, seconds
        fitting = int(answered * CHUNK_SECONDS / seconds)
        if fitting < rows <= self.workers:
            fitting = rows // 2  # by half, so that it shows whether fewer take less time
        elif rows > self.workers or fitting > self.workers:
            fitting = max(fitting // self.workers, 1) * self.workers  # a round of fewer rows takes as long as a full one
        self.rows = min(max(fitting, self.least), self.most)


@dataclass
class _Asker:
    """EasyDistill at work on one chunk after another."""

    endpoint: Endpoint
    task: Task
    installation: Installation
    server: Server | None
    folder: Path
    log: Path
    update: object
    size: _ChunkSize
    total: int
    done: int = 0
    unanswered: int = 0  # rows, since the last answer

    def ask(self, chunk: list[dict]) -> Iterator[list[dict]]:
        """Yield a chunk's entries as each attempt brings them, none for a row that no attempt brought.

        Raises BackendError where the whole chunk, and what came before it up to PROOF_ROWS, stays without an answer.
        """
        missing, said = chunk, ""
        for attempt in range(self.endpoint.attempts):
            if attempt:
                say(f"{len(missing)} of {len(chunk)} rows came back without an answer; asking them again")
                time.sleep(PAUSES_SECONDS[min(attempt, len(PAUSES_SECONDS)) - 1])
            said, ended = self._run(missing, len(chunk) - len(missing))
            found = self._entries(missing, ended.seconds)
            if not attempt:
                self.size.learn(len(chunk), len(found), ended.seconds)
            yield [found[row["id"]] for row in missing if row["id"] in found]
            missing = [row for row in missing if row["id"] not in found]
            if not missing or (missing == chunk and PERMANENT.search(said)):
                break  # asking again would say the same
        self.done += len(chunk)
        self.update(self.done)
        self._check_answered(chunk, missing, said, ended)

    def _check_answered(self, chunk: list[dict], missing: list[dict], said: str, ended: process.Ended) -> None:
        """Raise BackendError where so many rows have no answer that it is the server's fault."""
        if missing != chunk or _about_the_rows(said):
            self.unanswered = 0
            return
        self.unanswered += len(chunk)
        if PERMANENT.search(said) or self.unanswered >= min(PROOF_ROWS, self.endpoint.chunk_rows, self.total):
            raise self._failure(said, ended)

    def _run(self, rows: list[dict], before: int) -> tuple[str, process.Ended]:
        """Let EasyDistill do one job. Returns what it said, and how it ended."""
        if self.server:
            self.server.ensure()
        self._prepare(rows)
        lines: deque = deque(maxlen=SAID_LINES)
        calls = 0

        def hear(line: str) -> None:
            nonlocal calls
            lines.append(line)
            if ANSWERED.search(line):
                calls += 1
                self.update(self.done + min(before + calls // self.task.calls, before + len(rows)))

        silence = self.endpoint.timeout_seconds * (RETRIES + 1) + GRACE_SECONDS
        command = [*easydistill.command(self.installation), "--config", JOB]
        settings = {"cwd": self.folder, "env": self._environment(), "append": True, "silence_seconds": silence, "clean": self._clean}
        ended = process.run(command, self.log, hear, **settings)
        return "\n".join(lines), ended

    def _prepare(self, rows: list[dict]) -> None:
        """The job's files, in a folder where every path is a plain name."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        if store.is_dir(self.installation.home / "configs"):
            (self.folder / "configs").symlink_to(self.installation.home / "configs")
        for name, text in self.task.files.items():
            (self.folder / name).write_text(text, encoding="utf-8", newline="\n")
        store.write_jsonl(self.folder / INPUT, map(self.task.given, rows))
        store.write_json(self.folder / JOB, self._job())

    def _job(self) -> dict:
        job = json.loads(json.dumps(self.task.job))
        section = job
        for key in self.task.section:
            section = section[key]
        section["max_workers"] = self.endpoint.workers
        output = OUTPUT if "pipeline" not in job else "unused.jsonl"  # there, a stage writes what is wanted
        backend = {"type": "openai", "model_id": f"${NAME}", "timeout": self.endpoint.timeout_seconds, "max_retries": 0}
        return {**job, "backend": backend, "dataset": {"input_path": INPUT, "output_path": output}}

    def _environment(self) -> dict:
        """EasyDistill's environment variables: address, key and model's name among them, so that they stand in no file."""
        kept = {key: value for key, value in os.environ.items() if key not in (*PRIVATE, self.endpoint.key_variable)}
        address = {
            "OPENAI_BASE_URL": self.server.base_url if self.server else self.endpoint.base_url,
            "OPENAI_API_KEY": self.endpoint.key or "EMPTY",
            NAME: f"${REAL_NAME}",
            REAL_NAME: self.server.model_id if self.server else str(self.endpoint.model),
        }
        return without_proxy({**kept, **address, "PYTHONUNBUFFERED": "1"})

    def _clean(self, line: str) -> str:
        return line.replace(self.endpoint.key, "***") if self.endpoint.key else line

    def _entries(self, rows: list[dict], seconds: float) -> dict[str, dict]:
        """What EasyDistill wrote, by id; lines of other ids, and those that a kill cut short, are not taken."""
        asked = {row["id"] for row in rows}
        entries = {}
        for line in _whole_lines(self.folder / OUTPUT):
            key = line["id"] if "id" in line else line.get("metadata", {}).get("request_id")
            if key in asked and (entry := self.task.entry(line)):
                entries[key] = {"id": key, **entry, "seconds": seconds / len(rows)}
        return entries

    def _failure(self, said: str, ended: process.Ended) -> BackendError:
        fault, advice = name_fault(said, ended, self.endpoint)
        message = (
            f"EasyDistill brought no answer: {fault}. {advice} "
            f"Answers given before are kept; the same call goes on from there. The end of {store.shown(self.log)}:"
        )
        return BackendError("\n".join([message, *process.tail(self.log)]))


def _whole_lines(path: Path) -> Iterator[dict]:
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


# What a log without answers looks like → (the fault, what to do); the first that is found counts.
ROW_FAULTS = re.compile(r"context.length|maximum context|max_model_len|prompt is too long|content.(filter|management)", re.I)
FAULTS = (
    (
        r"error code: 40[13]|invalid.api.key|unauthorized",
        "the server refuses the key",
        "Put the right key into {key_variable}, which is {state}.",
    ),
    (r"error code: 429", "the server refuses so many requests", "Lower workers, or wait, and call again."),
    (
        r"model.{0,80}(not found|does not exist|not exist)|no such model|pinned to|unknown model|invalid model",
        "wrong model name: the server has no {model!r}",
        "Ask the server for its models (GET {base_url}/models).",
    ),
    (
        r"error code: 400\s*$",
        "the server refuses the requests without a reason, as `transformers serve` does at a wrong model name (here {model!r})",
        "Ask whoever runs the server for the model's name: for a folder it is the path as the server was given it.",
    ),
    (r"error code: 404", "nothing answers at this address", "Check the base_url, which usually ends in /v1, and the model's name."),
    (r"error code: 4\d\d", "the server refuses the requests", "See the log for its reason."),
    (r"error code: 5\d\d", "the server fails at the requests", "See the server's own log."),
    (r"timed? ?out", "no answer within {timeout_seconds:g} s", "Raise timeout_seconds, or lower workers and max_new_tokens."),
    (
        r"connect(ion)? ?error|connection refused|connection reset|health check failed|disconnected",
        "the server is down or cannot be reached",
        "Check that it runs and that the base_url is right.",
    ),
)


# a key, a name or an address that is wrong stays wrong
PERMANENT = re.compile("|".join(pattern for pattern, *_ in (FAULTS[0], FAULTS[2], FAULTS[3])), re.I)


def name_fault(said: str, ended: process.Ended, endpoint: Endpoint) -> tuple[str, str]:
    """Which of the known faults a run without answers looks like, and what to do."""
    facts = {**vars(endpoint), "model": str(endpoint.model), "state": "set now" if endpoint.key else "not set"}
    if ended.overdue:
        return f"it was silent for too long and was ended after {ended.seconds:.0f} s", "Raise timeout_seconds if the server is that slow."
    for pattern, fault, advice in FAULTS:
        if re.search(pattern, said, re.I | re.M):
            return fault.format(**facts), advice.format(**facts)
    return f"it ended with {process.how_it_ended(ended.status)} and no output", "See the log."


def _about_the_rows(said: str) -> bool:
    """Whether the server refuses these rows for what they hold, and would answer others."""
    return bool(ROW_FAULTS.search(said))
