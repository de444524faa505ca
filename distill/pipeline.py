"""The workflow: check → plan → job → run → verify. Each step is a line here and a module elsewhere.

A run's folder, `runs/<system>-<key>`, is known by what decides the run: the same settings, rows and student come back to it, go on where an
earlier run stood and do nothing that is finished; others get a folder of their own, and the old one stays.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint, data, easydistill, launch, models, preflight, resume, shapes, stages, store, train
from .config import BACKENDS, RUN, Settings, backend_problem, build_job, lab_settings, read_job, resolve
from .console import say, table
from .errors import BackendError, ConfigError, DataError
from .machine import download_bytes, this_machine
from .models import RUN_RECORD
from .train import TrainResult


def distill_system1(config: Mapping | None = None) -> str:
    """Distil the System-1 student: check everything, tokenize, train in a subprocess, verify, publish.

    config  a dict of settings over the preset `system1` (README, "Settings"), e.g. {"student_model": …, "labeled_path": …}
    A run that was cut short is continued, and one that is finished is not done again, unless "fresh" is True.
    Returns the checkpoint's path. Raises ConfigError, DataError or BackendError; then `out_dir` is as it was.
    """
    return _distill("system1", config)


def write_system1_config(config: Mapping | None = None) -> str:
    """Check settings and write System 1's EasyDistill job with the run's own token file. Returns the job's path.

    Nothing is written unless every setting, the student, the data and the places to write to are good.
    """
    return _write_job("system1", config)


def distill_system2(config: Mapping | None = None) -> str:
    """Distil the System-2 student, which reasons before it answers: the same steps over the preset `system2`.

    config  a dict of settings, e.g. {"student_model": …, "cot_path": …, "lora_rank": 16}
    Returns the checkpoint's path. Raises as `distill_system1` does.
    """
    return _distill("system2", config)


def write_system2_config(config: Mapping | None = None) -> str:
    """`write_system1_config` for System 2: the question ends with the sentence that asks for reasoning; trace and solution are learnt."""
    return _write_job("system2", config)


def _distill(system: str, user: Mapping | None) -> str:
    settings = resolve(user, preset=system)
    values = settings.values
    unsplit = build_job(settings, Path(values["labeled_path"]))
    chosen = choose_backend(unsplit, values["backend"], is_fitted=False)  # refuses before anything is written
    with store.lock(values["out_dir"]):
        job = read_job(_write_job_alone(system, settings))
        return _run(job, values["backend"], _still(chosen, job), **{name: values[name] for name in RUN if name in values}).checkpoint


def run_easy_distill(
    config_path: str | Path, *, backend: str = "auto", time_limit_minutes: float | None = None, fresh: bool = False
) -> TrainResult:
    """Run a job file to a verified checkpoint; one that is finished already is not trained again, one that was cut short goes on.

    backend             "auto", "easydistill" or "builtin"
    time_limit_minutes  wall-clock time after which the training is ended; None: none
    fresh               train anew, whatever an earlier run left
    Raises ConfigError for a job that cannot work, BackendError with the end of the log for a run that failed.
    """
    job = read_job(config_path)
    chosen = choose_backend(job, backend)
    with store.lock(job["training"]["output_dir"]):
        return _run(job, backend, chosen, is_fitted=False, time_limit_minutes=time_limit_minutes, fresh=fresh)


def _run(
    job: dict,
    asked: str,
    chosen: tuple,
    *,
    is_fitted: bool = True,
    time_limit_minutes: float | None = None,
    fresh: bool = False,
    fall_back: bool = False,
) -> TrainResult:
    """Train a job with the backend of `choose_backend`; the lock of its `out_dir` is held.

    asked      the backend that was asked for; under "auto", what the other one made or began is not made again
    is_fitted  whether the job was fitted to this machine just now
    fall_back  where EasyDistill fails, let the built-in engine train
    """
    checkpoint.check_out_dir(job["training"]["output_dir"])
    _check_tokens(job, models.check_student(job["models"]["student"]))
    run_folder = _run_folder_of(job)
    with store.lock(run_folder):
        if not fresh and (done := _done(job, chosen, asked == "auto" or fall_back)):
            return done
        if not is_fitted and not chosen[0]:
            _check_fits(job, run_folder)
        if fresh:
            shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
        if chosen[0] and asked == "auto" and resume.saved(run_folder / "checkpoints"):
            chosen = None, "an earlier session's training goes on"
        return _train_or_fall_back(job, run_folder, chosen, time_limit_minutes and 60 * time_limit_minutes, fresh, fall_back)


def _done(job: dict, chosen: tuple, by_either: bool) -> TrainResult | None:
    """The checkpoint that stands at a job's `out_dir` where this job was finished; None where it was not.

    by_either  whatever backend made it counts, not only the one that was chosen
    """
    out_dir, backend = Path(job["training"]["output_dir"]), "easydistill" if chosen[0] else "builtin"
    maker, record = _finished(job, None if by_either else backend)
    if record is None:
        return None
    say(f"training of {out_dir.name}: done before, nothing has changed ({store.shown(out_dir)})")
    log = str(_run_folder_of(job) / "train.log")
    return TrainResult(str(out_dir), maker, "done before", 0.0, record["metrics"], log, reused=True)


def _finished(job: dict, backend: str | None) -> tuple[str | None, dict | None]:
    """The backend that finished a job, and the record of it; (…, None) where it is not finished. None takes either backend's."""
    maker = backend or checkpoint.recorded(Path(job["training"]["output_dir"]), "backend")
    return maker, train.finished(job, maker) if maker else None


def _train_or_fall_back(
    job: dict, run_folder: Path, chosen: tuple, limit_seconds: float | None, fresh: bool, fall_back: bool
) -> TrainResult:
    installation, reason = chosen
    try:
        return _train(job, run_folder, installation, reason, limit_seconds, fresh)
    except BackendError as error:
        if not (installation and fall_back):
            raise
        why = f"EasyDistill failed, and fall_back is set: {str(error).splitlines()[0]}"
    plan = run_folder / "plan.json"
    store.write_json(plan, {**(store.read_json(plan) if store.is_file(plan) else {}), "fell_back": why})  # distill_run.json says it too
    return _train(job, run_folder, None, why, limit_seconds, fresh)


def _train(
    job: dict, run_folder: Path, installation: easydistill.Installation | None, reason: str, limit_seconds: float | None, fresh: bool
) -> TrainResult:
    """Train with one backend."""
    backend, out_dir, log = "easydistill" if installation else "builtin", Path(job["training"]["output_dir"]), run_folder / "train.log"
    say(f"backend: {backend} ({reason})")
    if why := "that is asked for" if fresh else _why_anew(job, out_dir):
        say(f"training of {out_dir.name}: made anew, since {why}")
    if installation and log.is_file():
        say("EasyDistill 1.x cannot go on where an earlier run stood: it starts over")
    say(f"log: {store.shown(log)}")
    own_copy = store.write_json(run_folder / "job.json", job)  # the job file may be written anew while this one trains
    if installation:
        result = launch.run(own_copy, run_folder, reason, installation, limit_seconds)
    else:
        result = train.run(own_copy, run_folder, reason, limit_seconds)
    say(f"trained {result.metrics['steps']:,} steps in {result.seconds:.0f} s; checkpoint: {store.shown(result.checkpoint)}")
    return result


def _why_anew(job: dict, out_dir: Path) -> str:
    """How a job differs from the one whose checkpoint stands at its `out_dir`, in words; empty where none stands there."""
    try:
        made = store.read_manifest(out_dir, name=RUN_RECORD) if store.is_dir(out_dir) else None
    except DataError:
        return "what stands there is damaged"
    if not made:
        return ""
    decides = [checkpoint.decisive_settings(one) for one in (made["job"], job)]
    differences = stages.changes(*[{**one["training"], **one["lab"]} for one in decides])
    if made["tokens_sha256"] != store.hash_file(Path(job["dataset"]["labeled_path"])):
        differences.append("the rows changed")
    return " and ".join(differences) or "the student, the backend, the engine's code or the validation rows changed"


def choose_backend(job: dict, asked: str, *, is_fitted: bool = True) -> tuple[easydistill.Installation | None, str]:
    """EasyDistill's installation where it is to run a job, None for the built-in engine; and why.

    asked      "auto" takes EasyDistill 1.x where it is installed and can do the job
    is_fitted  False where the job is still to be fitted to this machine for the backend that is asked for, so that memory is asked then
    Raises ConfigError for a job that EasyDistill is asked for and cannot do, BackendError where it is asked for and not installed.
    """
    if asked not in BACKENDS:
        raise ConfigError(backend_problem(asked))
    if asked == "builtin":
        return None, "asked for"
    if asked == "easydistill":
        found = easydistill.require(1)
        if refused := launch.refusals(job, found, memory=is_fitted):
            raise ConfigError.from_problems("this job for EasyDistill 1.x; backend = 'builtin' can do it", refused)
        return found, "asked for"
    found, reason = easydistill.find(1)
    refused = found and (launch.settings_refusals(job) or launch.refusals(job, found))  # the machine is asked last: that takes seconds
    return (None, refused_because(refused)) if refused else (found, reason)


def _still(chosen: tuple, job: dict) -> tuple:
    """A backend that was chosen before the settings were fitted to the machine, if it can do the job as it is now."""
    refused = launch.settings_refusals(job) if chosen[0] else []
    return (None, refused_because(refused)) if refused else chosen


def refused_because(refused: list[str]) -> str:
    """Why the built-in engine takes a job although EasyDistill is there."""
    return f"EasyDistill 1.x cannot do this job: {' '.join(refused)}"


def _write_job(system: str, user: Mapping | None) -> str:
    settings = resolve(user, preset=system)
    with store.lock(settings.values["out_dir"]):
        return _write_job_alone(system, settings)


def _write_job_alone(system: str, settings: Settings) -> str:
    """Check → show → tokenize → write the job, or raise and leave nothing. The lock of `out_dir` is held."""
    values = settings.values
    checkpoint.check_out_dir(values["out_dir"])
    store.check_writable(values["config_path"])
    tokenizer = models.check_student(values["student_model"])
    with store.lock(values["labeled_path"]):
        data.check_labeled(values["labeled_path"], system)
        with _made(_run_folder(system, settings), values.get("fresh", False)) as run_folder:
            tokens = run_folder / "train_tokenized.json"
            counts = _tokenize(system, values, tokenizer, tokens)
            settings, fit = _fitted(settings, counts["train"]["longest"], tokens)
            show_settings(settings)
            plan = {"mode": system, "settings": _with_origins(settings), "data": {"labeled_path": values["labeled_path"], **counts}}
            store.write_json(run_folder / "plan.json", {**plan, "preflight": fit})
            job_path = store.write_json(values["config_path"], build_job(settings, tokens))
    say(f"job: {store.shown(job_path)}   run: {store.shown(run_folder)}")
    return str(job_path)


def _fitted(settings: Settings, longest_tokens: int, tokens: Path) -> tuple[Settings, dict]:
    """Settings that fit this machine; and what was chosen, shown: name → {"value", "reason"}.

    A run that was finished or begun keeps what decides its weights, whatever machine this is.
    """
    run_folder, asked = tokens.parent, settings.values["backend"]
    begun = _begun(run_folder)
    kept = Settings(settings.values | begun, settings.origins | dict.fromkeys(begun, preflight.ORIGIN), settings.notes)
    by_either = asked == "auto" or settings.values.get("fall_back")
    if store.is_file(run_folder / "plan.json") and _finished(build_job(kept, tokens), None if by_either else asked)[1]:
        return kept, {}
    fit = _fit(settings, longest_tokens, run_folder, begun if resume.saved(run_folder / "checkpoints") else None)
    if fit is None:
        return settings, {}
    table("What fits", ["choice", "value", "why"], [[name, str(value), reason] for name, (value, reason) in fit.chosen.items()])
    return fit.settings, {name: {"value": value, "reason": reason} for name, (value, reason) in fit.chosen.items()}


def _fit(settings: Settings, longest_tokens: int, run_folder: Path, begun: dict | None = None) -> preflight.Fit | None:
    """`preflight.choose` for this machine; None where the student's memory cannot be told."""
    student, out_dir = settings.values["student_model"], Path(settings.values["out_dir"])
    try:
        shape, _ = shapes.find_shape(student)
    except ConfigError as error:
        say(f"note: {error} So its memory is not checked.")
        return None
    return preflight.choose(settings, shape, longest_tokens, this_machine(out_dir, run_folder), download_bytes(student, shape), begun)


def _check_fits(job: dict, run_folder: Path) -> None:
    """Raise PreflightError where this machine cannot train a job as it stands: every setting in it is yours, so none is changed."""
    values = {**job["training"], **lab_settings(job), "student_model": job["models"]["student"], "out_dir": job["training"]["output_dir"]}
    counts = store.read_manifest(Path(job["dataset"]["labeled_path"])).get("counts", {})  # none in one that the demo's controls changed
    _fit(Settings(values, dict.fromkeys(values, "yours")), counts.get("longest", values["max_length"]), run_folder)


def _begun(run_folder: Path) -> dict:
    """What the machine of a run's earlier session had changed of the settings that decide the weights; empty where there was none."""
    plan = run_folder / "plan.json"
    try:
        before = store.read_json(plan)["settings"] if store.is_file(plan) else {}
    except DataError as error:
        say(f"note: {error} So what an earlier machine had changed is not known; it is planned anew.")
        before = {}
    changed = {name: setting["value"] for name, setting in before.items() if setting["origin"] == preflight.ORIGIN}
    return {name: value for name, value in changed.items() if name in preflight.LEARNT}


def _run_folder(system: str, settings: Settings) -> Path:
    """The folder of the run that these settings, rows and this student make, wherever the student's files lie."""
    values = settings.values
    job, labeled = build_job(settings, Path(values["labeled_path"])), Path(values["labeled_path"])
    rows = [store.hash_file(path) for path in (labeled, data.validation_path(labeled)) if path.is_file()]
    student, own = models.fingerprint(values["student_model"]), stages.code(*stages.TOKENIZING)
    key = store.hash_json([checkpoint.decisive_settings(job), store.shown(values["out_dir"]), rows, student, own])
    return store.ROOT / "runs" / f"{system}-{key[:12]}"


@contextmanager
def _made(folder: Path, fresh: bool):
    """Yield a run's folder, made where it is not there, or anew where `fresh`; all is as it was if the block raises."""
    former = folder.with_name(f"{folder.name}.former")
    if former.exists() and not folder.exists():  # a kill came between
        former.rename(folder)
    if fresh and folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    is_new = not folder.exists()
    store.make_folder(folder)
    try:
        yield folder
    except BaseException:
        if is_new:
            shutil.rmtree(folder)
        if former.exists():
            former.rename(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        raise
    shutil.rmtree(former, ignore_errors=True)


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
