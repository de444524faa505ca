"""What `doctor` says of a machine: with what is here, and with what is missing or broken in its place."""

import json
import sys

import pytest

from distill import console, doctor, easydistill, engine, environment, pipeline
from distill.errors import BackendError

GPU = {"name": "Tesla T4", "gib": 14.7, "capability": "7.5"}
SERVING = {"vllm": None, "fastapi": "1", "uvicorn": "1", "openai": "1", "pydantic": "1"}
SECRET = "secret-value-of-a-key"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv(easydistill.HOME, raising=False)
    for name in doctor.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(console.console, "width", 300)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Put a machine in this one's place: machine(gpu=…, optional={…}, easydistill=(1, 2))."""

    def put(gpu=None, optional=SERVING, installed=()):
        brought = {"python": "3.12.1", "versions": {"torch": "2.11", "transformers": "5.20"}, "optional": optional, "gpu": gpu}
        monkeypatch.setattr(environment, "probe", lambda python: brought)

        def find(major):
            found = easydistill.Installation(
                major, f"{major}.0.0", tmp_path / f"python{major}", tmp_path, "EASYDISTILL_HOME", {"trl": "0.17"}
            )
            return (found, f"EasyDistill {major}.0.0 is there") if major in installed else (None, f"EasyDistill {major}.x is not there.")

        monkeypatch.setattr(easydistill, "find", find)
        monkeypatch.setattr(engine, "gpu_is_visible", lambda: False)

    return put


def jobs(found: dict) -> dict:
    return {job["job"]: (job["backend"], job["why"]) for job in found["jobs"]}


def missing(found: dict) -> dict:
    return {one["what"].split(" (")[0].split(":")[0]: one["command"] for one in found["missing"]}


def test_it_tells_what_is_here(project, capsys):
    """Nothing put in place of anything: this machine, as it is."""
    found = doctor.doctor()
    assert json.loads(json.dumps(found)) == found
    assert found["python"]["path"] == sys.executable and found["machine"]["usable_cores"] >= 1 and found["machine"]["disk_free_gib"] > 0
    engine = found["environments"]["engine"]
    assert engine["usable"] and engine["versions"]["torch"].split("+")[0] == environment.installed("torch").split("+")[0]
    assert jobs(found)["train by preset micro_system1"] == ("builtin", "EasyDistill 1.x is not installed here.")
    said = capsys.readouterr().out
    for part in (
        "Machine",
        "Environments",
        "Which backend",
        "usable cores",
        "setup-easydistill 1",
        f"torch {engine['versions']['torch']}",
    ):
        assert part in said


def test_a_gpu_is_shown_with_its_abilities(machine, capsys):
    machine(gpu=GPU)
    assert jobs(doctor.doctor())["label with a teacher loaded here"] == ("builtin", "on Tesla T4")
    assert "Tesla T4, 14.7 GiB, compute capability 7.5, computes in fp16" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(doctor.KEYS))
def test_a_key_is_shown_as_set_and_never_by_its_value(machine, monkeypatch, capsys, name):
    machine()
    monkeypatch.setenv(name, SECRET)
    found = doctor.doctor()
    said = capsys.readouterr().out
    assert found["keys"] == {key: key == name for key in doctor.KEYS} and SECRET not in said + json.dumps(found)
    assert said.count("not set (for") == 1


def test_with_easydistill_each_job_names_it(machine, monkeypatch):
    machine(installed=(1, 2))
    chosen = easydistill.find(1)
    monkeypatch.setattr(pipeline, "choose_backend", lambda job, asked: (chosen[0], chosen[1]) if asked == "auto" else None)
    found = doctor.examine()
    by_job = jobs(found)
    assert by_job["train by preset micro_system1"] == ("EasyDistill 1.0.0", "EasyDistill 1.0.0 is there")
    assert by_job["label with a teacher behind an API"][0] == by_job["judge answers"][0] == "EasyDistill 2.0.0"
    assert by_job["label with a teacher that the lab serves"] == ("EasyDistill 2.0.0 and transformers serve", "transformers 5.20")
    assert found["missing"] == [] and found["environments"]["EasyDistill 1.x"]["usable"]


def test_a_student_on_the_hub_is_not_asked_for(machine, monkeypatch):
    machine(installed=(1,))
    looked_at = []

    def choose(job, asked):
        looked_at.append(job["models"]["student"])
        return None, "a reason"

    monkeypatch.setattr(pipeline, "choose_backend", choose)
    backend, why = jobs(doctor.examine())["train by preset system1"]
    assert backend == "EasyDistill 1.0.0" and "unless the run finds against it" in why
    assert looked_at and not [student for student in looked_at if student.startswith("Qwen/")]


def test_what_is_missing_comes_with_the_command_that_mends_it(machine):
    machine(optional={**SERVING, "uvicorn": None})
    found = doctor.examine()
    commands = missing(found)
    assert "distill_app.py setup-easydistill 1" in commands["EasyDistill 1.x"]
    assert "distill_app.py setup-easydistill 2" in commands["EasyDistill 2.x"]
    assert commands["transformers serve"].endswith("-m pip install -r requirements.txt")
    assert found["servers"]["transformers serve"] == {"available": False, "why": "it lacks uvicorn"}
    assert jobs(found)["judge answers"] == ("none", "EasyDistill 2.x cannot be used")


@pytest.mark.parametrize(
    "gpu, vllm, available, why",
    [
        (None, None, False, "not installed"),
        (None, "0.9", False, "no GPU is visible"),
        (GPU, "0.9", True, "vllm 0.9"),
        (GPU, None, False, "not"),
    ],
)
def test_vllm_serves_where_it_is_installed_and_a_gpu_is_visible(machine, gpu, vllm, available, why):
    machine(gpu=gpu, optional={**SERVING, "vllm": vllm}, installed=(2,))
    found = doctor.examine()
    assert found["servers"]["vllm serve"]["available"] == available and why in found["servers"]["vllm serve"]["why"]
    assert jobs(found)["label with a teacher that the lab serves"][0].endswith("vllm serve" if available else "transformers serve")


def test_without_a_server_it_says_so(machine):
    machine(optional=dict.fromkeys(SERVING), installed=(2,))
    assert jobs(doctor.examine())["label with a teacher that the lab serves"] == ("none", "there is no server for it")


@pytest.mark.parametrize("broken", ["engine_python", "probe"])
def test_a_broken_engine_is_part_of_the_answer(machine, monkeypatch, capsys, broken):
    def fail(*arguments):
        raise BackendError("The engine's packages do not load.")

    machine(installed=(1, 2))
    monkeypatch.setattr(environment, broken, fail)
    found = doctor.doctor()
    assert found["environments"]["engine"] == {"usable": False, "path": None, "versions": {}, "note": "The engine's packages do not load."}
    assert not [job for job, (backend, _) in jobs(found).items() if backend == "builtin"]
    assert "distill_app.setup_engine()" in missing(found)["the engine"]
    assert "missing: the engine: The engine's packages do not load." in capsys.readouterr().out


def test_a_gpu_that_torch_cannot_use_is_missing(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(engine, "gpu_is_visible", lambda: True)
    assert "a torch that can use this machine's GPU" in missing(doctor.examine())
