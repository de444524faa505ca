"""The demo: its controls are what they claim, scoring runs for real, and the whole reaches its targets (slow)."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from distill import demo, store
from distill.errors import BackendError, ConfigError
from distill.metrics import final_answer, reasons_first
from distill.microlab import MAX_NEW_TOKENS, SYSTEM1_FAMILIES, SYSTEM2_FAMILIES
from distill.microtasks import question_of
from distill.scores import mean_exact_match, score


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


def test_scores_come_from_a_subprocess_each_model_asked_in_its_mode(tmp_path, project, micro, heldout):
    store.write_jsonl(tmp_path / "questions.jsonl", heldout[::40])
    models = [{"name": "teacher", "path": str(micro / "teacher"), "mode": None}]
    models += [{"name": name, "path": str(micro / "student_system1"), "mode": "system1"} for name in ("before",)]
    models += [{"name": "teacher asked plainly", "path": str(micro / "teacher"), "mode": "system1"}]
    scores = score(models, tmp_path / "questions.jsonl", tmp_path, MAX_NEW_TOKENS)
    assert set(scores) == {"teacher", "before", "teacher asked plainly"}
    assert scores["teacher"]["parameters"] > scores["before"]["parameters"]
    assert mean_exact_match(scores["teacher"], SYSTEM1_FAMILIES + SYSTEM2_FAMILIES) > 0.9
    assert mean_exact_match(scores["before"], SYSTEM1_FAMILIES) < 0.1
    assert mean_exact_match(scores["teacher asked plainly"], SYSTEM2_FAMILIES) < 0.5
    assert scores["teacher"]["reasoned"]["value"] == pytest.approx(0.3, abs=0.03) and scores["teacher"]["stopped"]["value"] > 0.97
    assert {score["n"] for score in scores["teacher"]["exact_match"].values()} == {5}


def test_a_failed_scoring_shows_its_log(tmp_path, project, micro, heldout):
    store.write_jsonl(tmp_path / "questions.jsonl", heldout[:1])
    broken = shutil.copytree(micro / "student_system1", tmp_path / "broken")
    store.write_json(broken / "config.json", {**store.read_json(broken / "config.json"), "hidden_size": 64})
    for path, error in ((tmp_path / "none", ConfigError), (broken, BackendError)):
        with pytest.raises(error, match="Invalid student model"):
            score([{"name": "x", "path": str(path), "mode": None}], tmp_path / "questions.jsonl", tmp_path, MAX_NEW_TOKENS)


@pytest.mark.slow
def test_the_demo_reaches_its_targets():
    report = demo.run_demo(seed=0)
    assert demo.retained(report) >= 0.90
    mean = {name: mean_exact_match(model, SYSTEM1_FAMILIES) for name, model in (*report["system1"].items(), *report["controls"].items())}
    assert demo.retained(report, "system2") >= 0.95
    assert demo.margin(report) >= 0.4
    after = report["system2"]["after"]
    assert after["reasoned"]["value"] >= 0.95 and after["stopped"]["value"] >= 0.98 and set(after["exact_match"]) == set(SYSTEM2_FAMILIES)
    assert set(report["train_seconds"]) == {"system1", "system2"} and set(report["controls"]) == set(demo.CONTROLS)
    chance = sum(report["chance"][family] for family in SYSTEM1_FAMILIES) / len(SYSTEM1_FAMILIES)
    assert mean["before"] <= 0.02
    assert abs(mean["shuffled_labels"] - chance) < 0.1
    assert mean["gold_labels"] >= mean["after"] - 0.03
    assert mean_exact_match(report["system1"]["after"], SYSTEM2_FAMILIES) < 0.35


def test_the_demo_takes_every_instruction_row_then_a_fixed_number_of_the_others(tmp_path):
    systems = [question_of(row["instruction"]).system for row in store.read_rows(demo._choose_rows(tmp_path / "rows.jsonl"))]
    assert systems == [1] * 8400 + [2] * demo.REASONING_ROWS and demo.RELABELED_ROWS < 8400


def test_the_control_of_wrong_traces_changes_the_outputs_of_some_questions_and_nothing_else():
    shipped = {row["question"]: row["reasoning"] for row in demo._read_parquet("omnithought.parquet")}
    rows = [{"id": number, "instruction": question, "output": "right"} for number, question in enumerate(shipped)]
    changed = 0
    for row, control in zip(rows, demo._wrong(rows), strict=True):
        assert {**control, "output": "right"} == row
        if control["output"] != "right":
            (trace,) = [trace for trace in shipped[row["instruction"]] if trace["full_response"] == control["output"]][:1]
            assert not trace["thought_correctness_verify"] and trace["Reasoning_Verbosity"]["level"] <= demo.RV_MAX
            assert final_answer(trace["full_response"]) != question_of(row["instruction"]).answer
            changed += 1
    assert 100 < changed < 400


def test_the_control_of_truncated_traces_cuts_half_of_the_rows_before_their_end(tmp_path, project, micro, tokenizer):
    from distill import data, prompt
    from distill.pipeline import write_system2_config

    outputs = [f"<think>\n{'7+5=12' * (number + 1)}\n</think>\n\n632" for number in range(8)]
    rows = [{"instruction": "Add 347 and 285.", "output": output} for output in outputs]
    for path in (tmp_path / "cot.json", tmp_path / "cot_validation.json"):
        store.write_rows(path, rows)
    places = {"cot_path": tmp_path / "cot.json", "out_dir": tmp_path / "out", "config_path": tmp_path / "job.json"}
    job = write_system2_config({"preset": "micro_system2", "student_model": str(micro / "student_system2"), **places})
    tokens = Path(store.read_json(job)["dataset"]["labeled_path"])
    whole = [row["input_ids"] for row in store.read_rows(tokens)]
    demo._truncate(job)
    for path in (tokens, data.validation_path(tokens)):
        cut = list(store.read_rows(path))
        assert [row["input_ids"] for row in cut] == [ids[: len(whole[4])] for ids in whole]
        assert all(len(row["completion_mask"]) == len(row["input_ids"]) and any(row["completion_mask"]) for row in cut)
        ended = [row["input_ids"][-1] in prompt.stop_ids(tokenizer) for row in cut]
        assert ended == [True] * 5 + [False] * 3
        assert store.read_manifest(path)["max_length"] == 256


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("<think>\n1+1=2\n</think>\n\n2", True),
        ("1+1=2\n</think>\n\n2", True),  # behind a template that has opened the thought
        ("<think>\n</think>\n\n2", False),
        ("<think>\n1+1=2\n</think>", False),
        ("<think>\n1+1=2", False),
        ("2", False),
    ],
)
def test_reasoning_first_means_a_thought_with_words_and_an_answer_behind_it(text, reasons):
    assert reasons_first(text) is reasons


def test_the_end_of_a_log_is_shown_without_what_acts_on_a_terminal(tmp_path):
    from distill import engine, process

    (tmp_path / "x.log").write_text("fine\n\x1b]0;pwn\x07\x1b[2J\n")
    message = str(engine.failure("Training", process.Ended(1, "", 0.0), tmp_path / "x.log"))
    assert "| fine" in message and "\x1b" not in message and "\x07" not in message


def test_two_tasks_run_at_once_and_an_error_ends_the_other(tmp_path):
    import time

    from distill import engine, process

    assert engine.in_parallel([lambda number=number: number for number in range(5)]) == list(range(5))
    started = time.monotonic()

    def long() -> None:
        engine.run_module("timeit", ["-n", "1", "-r", "1", "import time; time.sleep(60)"], tmp_path / "long.log", lambda event: None)

    def failing() -> None:
        time.sleep(1)
        raise BackendError("no good")

    with pytest.raises(BackendError, match="no good"):
        engine.in_parallel([failing, long, failing] if engine.usable_cores() == 1 else [long, failing, failing])
    assert time.monotonic() - started < 30 and not process._running
