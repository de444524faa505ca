"""lm-evaluation-harness, run for real over the micro world's held-out file; what needs the hub says so."""

import json
import shutil
from pathlib import Path

import pytest

from distill import harness, process, store
from distill.errors import BackendError, ConfigError, DataError

MICRO = Path(__file__).resolve().parent.parent / "data" / "micro"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with both tasks over the micro world's held-out rows; its name is one that `datasets` could take for a pattern."""
    folder = tmp_path_factory.mktemp("tasks") / "own [1] {{x}}"
    for mode in ("system1", "system2"):
        harness.write_heldout_task(_spread(folder.parent / "rows.jsonl"), mode, folder)
    return folder


def _spread(file: Path) -> Path:
    """Held-out rows of every family: the file has them family by family, and a limit takes the first."""
    store.write_jsonl(file, sorted(store.read_rows(MICRO / "heldout.jsonl"), key=lambda row: store.hash_json(row["id"])))
    return file


def test_heldout_task_asks_as_the_lab_does(tasks):
    rows = list(store.read_rows(tasks / "heldout_system2.jsonl"))
    assert len(rows) == 600
    assert all(row["question"].endswith("before giving the final answer.") for row in rows)
    assert "think step by step" not in (tasks / "heldout_system1.jsonl").read_text()


@pytest.mark.parametrize("mode", ["system1", "system2"])
def test_harness_reads_the_task_and_the_teacher_solves_it(tasks, mode):
    """The harness itself, without its slow start: the index of its own thousands of tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = {"pretrained": str(MICRO / "teacher"), "dtype": "float32", "think_end_token": "</think>"}
    longest = {"max_gen_toks": harness._reasoning_tokens(str(MICRO / "teacher"))} if mode == "system2" else None
    settings = {"task_manager": manager, "limit": 10, "batch_size": 10, "apply_chat_template": True, "gen_kwargs": longest}
    found = simple_evaluate("hf", model, [f"heldout_{mode}"], device="cpu", **settings)
    assert harness._metrics(found, f"heldout_{mode}")["exact_match"]["value"] >= 0.9


@pytest.mark.slow
def test_harness_measures_a_checkpoint_and_does_so_once(tasks, tmp_path, capsys):
    student = tmp_path / "of, mine=1 {x}"  # the harness's own form of arguments would fall apart
    shutil.copytree(MICRO / "teacher", student)
    wanted = {"limit": 10, "mode": "system1", "include_path": tasks, "out": tmp_path / "out"}
    first = harness.run_benchmarks(student, ["heldout_system1"], **wanted)
    found = first["tasks"]["heldout_system1"]["exact_match"]
    assert found["value"] >= 0.9
    assert found["n"] == 10
    assert first["versions"]["lm_eval"]
    assert first["command"].startswith("python -m lm_eval run --model hf")
    logs = {log: log.stat().st_mtime_ns for log in (tmp_path / "out").rglob("*.log")}
    assert harness.run_benchmarks(student, ["heldout_system1"], **wanted) == first
    assert "done before, nothing has changed" in capsys.readouterr().out
    assert {log: log.stat().st_mtime_ns for log in (tmp_path / "out").rglob("*.log")} == logs


@pytest.mark.slow
def test_harness_scores_what_follows_the_reasoning(tasks, tmp_path):
    wanted = {"limit": 10, "mode": "system2", "include_path": tasks, "out": tmp_path}
    found = harness.run_benchmarks(MICRO / "teacher", ["heldout_system2"], **wanted)
    assert found["tasks"]["heldout_system2"]["exact_match"]["value"] >= 0.9


@pytest.mark.slow
def test_untrained_student_scores_nothing(tasks, tmp_path):
    wanted = {"limit": 10, "mode": "system1", "include_path": tasks, "out": tmp_path}
    found = harness.run_benchmarks(MICRO / "student_system1", ["heldout_system1"], **wanted)
    assert found["tasks"]["heldout_system1"]["exact_match"]["value"] <= 0.2


@pytest.mark.slow
def test_public_benchmark_without_a_hub_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"^Cannot reach the hub for the data of gsm8k: .*openai/gsm8k"):
        harness.run_benchmarks(MICRO / "teacher", ["gsm8k"], limit=1, out=tmp_path / "out")


@pytest.mark.parametrize("task", ["", "a/b.yaml", "*", "--trust_remote_code", "gsm8k,ifeval", "x y", 7])
def test_what_is_no_name_of_a_task_is_refused_before_anything_runs(task, tmp_path):
    with pytest.raises(ConfigError, match="is no name of a task"):
        harness.run_benchmarks(MICRO / "teacher", [task], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)4 problems in the benchmarks.*tasks = \[\].*batch_size = True.*limit = 0.*system3"):
        harness.run_benchmarks(MICRO / "teacher", [], limit=0, mode="system3", batch_size=True, out=tmp_path / "out")


def test_checkpoint_or_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="Invalid student model"):
        harness.run_benchmarks(tmp_path / "nothing", ["gsm8k"], out=tmp_path / "out")
    with pytest.raises(ConfigError, match="include_path = .*there is no such folder"):
        harness.run_benchmarks(MICRO / "teacher", ["gsm8k"], include_path=tmp_path / "nothing", out=tmp_path / "out")


def test_file_without_a_question_of_the_mode_is_refused(tmp_path):
    store.write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "?", "answer": "!", "system": 1}])
    with pytest.raises(DataError, match="has no question for system2"):
        harness.write_heldout_task(tmp_path / "rows.jsonl", "system2", tmp_path / "tasks")


def test_public_names_are_tasks_of_the_installed_harness():
    import lm_eval

    written = "\n".join(file.read_text() for file in (Path(lm_eval.__file__).parent / "tasks").glob("*/**/*.yaml"))
    assert [name for name in harness.PUBLIC.values() if f"task: {name}\n" not in written] == []


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)", ConfigError, "Cannot reach the hub for"),
        ("DatasetNotFoundError: Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.", ConfigError, "is gated"),
        ("ValueError: Tasks not found: nonsense", BackendError, "Tasks not found: nonsense"),
    ],
)
def test_harness_without_a_result_is_told_apart_by_its_log(tmp_path, line, kind, words):
    log = tmp_path / "harness.log"
    log.write_text(f"Traceback\n{line}\n")
    error = harness._failure("task", process.Ended(1, "", 1.0), log)
    assert isinstance(error, kind)
    assert words in str(error)


def test_results_are_read_with_their_ways_and_without_their_gaps():
    task = {"alias": "t", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "acc,none": 1.0, "acc_stderr,none": "N/A"}
    metrics = harness._metrics({"results": {"t": task}, "n-samples": {"t": {"original": 9, "effective": 4}}}, "t")
    assert metrics == {"exact_match (strict)": {"value": 0.5, "stderr": 0.1, "n": 4}, "acc": {"value": 1.0, "stderr": None, "n": 4}}
    assert json.dumps(metrics)
