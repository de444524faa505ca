"""Traces of one's own teacher in place of a data set's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill import notebook, own_traces, store
from distill.choice import Wanted, choose
from distill.errors import ConfigError, DataError
from distill.prompt import is_trace
from distill.traces import prepare_system2_dataset


@pytest.fixture
def source(micro) -> dict:
    return {"source": str(micro / "omnithought.parquet"), "slice_str": "train[:24]", "rows": None, "max_new_tokens": 256}


def test_a_teachers_traces_are_a_source_that_system_2_is_prepared_from(project, micro, source, capsys):
    path = own_traces.write_traces(str(micro / "teacher"), **source)
    rows = list(store.read_rows(path))
    assert len(rows) >= 20 and all(is_trace(row["output"]) for row in rows)
    assert {row["teacher"] for row in rows} == {str(micro / "teacher")} and len({row["id"] for row in rows}) == len(rows)
    assert store.read_manifest(path)["read"] == 24
    student = {"student_model": str(micro / "student_system2"), "max_length": 256}
    prepared = prepare_system2_dataset("train", source=path, rows=None, validation=0, **student)
    assert {row["id"] for row in store.read_rows(prepared.path)} == {row["id"] for row in rows}
    capsys.readouterr()
    own_traces.write_traces(str(micro / "teacher"), **source)
    assert "the teacher's traces: done before, nothing has changed" in capsys.readouterr().out
    Path(path).unlink()
    own_traces.write_traces(str(micro / "teacher"), **source)
    assert "24 answered before" in capsys.readouterr().out  # nothing is asked twice


def test_as_many_questions_are_asked_as_wanted_each_once(project, tmp_path, monkeypatch):
    file = tmp_path / "questions.jsonl"
    texts = ["One?", "One?", "", "Two?", None, "Three?", "Four?"]
    file.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    asked, counts = own_traces._questions(own_traces.parse_sources(str(file), None, "train", own_traces.FIELDS), 3, seed=0, fresh=False)
    assert [row["instruction"] for row in asked.values()] == ["One?", "Two?", "Three?"]
    assert counts["read"] == 6 and counts["no question"] == 2 and sum(counts.values()) == 6 + 3


def test_a_source_without_questions_says_what_it_has(project, tmp_path, micro):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"task": "Add 1 and 2."}) + "\n")
    with pytest.raises(DataError, match=r"No data for System 2 distillation: .*has no question .*it has 'task'.*columns="):
        own_traces.write_traces(str(micro / "teacher"), source=str(file), slice_str="train")
    assert not (project / "data").exists()


def test_a_teacher_that_never_reasons_leaves_no_file(project, tmp_path, micro):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Reverse the letters JYRM."}) + "\n")
    with pytest.raises(DataError, match="No data for System 2 distillation: none of the 1 rows"):
        own_traces.write_traces(str(micro / "teacher"), source=str(file), slice_str="train", max_new_tokens=4)
    assert not (project / "data").exists()


def test_the_source_is_never_written_over(project, micro, source):
    with pytest.raises(ConfigError, match="is \\(in\\) the source"):
        own_traces.write_traces(str(micro / "teacher"), out=source["source"], **source)


def test_the_notebook_prepares_from_the_teachers_traces_where_asked(project, micro, monkeypatch):
    dataset = choose(False, False, Wanted())
    assert notebook.trace_arguments(dataset) == dataset.data_system2
    own = choose(False, False, replace(Wanted(), teacher="local-8bit"))
    monkeypatch.setattr(notebook, "write_traces", lambda **asked: f"traces of {len(asked)} arguments")
    arguments = notebook.trace_arguments(own)
    assert arguments["source"] == f"traces of {len(own.traces)} arguments" and arguments["slice_str"] == "train"


def test_windows_have_an_endpoints_traces_scored_and_are_refused_for_a_local_teacher(project, monkeypatch):
    narrow = Wanted(use_micro_world="no", teacher="endpoint", rv_max=5)
    assert choose(True, True, replace(narrow, rv_max=9)).judge is None
    chosen, scored = choose(True, True, narrow), []
    monkeypatch.setattr(notebook, "write_traces", lambda **asked: "traces.json")
    monkeypatch.setattr(notebook, "score_traces", lambda *asked: scored.append(asked))
    assert notebook.trace_arguments(chosen)["source"] == notebook.SCORED
    assert scored == [("traces.json", notebook.SCORED, chosen.traces["teacher_model"])]
    with pytest.raises(ConfigError, match="without RV and CD, which RV_MAX, LONG_SHARE would need"):
        choose(True, True, replace(narrow, teacher="local-8bit", long_share=0.5))
