"""What the tests share: no network, one thread, a project folder of their own, and Python in a process of its own."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# set before any library reads them: a test that asks the hub is refused at once
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_TELEMETRY="1")
os.environ["PYTHONPATH"] = str(REPOSITORY)  # so that the engine's processes find the lab where `project` stands for its root


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the project's root: relative paths count from there."""
    from distill import store

    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setattr(store, "ROOT", root)
    return root


@pytest.fixture
def trained(project, trained_once) -> Path:
    """A copy of a module's `trained_once`, a project in which something was distilled: wherever it lies, nothing has changed."""
    return shutil.copytree(trained_once, project, dirs_exist_ok=True)


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory that is free, in GiB; returns what each look at it found."""
    from distill.preflight import Machine

    looks = []

    def has(gib: float) -> list:
        monkeypatch.setattr("distill.machine.this_machine", lambda: looks.append(gib) or Machine("this CPU", gib))
        return looks

    return has


def run_id(project: Path) -> str:
    """The run that made the checkpoint at `out`."""
    from distill import store
    from distill.models import RUN_RECORD

    return store.read_manifest(project / "out", name=RUN_RECORD)["run_id"]


def load_benchmark(name: str):
    """A script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_python(tmp_path, project):
    """Start Python on some code with the lab importable and `project` as its root; kill what is left at the end."""
    started = []

    def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
        prelude = f"import sys\nfrom pathlib import Path\nfrom distill import store\nstore.ROOT = Path({str(project)!r})\n"
        process = subprocess.Popen(
            [sys.executable, "-c", prelude + code, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "hf"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def tokenizer():
    """The micro world's own tokenizer: byte-level BPE with Qwen2.5's control tokens and ChatML."""
    from distill.microtasks import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def micro() -> Path:
    """The shipped micro world."""
    return REPOSITORY / "data" / "micro"


@pytest.fixture(scope="session")
def heldout(micro) -> list[dict]:
    from distill import store

    return list(store.read_rows(micro / "heldout.jsonl"))


@pytest.fixture(scope="session")
def prepared_rows(tmp_path_factory, micro) -> list[dict]:
    """Some hundred rows, prepared as a user would."""
    from distill import data, store

    folder = tmp_path_factory.mktemp("prepared")
    places = {"out_labeled": folder / "labeled.json", "out_instructions": folder / "instructions.json"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", folder)
        prepared = data.prepare_system1_dataset("train[:600]", source=str(micro / "distilqwen.parquet"), validation=0, **places)
    return list(store.read_rows(prepared.path))


def write_job(folder: Path, rows: list[dict], validation: list[dict] = (), **settings) -> Path:
    """Labelled rows and a System-1 job over them for the micro student, all in `folder`; `folder/run` is made for the engine."""
    from distill import data, pipeline, store

    labeled = folder / "labeled.json"
    store.write_rows(labeled, rows)
    if validation:
        store.write_rows(data.validation_path(labeled), validation)
    (folder / "run").mkdir(exist_ok=True)
    places = {"labeled_path": str(labeled), "out_dir": str(folder / "out"), "config_path": str(folder / "job.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", folder)
        student = str(REPOSITORY / "data" / "micro" / "student_system1")
        job = pipeline.write_system1_config({"preset": "micro_system1", "student_model": student, **places, **settings})
    return Path(job)


@pytest.fixture
def make_job(project):
    return write_job


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, prepared_rows) -> dict:
    """One real training by subprocess: two epochs of 500 rows. {"checkpoint", "run", "result"}"""
    from distill import pipeline, store

    folder = tmp_path_factory.mktemp("small_run")
    job = write_job(folder, prepared_rows[:500], prepared_rows[500:560], num_epochs=2, logging_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", folder)
        result = pipeline.run_easy_distill(job)
    return {"checkpoint": result.checkpoint, "run": Path(result.log_path).parent, "result": result}
