"""Figures from scored answers: quality, a student beside its teacher, cases, targets."""

import math

import pytest

from distill import quality


def scored(right, *, family="add", text="4", **other) -> dict:
    measured = {"exact_match": right, "token_f1": right, "rouge_l": right, "math_verified": right, "repeated": 0.0}
    return {"family": family, "text": text, "tokens": 1, "stopped": True, **measured, "reference": None, "confidence": 0.5, **other}


BLEU = {"value": 50.0, "n": 4, "ci": [40.0, 60.0]}


def read(nll, top1):
    return {"nll": nll, "tokens": len(top1), "top1": top1}


def test_a_model_against_itself_retains_all_with_no_difference():
    answers = [scored(number % 3 > 0) for number in range(60)]
    kept, differences = quality.beside_teacher(answers, answers)
    assert {(found["value"], *found["ci"]) for found in kept.values()} == {(1.0, 1.0, 1.0)}
    assert {(found["value"], found["p"]) for found in differences.values()} == {(0.0, 1.0)}
    assert quality.beside_before(answers, answers)["exact_match"]["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}


def test_a_metric_that_does_not_apply_to_the_references_is_left_out():
    answers = [scored(1, math_verified=None) for _ in range(5)]
    kept, _ = quality.beside_teacher(answers, answers)
    assert "math_verified" not in kept and quality.quality(answers, BLEU)["math_verified"] is None


def test_perplexity_and_agreement_count_tokens_not_rows():
    student = [scored(1, reference=read(math.log(2) * 3, [1, 2, 3])), scored(1, reference=read(math.log(2), [7])), scored(0)]
    teacher = [scored(1, reference=read(1.0, [1, 2, 4])), scored(1, reference=read(1.0, [7])), scored(0)]
    found = quality.quality(student, BLEU, teacher)
    assert found["perplexity"]["value"] == pytest.approx(2.0)
    assert found["agreement"]["value"] == pytest.approx(3 / 4) and found["agreement"]["n"] == 2


def test_models_whose_tokenizers_cut_otherwise_have_no_agreement():
    student, teacher = [scored(1, reference=read(1.0, [1, 2, 3]))], [scored(1, reference=read(1.0, [1, 2]))]
    assert quality.quality(student, BLEU, teacher)["agreement"] is None


def test_answers_without_an_end_have_no_confidence_and_no_place_in_the_calibration():
    answers = [scored(1, confidence=0.9), scored(0, confidence=None, stopped=False)]
    found = quality.quality(answers, BLEU)
    assert found["calibration"]["n"] == 1 and found["stopped"]["value"] == 0.5
    assert quality.quality([scored(0, confidence=None)], BLEU)["calibration"] is None


@pytest.mark.parametrize(
    ("references", "math", "metric"),
    [
        (["42", "the sky"], None, "exact_match"),
        (["a long text of many words that no answer need ever equal in full"] * 2, 1, "math_verified"),
        (["a long text of many words that no answer need ever equal in full"] * 2, None, "token_f1"),
    ],
)
def test_the_headline_is_a_metric_that_suits_the_references(references, math, metric):
    found, reason = quality.headline(references, [scored(0, math_verified=math) for _ in references])
    assert found == metric and reason


def test_cases_come_with_the_most_different_first():
    questions = [{"id": str(number), "instruction": "?", "answer": "4"} for number in range(4)]
    student = [scored(1), scored(0, text="5"), scored(1, text="also 4"), scored(1)]
    teacher = [scored(1), scored(1), scored(1), scored(0, text="6")]
    rows = quality.cases(questions, {"student": student, "teacher": teacher}, "exact_match", "student", "teacher")
    assert [row["id"] for row in rows] == ["1", "3", "2", "0"]
    assert rows[0]["answers"]["student"] == {"text": "5", "tokens": 1, "stopped": True, "right": False, "score": 0}


def systems(value, low, high):
    share = {"value": value, "n": 100, "ci": [low, high]}
    return {"system2": {"student": "system2", "headline": "exact_match", "retained": {"exact_match": share}}}


MODELS = {"system2": {"quality": {"system2": {"reasoned": {"value": 0.5, "n": 10, "ci": [0.2, 0.79]}}}}}


def test_a_target_is_met_by_its_value_and_says_where_the_interval_reaches_over_the_line():
    clear, unsure = (quality.targets(systems(0.95, low, 1.0), MODELS, None)[0] for low in (0.91, 0.88))
    assert clear["met"] and "interval" not in clear["note"]
    assert unsure["met"] and "its interval reaches over the line" in unsure["note"]


def test_what_was_not_measured_is_neither_met_nor_missed():
    found = {target["name"]: target for target in quality.targets(systems(0.5, 0.4, 0.6), MODELS, None)}
    assert found["Quality kept, of the teacher's"]["met"] is False and found["Answers that reason first"]["met"] is False
    assert {(found[name]["met"], found[name]["shown"]) for name in found if "tokens" in name or "Speed" in name} == {(None, "not measured")}
    none = systems(None, 0, 0)
    none["system2"]["retained"]["exact_match"] = {"value": None, "n": 3, "ci": None}
    assert quality.targets(none, MODELS, None)[0]["met"] is None


def test_speed_is_held_against_the_faster_teacher():
    ratios = [
        {"student": "system2", "teacher": f"teacher {bits}-bit", "speed": {"value": value, "n": 4, "ci": [value, value]}}
        for bits, value in ((8, 9.0), (16, 2.5))
    ]
    seconds = {"128": {"p95": {"value": 1.9, "n": 4, "ci": [1.5, 2.5]}}, "256": {"p95": {"value": 3.1, "n": 4, "ci": [3.05, 3.2]}}}
    speed = {"ratios": ratios, "models": {"system2": {"seconds": seconds}}}
    found = quality.targets(systems(1, 1, 1), MODELS, speed)[2:]
    assert [(target["shown"], target["met"]) for target in found] == [("2.50 ×", False), ("1.90 s", True), ("3.10 s", False)]
    assert "16-bit" in found[0]["note"] and "reaches over" in found[1]["note"]
