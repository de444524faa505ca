"""The demo: its controls are what they claim, scoring runs for real, and the whole reaches its targets (slow)."""

from collections import Counter

import pytest

from distill import demo, evaluate, store
from distill.errors import BackendError
from distill.microlab import MAX_NEW_TOKENS, SYSTEM1_FAMILIES, SYSTEM2_FAMILIES
from distill.microtasks import question_of


def labels(rows):
    return Counter((question_of(row["instruction"]).family, row["output"]) for row in rows)


def test_shuffled_labels_keep_every_familys_labels_and_lose_their_questions(prepared_rows):
    shuffled = demo._shuffled(prepared_rows, seed=0)
    assert labels(shuffled) == labels(prepared_rows)
    assert [row["instruction"] for row in shuffled] == [row["instruction"] for row in prepared_rows]
    changed = sum(left["output"] != right["output"] for left, right in zip(shuffled, prepared_rows, strict=True))
    assert changed > 0.5 * len(prepared_rows)
    assert shuffled == demo._shuffled(prepared_rows, seed=0) != demo._shuffled(prepared_rows, seed=1)


def test_gold_labels_are_exact_and_change_wrong_rows_alone(prepared_rows):
    for row, gold in zip(prepared_rows, demo._gold(prepared_rows), strict=True):
        answer = question_of(row["instruction"]).answer
        assert gold["output"] == answer
        assert (gold == row) == (row["output"] == answer)


def test_chance_is_the_share_of_the_commonest_label(tmp_path):
    rows = [
        {"instruction": f"Tell me the parity of {number}.", "output": output} for number, output in enumerate(["even"] * 3 + ["odd"], 1234)
    ]
    store.write_rows(tmp_path / "rows.json", rows)
    assert demo._chance(tmp_path / "rows.json")["parity"] == 3 / 4


def test_scores_come_from_a_subprocess_each_model_asked_in_its_mode(tmp_path, micro, heldout):
    store.write_jsonl(tmp_path / "questions.jsonl", heldout[::40])
    models = [{"name": "teacher", "path": str(micro / "teacher"), "mode": None}]
    models += [{"name": name, "path": str(micro / "student_system1"), "mode": "system1"} for name in ("before",)]
    models += [{"name": "teacher asked plainly", "path": str(micro / "teacher"), "mode": "system1"}]
    scores = evaluate.score(models, tmp_path / "questions.jsonl", tmp_path, MAX_NEW_TOKENS)
    assert set(scores) == {"teacher", "before", "teacher asked plainly"}
    assert scores["teacher"]["parameters"] > scores["before"]["parameters"]
    assert evaluate.mean_exact_match(scores["teacher"], SYSTEM1_FAMILIES + SYSTEM2_FAMILIES) > 0.9
    assert evaluate.mean_exact_match(scores["before"], SYSTEM1_FAMILIES) < 0.1
    assert evaluate.mean_exact_match(scores["teacher asked plainly"], SYSTEM2_FAMILIES) < 0.5
    assert {score["n"] for score in scores["teacher"]["exact_match"].values()} == {5}


def test_a_failed_scoring_shows_its_log(tmp_path, heldout):
    store.write_jsonl(tmp_path / "questions.jsonl", heldout[:1])
    with pytest.raises(BackendError, match="Invalid student model"):
        evaluate.score(
            [{"name": "x", "path": str(tmp_path / "none"), "mode": None}], tmp_path / "questions.jsonl", tmp_path, MAX_NEW_TOKENS
        )


@pytest.mark.slow
def test_the_demo_reaches_its_targets():
    report = demo.run_demo(seed=0)
    assert demo.retained(report) >= 0.90
    mean = {
        name: evaluate.mean_exact_match(model, SYSTEM1_FAMILIES)
        for name, model in (*report["system1"].items(), *report["controls"].items())
    }
    chance = sum(report["chance"][family] for family in SYSTEM1_FAMILIES) / len(SYSTEM1_FAMILIES)
    assert mean["before"] <= 0.02
    assert abs(mean["shuffled_labels"] - chance) < 0.1
    assert mean["gold_labels"] >= mean["after"] - 0.03
    assert evaluate.mean_exact_match(report["system1"]["after"], SYSTEM2_FAMILIES) < 0.35


def test_the_demo_takes_every_instruction_row_and_a_fixed_number_of_the_others(tmp_path):
    systems = [question_of(row["instruction"]).system for row in store.read_rows(demo._choose_rows(tmp_path / "rows.jsonl"))]
    assert (systems.count(1), systems.count(2)) == (8400, demo.REASONING_ROWS)
