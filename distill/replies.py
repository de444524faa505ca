"""Single questions to a model behind an API, by OpenAI's own client: several at a time, and none that was answered before.

For what EasyDistill 2.x has no job for. Each reply is in its journal as soon as it is there: one JSON line `{"id", "text", "stopped"}`.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from . import process, store
from .asking import FAULTS, PROOF_ROWS, ROW_FAULTS
from .config import model_name
from .console import progress, say
from .endpoint import Endpoint
from .errors import BackendError, shortened
from .server import HOST, serving

FAULT_CHARS = 500
FILTERED = "the server's content filter kept the reply back"  # a fault of the row, as ROW_FAULTS has it
NO_TEXT = "the reply holds no text"
OWN_FAULT = (NO_TEXT, "its replies hold no text", "Raise max_new_tokens, which reasoning may have used up, or ask another model.")
LASTING = re.compile(r"error code: 40[14]\b", re.I)  # a wrong key or address, for every question alike


def replies_once(endpoint: Endpoint, questions: list[str], max_new_tokens: int, kind: str, title: str) -> dict[str, dict]:
    """Each question's reply {"text", "stopped"}, given now or in an earlier run; a question without one is left out.

    questions       user turns, asked as they are at temperature 0
    max_new_tokens  limit of a reply
    kind            folder of the journal, runs/<kind>; its name hashes the model and the limit
    title           of the progress bar
    Raises BackendError where the server refuses the key, or brings no reply PROOF_ROWS times on end.
    """
    journal = store.ROOT / "runs" / kind / f"{store.hash_json([endpoint.identity(), max_new_tokens])[:24]}.jsonl"
    store.make_folder(journal.parent)
    names = {_name(text): text for text in questions}
    with store.lock(journal):
        known = {entry["id"] for entry in store.read_journal(journal)}
        waiting = {name: text for name, text in names.items() if name not in known}
        if len(waiting) < len(names):
            say(f"{len(names) - len(waiting):,} of {len(names):,} replies had been given before ({store.shown(journal)})")
        if waiting:
            _ask(endpoint, waiting, max_new_tokens, journal, title)
        return {names[entry["id"]]: entry for entry in store.read_journal(journal) if entry["id"] in names}


def _name(text: str) -> str:
    return store.hash_json(text)[:24]


def _ask(endpoint: Endpoint, questions: dict[str, str], limit: int, journal: Path, title: str) -> None:
    """Ask for replies, by name, and put each into the journal, whose lock is held."""
    names = list(questions)
    with _address(endpoint, journal) as where, progress(title, total=len(names)) as update:
        keeper = _Keeper(endpoint, journal, min(PROOF_ROWS, len(names)), update)
        for start in range(0, len(names), endpoint.chunk_rows):
            chunk = {name: questions[name] for name in names[start : start + endpoint.chunk_rows]}
            _ask_side_by_side(endpoint, *where(), chunk, limit, keeper.keep)


@contextmanager
def _address(endpoint: Endpoint, journal: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """Yield what tells the model's address and its name there; a server of the lab's own is started anew where it has died."""
    if endpoint.base_url:
        yield lambda: (endpoint.base_url, str(endpoint.model))
        return
    with serving(model_name(endpoint.model), journal.with_suffix(".server.log")) as server:

        def where() -> tuple[str, str]:
            server.ensure()
            return server.base_url, server.model_id

        yield where


def _ask_side_by_side(endpoint: Endpoint, base_url: str, model: str, questions: dict[str, str], limit: int, keep: Callable) -> None:
    """Ask several questions at the same time; keep(name, reply, fault) is called in this thread as each is done."""
    from concurrent.futures import Future, as_completed

    names = {Future(): name for name in questions}
    waiting = deque(names)
    with _client(endpoint, base_url) as client:

        def work() -> None:
            with suppress(IndexError):  # none is waiting any more
                while True:
                    future = waiting.popleft()
                    try:
                        future.set_result(_reply(client, model, questions[names[future]], limit))
                    except Exception as error:  # noqa: BLE001  raised below, where the result is asked for
                        future.set_exception(error)

        # no pool: at its end, after an error or Ctrl-C, Python would wait for the threads of one as long as a server is silent
        for _ in range(min(endpoint.workers, len(questions))):
            Thread(target=work, daemon=True).start()
        try:
            for done in as_completed(list(names)):
                keep(names[done], *done.result())
        finally:
            waiting.clear()


def _client(endpoint: Endpoint, base_url: str):
    from openai import DefaultHttpxClient, OpenAI

    here = urlsplit(base_url).hostname in (HOST, "localhost")  # where no proxy stands between
    settings = {"max_retries": endpoint.attempts - 1, "timeout": endpoint.timeout_seconds}
    return OpenAI(api_key=endpoint.key or "EMPTY", base_url=base_url, http_client=DefaultHttpxClient(trust_env=not here), **settings)


def _reply(client, model: str, question: str, limit: int) -> tuple[dict | None, str]:
    """One reply {"text", "stopped"}, or None and why there is none."""
    from openai import APIStatusError, OpenAIError

    try:
        messages = [{"role": "user", "content": question}]
        choice = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=limit).choices[0]
        if choice.finish_reason == "content_filter":
            return None, FILTERED
        if choice.message.content is None:
            return None, f"{NO_TEXT} (finish_reason {choice.finish_reason})"
        return {"text": choice.message.content, "stopped": choice.finish_reason != "length"}, ""
    except APIStatusError as error:
        return None, f"Error code: {error.status_code} {error.body or ''}".strip()
    except OpenAIError as error:
        return None, f"{error} {error.__cause__ or ''}".strip()
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a page of a proxy, JSON of another kind
        return None, f"no chat completion came back ({type(error).__name__})"


@dataclass
class _Keeper:
    """Puts replies into the journal, faults into the log, and stops where the server brings nothing."""

    endpoint: Endpoint
    journal: Path
    proof: int  # so many without a reply, one after another, are the server's fault
    update: Callable
    done: int = 0
    silent: int = 0  # since the last reply

    def __post_init__(self) -> None:
        self.log = self.journal.with_suffix(".log")
        self.log.unlink(missing_ok=True)

    def keep(self, name: str, reply: dict | None, fault: str) -> None:
        """Raise BackendError where no further question has any hope of a reply."""
        self.done += 1
        self.update(self.done)
        if reply:
            self.silent = 0
            store.add_to_journal(self.journal, {"id": name, **reply, "text": self._clean(reply["text"])})
            return
        store.append_json_line(self.log, {"question": name, "fault": shortened(self._clean(fault), FAULT_CHARS)})
        self.silent = 0 if ROW_FAULTS.search(fault) else self.silent + 1
        if LASTING.match(fault) or self.silent >= self.proof:
            raise self._failure(fault)

    def _clean(self, text: str) -> str:
        """What a server says, without the key, which it knows, and without lone surrogates, which no file can hold."""
        text = text.encode(errors="replace").decode()
        return text.replace(self.endpoint.key, "***") if self.endpoint.key else text

    def _failure(self, said: str) -> BackendError:
        fault, advice = _name_fault(said, self.endpoint)
        message = (
            f"{self.endpoint.name} gives no reply: {fault}. {advice} "
            f"Replies given before are kept; the same call goes on from there. The end of {store.shown(self.log)}:"
        )
        return BackendError("\n".join([message, *process.tail(self.log)]))


def _name_fault(said: str, endpoint: Endpoint) -> tuple[str, str]:
    """Which of the known faults an error looks like, and what to do."""
    facts = {**vars(endpoint), "model": str(endpoint.model), "state": "set now" if endpoint.key else "not set"}
    for pattern, fault, advice in (OWN_FAULT, *FAULTS):
        if re.search(pattern, said, re.I | re.M):
            return fault.format(**facts), advice.format(**facts)
    return "what answers there is no API of OpenAI's form", "Check the base_url, which usually ends in /v1."
