"""Sample answers: at every validation the student answers some questions, so that one sees it learn. The training is not disturbed."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import engine, store
from .generation import generate

SAMPLE_TOKENS = 512


def sampler(questions_path: Path, count: int, samples_path: Path):
    """A trainer callback: at every validation, the first validation questions are answered, into `samples_path` and for the lab to show.

    questions_path  a token file
    count           of questions
    """
    from transformers import TrainerCallback

    rows, limit_tokens = sample_questions(questions_path, count)
    asked = [[token for token, supervised in zip(row["input_ids"], row["completion_mask"], strict=True) if not supervised] for row in rows]

    class Sampler(TrainerCallback):
        def on_evaluate(self, args, state, control, model, processing_class, **kwargs):
            with undisturbed(model), _autocast(args, model):
                answers = generate(model, processing_class, asked, limit_tokens)
            for row, answer in zip(rows, answers, strict=True):
                texts = {"instruction": row["instruction"], "answer": answer.text, "reference": row["output"]}
                sample = {"step": state.global_step, **texts, "stopped": answer.stopped}
                store.append_json_line(samples_path, sample)
                print(sample_line(sample))
                engine.emit(sample=sample)

    return Sampler()


def sample_questions(path: Path, count: int) -> tuple[list[dict], int]:
    """The first `count` rows of a token file, and how many tokens an answer may have: half as many again as the longest, at most
    SAMPLE_TOKENS."""
    rows, longest = [], 0
    for row in store.read_rows(path):
        longest = max(longest, sum(row["completion_mask"]))
        rows += [row] if len(rows) < count else []
    return rows, min(SAMPLE_TOKENS, math.ceil(1.5 * longest))


def sample_line(sample: dict) -> str:
    """A sample answer as one line of printable text."""
    asked, answer, wanted = (_glimpse(sample[key], limit) for key, limit in (("instruction", 60), ("answer", 80), ("reference", 40)))
    cut_off = "" if sample["stopped"] else " (cut off)"
    return f"step {sample['step']}: {asked} → {answer}{cut_off}, wanted: {wanted}"


def _glimpse(text: str, limit_chars: int) -> str:
    """The beginning and the end of a text, where an answer to a long thought stands; no control characters."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    half = limit_chars // 2
    return text if len(text) <= limit_chars else f"{text[:half]} … {text[-half:]}"


@contextmanager
def undisturbed(model) -> Iterator[None]:
    """Let a model answer in the midst of its training: its mode and every random generator are afterwards what they were."""
    import numpy
    import torch

    training, python, arrays = model.training, random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        yield
    model.train(training)
    random.setstate(python)
    numpy.random.set_state(arrays)


def _autocast(args, model):
    """Compute as the training does; peft asks the model behind the forward that the trainer has wrapped for it."""
    import torch

    half = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(model.device.type, half, enabled=args.bf16 or args.fp16)
