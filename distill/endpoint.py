"""A teacher behind an API: how a user names one, and what EasyDistill 2.x is asked to do with it.

A user's text never stands in a job's settings, where `$` would be expanded: it goes in files of rows and prompts, the model's name and
address in environment variables. What a server makes of a text is its own affair: control strings in it may act there.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from . import models, store
from .config import is_hub_name, model_name
from .errors import BackendError, ConfigError, shortened
from .prompt import REASONING_TAGS, chat_format, is_trace, is_unicode

PROMPTS = Path(__file__).resolve().parent.parent / "configs" / "prompts"
DEFAULT_PROMPT = PROMPTS / "cot_generation.txt"
PLACE = "{instruction}"
INPUT, OUTPUT, TEMPLATE = "in.jsonl", "out.jsonl", "prompt.txt"
LEVELS = range(10)
VERDICTS = ("correctness", "logical_correctness")
SCORE_MAX_TOKENS = 512


@dataclass(frozen=True)
class Endpoint:
    """A teacher behind an OpenAI-compatible API. It can stand wherever a `teacher_model` is taken; EasyDistill 2.x asks it.

    model            its name at the server; without base_url a folder or hub name, which the lab serves itself
    base_url         e.g. "http://127.0.0.1:8000/v1"; None: the lab starts, watches and ends a server of its own
    key_variable     name of the environment variable that holds the key; never the key
    prompt_file      System 2: a text with {instruction}; None takes configs/prompts/cot_generation.txt. All else in it is taken literally
    chunk_rows       rows asked at a time, at most; fewer where they would take more than three minutes, which a kill may lose
    workers          questions under way at the same time
    attempts         times that a row without an answer is asked
    timeout_seconds  longest wait for one answer
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    prompt_file: str | None = None
    chunk_rows: int = 32
    workers: int = 8
    attempts: int = 3
    timeout_seconds: float = 1800

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {value!r}: give a whole number above 0."
            for name in ("chunk_rows", "workers", "attempts")
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < 1
        ]
        if not isinstance(self.timeout_seconds, int | float) or isinstance(self.timeout_seconds, bool) or not self.timeout_seconds > 0:
            problems.append(f"timeout_seconds = {self.timeout_seconds!r}: give a number above 0.")
        if not isinstance(self.model, str | Path) or not str(self.model).strip() or "\0" in str(self.model):
            problems.append(f"model = {self.model!r}: is no name.")
        if not isinstance(self.key_variable, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            problems.append("key_variable: is no name of an environment variable. Put the key into one, and give the variable's name.")
        if self.base_url is not None and (problem := _address_problem(self.base_url)):
            problems.append(problem)
        if problems:
            raise ConfigError.from_problems("the endpoint", problems)

    @property
    def name(self) -> str:
        """What a label calls this teacher."""
        served = self.base_url is None and not is_hub_name(str(self.model))
        return store.shown(self.model) if served else str(self.model)

    @property
    def key(self) -> str | None:
        """The key, where the environment has one; a server of the lab's own needs none. Raises ConfigError for what can be no key."""
        key = os.environ.get(self.key_variable, "").strip() if self.base_url else ""
        if not re.fullmatch(r"[!-~]*", key):
            raise ConfigError(f"What {self.key_variable} holds is no key: there are blanks or signs in it that no header can carry.")
        return key or None

    @property
    def prompt(self) -> str:
        """The text that asks for reasoning. Raises ConfigError where the file has no place for the question."""
        return read_prompt(self.prompt_file or DEFAULT_PROMPT, PLACE)

    def check(self) -> None:
        """Raise ConfigError where a model that the lab is to serve is not there or cannot be asked."""
        if self.base_url is None:
            chat_format(models.check_model(model_name(self.model), "teacher"), "system1")

    def identity(self) -> list:
        """What tells this teacher from another: its address, or the files that are served; and how it is asked to reason."""
        who = [self.base_url.rstrip("/"), str(self.model)] if self.base_url else ["served", models.fingerprint(model_name(self.model))]
        return [*who, store.hash_json(self.prompt)]


def _address_problem(address) -> str | None:
    """What is wrong with a base_url, without saying what may be a secret in it."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        good, parts = False, None
    if not good:
        return "base_url: is no address. Write e.g. http://127.0.0.1:8000/v1."
    if parts.username or parts.password or parts.query:
        return "base_url: holds a user name, password or query. Put the key into an environment variable and name that as key_variable."
    return None


def read_prompt(path: str | Path, *places: str) -> str:
    """A prompt file's text, without the line break at its end. Raises ConfigError unless each of `places` stands in it."""
    path = store.resolve(path)
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The prompt file {store.shown(path)} cannot be read: {shortened(error)}.") from error
    if missing := [place for place in places if place not in text]:
        raise ConfigError(f"The prompt file {store.shown(path)} has no {' and no '.join(missing)}, where the question is put.")
    return text


def filled(prompt: str, **texts: str) -> str:
    """A prompt with texts in place of {name}; whatever else stands in braces, in the prompt or in a text, stays as it is."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in texts), lambda found: texts[found[0][1:-1]], prompt)


def as_template(prompt: str) -> str:
    """A prompt as EasyDistill formats it: every brace doubled but those of {instruction}."""
    parts = [part.replace("{", "{{").replace("}", "}}") for part in prompt.split(PLACE)]
    return PLACE.join(parts)


# What EasyDistill is asked to do


@dataclass(frozen=True)
class Task:
    """One kind of job.

    job        the job's settings, without backend and number of workers
    section    the section of the job that the number of workers belongs to
    given      a row → the line that EasyDistill reads
    entry      a line that it wrote → what is kept of it; None where it holds no answer
    files      name → text of the files that the job names
    prompts    EasyDistill's own prompt file that the job needs, "" for none
    calls      questions that EasyDistill asks for a row
    fault      an entry → why it is of no use, "" where it is: where all of the first are of none, the rest is not asked
    """

    job: dict
    section: tuple
    given: Callable[[dict], dict]
    entry: Callable[[dict], dict | None]
    files: dict = field(default_factory=dict)
    prompts: str = ""
    calls: int = 1
    fault: Callable[[dict], str] = lambda entry: ""


def generation(max_new_tokens: int, temperature: float = 0.0, prompt: str | None = None, traces: bool = False) -> Task:
    """Answers to rows {"id", "instruction"}: entries {"text", "tokens", "stopped"}, as a local teacher gives them.

    prompt  text with {instruction}, put around each question
    traces  whether answers are wanted that think between tags first
    """
    settings = {"temperature": temperature, "max_tokens": max_new_tokens, "show_progress": False, "retry_attempts": 2}
    template = {"prompt_template_file": TEMPLATE} if prompt else {}

    def entry(line: dict) -> dict | None:
        said = line["messages"][-1]["content"]
        text = whole_trace(said) if traces else said
        usage = line["metadata"].get("usage") or {}
        if not isinstance(tokens := usage.get("completion_tokens"), int):
            raise BackendError(
                "The server does not report how many tokens an answer has (usage.completion_tokens), so nobody can tell whole answers from "
                "those that were cut off. Use a server that reports usage, e.g. vLLM, transformers serve, or a commercial API."
            )
        return {"text": text, "tokens": tokens, "stopped": tokens < max_new_tokens} if is_unicode(text) else None

    return Task(
        # skip_empty: an empty answer is an answer too, else it would be asked for again and again
        job={"job_type": "instruct_distill", "generation": {**settings, **template}, "sft": {"skip_empty": False}},
        section=("generation",),
        given=lambda row: {"id": row["id"], "instruction": row["instruction"]},  # no more columns: they would overwrite the id
        entry=entry,
        files={TEMPLATE: as_template(prompt)} if prompt else {},
        fault=trace_fault if traces else lambda entry: "",
    )


def scoring(job_type: str, metrics: list[str], max_new_tokens: int = SCORE_MAX_TOKENS) -> Task:
    """A judge's scores of rows {"id", "instruction", "output"}: entries {metric: score}, None for what is no score.

    job_type  "instruct_eval", "cot_eval", or "advanced_cot_distill", of which only the scoring is done
    """
    settings = {"metrics": list(metrics), "temperature": 0.0, "max_tokens": max_new_tokens, "show_progress": False}
    prompts = "default_eval_prompts.yaml" if job_type == "instruct_eval" else "default_cot_eval_prompts.yaml"
    job, section, output = {"job_type": job_type, "eval": settings}, ("eval",), "output"
    if job_type == "advanced_cot_distill":
        stages = [{"stage": "cot_rvcd_score", "config": settings, "output_path": OUTPUT}, {"stage": "build_sft"}]
        job, section, output = {"job_type": job_type, "pipeline": stages}, ("pipeline", 0, "config"), "response"

    def entry(line: dict) -> dict | None:
        # a question that failed leaves its metric out; an answer without a score leaves None
        complete = all(metric in line for metric in metrics)
        return {metric: score_of(metric, line[metric]) for metric in metrics} if complete else None

    return Task(
        job=job,
        section=section,
        given=lambda row: {"id": row["id"], "instruction": row["instruction"], output: row["output"]},
        entry=entry,
        prompts=prompts,
        calls=len(metrics),
    )


def score_of(metric: str, value) -> int | None:
    """A judge's score where it is one: 0 to 9, or 0 and 1 for a verdict; else None."""
    allowed = (0, 1) if metric in VERDICTS else LEVELS
    return int(value) if isinstance(value, int) and value in allowed else None


def whole_trace(text: str) -> str:
    """An answer with the tag that opens its thought, where the server's generation prompt had opened it already."""
    opened, closed = REASONING_TAGS
    text = text.strip()
    return f"{opened}\n{text}" if closed in text and opened not in text else text


def trace_fault(entry: dict) -> str:
    """Why an answer cannot be used as a trace, "" where it can."""
    if not entry["stopped"]:
        return "cut off at max_new_tokens"
    return "" if is_trace(entry["text"]) else "without the form <think>…</think> and a solution"
