"""Labelling, measured on the micro teacher: `python benchmarks/bench_label.py`. Prints the tables that stand in benchmarks/RESULTS.md.

First how far 16, 8 and 4 bits agree with fp32, in the next token and in whole answers, and how fast each is; then the lab's batches
against a plain loop at batch 2. Run it alone on the machine.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import engine, generation, models, store  # noqa: E402
from distill.answers import answer_all  # noqa: E402
from distill.console import say  # noqa: E402
from distill.intervals import wilson  # noqa: E402
from distill.microlab import MAX_NEW_TOKENS, MICRO  # noqa: E402
from distill.prompt import asked_ids  # noqa: E402
from distill.scores import exact_match, mean_exact_match  # noqa: E402

TEACHER = str(MICRO / "teacher")
LOOP_BATCH = 2


def main() -> None:
    """Measure on the shipped held-out questions: 40 a family for agreement, 20 a family for the loop."""
    import torch

    torch.set_num_threads(engine.usable_cores())
    heldout = list(store.read_rows(MICRO / "heldout.jsonl"))
    say(agreement_table(heldout[::5]))
    say(loop_table(heldout[::10]))


def agreement_table(questions: list[dict]) -> str:
    """Markdown: by bits, agreement with fp32 and speed."""
    lines = ["| bits | MiB | next token as fp32 (95%) | answers as fp32 (95%) | exact match | tokens/s |", "|" + "---|" * 6]
    reference, first = None, None
    for bits in (32, 16, 8, 4):
        model, tokenizer = models.load_teacher(TEACHER, bits=bits)
        started = time.perf_counter()
        made = answer_all(model, tokenizer, _request(questions))["answers"]
        seconds = time.perf_counter() - started
        reference = reference or (made, _trained_on(tokenizer, questions, made))
        tokens = _next_tokens(model, reference[1])
        first = first or tokens
        same_token = wilson(sum(left == right for left, right in zip(tokens, first, strict=True)), len(tokens))
        texts = [answer["text"] for answer in made]
        same_text = wilson(sum(text == answer["text"] for text, answer in zip(texts, reference[0], strict=True)), len(texts))
        scores = exact_match(questions, texts)
        right = mean_exact_match({"exact_match": scores}, list(scores))
        speed = sum(answer["tokens"] for answer in made) / seconds
        size = model.get_memory_footprint() / 2**20
        lines.append(f"| {bits} | {size:.2f} | {_shown(same_token)} | {_shown(same_text)} | {right:.3f} | {speed:,.0f} |")
    return "\n".join([*lines, f"\n{len(questions)} questions, {len(first):,} positions of fp32's own answers, greedy.\n"])


def _request(questions: list[dict]) -> dict:
    asked = [{"instruction": row["instruction"], "mode": f"system{row['system']}"} for row in questions]
    return {"questions": asked, "max_new_tokens": MAX_NEW_TOKENS}


def _trained_on(tokenizer, questions: list[dict], answers: list[dict]) -> list[tuple[list[int], int]]:
    """Each question with fp32's answer behind it, and where the answer begins."""
    rows = []
    for row, answer in zip(questions, answers, strict=True):
        asked = asked_ids(tokenizer, row["instruction"], mode=f"system{row['system']}")
        rows.append((asked + tokenizer(answer["text"], add_special_tokens=False)["input_ids"], len(asked)))
    return rows


def _next_tokens(model, rows: list[tuple[list[int], int]]) -> list[int]:
    """The most likely next token at every position of the answers, and behind their last one."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, start in rows:
            found += model(torch.tensor([ids])).logits[0, start - 1 :].argmax(-1).tolist()
    return found


def loop_table(questions: list[dict]) -> str:
    """Markdown: the lab's batches against a loop of batches of two in the order of the questions, fp32."""
    model, tokenizer = models.load_teacher(TEACHER, bits=32)
    request = _request(questions)
    asked = [asked_ids(tokenizer, question["instruction"], mode=question["mode"]) for question in request["questions"]]
    limits = [MAX_NEW_TOKENS[question["mode"]] for question in request["questions"]]
    started = time.perf_counter()
    plain = []
    for first in range(0, len(asked), LOOP_BATCH):
        plain += _plain_batch(model, tokenizer, asked[first : first + LOOP_BATCH], max(limits[first : first + LOOP_BATCH]))
    loop_seconds = time.perf_counter() - started
    started = time.perf_counter()
    made = [answer["text"] for answer in answer_all(model, tokenizer, request)["answers"]]
    seconds = time.perf_counter() - started
    alone = [generation.generate(model, tokenizer, [ids], limit)[0].text for ids, limit in zip(asked, limits, strict=True)]
    same = sum(left == right for left, right in zip(made, alone, strict=True))
    int8, tokenizer = models.load_teacher(TEACHER, bits=8)
    batched = [answer["text"] for answer in answer_all(int8, tokenizer, request)["answers"]]
    pairs = [generation.generate(int8, tokenizer, [ids], limit)[0].text for ids, limit in zip(asked, limits, strict=True)]
    same8 = sum(left == right for left, right in zip(batched, pairs, strict=True))
    return "\n".join(
        [
            f"| {len(asked)} questions, fp32 | seconds |",
            "|---|---|",
            f"| plain loop, batches of {LOOP_BATCH} | {loop_seconds:.1f} |",
            f"| the lab's batches | {seconds:.1f} ({loop_seconds / seconds:.1f} ×) |",
            f"\nAnswers in batches as one by one: fp32 {same} of {len(asked)}, int8 {same8} of {len(asked)};"
            f" the loop's as the lab's: {sum(left == right for left, right in zip(plain, made, strict=True))}.",
        ]
    )


def _plain_batch(model, tokenizer, asked: list[list[int]], limit: int) -> list[str]:
    """What a plain loop does: pad two questions and generate."""
    import torch

    inputs = tokenizer.pad({"input_ids": asked}, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _shown(share: dict) -> str:
    return f"{share['value']:.3f} ({share['ci'][0]:.3f}–{share['ci'][1]:.3f})"


if __name__ == "__main__":
    main()
