"""The tasks of the micro world: questions with one exact answer, worked steps for the hard ones, and a tokenizer that knows the words.

A *family* is a kind of question. System 1 families can be answered at once by a model of 0.7 M parameters; System 2 families cannot,
but can be learnt from worked steps. A *question* is a family and its arguments: how it is phrased is no part of its identity, so a
held-out question is never a training question in other words. An answer is right when it equals `Question.answer`, after `strip()`.

    Question        add:347,285 → 632
    phrase          Find the sum of 347 and 285.
    worked_steps    7+5=12 ⏎ 4+8+1=13 ⏎ 3+2+1=6

In every phrasing of a family the arguments stand equally far from each other and from the end of the question, so that a small
student learns in few steps where to look. Not covered: prompts (`prompt`), models and files (`microlab`).
"""

import hashlib
import json
import math
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from .prompt import COT_SENTENCE

HELDOUT_PERCENT = 20  # of all questions of a family, chosen by hash

# How a teacher writes its steps, and how often. The first words of a thought give its style away, so sampling them samples the style.
STYLES = {"short": 0.58, "labelled": 0.17, "spoken": 0.17, "careful": 0.08}
PLACES = ("Ones", "Tens", "Hundreds")


@dataclass(frozen=True)
class Family:
    """A kind of question.

    system     1 (answered at once) or 2 (worked steps first)
    draw       a random.Random → the arguments of a random question, a tuple of texts
    solve      the arguments → the answer, a text
    phrasings  templates with {0}, {1} for the arguments; every one is used in training and in tests
    """

    name: str
    system: int
    draw: Callable
    solve: Callable
    phrasings: tuple


@dataclass(frozen=True)
class Question:
    """One question: `arguments` is a tuple of texts, `answer` the exact text of its answer."""

    family: str
    system: int
    arguments: tuple
    answer: str

    @property
    def id(self) -> str:
        """`add:347,285`: the same for every phrasing."""
        return question_id(self.family, self.arguments)


def question_id(family: str, arguments: tuple) -> str:
    return f"{family}:{','.join(arguments)}"


def _draw_letters(rng: random.Random) -> tuple:
    return ("".join(rng.choices(string.ascii_uppercase, k=4)),)


def _draw_number(rng: random.Random) -> tuple:
    return (str(rng.randint(1000, 9999)),)


def _draw_pair(rng: random.Random) -> tuple:
    """Two 3-digit numbers, the larger first: no difference is negative, and 285 + 347 is not 347 + 285 in disguise."""
    low, high = sorted((rng.randint(100, 999), rng.randint(100, 999)))
    return str(high), str(low)


def _draw_product(rng: random.Random) -> tuple:
    return str(rng.randint(100, 999)), str(rng.randint(2, 9))


_FAMILIES = (
    Family(
        "reverse",
        1,
        _draw_letters,
        lambda letters: letters[::-1],
        (
            "Write backwards the letters {0}.",
            "Reverse the letters {0}.",
            "Turn around the word {0}.",
            "What is the reverse of the word {0}?",
        ),
    ),
    Family(
        "swap",
        1,
        _draw_letters,
        lambda letters: letters[-1] + letters[1:-1] + letters[0],
        (
            "Swap the first and the last letter of {0}.",
            "Exchange the two outer letters of {0}.",
            "Let the first and the last letter trade places in {0}.",
            "What comes of swapping the outer letters of {0}?",
        ),
    ),
    Family(
        "last_letter",
        1,
        _draw_letters,
        lambda letters: letters[-1],
        (
            "What is the last letter of {0}?",
            "Which letter ends the word {0}?",
            "Name the final letter of {0}.",
            "Give only the last letter of the word {0}.",
        ),
    ),
    Family(
        "largest",
        1,
        _draw_number,
        max,
        (
            "What is the largest digit of {0}?",
            "Which digit is the biggest in {0}?",
            "Name the highest digit of {0}.",
            "Give only the greatest digit of {0}.",
        ),
    ),
    Family(
        "smallest",
        1,
        _draw_number,
        min,
        (
            "What is the smallest digit of {0}?",
            "Which digit is the least in {0}?",
            "Name the lowest digit of {0}.",
            "Give only the smallest digit of {0}.",
        ),
    ),
    Family(
        "parity",
        1,
        _draw_number,
        lambda number: "odd" if int(number) % 2 else "even",
        (
            "Say even or odd for the number {0}.",
            "Is it even or odd, the number {0}?",
            "Tell me the parity of {0}.",
            "What is the parity of the number {0}?",
        ),
    ),
    Family(
        "count_even",
        1,
        _draw_number,
        lambda number: str(sum(digit in "02468" for digit in number)),
        (
            "How many even digits are in {0}?",
            "Count the even digits of {0}.",
            "Give the number of even digits in {0}.",
            "What is the count of even digits in {0}?",
        ),
    ),
    Family(
        "add",
        2,
        _draw_pair,
        lambda left, right: str(int(left) + int(right)),
        (
            "What is {0} + {1}?",
            "Add {0} and {1}.",
            "Find the sum of {0} and {1}.",
            "How much is {0} plus {1}?",
        ),
    ),
    Family(
        "subtract",
        2,
        _draw_pair,
        lambda left, right: str(int(left) - int(right)),
        (
            "What is {0} - {1}?",
            "Find {0} minus {1}.",
            "Find the difference of {0} and {1}.",
            "How much is {0} less {1}?",
        ),
    ),
    Family(
        "multiply",
        2,
        _draw_product,
        lambda left, right: str(int(left) * int(right)),
        (
            "What is {0} * {1}?",
            "Multiply {0} by {1}.",
            "Find the product of {0} and {1}.",
            "How much is {0} times {1}?",
        ),
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}


def split_of(family: str, arguments: tuple) -> str:
    """`"heldout"` or `"train"`: decided by a hash of the question alone, so that the two never share a question, whatever the seed."""
    digest = hashlib.sha256(question_id(family, arguments).encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT else "train"


def sample_questions(family: str, n: int, seed: int, split: str) -> list[Question]:
    """`n` distinct questions of one family and split ("train" or "heldout"), the same for the same seed.

    Raises ValueError where the family has fewer (the smallest, multiply, has 7,200 questions, a fifth of them held out).
    """
    rng = random.Random(f"{family} {split} {seed}")
    found, misses = {}, 0
    while len(found) < n:
        arguments = FAMILIES[family].draw(rng)
        if split_of(family, arguments) != split or arguments in found:
            misses += 1
            if misses > 100 * n + 10_000:
                raise ValueError(f"family {family!r} has no {n} distinct {split} questions; {len(found)} were found")
            continue
        found[arguments] = Question(family, FAMILIES[family].system, arguments, FAMILIES[family].solve(*arguments))
    return list(found.values())


def phrase(question: Question, rng: random.Random) -> str:
    """The question in words: one of its family's phrasings."""
    return rng.choice(FAMILIES[question.family].phrasings).format(*question.arguments)


def question_of(instruction: str) -> Question:
    """The question that an instruction asks: the inverse of `phrase`.  `Find the sum of 347 and 285.` → add:347,285

    Raises ValueError for a text that is no phrasing of any family.
    """
    for family in FAMILIES.values():
        for phrasing in family.phrasings:
            pattern = re.escape(phrasing).replace(r"\{0\}", "(\\w+)").replace(r"\{1\}", "(\\w+)")
            if found := re.fullmatch(pattern, instruction):
                arguments = found.groups()
                return Question(family.name, family.system, arguments, family.solve(*arguments))
    raise ValueError(f"no family of the micro world asks {instruction!r}")


def _columns(question: Question) -> list[tuple]:
    """Column by column from the ones: [(what is reckoned, its value, digit to write, carry or borrow)].

    347 + 285 → [("7+5", 12, 2, 1), ("4+8+1", 13, 3, 1), ("3+2+1", 6, 6, 0)]

    A product with a carry is reckoned in two steps, `4*6+4=24+4=28`: written at once it has nine times the cases to learn.
    """
    left = [int(digit) for digit in reversed(question.arguments[0])]
    right = [int(digit) for digit in reversed(question.arguments[1])]
    columns, carry = [], 0
    for place, top in enumerate(left):
        if question.family == "subtract":
            top -= carry
            carry = int(top < right[place])
            value = top + 10 * carry - right[place]
            columns.append((f"{top + 10 * carry}-{right[place]}", value, value, carry))
            continue
        tail = f"+{carry}" if carry else ""
        if question.family == "add":
            value, text = top + right[place] + carry, f"{top}+{right[place]}{tail}"
        else:
            value = top * right[0] + carry
            text = f"{top}*{right[0]}" + (f"{tail}={top * right[0]}{tail}" if carry else "")
        carry = value // 10
        columns.append((text, value, value % 10, carry))
    return columns


def worked_steps(question: Question, style: str, checks: int = 1) -> str:
    """The thought of a reasoning question in one of STYLES; `checks` is how often a careful one goes over its steps again.

    short     7+5=12 ⏎ 4+8+1=13 ⏎ 3+2+1=6
    labelled  Ones 7+5=12 ⏎ Tens 4+8+1=13 ⏎ Hundreds 3+2+1=6
    spoken    In the ones: 7+5=12, so write 2 and keep 1. ⏎ …
    careful   Let me go slowly. ⏎ (spoken) ⏎ Check it again. ⏎ (short) …
    """
    columns = _columns(question)
    short = "\n".join(f"{text}={value}" for text, value, _, _ in columns)
    if style == "short":
        return short
    if style == "labelled":
        return "\n".join(f"{place} {line}" for place, line in zip(PLACES, short.split("\n"), strict=True))
    spoken = "\n".join(
        f"In the {place.lower()}: {text}={value}, so write {digit} and keep {kept}."
        for place, (text, value, digit, kept) in zip(PLACES, columns, strict=True)
    )
    return spoken if style == "spoken" else "Let me go slowly.\n" + spoken + f"\nCheck it again.\n{short}" * checks


def sample_thought(question: Question, rng: random.Random) -> str:
    """A thought in a style drawn by its share; a careful one checks once to three times."""
    style = rng.choices(list(STYLES), weights=list(STYLES.values()))[0]
    return worked_steps(question, style, checks=rng.randint(1, 3))


def verbosity_level(thought: str, question: Question) -> int:
    """Reasoning verbosity, 0 to 9: 2 × log2 of the thought's length in characters over that of the shortest thought for the question."""
    ratio = max(1.0, len(thought) / len(worked_steps(question, "short")))
    return min(9, int(2 * math.log2(ratio)))


def difficulty_level(question: Question) -> int:
    """Cognitive difficulty, 0 to 9: 3 for every carry or borrow, and up to 2 for the share of big digits (6 to 9) in the question."""
    carries = sum(kept > 0 for _, _, _, kept in _columns(question))
    digits = "".join(question.arguments)
    return min(9, 3 * carries + sum(digit > "5" for digit in digits) // 2)


# From Qwen2.5's tokenizer: how text is cut before merging (a digit is a piece of its own), and its 22 added tokens in their order;
# `skip_special_tokens` drops the first group and keeps the second.
PRETOKENIZE_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
CONTROL_TOKENS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip

# ChatML for system, user and assistant turns; unlike Qwen's own it adds no system message of its own accord.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def tokenizer_words() -> list[str]:
    """Every text that the tokenizer learns its merges from: all templates and styles, with arguments left out."""
    blank = Question("add", 2, ("000", "000"), "2")
    texts = [phrasing.format("", "") for family in FAMILIES.values() for phrasing in family.phrasings]
    texts += [worked_steps(blank, style).translate({ord("0"): " "}) for style in STYLES]
    texts += ["even", "odd", COT_SENTENCE, ".\n\n", "?\n\n", "<think>\n", "\n</think>\n\n", "system\n", "user\n", "assistant\n"]
    return texts


def build_tokenizer():
    """A byte-level BPE tokenizer of Qwen's kind in which a template word is one token and a digit or capital letter is always its own.

    Returns a Qwen2 tokenizer; what it saves loads with `AutoTokenizer.from_pretrained`. Text comes back exactly (in NFC, as Qwen has it).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(tokenizer_words(), trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    for token in SPECIAL_TOKENS + CONTROL_TOKENS:  # here too, so that their ids follow Qwen's order and not that of eos and pad
        vocab[token] = len(vocab)
    tokenizer = Qwen2TokenizerFast(
        vocab=vocab,
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=1024,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
