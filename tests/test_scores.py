"""The scoring core: exact match and batched generation."""

import shutil

import pytest

from distill import generation, store
from distill.errors import DataError
from distill.generation import generate
from distill.models import RUN_RECORD, load_to_train
from distill.prompt import asked_ids
from distill.scores import exact_match, score


def test_exact_match_counts_by_family():
    questions = [{"family": "a", "answer": "1"}, {"family": "a", "answer": "2"}, {"family": "b", "answer": "3"}]
    scores = exact_match(questions, ["1", "2 or 3", "<think>\n…\n</think>\n\n3"])
    assert {family: (score["value"], score["n"]) for family, score in scores.items()} == {"a": (0.5, 2), "b": (1.0, 1)}


def test_exact_match_refuses_answers_that_do_not_match_the_questions():
    with pytest.raises(ValueError, match="zip"):
        exact_match([{"family": "a", "answer": "1"}], [])


def test_a_checkpoint_that_was_changed_since_it_was_made_is_not_scored(project, micro):
    out = shutil.copytree(micro / "student_system1", project / "out")
    store.write_manifest(out, {}, name=RUN_RECORD)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=f"model.safetensors is missing or is not what out/{RUN_RECORD} recorded"):
        score([{"name": "m", "path": "out", "mode": None}], micro / "heldout.jsonl", project / "run", {"system1": 1, "system2": 1})


@pytest.fixture(scope="module")
def teacher(micro):
    return load_to_train(str(micro / "teacher"))


def test_batched_answers_equal_answers_one_by_one_in_the_order_asked(teacher, heldout):
    model, tokenizer = teacher
    questions = heldout[::97]
    asked = [asked_ids(tokenizer, question["instruction"], mode=f"system{question['system']}") for question in questions]
    together = generate(model, tokenizer, asked, 200)
    alone = [generate(model, tokenizer, [ids], 200)[0] for ids in asked]
    assert len(questions) > 15
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert all(answer.stopped for answer in together)


def test_generation_stops_at_the_end_of_turn_and_says_when_it_did_not(teacher, heldout):
    model, tokenizer = teacher
    question = next(question for question in heldout if question["system"] == 2)
    asked = [asked_ids(tokenizer, question["instruction"], mode="system2")]
    whole, cut = generate(model, tokenizer, asked, 300)[0], generate(model, tokenizer, asked, 5)[0]
    assert whole.stopped and not whole.text.endswith("<|im_end|>") and whole.tokens < 300
    assert not cut.stopped and cut.tokens == 5 and whole.text.startswith(cut.text)


def test_sampling_is_reproducible_and_differs_from_greedy(teacher, heldout):
    model, tokenizer = teacher
    questions = [question for question in heldout if question["system"] == 2][:12]
    asked = [asked_ids(tokenizer, question["instruction"], mode="system2") for question in questions]
    first, again, other = (
        [answer.text for answer in generate(model, tokenizer, asked, 200, temperature=1.0, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again and first != other


def test_batches_keep_to_the_token_budget_and_cover_every_row():
    lengths = [5, 900, 20, 20, 3, 400]
    batches = list(generation._batches(lengths, 100, 1200, None))
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * (max(lengths[n] for n in batch) + 100) <= 1200 for batch in batches)
