"""The micro world as shipped: whole, small, in the hub's exact schemas, its teacher proven, its held-out questions never trained on."""

import random

import pyarrow.parquet
import pytest

from distill import microlab, store
from distill.errors import BackendError
from distill.metrics import final_answer
from distill.microtasks import FAMILIES, phrase, question_of, sample_questions, sample_thought, worked_steps
from distill.models import load_to_train
from distill.prompt import COT_SENTENCE, asked_ids

MODELS = ("teacher", "student_system1", "student_system2")


@pytest.fixture(scope="module")
def models(micro):
    return {name: load_to_train(str(micro / name)) for name in MODELS}


@pytest.fixture(scope="module")
def tables(micro):
    return {name: pyarrow.parquet.read_table(micro / f"{name}.parquet") for name in ("distilqwen", "omnithought")}


def test_every_shipped_file_is_what_its_manifest_recorded(micro):
    manifest = store.read_manifest(micro)
    assert {"heldout.jsonl", "distilqwen.parquet", "omnithought.parquet", "teacher/model.safetensors"} <= set(manifest["files"])


def test_models_keep_to_their_sizes(models, micro):
    sizes = {name: model.num_parameters() for name, (model, _) in models.items()}
    assert sizes["teacher"] <= 4_500_000
    assert max(sizes["student_system1"], sizes["student_system2"]) <= 0.4 * sizes["teacher"]
    assert (micro / "teacher" / "model.safetensors").stat().st_size <= 10_000_000
    assert {model.config.model_type for model, _ in models.values()} == {"qwen2"}


def test_shipped_weights_are_bf16(micro):
    from safetensors import safe_open

    for name in MODELS:
        with safe_open(micro / name / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_students_are_the_untrained_models_of_their_seed(models):
    seed = store.read_manifest(microlab.MICRO)["seed"]
    for name in ("student_system1", "student_system2"):
        model, tokenizer = models[name]
        fresh = microlab.new_model(name, tokenizer, seed).bfloat16().float()
        # within one rounding of bf16: another processor's random numbers may differ in the last bit
        assert all(left.allclose(right, rtol=2**-7) for left, right in zip(model.parameters(), fresh.parameters(), strict=True))


def test_teacher_reaches_its_floor_on_every_family(models, heldout):
    counts = {family: sum(question["family"] == family for question in heldout) for family in FAMILIES}
    assert set(counts.values()) == {200}
    scores = microlab.prove_teacher(*models["teacher"], heldout)
    assert set(scores) == set(FAMILIES) and min(score["value"] for score in scores.values()) >= 0.97


def test_a_weak_teacher_is_not_shipped(models, heldout):
    with pytest.raises(BackendError, match="below 0.97"):
        microlab.prove_teacher(*models["student_system1"], heldout[::100])


def test_families_are_enough_and_phrased_several_ways():
    assert len(microlab.SYSTEM1_FAMILIES) >= 6 and len(microlab.SYSTEM2_FAMILIES) >= 3
    assert all(len(set(family.phrasings)) >= 4 for family in FAMILIES.values())


def test_held_out_questions_appear_in_no_training_row_in_any_phrasing(tables, heldout):
    asked = {question_of(row["instruction"]).id for row in heldout}
    assert len(asked) == len(heldout)
    trained = {question_of(text).id for text in tables["distilqwen"]["instruction"].to_pylist()}
    trained |= {question_of(text).id for text in tables["omnithought"]["question"].to_pylist()}
    trained |= {row["id"] for rows in microlab.gold_rows(store.read_manifest(microlab.MICRO)["seed"]).values() for row in rows}
    assert not asked & trained


def test_held_out_file_has_the_right_answers(heldout):
    assert set(heldout[0]) == {"id", "family", "system", "instruction", "answer"}
    for row in heldout:
        question = question_of(row["instruction"])
        assert (question.family, question.system, question.answer) == (row["family"], row["system"], row["answer"])


def test_system1_file_has_distilqwens_schema(tables):
    assert [(field.name, str(field.type)) for field in tables["distilqwen"].schema] == [("instruction", "string"), ("output", "string")]


def test_system2_file_has_omnithoughts_schema(tables):
    level = "struct<judge: string, level: int64>"
    trace = {
        "Cognitive_Difficulty": level,
        "Reasoning_Verbosity": level,
        "full_response": "string",
        "solution": "string",
        "teacher": "string",
        "thought": "string",
        "thought_correctness_verify": "bool",
    }
    schema = tables["omnithought"].schema
    assert schema.names == ["question", "reasoning"]
    assert {field.name: str(field.type) for field in schema.field("reasoning").type.value_type} == trace


def test_traces_are_several_a_question_right_and_wrong_and_of_every_length(tables):
    rows = tables["omnithought"].to_pylist()
    traces = [trace for row in rows for trace in row["reasoning"]]
    assert all(len(row["reasoning"]) > 1 for row in rows)
    wrong = sum(not trace["thought_correctness_verify"] for trace in traces) / len(traces)
    assert 0.01 < wrong < 0.3
    assert {trace["Reasoning_Verbosity"]["level"] for trace in traces} >= {0, 1, 5, 6, 7}
    assert {level // 3 if level < 6 else 2 for level in (trace["Cognitive_Difficulty"]["level"] for trace in traces)} == {0, 1, 2}
    for row in rows[:500]:
        answer = question_of(row["question"]).answer
        for trace in row["reasoning"]:
            assert trace["full_response"] == f"<think>\n{trace['thought']}\n</think>\n\n{trace['solution']}"
            assert trace["thought_correctness_verify"] == (final_answer(trace["full_response"]) == answer)


def test_system1_labels_are_the_teachers_mistakes_included(tables):
    rows = tables["distilqwen"].to_pylist()
    right = [question_of(row["instruction"]).answer == row["output"] for row in rows]
    assert 0.9 < sum(right) / len(right) < 1.0


def test_reasoning_questions_are_the_same_for_both_systems(tables):
    plain = {text for text in tables["distilqwen"]["instruction"].to_pylist() if question_of(text).system == 2}
    assert plain == set(tables["omnithought"]["question"].to_pylist())


def test_worked_steps_end_in_the_answer_and_every_line_is_true():
    rng = random.Random(0)
    for family in microlab.SYSTEM2_FAMILIES:
        for question in sample_questions(family, 200, 3, "train"):
            steps = worked_steps(question, "short").split("\n")
            values = [int(step.rpartition("=")[2]) for step in steps]
            assert all(len({eval(side) for side in step.split("=")}) == 1 for step in steps)  # digits and + - * alone
            written = str(values[-1]) + "".join(str(value % 10) for value in reversed(values[:-1]))
            assert int(written) == int(question.answer)
            assert sample_thought(question, rng)


def test_every_phrasing_leads_back_to_its_question():
    rng = random.Random(0)
    for family in FAMILIES:
        for question in sample_questions(family, 100, 0, "heldout"):
            assert question_of(phrase(question, rng)) == question


def test_a_question_of_no_family_is_refused():
    with pytest.raises(ValueError, match="no family"):
        question_of("What is the capital of France?")


def test_tokenizer_keeps_digits_and_capitals_apart(tokenizer):
    for token in tokenizer.get_vocab():
        assert (
            sum(letter.isdigit() for letter in token) <= 1
            and sum(letter.isupper() and letter.isascii() for letter in token) <= 1
            or "|" in token
        )


def test_tokenizer_has_qwens_added_tokens_in_qwens_order(tokenizer):
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda pair: pair[1])
    names = [name for name, _ in added]
    assert names[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and len(names) == 22 and names[-1] == "<|file_sep|>"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_the_teacher_is_asked_in_chatml(tokenizer):
    text = tokenizer.decode(asked_ids(tokenizer, "Add 3 and 4.", mode="system2"))
    assert text == f"<|im_start|>user\nAdd 3 and 4.\n\n{COT_SENTENCE}<|im_end|>\n<|im_start|>assistant\n"
