"""Ask a model question by question; each answer appears as it is written. A question stands alone: students are taught single questions."""

import sys
from collections.abc import Iterable
from pathlib import Path

from . import generation, models, store
from .config import is_hub_name, model_name
from .console import say, visible
from .errors import ConfigError
from .models import RUN_RECORD
from .prompt import MODES, asked_ids


def chat(path: str, *, mode: str | None = None, max_new_tokens: int | None = None, questions: Iterable[str] | None = None) -> list[dict]:
    """Ask the model at `path` each question and write its answers, as they grow, to the console.

    path            a checkpoint's folder, or a name on the hub
    mode            "system1" or "system2"; None asks as the checkpoint was trained
    max_new_tokens  limit of an answer; None takes the mode's usual one
    questions       None reads them from standard input, a line each, until it ends
    Returns [{"question", "answer", "tokens", "seconds", "stopped"}]. Raises ConfigError `Model not found at <path>`, DataError for a
    checkpoint of the lab that is damaged.
    """
    path = model_name(path)
    if not is_hub_name(path) and models.missing_in_folder(Path(path)):
        raise ConfigError(f"Model not found at {path}: {models.missing_in_folder(Path(path))}")
    store.read_manifest(path, name=RUN_RECORD)
    mode, reason = (mode, "asked for") if mode else _trained_mode(path)
    limit = generation.token_limit(max_new_tokens, mode)
    model, tokenizer = models.load_student(path)
    say(f"{path}: {mode} ({reason})." + (" An empty line ends." if questions is None and sys.stdin.isatty() else ""))
    return [_answer(model, tokenizer, question, mode, limit) for question in (_typed() if questions is None else questions)]


def _trained_mode(path: str) -> tuple[str, str]:
    """How a checkpoint was trained, by its own record."""
    record = Path(path) / RUN_RECORD
    mode = store.read_json(record).get("mode") if store.is_file(record) else None
    if mode in MODES:
        return mode, "as it was trained"
    return "system1", "no record says how it was trained; --mode system2 asks for reasoning"


def _typed() -> Iterable[str]:
    """Lines from standard input up to its end, or to an empty one where somebody types."""
    typing = sys.stdin.isatty()
    while True:
        if typing:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (typing and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _answer(model, tokenizer, question: str, mode: str, limit: int) -> dict:
    # half of a character, as a terminal of another encoding may send it, can be no token
    asked = asked_ids(tokenizer, question.encode(errors="replace").decode(), mode=mode)
    (answer,) = generation.generate(model, tokenizer, [asked], limit, on_text=lambda text: say(visible(text), end=""))
    speed = answer.tokens / answer.seconds if answer.seconds else 0
    cut = "" if answer.stopped else f", cut off at {limit} tokens"
    say(f"\n  [{answer.tokens} tokens in {answer.seconds:.1f} s, {speed:.0f} tokens/s{cut}]")
    return {"question": question, "answer": answer.text, "tokens": answer.tokens, "seconds": answer.seconds, "stopped": answer.stopped}
