"""Ask a loaded model: questions in batches, each answered until its end of turn."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import ConfigError, DataError
from .prompt import MODES, asked_ids, is_unicode
from .prompt import stop_ids as template_stop_ids

BATCH_TOKENS = 16_384  # of a batch's questions and answers together
MAX_NEW_TOKENS = {"system1": 256, "system2": 1024}


def stop_ids(model, tokenizer) -> list[int]:
    """Ids that end an answer: the chat template's and the tokenizer's (`prompt.stop_ids`), then the model's own others."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    stops = template_stop_ids(tokenizer)
    return stops + [token for token in own if token not in stops]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    text     without the end of turn
    tokens   its length
    stopped  whether it ended by itself
    seconds  from the start of its batch to its last token
    """

    text: str
    tokens: int
    stopped: bool
    seconds: float


def generate(
    model,
    tokenizer,
    asked: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    finished: Callable[[dict[int, Answer]], None] = lambda answers: None,
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer many questions in batches, each until its end of turn; answers come in the order of the questions.

    asked           token ids of each question (`prompt.asked_ids`)
    max_new_tokens  limit of an answer, in tokens
    temperature     0 is greedy; above, tokens are sampled, reproducibly by `seed`
    top_p           when sampling: the smallest set of tokens that holds this share of the probability, 0 to 1
    batch_size      questions a batch; None fills a batch by `batch_tokens`
    batch_tokens    a batch holds as many questions as fit, each counted as the batch's longest plus `max_new_tokens`
    finished        called after each batch with its answers by question number
    on_text         called with an answer's text as it grows; for one question at a time
    """
    import torch
    from transformers import GenerationConfig

    stops = stop_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p} if temperature else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **sampling)
    answers: list[Answer | None] = [None] * len(asked)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the caller's own random numbers go on as before
        torch.manual_seed(seed)
        for batch in _batches([len(ids) for ids in asked], max_new_tokens, batch_tokens, batch_size):
            streamer = _streamer(tokenizer, stops, on_text) if on_text else None
            made = _answer_batch(model, tokenizer, [asked[number] for number in batch], settings, streamer)
            done = dict(zip(batch, made, strict=True))
            for number, answer in done.items():
                answers[number] = answer
            finished(done)
    return answers


def _answer_batch(model, tokenizer, asked: list[list[int]], settings, streamer) -> list[Answer]:
    import torch

    inputs = _left_padded(asked, tokenizer.pad_token_id, model.device)
    stops, clock = settings.eos_token_id, _clock(settings.eos_token_id)
    with torch.inference_mode(), _alone(model, settings):
        made = model.generate(**inputs, generation_config=settings, stopping_criteria=[clock], streamer=streamer)
    new = made[:, inputs["input_ids"].shape[1] :].tolist()
    return [_answer(tokenizer, ids, stops, clock.ended(row)) for row, ids in enumerate(new)]


@contextmanager
def _alone(model, settings) -> Iterator[None]:
    """Within the block a model has no generation settings but these.

    Its own may sample, penalise repetition (Qwen2.5-Instruct's do) or stop elsewhere, and `generate` fills with them whatever is left open.
    """
    its_own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = its_own


def _clock(stops: list[int]):
    """A stopping criterion that stops nothing and notes when each answer of a batch ended."""
    import torch
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.started, self.seconds, self.latest = time.perf_counter(), {}, 0.0

        def __call__(self, input_ids, scores, **kwargs):
            self.latest = time.perf_counter() - self.started
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if token in stops:
                    self.seconds.setdefault(row, self.latest)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        def ended(self, row: int) -> float:
            return self.seconds.get(row, self.latest)

    return Clock()


def _streamer(tokenizer, stops: list[int], on_text: Callable[[str], None]):
    """Pass an answer's text on, word by word, without the question and without its end of turn."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def put(self, value):
            if value.dim() > 1 or value.tolist()[-1] not in stops:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False):
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True)


def token_limit(max_new_tokens: int | None, mode: str) -> int:
    """The limit of an answer: what is asked for, or the mode's usual one. Raises ConfigError for a mode or a number that cannot be."""
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r}: is not one of {', '.join(MODES)}.")
    if max_new_tokens is None:
        return MAX_NEW_TOKENS[mode]
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens!r}: give a whole number above 0.")
    return max_new_tokens


def infer_student(model, tokenizer, prompt: str, mode: str = "system1", max_new_tokens: int | None = None) -> str:
    """A student's answer to a raw question, which is put into the chat template here and nowhere else.

    mode            "system1" asks plainly, "system2" asks for reasoning first
    max_new_tokens  limit of the answer; None takes MAX_NEW_TOKENS of the mode
    """
    limit = token_limit(max_new_tokens, mode)
    if not is_unicode(prompt):
        raise DataError("The question is no valid Unicode: it holds half of a character.")
    (answer,) = generate(model, tokenizer, [asked_ids(tokenizer, prompt, mode=mode)], limit)
    return answer.text


def _batches(lengths: list[int], max_new_tokens: int, batch_tokens: int, batch_size: int | None) -> Iterator[list[int]]:
    """Row numbers in batches, longest first, so that a batch wastes little padding and the largest need shows at once."""
    waiting = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while waiting:
        size = batch_size or max(1, batch_tokens // (lengths[waiting[0]] + max_new_tokens))
        yield waiting[:size]
        waiting = waiting[size:]


def _left_padded(rows: list[list[int]], pad_id: int, device) -> dict:
    import torch

    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _answer(tokenizer, ids: list[int], stops: list[int], seconds: float) -> Answer:
    length = next((place for place, token in enumerate(ids) if token in stops), None)
    kept = ids[:length]
    return Answer(tokenizer.decode(kept, skip_special_tokens=False), len(kept), length is not None, seconds)
