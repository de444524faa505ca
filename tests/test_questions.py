"""Held-out questions: their forms, what training saw of them, which are asked."""

import pytest

from distill import store
from distill.errors import ConfigError, DataError
from distill.questions import drawn, questions_for, read_questions
from distill.students import Student

ROWS = [
    {"instruction": "What is 2 + 2?", "answer": "4", "system": 1},
    {"instruction": "What is 3 + 3?", "input": "quick", "output": "<think>\n3+3=6\n</think>\n\n6"},
    {"instruction": "What is 4 + 4?", "answer": "8", "system": 2, "id": "four"},
]


@pytest.fixture
def student(project):
    """A student that learnt from two rows and was chosen by a third."""
    labeled = project / "labeled.json"
    store.write_rows(labeled, [{"instruction": text, "output": "x"} for text in ("Name the sea.", "What is 2 - 2?")])
    store.write_rows(store.validation_path(labeled), [{"instruction": "Name the tree.", "output": "oak"}])
    record = {
        "job": {"dataset": {"labeled_path": str(project / "run" / "train_tokenized.json")}, "models": {"student": "base"}},
        "data": {
            "labeled_path": str(labeled),
            "labeled_sha256": store.hash_file(labeled),
            "validation_sha256": store.hash_file(store.validation_path(labeled)),
        },
    }
    return Student("system1", str(project / "out"), "base", record)


def test_rows_of_the_lab_are_questions_too_and_each_is_for_its_own_system(tmp_path):
    store.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    first, second = (list(read_questions(tmp_path / "rows.jsonl", mode)) for mode in ("system1", "system2"))
    assert [(row["answer"], row["mode"]) for row in first] == [("4", "system1"), ("6", "system1")]
    assert [row["answer"] for row in second] == ["6", "8"] and second[1]["id"] == "four" and len(second[0]["id"]) == 16


@pytest.mark.parametrize(
    "row", [{"instruction": "?"}, {"instruction": " ", "answer": "4"}, {"instruction": "?", "answer": 4}, {"answer": "4"}]
)
def test_a_row_that_is_no_question_is_named(tmp_path, row):
    store.write_jsonl(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match="row 3 of .*rows.jsonl(: system| is no question)"):
        list(read_questions(tmp_path / "rows.jsonl", "system1"))


def test_a_question_that_training_saw_in_other_letters_is_removed_and_counted(student, project):
    planted = [{"instruction": "name  THE sea!", "answer": "x"}, {"instruction": "What is 2 + 2?", "answer": "4"}]
    store.write_jsonl(project / "heldout.jsonl", planted)
    found = questions_for(student, project / "heldout.jsonl", None, 0)
    assert [row["instruction"] for row in found.rows] == ["What is 2 + 2?"]
    leaked = found.facts["leakage"]
    assert (leaked["removed"], leaked["same"], leaked["n_grams"], leaked["checked_against"]) == (1, 1, 0, 3)
    assert leaked["examples"][0]["instruction"].split() == ["name", "THE", "sea!"] and "Name the sea." in leaked["examples"][0]["training"]


def test_where_all_was_seen_there_is_nothing_to_ask(student, project):
    store.write_jsonl(project / "heldout.jsonl", [{"instruction": "Name the tree.", "answer": "oak"}])
    with pytest.raises(DataError, match="all 1 questions of system1 stand in the training rows too"):
        questions_for(student, project / "heldout.jsonl", None, 0)


def test_without_a_file_the_validation_rows_are_asked_and_that_is_said(student, capsys):
    found = questions_for(student, None, None, 0)
    assert [row["answer"] for row in found.rows] == ["oak"] and "the checkpoint was chosen by" in found.facts["note"]
    assert found.facts["leakage"]["checked_against"] == 2


def test_rows_that_changed_since_the_training_are_not_checked_against(student, project):
    store.write_rows(project / "labeled.json", [{"instruction": "other", "output": "x"}])
    store.write_jsonl(project / "heldout.jsonl", ROWS)
    leaked = questions_for(student, project / "heldout.jsonl", None, 0).facts["leakage"]
    assert leaked["checked_against"] is None and "gone, or others stand there now" in leaked["why_unchecked"]
    store.write_rows(project / "labeled_validation.json", [{"instruction": "other", "output": "x"}])
    with pytest.raises(ConfigError, match="no validation rows here"):
        questions_for(student, None, None, 0)


def test_the_training_rows_themselves_are_no_held_out_questions(student, project):
    with pytest.raises(DataError, match="all 2 questions of system1 stand in the training rows too"):
        questions_for(student, project / "labeled.json", None, 0)


def test_a_copy_of_the_validation_rows_is_known_for_what_it_is(student, project):
    rows = list(store.read_rows(project / "labeled_validation.json"))
    store.write_rows(project / "copy.json", rows)
    found = questions_for(student, project / "copy.json", None, 0)
    assert [row["answer"] for row in found.rows] == ["oak"] and "the checkpoint was chosen by" in found.facts["note"]


def test_a_question_that_comes_twice_is_asked_once(student, project):
    store.write_jsonl(project / "heldout.jsonl", [{"instruction": "What is 2 + 2?", "answer": "4", "id": number} for number in range(3)])
    found = questions_for(student, project / "heldout.jsonl", None, 0)
    assert [row["id"] for row in found.rows] == ["0"] and (found.facts["read"], found.facts["merged"]) == (3, 2)


def test_a_file_for_the_other_system_alone_is_refused(student, project):
    store.write_jsonl(project / "heldout.jsonl", [ROWS[2]])
    with pytest.raises(DataError, match="has no question for system1"):
        questions_for(student, project / "heldout.jsonl", None, 0)


def test_one_file_for_each_system_must_name_both(student, project):
    with pytest.raises(ConfigError, match="no file for system1"):
        questions_for(student, {"system2": "heldout.jsonl"}, None, 0)


def test_questions_are_drawn_by_lot_in_their_order():
    rows = [{"id": number} for number in range(50)]
    first = drawn(rows, 10, 0)
    assert len(first) == 10 and first == sorted(first, key=lambda row: row["id"]) and first == drawn(rows, 10, 0) != drawn(rows, 10, 1)
    assert drawn(rows, None, 0) == drawn(rows, 90, 0) == rows
    with pytest.raises(ConfigError, match="limit = 0"):
        drawn(rows, 0, 0)
