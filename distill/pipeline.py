"""The workflow: check → plan → job → run → verify. Each step is a line here and a module elsewhere."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint, data, easydistill, launch, models, store, train
from .config import BACKENDS, Settings, backend_problem, build_job, read_job, resolve
from .console import say, table
from .errors import ConfigError, DataError


def distill_system1(config: Mapping | None = None) -> str:
    """Distil the System-1 student: check everything, tokenize, train in a subprocess, verify, publish.

    config  a dict of settings over the preset `system1` (README, "Settings"), e.g. {"student_model": …, "labeled_path": …}
    Returns the checkpoint's path. Raises ConfigError, DataError or BackendError; then `out_dir` is as it was.
    """
    return _distill("system1", config)


def write_system1_config(config: Mapping | None = None) -> str:
    """Check settings and write System 1's EasyDistill job with the run's own token file. Returns the job's path.

    Nothing is written unless every setting, the student, the data and the places to write to are good.
    """
    return _write_job("system1", resolve(config, preset="system1"))


def distill_system2(config: Mapping | None = None) -> str:
    """Distil the System-2 student, which reasons before it answers: the same steps over the preset `system2`.

    config  a dict of settings, e.g. {"student_model": …, "cot_path": …, "lora_rank": 16}
    Returns the checkpoint's path. Raises as `distill_system1` does.
    """
    return _distill("system2", config)


def write_system2_config(config: Mapping | None = None) -> str:
    """`write_system1_config` for System 2: the question ends with the sentence that asks for reasoning; trace and solution are learnt."""
    return _write_job("system2", resolve(config, preset="system2"))


def _distill(system: str, user: Mapping | None) -> str:
    settings = resolve(user, preset=system)
    values = settings.values
    chosen = choose_backend(build_job(settings, Path(values["labeled_path"])), values["backend"])  # refuses before anything is written
    return _run(read_job(_write_job(system, settings)), *chosen, values.get("time_limit_minutes")).checkpoint


def run_easy_distill(config_path: str | Path, *, backend: str = "auto", time_limit_minutes: float | None = None) -> train.TrainResult:
    """Run a job file to a verified checkpoint.

    backend             "auto", "easydistill" or "builtin"
    time_limit_minutes  wall-clock time after which the training is ended; None: none
    Raises ConfigError for a job that cannot work, BackendError with the end of the log for a run that failed.
    """
    job = read_job(config_path)
    return _run(job, *choose_backend(job, backend), time_limit_minutes)


def _run(job: dict, installation: easydistill.Installation | None, reason: str, time_limit_minutes: float | None) -> train.TrainResult:
    checkpoint.check_out_dir(job["training"]["output_dir"])
    _check_tokens(job, models.check_student(job["models"]["student"]))
    say(f"backend: {'easydistill' if installation else 'builtin'} ({reason})")
    run_folder = _run_folder_of(job)
    say(f"log: {store.shown(run_folder / 'train.log')}")
    # the run's own copy: the job file may be written anew while this one trains
    own_copy, limit_seconds = store.write_json(run_folder / "job.json", job), time_limit_minutes and 60 * time_limit_minutes
    if installation:
        result = launch.run(own_copy, run_folder, reason, installation, limit_seconds)
    else:
        result = train.run(own_copy, run_folder, reason, limit_seconds)
    say(f"trained {result.metrics['steps']:,} steps in {result.seconds:.0f} s; checkpoint: {store.shown(result.checkpoint)}")
    return result


def choose_backend(job: dict, asked: str) -> tuple[easydistill.Installation | None, str]:
    """EasyDistill's installation where it is to run a job, None for the built-in engine; and why.

    asked  "auto" takes EasyDistill 1.x where it is installed and can do the job
    Raises ConfigError for a job that EasyDistill is asked for and cannot do, BackendError where it is asked for and not installed.
    """
    if asked not in BACKENDS:
        raise ConfigError(backend_problem(asked))
    if asked == "builtin":
        return None, "asked for"
    if asked == "easydistill":
        found = easydistill.require(1)
        if refused := launch.refusals(job, found):
            raise ConfigError.from_problems("this job for EasyDistill 1.x; backend = 'builtin' can do it", refused)
        return found, "asked for"
    found, reason = easydistill.find(1)
    refused = found and (launch.settings_refusals(job) or launch.refusals(job, found))  # the machine is asked last: that takes seconds
    return (None, refused_because(refused)) if refused else (found, reason)


def refused_because(refused: list[str]) -> str:
    """Why the built-in engine takes a job although EasyDistill is there."""
    return f"EasyDistill 1.x cannot do this job: {' '.join(refused)}"


def _write_job(system: str, settings: Settings) -> str:
    """Check → show → tokenize → write the job, or raise and leave nothing."""
    values = settings.values
    checkpoint.check_out_dir(values["out_dir"])
    store.check_writable(values["config_path"])
    tokenizer = models.check_student(values["student_model"])
    with store.lock(values["labeled_path"]), _new_run_folder(system) as run_folder:
        data.check_labeled(values["labeled_path"], system)
        tokens = run_folder / "train_tokenized.json"
        counts = _tokenize(system, values, tokenizer, tokens)
        show_settings(settings)
        plan = {"mode": system, "settings": _with_origins(settings), "data": {"labeled_path": values["labeled_path"], **counts}}
        store.write_json(run_folder / "plan.json", plan)
        job_path = store.write_json(values["config_path"], build_job(settings, tokens))
    say(f"job: {store.shown(job_path)}   run: {store.shown(run_folder)}")
    return str(job_path)


def _tokenize(system: str, values: dict, tokenizer, tokens: Path) -> dict:
    """Tokenize the labelled rows and their validation rows. Returns what there is to know of both."""
    labeled, max_length = Path(values["labeled_path"]), values["max_length"]
    rows = data.write_tokenized(labeled, tokenizer, max_length, system, tokens)
    data.require_rows(rows, labeled, max_length, system)
    counts = {"labeled_sha256": store.hash_file(labeled), "train": _counts(rows)}
    if data.validation_path(labeled).is_file():
        validation = data.write_tokenized(data.validation_path(labeled), tokenizer, max_length, system, data.validation_path(tokens))
        counts |= {"validation_sha256": store.hash_file(data.validation_path(labeled)), "validation": _counts(validation)}
        if not validation.kept:
            store.remove_file(validation.path)
    for name, count in counts.items():
        if isinstance(count, dict):
            say(f"{name}: {count['kept']:,} rows, the longest {count['longest']:,} tokens; {count['too_long']:,} too long and dropped")
    return counts


def _counts(tokenized: data.Tokenized) -> dict:
    return {name: getattr(tokenized, name) for name in ("kept", "too_long", "longest", "supervised")}


def show_settings(settings: Settings) -> None:
    """Print every setting with where it came from, and the notes."""
    rows = [[name, _shown(value), settings.origins[name]] for name, value in settings.values.items()]
    table("Settings", ["setting", "value", "from"], rows)
    for note in settings.notes:
        say(f"note: {note}")


def _shown(value) -> str:
    return store.shown(value) if isinstance(value, str) and Path(value).is_absolute() else json.dumps(value)


def _with_origins(settings: Settings) -> dict:
    return {name: {"value": value, "origin": settings.origins[name]} for name, value in settings.values.items()}


@contextmanager
def _new_run_folder(name: str):
    """A new folder in `runs/`; gone again if the block raises."""
    runs = store.ROOT / "runs"
    folder = runs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    while folder.exists():
        folder = folder.with_name(folder.name + "x")
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        if not any(runs.iterdir()):
            runs.rmdir()
        raise


def _check_tokens(job: dict, tokenizer) -> None:
    """Raise unless the job's token file is whole and was made for the job's student and `max_length`."""
    tokens = Path(job["dataset"]["labeled_path"])
    found = store.read_manifest(tokens) if store.is_file(tokens) else None
    if found is None:
        raise DataError(f"{store.shown(tokens)} is no token file of the lab: write the job with write_system1_config.")
    wanted = data.tokens_made_for(tokenizer, job["training"]["max_length"])
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        made_for = " and ".join(differing)
        raise ConfigError(f"{store.shown(tokens)} was made for another {made_for}: write the job anew with write_system1_config.")


def _run_folder_of(job: dict) -> Path:
    """The folder of a job's token file: the run that the file was made for."""
    return Path(job["dataset"]["labeled_path"]).parent
