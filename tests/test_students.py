"""What is known of a checkpoint: its mode, its past, its rows, its training."""

import shutil
from pathlib import Path

import pytest

from distill import store
from distill.errors import ConfigError, DataError
from distill.models import RUN_RECORD, load_tokenizer
from distill.students import learnt_rows, student_at, template_differs, training_facts


def test_a_checkpoint_of_the_lab_says_how_it_is_asked_and_what_it_was(small_run, micro):
    student = student_at(small_run["checkpoint"])
    assert (student.mode, student.before) == ("system1", str(micro / "student_system1"))
    assert student.run_folder == small_run["run"]
    assert [place.name for place in learnt_rows(student)] == ["labeled.json", "labeled_validation.json"]


def test_the_training_is_told_from_the_record_and_the_runs_own_files(small_run):
    facts = training_facts(student_at(small_run["checkpoint"]))
    assert (facts["rows"], facts["validation_rows"], facts["epochs"], facts["backend"]) == (500, 60, 2, "builtin")
    assert facts["steps"] == facts["loss"]["training"][-1][0] and facts["seconds"] > 0
    fell = facts["loss_reduction"]["training"]
    assert fell["first"] > fell["last"] == facts["loss"]["training"][-1][1] and 0 < fell["share"] < 1
    assert facts["settings"]["num_train_epochs"]["value"] == 2 and facts["levels"] is None
    assert sum(facts["source"]["sources"].values()) == 500


def test_rows_that_were_changed_since_are_not_taken_for_those_that_were_learnt(small_run, tmp_path):
    student = student_at(small_run["checkpoint"])
    labeled = Path(student.record["data"]["labeled_path"])
    kept = shutil.copy(labeled, tmp_path / "kept.json")
    store.write_rows(labeled, [{"instruction": "other", "output": "x", "RV": 1, "CD": 2}])
    try:
        assert learnt_rows(student) == (None, labeled.with_name("labeled_validation.json"))
        facts = training_facts(student)
        assert facts["source"] == {} and facts["levels"] is None and facts["rows"] == 500
    finally:
        shutil.copy(kept, labeled)


def test_levels_of_the_rows_are_counted_together(small_run):
    student = student_at(small_run["checkpoint"])
    labeled = small_run["run"].parent.parent / "levels.json"
    store.write_rows(labeled, [{"instruction": str(n), "output": "x", "RV": n % 2, "CD": 3} for n in range(5)])
    data = {"labeled_path": str(labeled), "labeled_sha256": store.hash_file(labeled)}
    facts = training_facts(type(student)(student.mode, student.path, student.before, {**student.record, "data": data}))
    assert facts["levels"] == {"rv": {"0": 3, "1": 2}, "cd": {"3": 5}, "joint": [[0, 3, 3], [1, 3, 2]]}


def test_another_chat_template_than_the_one_of_the_training_is_noticed(small_run, tmp_path):
    student = student_at(small_run["checkpoint"])
    tokenizer = load_tokenizer(student.path)
    assert template_differs(student, tokenizer) is False
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}Assistant:"
    assert template_differs(student, tokenizer) is True


def test_a_model_that_the_lab_did_not_make_is_told_how_it_is_asked(micro):
    path = str(micro / "teacher")
    with pytest.raises(ConfigError, match="does not say how it is asked"):
        student_at(path)
    student = student_at(path, "system2", micro / "student_system2")
    assert (student.mode, student.before, student.run_folder) == ("system2", str(micro / "student_system2"), None)
    assert (
        learnt_rows(student) == (None, None) and training_facts(student) is None and template_differs(student, load_tokenizer(path)) is None
    )


def test_a_damaged_checkpoint_and_a_missing_one_are_refused(small_run, tmp_path):
    with pytest.raises(ConfigError, match="Invalid student model"):
        student_at(tmp_path / "none")
    copy = shutil.copytree(small_run["checkpoint"], tmp_path / "copy")
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=f"recorded|{RUN_RECORD}"):
        student_at(copy)
