"""EasyDistill's known failures, a test each: detected, named, and nothing left: no checkpoint, no temporary folder, no process."""

import re
from pathlib import Path

import pytest
import standin_easydistill
import standin_easydistill2
from test_launch import EQUAL, ROWS, STANDIN, left_behind, standin  # noqa: F401

from distill import easydistill, faults, launch, pipeline, process, store
from distill.errors import BackendError
from distill.faults import Facts, diagnose

SEEN = {
    "dies": "ended before its end, and EasyDistill's exit status \\(0\\)",
    "does_nothing": "ended before its end, and EasyDistill's exit status \\(0\\)",
    "saves_nothing": "trained to the end and left no checkpoint",
    "saves_the_student": "nothing was learnt",
    "saves_nan": "not finite",
    "saves_a_part": "not whole",
    "saves_a_torn_file": "left no checkpoint that can be used",
    "is_killed": "the training was killed",
    "loses_its_command_line": "killed, as happens when memory runs out",
    "crashes": "the training crashed",
    "fills_the_gpu": "out of memory on the GPU",
    "fills_the_memory": "out of memory",
    "fills_the_disk": "a full disk",
    "meets_an_unknown_setting": "its trl does not know: learnin_rate",
    "finds_no_data": "data that is missing",
    "finds_no_student": "a student that is not there",
    "meets_a_new_student": "a newer transformers",
    "lacks_a_package": "its environment lacks: vllm",
    "asks_for_wandb": "wandb without a key",
}


def test_every_behaviour_of_the_standin_has_its_test():
    assert set(standin_easydistill.BEHAVIOURS) == {*SEEN, "trains", "says_error", "hangs"}


def fail(tmp_path, installation, make_job, **settings) -> str:
    """The message of a run that must fail, over an older checkpoint that must stay as it is."""
    job = make_job(tmp_path, ROWS, **EQUAL)
    old = tmp_path / "out"
    old.mkdir()
    for name in ("model.safetensors", "config.json"):
        (old / name).write_text("an older checkpoint")
    store.write_json(old / "distill_run.json", {"run_id": "old"})
    before = {path.name: store.hash_file(path) for path in old.iterdir()}
    with pytest.raises(BackendError) as caught:
        launch.run(job, tmp_path / "run", "test", installation, **settings)
    assert {path.name: store.hash_file(path) for path in old.iterdir()} == before
    assert not (tmp_path / "out.previous").exists() and not (tmp_path / "run" / "last").exists()
    assert left_behind(tmp_path) == []
    return str(caught.value)


@pytest.mark.parametrize("behaviour", SEEN)
def test_a_fault_is_detected_and_named_and_leaves_nothing(tmp_path, standin, make_job, behaviour):  # noqa: F811
    message = fail(tmp_path, standin(behaviour), make_job)
    assert re.search(SEEN[behaviour], message), message
    first, *log = message.splitlines()
    assert first.startswith("EasyDistill's training failed. It looks like this: ") and "The end of" in first
    assert log and all(line.startswith("  | ") for line in log)


def test_a_training_that_hangs_is_ended(tmp_path, standin, make_job, monkeypatch):  # noqa: F811
    monkeypatch.setattr(launch, "SILENCE_SECONDS", 3)
    assert "it hangs" in fail(tmp_path, standin("hangs"), make_job)


def test_a_training_past_its_time_limit_is_ended(tmp_path, standin, make_job):  # noqa: F811
    assert "past its time limit" in fail(tmp_path, standin("hangs"), make_job, limit_seconds=2)


def test_an_old_checkpoint_in_the_working_folder_is_not_taken_for_a_new_one(tmp_path, standin, make_job):  # noqa: F811
    left = tmp_path / "run" / "easydistill" / "out"
    left.mkdir(parents=True)
    for file in (Path(__file__).parent.parent / "data" / "micro" / "student_system1").iterdir():
        (left / file.name).write_bytes(file.read_bytes())
    assert "left no checkpoint" in fail(tmp_path, standin("saves_nothing"), make_job)


def test_2x_is_refused_where_1x_is_needed(tmp_path, make_job, monkeypatch):
    job = make_job(tmp_path, ROWS, **EQUAL)
    (tmp_path / "standin").mkdir()
    monkeypatch.setenv("EASYDISTILL_HOME", str(standin_easydistill2.build(tmp_path / "standin")))
    with pytest.raises(BackendError, match=r"EasyDistill 1.x is needed .*2.x makes data .* cannot train.*setup-easydistill 1"):
        pipeline.run_easy_distill(job, backend="easydistill")
    assert not (tmp_path / "out").exists() and left_behind(tmp_path) == []


@pytest.mark.parametrize(("files", "said"), [([], "placeholder"), (["cli/main.py"], "2.x makes data")])
def test_the_placeholder_and_2x_are_told_from_a_1x(tmp_path, standin, files, said):  # noqa: F811
    standin()
    package = tmp_path / STANDIN / "checkout" / "easydistill"
    (package / "kd" / "train.py").unlink()
    for name in files:
        (package / name).parent.mkdir()
        (package / name).write_text("")
        (package / "__init__.py").write_text('__version__ = "2.0.0"')
    with pytest.raises(BackendError, match=said):
        easydistill.require(1)


# What the real one and its libraries print, by what it is


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "out of memory on the GPU"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "out of memory"),
        ("subprocess.CalledProcessError: Command '['/x/python3', 'train.py']' died with <Signals.SIGKILL: 9>.", "the training was killed"),
        ("safetensors_rust.SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)", "a full disk"),
        ("RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", "a full disk"),
        ("TypeError: SFTConfig.__init__() got an unexpected keyword argument 'learnin_rate'", "a training setting"),
        ("  Extra inputs are not permitted [type=extra_forbidden, input_value=0]", "EasyDistill 2.x"),
        ("python: can't open file '/x/easydistill/kd/train.py': [Errno 2] No such file or directory", "an EasyDistill without its trainer"),
        ("AttributeError: 'list' object has no attribute 'keys'", "a student that needs a newer transformers"),
        ("sh: 1: accelerate: not found", "its processes did not start"),
        ("ImportError: deepspeed is not installed => run `pip3 install deepspeed`", "a package that its environment lacks: deepspeed"),
        ("ValueError: 'steep' is not a valid SchedulerType, please select one of", "a training setting of a value"),
        ("ValueError: Unrecognized model in /x/student. Should have a `model_type` key", "a student that is not there"),
        ("datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset", "data that is missing"),
        ("RuntimeError: CUDA error: no kernel image is available for execution on the device", "a GPU that its torch cannot use"),
    ],
)
def test_a_line_of_the_log_names_the_fault(line, name):
    fault = diagnose(f"2026-11-21 14:27:43,785 - INFO - {line}\n", Facts())
    assert fault.name.startswith(name) and fault.advice


def test_what_the_lab_saw_names_the_fault_where_the_log_is_silent():
    assert "time limit (12 s)" in diagnose("", Facts(overdue="limit", seconds=12)).name
    assert "hangs" in diagnose("CUDA out of memory", Facts(overdue="silence")).name
    assert diagnose("", Facts(free_bytes=0)).name == "a full disk"
    assert "killed" in diagnose("", Facts(status=-9)).name and "exit status (0)" in diagnose("", Facts()).name


@pytest.mark.parametrize(("name", "advice", "pattern"), faults.KNOWN)
def test_every_fault_says_what_to_do(name, advice, pattern):
    assert advice.endswith((".", ")")) and not name.endswith(".")
    assert re.compile(pattern) and not re.search(pattern, "0 errors, nothing failed; exception count 0")


def test_the_limit_of_silence_is_half_an_hour():
    assert launch.SILENCE_SECONDS == 1800 and process.PATIENCE_SECONDS < 60


@pytest.mark.parametrize("harmless", ["NCCL INFO init", "deepspeed not found, skipping", "No module named sklearn, falling back"])
def test_what_was_said_before_it_broke_names_no_fault(harmless):
    log = f"{harmless}\nTraceback (most recent call last):\nFileNotFoundError: Unable to find '/x/tokens.json'\n"
    assert diagnose(log, Facts()).name == "data that is missing or cannot be read"
