"""The registry of runs: what each was made of and came to, whatever became of its folder, and how runs differ."""

import argparse
import json
import shutil

import pytest
from conftest import REPOSITORY

from distill import store
from distill.cli_runs import RUN_COMMANDS
from distill.console import console
from distill.data import prepare_system1_dataset
from distill.errors import ConfigError
from distill.pipeline import distill_system1, write_system1_config
from distill.registry import compare_runs, list_runs, show_runs

FEW_STEPS = {"preset": "micro_system1", "backend": "builtin", "max_steps": 4, "warmup_ratio": 0.0, "sample_answers": 0}


def job(**changes) -> dict:
    student = str(REPOSITORY / "data" / "micro" / "student_system1")
    places = {"labeled_path": "labeled.json", "out_dir": "out", "config_path": "job.json"}
    return {**FEW_STEPS, "student_model": student, **places, **changes}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, micro):
    """A project with one finished run, at `out`, and one that was only prepared, with another learning rate."""
    folder = tmp_path_factory.mktemp("registry") / "project"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", folder)
        source = str(micro / "distilqwen.parquet")
        prepare_system1_dataset("train[:60]", source=source, out_labeled="labeled.json", out_instructions="instructions.json")
        distill_system1(job())
        write_system1_config(job(learning_rate=1e-4, out_dir="other"))
    return folder


@pytest.fixture
def runs(project, trained_once):
    """The project again, in a place of its own: (finished, prepared)."""
    shutil.copytree(trained_once, project, dirs_exist_ok=True)
    for place in project.rglob("*.json"):  # what was moved is the same run
        place.write_text(place.read_text().replace(str(trained_once), str(project)))
    (finished,) = (place.parent for place in (project / "runs").glob("*/last"))
    (prepared,) = (place for place in (project / "runs").glob("system1-*") if place != finished)
    reseal(project / "out" / "distill_run.json")
    reseal(project / "labeled.json.manifest.json")
    return finished, prepared


def reseal(place):
    manifest = store.read_json(place)
    manifest.pop(store.SEAL)
    store.write_json(place, {**manifest, store.SEAL: store.hash_json(manifest)})


def one(folder):
    return next(run for run in list_runs() if run.id == folder.name)


def test_a_finished_run_says_what_it_was_made_of_and_what_it_left(runs, project):
    record, run = store.read_json(project / "out" / "distill_run.json"), one(runs[0])
    assert (run.system, run.state, run.rows, run.backend) == ("system1", "finished", 57, "builtin")
    assert run.student.endswith("student_system1") and run.teacher.endswith("data/micro/teacher") and sum(run.labels.values()) == 60
    assert run.best_validation_loss == record["metrics"]["best_validation_loss"] > 0
    assert run.train_seconds == record["metrics"]["train_seconds"] > 0 and run.checkpoint_id == record["run_id"]
    assert (run.checkpoint, run.checkpoint_state, run.scores) == (str(project / "out"), "there", None)


def test_a_run_that_has_not_been_trained_is_prepared(runs):
    run = one(runs[1])
    assert (run.state, run.checkpoint_state, run.train_seconds, run.backend) == ("prepared", "none yet", None, None)


def test_a_run_that_was_cut_short_says_how_far_it_came(runs):
    (runs[1] / "train.log").touch()
    assert one(runs[1]).state == "cut short before its first figure"
    for step in (10, 20):
        store.append_json_line(runs[1] / "metrics.jsonl", {"time": 5.0, "step": step, "steps": 1234, "eval_loss": 2 + step / 100})
    assert (one(runs[1]).state, one(runs[1]).best_validation_loss) == ("cut short at step 20 of 1,234", 2.1)
    saved = runs[1] / "checkpoints" / "checkpoint-25"
    saved.mkdir(parents=True)
    assert one(runs[1]).state == "cut short at step 20 of 1,234"  # nothing in it yet
    store.write_json(saved / "trainer_state.json", {"max_steps": 1234})
    assert one(runs[1]).state == "cut short at step 25 of 1,234"


def test_what_became_of_a_checkpoint_is_said(runs, project):
    weights = project / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert one(runs[0]).checkpoint_state == "damaged: model.safetensors"
    (project / "out").rename(project / "out.previous")
    assert one(runs[0]).checkpoint_state == "gone" and one(runs[0]).backend == "builtin"
    shutil.copytree(project / "out.previous", project / "out")
    record = store.read_json(project / "out" / "distill_run.json")
    record["job"]["dataset"]["labeled_path"] = str(runs[1] / "train_tokenized.json")
    store.write_json(project / "out" / "distill_run.json", record)
    reseal(project / "out" / "distill_run.json")
    assert one(runs[0]).checkpoint_state == "replaced by another run" and one(runs[0]).state == "finished"
    shutil.rmtree(project / "out")
    shutil.rmtree(project / "out.previous")
    found = one(runs[0])
    assert (found.state, found.checkpoint_state, found.checkpoint_id) == ("finished", "gone", None) and found.train_seconds > 0


def test_damaged_and_foreign_folders_are_named_and_the_others_listed(runs, project, capsys):
    (project / "runs" / "answers").mkdir()
    (project / "runs" / "system1-empty").mkdir()
    for name, plan in (("somebody", "[1, 2]"), ("system2-cut", '{"mode": "sys')):
        (project / "runs" / name).mkdir()
        (project / "runs" / name / "plan.json").write_text(plan)
    assert {run.id for run in list_runs()} == {folder.name for folder in runs}
    said = capsys.readouterr().out
    assert "runs/system1-empty is passed over: runs/system1-empty/plan.json does not exist." in said
    assert "runs/somebody is passed over: it is no run of this lab" in said and "runs/system2-cut is passed over" in said
    assert "answers" not in said and show_runs()["passed_over"].keys() == {"runs/somebody", "runs/system1-empty", "runs/system2-cut"}


def test_a_project_without_runs_has_none(project):
    assert list_runs() == [] and show_runs() == {"runs": [], "passed_over": {}}


def test_the_table_fits_a_narrow_terminal_and_its_facts_are_plain(runs, monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 60)
    found = show_runs()
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "distill_app" not in line) <= 60
    assert [run["id"] for run in json.loads(json.dumps(found))["runs"]] == [run.id for run in list_runs()]


def test_a_comparison_shows_what_differs_and_nothing_else(runs, capsys):
    found = compare_runs(*(folder.name for folder in runs))
    assert found["settings"] == {"learning_rate": [0.002, 0.0001]} and found["data"] == {}
    said = capsys.readouterr().out
    assert "learning_rate" in said and "weight_decay" not in said and "data: no difference" in said and "none was evaluated" in said


def test_a_comparison_shows_how_rows_were_prepared(runs, project, micro):
    prepare_system1_dataset(
        "train[:80]", source=str(micro / "distilqwen.parquet"), out_labeled="more.json", out_instructions="more_instructions.json"
    )
    write_system1_config(job(labeled_path="more.json", out_dir="third"))
    (third,) = {run.id for run in list_runs()} - {folder.name for folder in runs}
    found = compare_runs(runs[0].name, third)
    assert found["settings"] == {} and found["data"]["slice_str"] == ["train[:60]", "train[:80]"]
    assert found["data"]["rows kept"] == [57, 76] and "source" not in found["data"]


SCORE, KEPT = {"value": 0.934, "n": 200, "ci": [0.891, 0.961]}, {"value": 0.98, "n": 200, "ci": None}


def evaluated(folder, **changes) -> dict:
    """What `evaluate` leaves in a run's folder."""
    facts = {
        "made": "2026-01-01",
        "path": one(folder).checkpoint,
        "mode": "system1",
        "quality": {"n": 200, "exact_match": SCORE, "math_verified": None, "families": {"add": SCORE}},
        "retained": {"exact_match": KEPT},
        "headline": "exact_match",
        "questions": {"source": "heldout.jsonl", "sha256": "a" * 64, "rows": 200},
        **changes,
    }
    store.write_json(folder / "evaluation.json", facts)
    return facts


def test_scores_stand_side_by_side_with_their_intervals(runs, capsys):
    facts = evaluated(runs[0])
    assert one(runs[0]).scores == facts
    found = compare_runs(runs[0].name, runs[1].name)
    assert found["scores"] == {"exact_match": [SCORE, None], "retained exact_match": [KEPT, None]}
    show_runs()
    said = capsys.readouterr().out
    assert "0.934 [0.89, 0.96]" in said and "0.980" in said and "passed over" not in said


@pytest.mark.parametrize(
    ("other", "warned"), [({}, False), ({"sha256": "b" * 64}, True), ({"rows": 100}, True), ({"source": "copy.jsonl"}, False)]
)
def test_a_comparison_says_which_questions_were_asked_and_warns_where_they_differ(runs, capsys, other, warned):
    asked = evaluated(runs[0])["questions"]
    evaluated(runs[1], questions={**asked, **other})
    found = compare_runs(*(folder.name for folder in runs))
    assert found["questions"] == {name: [asked[name], {**asked, **other}[name]] for name in ("source", "sha256", "rows")}
    said = capsys.readouterr().out
    assert "heldout.jsonl" in said and ("do not compare" in said) is warned


def test_scores_of_another_checkpoint_are_not_a_runs_own(runs, capsys):
    evaluated(runs[0], path="elsewhere/copy")
    assert one(runs[0]).scores is None
    assert "evaluation.json is passed over: It is of elsewhere/copy, not of this run's checkpoint, out." in capsys.readouterr().out
    assert compare_runs(*(folder.name for folder in runs))["scores"] == {}
    assert f"{runs[0].name}/evaluation.json is passed over" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "null",
        '{"headline": "exact_match"}',
        '{"path": "out", "headline": "a", "quality": {"a": {"value": "x", "ci": 1}}, "retained": {}, "questions": {}}',
        '{"path": "out", "headline": ["a"], "quality": {}, "retained": {}, "questions": {"source": 1, "sha256": 1, "rows": 1}}',
        '{"path": "\\u0000", "headline": "a", "quality": {}, "retained": {}, "questions": {"source": 1, "sha256": 1, "rows": 1}}',
        '{"headl',
    ],
)
def test_a_malformed_evaluation_is_named_and_its_run_stays(runs, text):
    (runs[0] / "evaluation.json").write_text(text)
    found = show_runs()
    assert len(found["runs"]) == 2 and one(runs[0]).scores is None
    assert list(found["passed_over"]) == [f"runs/{runs[0].name}/evaluation.json"]


def test_a_run_is_found_by_the_beginning_of_its_name(runs):
    first, second = (folder.name for folder in runs)
    key = first.partition("-")[2]
    assert compare_runs(key[:6], second)["runs"] == [first, second]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["system1-"], "2 runs begin so"),
        (["system3-{key}"], "there is no such run. Did you mean system1-{key}?"),
        ([""], "there is no such run"),
        (["{key}", "system1-{key}"], "needs two different runs"),
        ([], "needs two different runs"),
    ],
)
def test_a_name_that_is_no_run_or_several_is_refused(runs, names, message):
    key = runs[0].name.partition("-")[2]
    with pytest.raises(ConfigError) as error:
        compare_runs(*(name.format(key=key) for name in names))
    assert message.format(key=key) in str(error.value)


def test_the_command_lists_and_compares(runs):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for add in RUN_COMMANDS:
        add(commands)
    listed, compared = parser.parse_args(["runs"]), parser.parse_args(["runs", *(folder.name for folder in runs)])
    assert len(listed.run(listed)["runs"]) == 2
    assert compared.run(compared)["settings"] == {"learning_rate": [0.002, 0.0001]}
