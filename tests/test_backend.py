"""Which backend a job takes and why; and how long it may."""

import os

import pytest

from distill import easydistill, launch, pipeline, store
from distill.errors import BackendError, ConfigError

JOB = {"job_type": "kd_black_box_train_only", "training": {}}
INSTALLED = object()


@pytest.fixture
def machine(monkeypatch):
    """Say what is installed, and what EasyDistill cannot do of the job."""

    def say(installed: bool, refused: list[str] = ()) -> None:
        found = (INSTALLED, "It is here.") if installed else (None, "It is not.")
        monkeypatch.setattr(easydistill, "find", lambda major: found)
        monkeypatch.setattr(easydistill, "require", lambda major: found[0])
        monkeypatch.setattr(launch, "refusals", lambda job, installation, memory=True: list(refused))

    return say


def test_the_built_in_engine_is_taken_where_it_is_asked_for(machine):
    machine(installed=True)
    assert pipeline.choose_backend(JOB, "builtin") == (None, "asked for")


def test_easydistill_is_taken_where_it_is_installed_and_can_do_the_job(machine):
    machine(installed=True)
    assert pipeline.choose_backend(JOB, "auto") == (INSTALLED, "It is here.")
    assert pipeline.choose_backend(JOB, "easydistill") == (INSTALLED, "asked for")


def test_without_it_the_built_in_engine_trains_and_says_why(machine):
    machine(installed=False)
    assert pipeline.choose_backend(JOB, "auto") == (None, "It is not.")


def test_a_job_that_it_cannot_do_goes_to_the_built_in_engine_with_every_reason(machine):
    machine(installed=True, refused=["No LoRA.", "No memory."])
    assert pipeline.choose_backend(JOB, "auto") == (None, "EasyDistill 1.x cannot do this job: No LoRA. No memory.")
    with pytest.raises(ConfigError) as raised:
        pipeline.choose_backend(JOB, "easydistill")
    assert "2 problems in this job for EasyDistill 1.x" in str(raised.value) and "No LoRA.\n  No memory." in str(raised.value)


def test_what_the_settings_rule_out_is_known_without_asking_the_machine(machine, monkeypatch):
    machine(installed=True)
    monkeypatch.setattr(launch, "refusals", lambda job, installation: pytest.fail("the machine was asked"))
    installation, reason = pipeline.choose_backend({**JOB, "training": {"group_by_length": True}}, "auto")
    assert installation is None and "group_by_length = true" in reason


def test_asked_for_and_not_installed_is_an_error_that_says_how_to_get_it(project, monkeypatch):
    monkeypatch.delenv(easydistill.HOME, raising=False)
    with pytest.raises(BackendError, match=r"EasyDistill 1\.x is needed .*setup-easydistill 1"):
        pipeline.choose_backend(JOB, "easydistill")


def test_another_name_is_refused_with_the_near_miss():
    with pytest.raises(ConfigError, match="backend = 'easydistil': is not one of auto, easydistill, builtin. Did you mean easydistill?"):
        pipeline.choose_backend(JOB, "easydistil")


def test_what_easydistill_cannot_do_is_refused_before_anything_is_written(project, micro, monkeypatch):
    installation = easydistill.Installation(1, "1.0", project / "bin" / "python", project, "test", {})
    monkeypatch.setattr(easydistill, "find", lambda major: (installation, "It is here."))
    store.write_rows(project / "data" / "train_labeled.json", [{"instruction": "Is 1 odd?", "output": "odd"}])
    before = sorted(os.walk(project))
    settings = {"preset": "micro_system1", "student_model": str(micro / "student_system1"), "backend": "easydistill", "lora_rank": 4}
    with pytest.raises(ConfigError) as raised:
        pipeline.distill_system1(settings)
    assert "lab.lora_rank = 4: only the built-in engine" in str(raised.value) and "group_by_length" in str(raised.value)
    assert sorted(os.walk(project)) == before


def test_a_training_past_its_time_limit_is_ended_and_leaves_nothing(tmp_path, make_job, prepared_rows):
    job = make_job(tmp_path, prepared_rows * 4, num_epochs=200)
    with pytest.raises(BackendError, match=r"Training failed: it was ended after \d+ s, its time limit"):
        pipeline.run_easy_distill(job, backend="builtin", time_limit_minutes=0.1)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("limit", [0, -1, "an hour", True])
def test_a_time_limit_that_is_none_is_refused(limit):
    from distill.config import resolve

    with pytest.raises(ConfigError, match="time_limit_minutes"):
        resolve({"time_limit_minutes": limit}, preset="system1")
