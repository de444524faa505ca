"""Answers side by side: each student beside the teacher asked the same way, one model in memory at a time.

A model that is missing or fails is left out with its reason, and the others are shown.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import answers, compare_page, models, prompt, store
from .compare_page import TITLES
from .config import is_hub_name, model_name
from .console import console, in_notebook, say, visible
from .errors import BackendError, ConfigError, DistillError, shortened
from .metrics import final_answer, reasoning

# Who is asked in which mode.
ROLE_MODES = {"teacher": prompt.MODES, "system1": ("system1",), "system2": ("system2",)}


@dataclass(frozen=True, repr=False)
class Comparison:
    """What the models answered. It shows itself in Jupyter; `show()` prints it, `save(folder)` keeps it.

    prompts   [{"prompt", "modes"}]
    columns   models that answered: [{"role", "name", "path", "bits", "max_new_tokens", "parameters", "weight_bytes", "device",
              "load_seconds", "versions": {package: version}}]; bits and load_seconds are None for a model that was given loaded
    answers   [{"prompt" (number, from 0), "mode", "role", "text", "reasoning", "final", "tokens", "seconds", "tokens_per_second",
              "stopped"}]: text is whole, reasoning and final are its parts; seconds count from the start of the answer's batch
    missing   role → why that model is left out
    made      local time, ISO 8601
    """

    prompts: list[dict]
    columns: list[dict]
    answers: list[dict]
    missing: dict[str, str]
    made: str

    def to_dict(self) -> dict:
        """Everything as plain values that JSON can hold; `Comparison(**values)` is the way back."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The comparison as Markdown."""
        return compare_page.markdown(self.to_dict())

    def show(self) -> None:
        """Print the comparison, wrapped to the terminal's width."""
        console.print(self, soft_wrap=False)

    def save(self, folder: str | Path) -> dict[str, str]:
        """Write comparison.md, comparison.html (a page that stands alone) and comparison.json. Returns their paths by kind."""
        folder = store.resolve(folder)
        written = {"json": str(store.write_json(folder / "comparison.json", self.to_dict()))}
        for kind, text in (("markdown", self.to_markdown()), ("html", compare_page.html_page(self.to_dict()))):
            place = folder / f"comparison.{'md' if kind == 'markdown' else kind}"
            with store.atomic_file(place) as file:
                file.write(text)
            written[kind] = str(place)
        return written

    def _repr_html_(self) -> str:
        return compare_page.html(self.to_dict())

    def __rich_console__(self, console, options):
        yield compare_page.terminal(self.to_dict(), options.max_width)

    def __repr__(self) -> str:
        return f"<{compare_page.headline(self.to_dict())}; .show(), .to_markdown(), .save(folder)>"


@dataclass(frozen=True)
class _Column:
    """A model that may be compared: where it lies, or what was loaded already."""

    role: str
    path: str | Path
    model: object
    tokenizer: object
    max_new_tokens: int

    @property
    def modes(self) -> tuple[str, ...]:
        return ROLE_MODES[self.role]


def compare_models(
    prompts: list[str | dict],
    teacher_path: str | Path = "Qwen/Qwen2.5-7B-Instruct",
    system1_path: str | Path = "./distilled-qwen2.5-0.5b",
    system2_path: str | Path = "./distilled-qwen2.5-1.5b-cot",
    *,
    teacher_model=None,
    teacher_tokenizer=None,
    sys1_model=None,
    sys1_tokenizer=None,
    sys2_model=None,
    sys2_tokenizer=None,
    max_tokens_teacher: int = 256,
    max_tokens_sys1: int = 256,
    max_tokens_sys2: int = 1024,
    fresh: bool = False,
) -> Comparison:
    """Ask teacher and students the same prompts, greedily; print the answers (Jupyter shows what is returned) and save them.

    prompts       [text, asked in both modes, or {"prompt": text, "modes": ["system1", "system2"]}]
    …_path        folder or hub name; the teacher is held in the bits of its earlier answers, else in 8, or in 4 where 8 do not fit
    …_model       a loaded model, with its tokenizer; its path is then only its name
    max_tokens_…  limit of an answer, in tokens, in either mode
    fresh         ask everything anew; else a model that is loaded here is, and one by its path is asked what it was not asked before

    The teacher is asked in each mode of a prompt, a student in its own. A model that is missing or fails is left out, with its reason.
    Writes `reports/comparison/comparison.{md,html,json}`; logs are in `runs/compare/`.
    Raises ConfigError for prompts or limits that cannot work, or where every model is left out.
    """
    columns = [
        _Column("teacher", teacher_path, teacher_model, teacher_tokenizer, max_tokens_teacher),
        _Column("system1", system1_path, sys1_model, sys1_tokenizer, max_tokens_sys1),
        _Column("system2", system2_path, sys2_model, sys2_tokenizer, max_tokens_sys2),
    ]
    problems = prompt_problems(prompts) + [problem for column in columns for problem in _column_problems(column)]
    if problems:
        raise ConfigError.from_problems("the comparison", problems)
    asked = [_with_modes(given) for given in prompts]
    wanted = [column for column in columns if _questions(column, asked)]
    missing = {column.role: why for column in wanted if (why := _why_left_out(column))}
    folder = store.ROOT / "reports" / "comparison"
    store.check_writable(folder / "comparison.json")
    results = _ask_all([column for column in wanted if column.role not in missing], asked, missing, fresh)
    if not results:
        raise ConfigError.from_problems("the comparison: no model is left", list(missing.values()))
    comparison = _comparison(asked, columns, results, missing)
    if not in_notebook():
        comparison.show()
    comparison.save(folder)
    say(f"Comparison: {store.shown(folder)}/comparison.html, .md and .json")
    return comparison


def prompt_problems(prompts) -> list[str]:
    """What is wrong with a list of prompts, in words, each with its place; empty where every one can be asked."""
    if not isinstance(prompts, list | tuple) or not prompts:
        return [f'prompts = {shortened(repr(prompts), 80)}: is no list of prompts. Write e.g. ["What is 17 + 25?"].']
    return [f"prompts[{number}]: {what}" for number, given in enumerate(prompts) if (what := _prompt_problem(given))]


def _prompt_problem(given) -> str | None:
    """What is wrong with one prompt, in words."""
    if not isinstance(given, str) and not (isinstance(given, dict) and set(given) == {"prompt", "modes"}):
        return f'{shortened(repr(given), 80)} is neither text nor {{"prompt": text, "modes": ["system1", "system2"]}}.'
    text, modes = (given, prompt.MODES) if isinstance(given, str) else (given["prompt"], given["modes"])
    if not isinstance(text, str) or not text.strip():
        return f"{shortened(repr(text), 80)} is no question: write some text."
    if not prompt.is_unicode(text):
        return "the text holds half of a character (a lone surrogate), which no tokenizer can read. Decode it anew."
    if not isinstance(modes, list | tuple) or not modes or any(mode not in prompt.MODES for mode in modes):
        return f'modes = {shortened(repr(modes), 80)}: use "system1", "system2" or both, in a list.'
    return None


def _column_problems(column: _Column) -> list[str]:
    short = {"system1": "sys1", "system2": "sys2"}.get(column.role, column.role)
    problems = []
    if not isinstance(column.path, str | Path) or not str(column.path).strip():
        problems.append(f"{column.role}_path = {column.path!r}: is no path or name.")
    if (column.model is None) != (column.tokenizer is None):
        problems.append(f"{short}_model and {short}_tokenizer go together: give both, or neither.")
    if not isinstance(column.max_new_tokens, int) or isinstance(column.max_new_tokens, bool) or column.max_new_tokens < 1:
        problems.append(f"max_tokens_{short} = {column.max_new_tokens!r}: an answer needs at least one token. Set a whole number from 1.")
    return problems


def _with_modes(given: str | dict) -> dict:
    """A prompt with its modes, each once, System 1 first."""
    text, modes = (given, prompt.MODES) if isinstance(given, str) else (given["prompt"], given["modes"])
    return {"prompt": text, "modes": [mode for mode in prompt.MODES if mode in modes]}


def _questions(column: _Column, asked: list[dict]) -> list[tuple[int, str]]:
    """(prompt number, mode) of everything that a model is asked."""
    return [(number, mode) for number, each in enumerate(asked) for mode in each["modes"] if mode in column.modes]


def _why_left_out(column: _Column) -> str | None:
    """Why a model cannot be asked, said aloud; None where it can. No weights are loaded."""
    try:
        tokenizer = column.tokenizer or _check_model(column)
        for mode in column.modes:
            prompt.chat_format(tokenizer, mode)
    except DistillError as error:
        return _say_left_out(column, error)
    return None


def _check_model(column: _Column):
    """The tokenizer of a model that is there. Raises ConfigError, DataError for a checkpoint of the lab that is damaged."""
    name = model_name(column.path)
    if not is_hub_name(name) and not store.is_file(Path(name) / "config.json"):
        raise ConfigError(
            f"Model not found at {column.path}: {models.missing_in_folder(Path(name))} Distil it first, or give another {column.role}_path."
        )
    return models.check_model(name, "teacher" if column.role == "teacher" else "student")


def _say_left_out(column: _Column, error: DistillError) -> str:
    say(visible(str(error)))
    say(f"The comparison goes on without the {TITLES[column.role]}.")
    return str(error)


def _ask_all(columns: list[_Column], asked: list[dict], missing: dict[str, str], fresh: bool) -> dict[str, dict]:
    """Every model's facts and answers by role; one that fails goes to `missing` and takes no other down."""
    results = {}
    with store.lock(store.ROOT / "runs" / "compare"):
        for column in columns:
            try:
                results[column.role] = _ask(column, asked, fresh)
            except DistillError as error:
                missing[column.role] = _say_left_out(column, error)
    return results


def _ask(column: _Column, asked: list[dict], fresh: bool) -> dict:
    """One model's facts and answers, the answers in the order of `_questions`."""
    limits = dict.fromkeys(column.modes, column.max_new_tokens)
    questions = [{"instruction": asked[number]["prompt"], "mode": mode} for number, mode in _questions(column, asked)]
    request = {"name": column.role, "questions": questions, "max_new_tokens": limits}
    if column.model is not None:
        return {"bits": None, "load_seconds": None, **_ask_given(column, request)}
    role = "teacher" if column.role == "teacher" else "student"
    request |= {"path": model_name(column.path), "role": role, "bits": None}
    title = f"Asking the {TITLES[column.role]}"
    return answers.ask_once([request], store.ROOT / "runs" / "compare" / column.role, title, fresh=fresh)[column.role]


def _ask_given(column: _Column, request: dict) -> dict:
    from torch import OutOfMemoryError

    try:
        return answers.answer_all(column.model, column.tokenizer, request)
    except OutOfMemoryError as error:
        raise BackendError(
            f"The GPU's memory is full: {shortened(error)}. Give the model's path, so that one is loaded at a time."
        ) from error


def _comparison(asked: list[dict], columns: list[_Column], results: dict[str, dict], missing: dict[str, str]) -> Comparison:
    shown = [column for column in columns if column.role in results]
    return Comparison(
        prompts=asked,
        columns=[_facts(column, results[column.role]) for column in shown],
        answers=[answer for column in shown for answer in _answers(column, asked, results[column.role]["answers"])],
        missing=missing,
        made=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _facts(column: _Column, result: dict) -> dict:
    known = {"role": column.role, "name": TITLES[column.role], "path": str(column.path), "max_new_tokens": column.max_new_tokens}
    return known | {key: value for key, value in result.items() if key != "answers"}


def _answers(column: _Column, asked: list[dict], made: list[dict]) -> list[dict]:
    questions = _questions(column, asked)
    return [
        {"prompt": number, "mode": mode, "role": column.role, **_measured(answer)}
        for (number, mode), answer in zip(questions, made, strict=True)
    ]


def _measured(answer: dict) -> dict:
    """An answer in its parts and with its pace."""
    pace = answer["tokens"] / answer["seconds"] if answer["seconds"] else None
    parts = {"text": answer["text"], "reasoning": reasoning(answer["text"]), "final": final_answer(answer["text"])}
    return parts | {"tokens": answer["tokens"], "seconds": answer["seconds"], "tokens_per_second": pace, "stopped": answer["stopped"]}
