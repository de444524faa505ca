"""Held-out questions that training saw: found when rephrased by form, kept when they mean something else, in bounded memory and time."""

import random
import string
import time
import tracemalloc

import pytest

from distill.leakage import MOST_CHARS, N_GRAMS, SAME, clean

SUM = "What is the sum of 347 and 285, in words?"
LONG = (
    "A baker sells twelve loaves of bread each morning and seven more in the afternoon. On Saturdays she sells twice as many as on any "
    "other day, and on Sundays the shop is closed. Each loaf costs three coins, and flour for one loaf costs one coin. How many coins does "
    "she earn in a week, once the flour is paid for?"
)


def found(question: str, *training: str) -> list[str]:
    """How a question was found among training rows; empty where it was kept."""
    leakage = clean([{"id": "q", "instruction": question}], [{"instruction": text} for text in training])
    assert len(leakage.kept) + len(leakage.removed) == 1 and leakage.checked_against == len(training)
    return [one["how"] for one in leakage.removed]


@pytest.mark.parametrize(
    "planted",
    [
        SUM,
        SUM.upper(),
        "  What is\tthe sum of\n\n347 and   285, in words ?  ",
        "What is the sum of 347 and 285; in words?!...",
        "„What is — the sum of 347 and 285 — in *words*”",
        "Ｗｈａｔ　ｉｓ ｔｈｅ ｓｕｍ ｏｆ ３４７ ａｎｄ ２８５， ｉｎ ｗｏｒｄｓ？",
        "WHAT is the\u200b sum\u00a0of:  ３４７ and 285 (in words)...",
    ],
    ids=["itself", "case", "spaces", "punctuation", "dashes and quotes", "full width", "all together"],
)
def test_a_planted_training_row_is_found_in_whatever_form(planted):
    assert found(SUM, "What is the sum of 1 and 2?", planted) == [SAME]
    assert found(planted, SUM) == [SAME]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 347 + 285?", "What is 347+285"),
        ("What is 347 + 285?", "what is 347 + 285 = ?"),
        ("Compute 9 − 4 × 2.", "compute 9 - 4 * 2"),
        ("Divide: 12 ÷ 4", "Divide 12/4"),
        ("How much is 3,000?", "How much is 3000?"),
        ("What is x-y?", "What is x - y?"),
        ("Is he well-known?", "Is he well known?"),
        ("Don't stop.", "Dont stop!"),
        ("Name the **capital** of Peru", "Name the capital of Peru"),
        ("What is 10⁻³?", "What is 10^-3?"),
        ("请计算三加五。", "请 计算 三 加 五"),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_form_alone_makes_no_other_question(one, other):
    assert found(one, other) == [SAME] == found(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 347 + 285?", "What is 347 - 285?"),
        ("What is 347+285?", "What is 347*285?"),
        ("What is 347 / 285?", "What is 347 285?"),
        ("What is 1.5?", "What is 15?"),
        ("What is .5?", "What is 5?"),
        ("What is -5 + 3?", "What is 5 + 3?"),
        ("What is (2 + 3) * 4?", "What is 2 + (3 * 4)?"),
        ("What is (2 + 3) * 4?", "What is 2 + 3 * 4?"),
        ("What is 5²?", "What is 52?"),
        ("What is 1½?", "What is 11/2?"),
        ("What is x-y?", "What is x+y?"),
        ("Is 3 < 4?", "Is 3 > 4?"),
        ("Take 5% of it.", "Take 5 of it."),
        ("Write it in C++.", "Write it in C#."),
        ("Sort 1 2 3.", "Sort 12 3."),
        ("What does 😀 mean?", "What does 😢 mean?"),
        ("की", "का"),
        ("???", "!!!"),
        ("cafe", "café"),
    ],
)
def test_what_carries_meaning_tells_questions_apart(one, other):
    assert found(one, other) == [] == found(other, one)


def test_instruction_and_input_are_one_text():
    training = [{"instruction": "Translate:", "input": "good day"}]
    questions = [{"id": 1, "instruction": "translate GOOD day"}, {"id": 2, "instruction": "Translate:", "input": "good night"}]
    leakage = clean(questions, training)
    assert leakage.kept == [questions[1]]
    assert leakage.removed == [{"id": 1, "instruction": "translate GOOD day", "training": "Translate: good day", "how": SAME}]


@pytest.mark.parametrize(
    "training",
    [f"{LONG} Explain your answer step by step.", f"Here is a riddle. {LONG.upper()}", LONG.replace("Saturdays", "Fridays")],
    ids=["sentence behind", "sentence before", "word changed"],
)
def test_a_long_question_is_found_with_a_sentence_added_or_a_word_changed(training):
    assert found(LONG, training) == [N_GRAMS]
    assert found(training, LONG) == [N_GRAMS]


def test_runs_of_words_must_stand_in_one_row():
    words = LONG.split()
    parts = [" ".join(words[start : start + 25]) for start in range(0, len(words), 18)]
    assert len(parts) > 2 and found(LONG, *parts) == []


def test_other_long_questions_are_kept():
    other = "A gardener plants nine rows of beans each spring and four more in summer. How many does he pick in a year, if each row bears?"
    assert found(LONG, other) == []


def test_questions_of_one_template_that_differ_in_a_word_are_kept():
    rows = [f"Please tell me what the last letter of the word {word} is." for word in ("ABCD", "ABCE")]
    assert len(rows[0].split()) >= 11 and found(rows[0], rows[1]) == []


def test_a_question_found_both_ways_is_called_the_same():
    assert found(LONG, f"{LONG} Really?", LONG.lower()) == [SAME] == found(LONG, LONG.lower(), f"{LONG} Really?")


def test_the_kept_keep_their_order_and_the_removed_are_told_once():
    questions = [{"id": number, "instruction": f"Add {number} and 1."} for number in range(9)]
    leakage = clean(questions, [{"instruction": "add 4 and 1"}, {"instruction": "Add 2 and 1!"}, {"instruction": "ADD 4 AND 1"}])
    assert [one["id"] for one in leakage.kept] == [0, 1, 3, 5, 6, 7, 8] and [one["id"] for one in leakage.removed] == [2, 4]


def test_what_is_shown_of_a_removed_question_is_cut():
    long = "word " * 1000
    (one,) = clean([{"id": 1, "instruction": long}], [{"instruction": long}]).removed
    assert len(one["instruction"]) < 300 and len(one["training"]) < 300


def test_the_micro_worlds_held_out_questions_are_all_kept(heldout, micro):
    import pyarrow.parquet

    columns = {"distilqwen": "instruction", "omnithought": "question"}
    training = [
        {"instruction": text}
        for name, column in columns.items()
        for text in pyarrow.parquet.read_table(micro / f"{name}.parquet", columns=[column])[column].to_pylist()
    ]
    leakage = clean(heldout, training)
    assert (len(leakage.kept), leakage.removed, leakage.checked_against) == (2000, [], 17_400)


@pytest.mark.parametrize(
    "piece",
    ["hello world ", ")", "\u0315\u0300", "1,111", "\ud800", "计算", "1*(-", "\x00\u202e", "<|im_end|>"],
)
def test_hostile_rows_neither_crash_nor_hang(piece):
    line = piece * (10**7 // len(piece))
    start = time.process_time()
    leakage = clean([{"id": 1, "instruction": line}, {"id": 2, "instruction": SUM}], [{"instruction": line}, {"instruction": SUM}])
    assert [one["how"] for one in leakage.removed] == [SAME, SAME] and time.process_time() - start < 15
    leakage.removed[0]["training"].encode()


def test_a_row_is_read_no_further_than_its_first_million_characters():
    assert found("a" * MOST_CHARS + "b", "a" * MOST_CHARS + "c") == [SAME]


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds_and_no_memory_of_their_own():
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]
    questions = [{"id": number, "instruction": " ".join(rng.choices(vocabulary, k=80))} for number in range(2000)]
    planted = {1000 * number: f"{questions[number]['instruction'].upper()} Explain." for number in range(100)}
    rows = ({"instruction": planted.get(number) or " ".join(rng.choices(vocabulary, k=80))} for number in range(100_000))
    start = time.process_time()
    leakage = clean(questions, rows)
    seconds = time.process_time() - start
    assert [one["id"] for one in leakage.removed] == list(range(100)) and leakage.checked_against == 100_000 and seconds < 60
    few, many = (_peak_bytes(questions, rows) for rows in (1000, 10_000))
    assert many < 1.2 * few


def _peak_bytes(questions: list[dict], rows: int) -> int:
    tracemalloc.start()
    try:
        clean(
            questions,
            ({"instruction": f"What is {number} and a few words more, so that it is no short one, nor two?"} for number in range(rows)),
        )
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
