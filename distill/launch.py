"""The real EasyDistill 1.x as a backend: started on the job, watched, and believed only where its checkpoint proves itself.

EasyDistill ends with exit status 0 whatever happens. Only `train_runtime` in its log says that a training reached its end, and only a
checkpoint that the engine's process (`python -m distill.launch --adopt`) has loaded and compared with the student says that it was worth
anything: that one is saved in the lab's own form and published as any other.
"""

import argparse
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import checkpoint, config, easydistill, engine, faults, machine, models, process, store, train, trainer, workplace
from .console import say
from .easydistill import Installation
from .errors import BackendError, ConfigError, DistillError
from .memory import Training, training_need
from .models import RUN_RECORD
from .preflight import Machine, as_trained, machine_of
from .shapes import shape_of

SILENCE_SECONDS = 1800
ADOPTED = "adopt.json"
STARTS_OVER = (
    " Run again, it starts over: EasyDistill 1.x can neither go on where a training stood nor take fewer rows at a time when memory runs "
    "out. The built-in engine does both: backend = 'builtin'."
)


# What EasyDistill cannot do


def refusals(job: dict, installation: Installation, *, memory: bool = True) -> list[str]:
    """What keeps EasyDistill 1.x from doing a job, a sentence each; none where it can.

    memory  whether to ask if the job as it stands fits this machine
    Downloads a student that is on the hub, which any backend needs. Raises ConfigError for a student that no backend can train.
    """
    models.check_student(job["models"]["student"])
    student, gpu = models.local_folder(job["models"]["student"]), machine.gpu()
    problems, place = settings_refusals(job), machine_of(gpu, machine.free_ram_gib())
    try:
        how = as_trained({**job["training"], "backend": "easydistill"}, job["training"]["max_length"], place)
        problems += _memory_problems(student, how, place) if memory else []
    except ConfigError as error:  # a precision that the machine does not train in
        problems.append(str(error))
    return problems + _student_problems(student, installation)


def settings_refusals(job: dict) -> list[str]:
    """`refusals` by the job's settings alone, whatever the machine and the student."""
    problems = [
        f"lab.{key} = {value!r}: only the built-in engine does that."
        for key, value in job.get("lab", {}).items()
        if value != config.LAB_DEFAULTS[key] and key != "sample_answers"
    ]
    if job["training"].get("optim") in config.LAB_OPTIMIZERS:
        problems.append(f"training.optim = {job['training']['optim']!r}: EasyDistill's environment has no bitsandbytes.")
    if job["training"].get("group_by_length"):
        problems.append("training.group_by_length = true: EasyDistill's own grouping, by transformers, trains far worse. Set it to false.")
    return problems


def _student_problems(student: Path, installation: Installation) -> list[str]:
    settings = store.read_json(student / "config.json")
    named = student / "tokenizer_config.json"
    brings_code = "auto_map" in settings or (named.is_file() and "auto_map" in store.read_json(named))
    problems = ["the student brings code of its own (auto_map), which EasyDistill would run: it trusts remote code."] if brings_code else []
    if not list(student.glob(workplace.WEIGHTS)):
        problems.append("the student's weights have other names than model.safetensors, which EasyDistill would not find.")
    kind, known = str(settings.get("model_type")), _model_types(installation)
    if known and kind.replace("-", "_") not in known:
        problems.append(f"its transformers {installation.versions.get('transformers', '')} does not know the student's model_type {kind}.")
    try:
        workplace.translated_config(settings)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _model_types(installation: Installation) -> set[str]:
    """The models that the environment's transformers knows, by its folders; empty where they are not found."""
    return {path.name for path in workplace.environment_of(installation).glob("lib/python*/site-packages/transformers/models/*")}


def _memory_problems(student: Path, how: Training, place: Machine) -> list[str]:
    try:
        shape = shape_of(store.read_json(student / "config.json"), store.shown(student))
    except ConfigError as error:
        say(f"note: {error} So EasyDistill's memory is not checked.")
        return []
    need, where = training_need(shape, how), f"the GPU ({place.name})" if place.gpu else "this machine"
    if need.gib <= place.free_gib:
        return []
    return [
        f"it trains every weight in fp32 and holds a whole batch's logits, which takes {need.gib:.1f} GiB for this student "
        f"({need.listed()}), and {where} has {place.free} free. Take a smaller student, or fewer rows at a time "
        "(per_device_train_batch_size); lora_rank and logits in parts are the built-in engine's alone."
    ]


# Launching


def run(
    config_path: str | Path, run_folder: Path, reason: str, installation: Installation, limit_seconds: float | None = None
) -> train.TrainResult:
    """Train a job with EasyDistill 1.x; the counterpart of `train.run`.

    limit_seconds  wall-clock time that the training may take; it is ended too when nothing is heard of it for SILENCE_SECONDS
    Raises BackendError that names the fault, says what to do and ends with the log; then nothing has changed at the job's `output_dir`.
    """
    job, work = config.read_job(config_path), run_folder / "easydistill"
    known = checkpoint.identity(job, "easydistill")
    say("EasyDistill measures no validation loss and answers no samples: its last checkpoint is the one that is published")

    def launch_and_adopt(show: Callable[[dict], None]) -> BackendError:
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        try:
            for name in ("out", "cache"):
                (work / name).mkdir(parents=True)
            facts = _launch(job, run_folder, installation, limit_seconds, show)
            store.write_json(work / ADOPTED, {**facts, "known": known})
            arguments = ["--adopt", str(work), "--config", str(store.resolve(config_path))]
            log = run_folder / "verify.log"
            ended = engine.run_module("distill.launch", arguments, log, show)
            return _failure(log, faults.Facts(ended.status, ended.overdue, ended.seconds, True, _free_bytes(run_folder)))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    return train.publish(job, run_folder, "easydistill", reason, launch_and_adopt)


def _launch(job: dict, run_folder: Path, installation: Installation, limit_seconds: float | None, show) -> dict:
    """Train in a safe folder. Returns what is known of the run.

    Raises BackendError unless the log says that the training reached its end and a checkpoint lies there; DataError for rows without
    tokens.
    """
    rows = sum(1 for _ in trainer.supervised_rows(job["dataset"]["labeled_path"]))  # on others EasyDistill trains all the same
    gpu, out = machine.gpu(), run_folder / "easydistill" / "out"
    precision, processes = trainer.precision_on(models.capability_of(gpu), job["training"]), workplace.processes_for(bool(gpu))
    training, log = workplace.training_for(job, precision[0], bool(gpu)), run_folder / "train.log"
    chosen = {name: {"value": value, "reason": why} for name, (value, why) in (("precision", precision), ("processes", processes))}
    follower = Follower(run_folder / "metrics.jsonl", training["logging_steps"], show)
    with workplace.safe_folder(job, run_folder / "easydistill", installation, training, processes[0]) as place:
        command = [*easydistill.command(installation), "--config", str(place / "job.json")]
        limits = {"limit_seconds": limit_seconds, "silence_seconds": SILENCE_SECONDS}
        ended = process.run(command, log, follower, cwd=place, env=workplace.environment_variables(place, processes[0]), **limits)
    if ended.overdue or not follower.end or models.missing_in_folder(out):  # the exit status says nothing
        raise _failure(log, faults.Facts(ended.status, ended.overdue, ended.seconds, bool(follower.end), _free_bytes(run_folder)))
    known = {"version": installation.version, "origin": installation.origin, "versions": installation.versions}
    return {"metrics": {"rows": rows, **follower.metrics()}, "chosen": chosen, "easydistill": known}


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _failure(log: Path, facts: faults.Facts) -> BackendError:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    fault = faults.diagnose(text, facts)
    message = f"EasyDistill's training failed. It looks like this: {fault.name}. {fault.advice}{'' if facts.trained else STARTS_OVER}"
    message += f" The end of {store.shown(log)}:"
    return BackendError("\n".join([message, *process.tail(log, skip=engine.EVENT)]))


# Its log


def read_line(line: str) -> dict:
    """What a line of EasyDistill's log says of the training: steps, figures, or nothing.

    >>> read_line("2026-01-01 00:00:00,000 - INFO -   9%|▉         | 7/76 [00:00<00:05, 12.80it/s]")
    {'step': 7, 'steps': 76}
    >>> read_line("2026-01-01 00:00:00,000 - INFO - {'loss': 5.5, 'grad_norm': nan}")
    {'loss': 5.5, 'grad_norm': None}
    """
    said = re.sub(r"^\d{4}-\S+ \S+ - [A-Z]+ - ", "", line)
    if bar := re.match(r"\s*\d+%\|.*?\| *(\d+)/(\d+) \[", said):
        return {"step": int(bar[1]), "steps": int(bar[2])}
    if not re.match(r"\{'(?:loss|train_runtime)': ", said):
        return {}
    figures = {key: float(value) for key, value in re.findall(r"'(\w+)': (-?[\d.]+(?:e[+-]?\d+)?|-?inf|nan)", said)}
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


class Follower:
    """Reads EasyDistill's log line by line: its bar and figures become the lab's events and `metrics.jsonl`.

    end  the figures of the training's last line, empty until it comes
    """

    def __init__(self, metrics: Path, logging_steps: int, show: Callable[[dict], None]) -> None:
        self.place, self.logging_steps, self.show = metrics, logging_steps, show
        self.steps, self.losses, self.end = None, [], {}
        metrics.unlink(missing_ok=True)

    def __call__(self, line: str) -> bool:
        """Take a line; returns whether it belongs into the log: bars and repetitions do not."""
        event = read_line(line)
        if "steps" in event:
            self.steps = event["steps"]
            self.show(event)
        elif event:
            self._figures(event)
        return "steps" not in event and not re.search(r" - ERROR - Detected error in output: | - [A-Z]+ - $", line)

    def _figures(self, figures: dict) -> None:
        if "train_runtime" in figures:
            self.end, step = figures, self.steps
        else:
            self.losses.append(figures["loss"])
            step = len(self.losses) * self.logging_steps  # the bar is drawn after the figures are printed
        event = {"step": step, "steps": self.steps, **figures}
        store.append_json_line(self.place, {"time": time.time(), **event})
        self.show({key: value for key, value in event.items() if value is not None})

    def metrics(self) -> dict:
        """The figures of a training that reached its end, by the names that the built-in engine's have."""
        return {
            "steps": self.steps,
            "train_seconds": round(self.end["train_runtime"], 2),
            "train_loss": self.end.get("train_loss"),
            "first_loss": self.losses[0] if self.losses else None,
            "last_loss": self.losses[-1] if self.losses else None,
            "validation_loss": [],
            "best_validation_loss": None,
        }


# In the engine's process


def main() -> None:
    """Adopt what EasyDistill left; exit status 0 only where the checkpoint stands at the job's `output_dir`."""
    parser = argparse.ArgumentParser(prog="python -m distill.launch", description="Verify and publish what EasyDistill trained.")
    parser.add_argument("--adopt", required=True, help="folder with EasyDistill's `out`, as distill.launch.run makes it")
    parser.add_argument("--config", required=True, help="the job")
    arguments = parser.parse_args()
    try:
        adopt(config.read_job(arguments.config), Path(arguments.adopt))
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def adopt(job: dict, work: Path) -> None:
    """Publish EasyDistill's checkpoint as one of the lab: in the student's own form, compared with the student, sealed."""
    student, out_dir, run_folder = job["models"]["student"], Path(job["training"]["output_dir"]), work.parent
    facts = store.read_json(work / ADOPTED)
    untrained, tokenizer = models.load_to_train(student)
    before = checkpoint.weight_hashes(untrained)
    model = _load_trained(work / "out", untrained)
    with store.atomic_folder(out_dir) as folder:
        trained = checkpoint.save(model, tokenizer, folder)
        moved = checkpoint.verify_checkpoint(folder, before, trained)
        with store.atomic_folder(run_folder / "last") as last:  # it is the last one too: there is no validation to choose another by
            shutil.copytree(folder, last, dirs_exist_ok=True)
        counts = {"parameters": model.num_parameters(), "trained_parameters": model.num_parameters(), "tensors_moved": moved}
        metrics = {**facts["metrics"], **counts}
        made = checkpoint.record(job, run_folder, facts["known"], before, facts["chosen"], metrics, facts["easydistill"])
        store.write_manifest(folder, made, name=RUN_RECORD)
    say(f"checkpoint: {store.shown(out_dir)}")


def _load_trained(out: Path, student):
    """The weights that EasyDistill saved, in the student's own configuration. Raises BackendError where some are missing."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            out, config=student.config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise BackendError(f"The checkpoint does not load: {error}") from error
    if found["missing_keys"]:
        raise BackendError(f"The checkpoint lacks {len(found['missing_keys'])} tensors, such as {sorted(found['missing_keys'])[0]}.")
    model.generation_config = student.generation_config
    return model


if __name__ == "__main__":
    main()
