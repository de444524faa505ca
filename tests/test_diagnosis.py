"""Broken students are called out by what they measure; good and merely imperfect ones are not.

The figures of the broken ones are those of the micro world's teacher after it was broken on purpose (held-out questions, 100 of System 1
and 43 of System 2): its end of turn never chosen, one token always preferred, another chat template; "random" is the untrained student.
"""

import pytest

from distill.diagnosis import diagnose
from distill.intervals import mcnemar, paired_difference, retained, wilson

VOCABULARY = 573


def estimate(value: float, n: int, half: float = 0.0) -> dict:
    return {"value": value, "n": n, "ci": [value - half, value + half]}


def quality(n: int, **figures) -> dict:
    """What `quality.quality` gives, of a student without fault but for `figures`."""
    shares = {"exact_match": 0.9, "token_f1": 0.9, "reasoned": 0.0, "stopped": 1.0, "repeating": 0.0, "empty": 0.0} | figures
    found = {name: wilson(round(n * share), n) for name, share in shares.items() if name not in ("perplexity", "agreement", "tokens")}
    perplexity, agreement = figures.get("perplexity", 1.2), figures.get("agreement", 0.9)
    return {
        **found,
        "n": n,
        "perplexity": perplexity and estimate(perplexity, n, 0.1 * perplexity),
        "agreement": None if agreement is None else estimate(agreement, n, min(agreement, 0.05)),
        "tokens": estimate(figures.get("tokens", 12.0), n, 1.0),
    }


def outcomes(n: int, after: float, before: float, teacher: float = 1.0) -> dict:
    """What stands beside a student: its answers against those of before and of the teacher, the wrong ones last."""
    one, other, third = ([number < round(n * share) for number in range(n)] for share in (after, before, teacher))
    change = paired_difference(one, other)
    return {
        "against_before": {"exact_match": {**change, "mcnemar": mcnemar(one, other)}, "token_f1": change},
        "retained": {"exact_match": retained(one, third), "token_f1": retained(one, third)},
    }


def called(given: dict, after: float, before: float = 0.0, teacher: float = 1.0, **facts) -> list[str]:
    known = {"template_differs": False, "limit_tokens": 256, "vocabulary": VOCABULARY, "mode": "system1", **facts}
    faults = diagnose(given, quality(given["n"]), outcomes(given["n"], after, before, teacher), known)
    assert all(set(fault) == {"what", "evidence", "advice"} and all(fault.values()) for fault in faults)
    assert all(any(letter.isdigit() for letter in fault["evidence"]) for fault in faults if "template" not in fault["what"])
    return [fault["what"] for fault in faults]


NOT_FINITE = "Its weights are not finite."
CHANCE = "It knows no more than chance, as random weights do."
TEMPLATE = "Its chat template is not the one that it was trained with."
ENDLESS = "Its answers do not stop by themselves."
REPEATS = "It repeats itself."
EMPTY = "It often says nothing in the end."
UNREASONED = "It is a System-2 student and does not reason before it answers."
NO_BETTER = "It is no better than before its training."

SYSTEM1_FAULTS = {
    "random weights": ({"perplexity": 848, "agreement": 0.0, "stopped": 0.03, "repeating": 0.10}, [CHANCE, ENDLESS, NO_BETTER]),
    "no stop token": ({"perplexity": 353_274, "agreement": 0.65, "stopped": 0.0, "repeating": 0.02}, [ENDLESS, NO_BETTER]),
    "repeating": ({"perplexity": 1341, "agreement": 0.0, "stopped": 0.0, "repeating": 1.0}, [CHANCE, ENDLESS, REPEATS, NO_BETTER]),
    "repeating, then stopping": ({"agreement": 0.9, "stopped": 1.0, "repeating": 0.6}, [REPEATS, NO_BETTER]),
}


@pytest.mark.parametrize("fault", SYSTEM1_FAULTS)
def test_a_broken_system1_student_is_called_out(fault):
    figures, expected = SYSTEM1_FAULTS[fault]
    assert called(quality(100, exact_match=0.0, token_f1=0.0, **figures), 0.0) == expected


SYSTEM2_FAULTS = {
    "random weights": (
        {"perplexity": 851, "agreement": 0.0, "stopped": 0.3, "repeating": 0.21, "reasoned": 0.0},
        [CHANCE, ENDLESS, REPEATS, UNREASONED, NO_BETTER],
    ),
    "no stop token": ({"perplexity": 3.05, "agreement": 0.97, "stopped": 0.0, "empty": 0.07, "reasoned": 0.93}, [ENDLESS, NO_BETTER]),
    "repeating": (
        {"perplexity": 4407, "agreement": 0.0, "stopped": 0.0, "repeating": 1.0},
        [CHANCE, ENDLESS, REPEATS, UNREASONED, NO_BETTER],
    ),
    "answers at once": ({"reasoned": 0.1}, [UNREASONED, NO_BETTER]),
    "thoughts without end": ({"reasoned": 0.4, "empty": 0.6, "stopped": 0.4}, [ENDLESS, EMPTY, UNREASONED, NO_BETTER]),
}


@pytest.mark.parametrize("fault", SYSTEM2_FAULTS)
def test_a_broken_system2_student_is_called_out(fault):
    figures, expected = SYSTEM2_FAULTS[fault]
    assert called(quality(43, exact_match=0.0, token_f1=0.0, **figures), 0.0, mode="system2") == expected


@pytest.mark.parametrize("perplexity", [2337, 484_659])
def test_another_template_is_called_out_and_not_taken_for_random_weights(perplexity):
    given = quality(100, exact_match=0.10, token_f1=0.10, perplexity=perplexity, agreement=0.25, stopped=0.95)
    assert called(given, 0.10, template_differs=True) == [TEMPLATE]
    assert called(given, 0.10, template_differs=None) == []


GOOD = {
    "as good as its teacher": (quality(200), 0.9, {}),
    "imperfect": (quality(200, exact_match=0.7, stopped=0.93, repeating=0.05, empty=0.03, perplexity=4.0, agreement=0.7), 0.7, {}),
    "System 2, imperfect": (quality(43, reasoned=0.9, stopped=0.91, empty=0.05), 0.8, {"mode": "system2"}),
    "System 1 does not reason": (quality(200, reasoned=0.0), 0.9, {}),
    "a few unlucky answers of ten": (quality(10, stopped=0.8, repeating=0.2, empty=0.1), 0.7, {}),
    "free text": (quality(200, exact_match=0.0, perplexity=9.0, agreement=0.6), 0.4, {}),
    "another tokenizer, no references read": (quality(200, agreement=None, perplexity=None), 0.9, {}),
    "no record of its training": (quality(200), 0.9, {"template_differs": None}),
}


@pytest.mark.parametrize("student", GOOD)
def test_a_good_student_has_no_fault(student):
    given, after, facts = GOOD[student]
    assert called(given, after, **facts) == []


def test_a_student_that_did_not_change_or_fell_is_called_out():
    assert called(quality(200), 0.5, before=0.5) == [NO_BETTER]
    assert called(quality(200), 0.3, before=0.5) == ["It is worse than before its training: exact match, token F1 fell."]


def test_a_student_that_was_near_its_teacher_already_is_not():
    assert called(quality(200), 0.95, before=0.95) == []
    assert called(quality(200), 0.46, before=0.46, teacher=0.5) == []


def test_a_rise_of_one_measure_is_enough():
    comparisons = outcomes(200, 0.0, 0.0)
    comparisons["against_before"]["token_f1"] = outcomes(200, 0.6, 0.3)["against_before"]["token_f1"]
    facts = {"template_differs": False, "limit_tokens": 256, "vocabulary": VOCABULARY, "mode": "system1"}
    assert diagnose(quality(200), quality(200), comparisons, facts) == []
    assert diagnose(quality(200), None, {"retained": {}, "against_before": {}}, facts) == []


def test_weights_that_are_not_finite_are_the_first_fault():
    unread = {**quality(100, exact_match=0.0, stopped=0.0), "perplexity": None, "agreement": None, "calibration": None}
    assert called(unread, 0.0, not_finite=True, template_differs=True) == [NOT_FINITE, TEMPLATE, ENDLESS, NO_BETTER]
    assert called(quality(200), 0.9, not_finite=False) == []


def test_the_evidence_gives_the_figures_and_the_advice_the_settings():
    facts = {"template_differs": False, "limit_tokens": 256, "vocabulary": VOCABULARY, "mode": "system1"}
    broken = quality(100, exact_match=0.0, stopped=0.03, perplexity=848, agreement=0.0, tokens=63.3)
    chance, endless, no_better = diagnose(broken, quality(100), outcomes(100, 0.0, 0.0), facts)
    assert "Perplexity on the reference answers is 848; guessing among its 573 tokens gives 573" in chance["evidence"]
    assert "learning_rate" in chance["advice"] and "num_epochs" in chance["advice"]
    assert "3.0% (95%: 1.0% to 8.5%, n = 100)" in endless["evidence"] and "256 tokens" in endless["evidence"]
    assert "max_length" in endless["advice"] and "max_new_tokens" in endless["advice"]
    assert "exact match changed by +0.000 (95%: +0.000 to +0.000, n = 100, 0 gained and 0 lost, p = 1)" in no_better["evidence"]
