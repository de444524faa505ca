"""The built-in engine: TRL's SFTTrainer on a job's own tokenized rows, run as `python -m distill.train --config JOB.json`.

`run` is the lab's side: it starts the engine, again with fewer rows at a time where memory runs out, shows its progress and believes only
the checkpoint. The rest runs in the engine's process, which goes on where a killed one of the same job stood.
A checkpoint is published whole or not at all: it is saved under a temporary name, loaded again, compared with the student, sealed with
`distill_run.json`, and only then renamed to the job's `output_dir`.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import backoff, checkpoint, config, engine, faults, preflight, resume, samples, store
from .console import progress, say
from .data import validation_path
from .errors import BackendError, DataError, DistillError
from .models import RUN_RECORD, gpu_capability, load_to_train
from .trainer import attention_for, build_trainer, datasets, load_student, precision_for


@dataclass(frozen=True)
class TrainResult:
    """What a backend leaves: the checkpoint, which backend made it and why, how long it took, and its figures.

    reused        whether the checkpoint had been finished before, so that nothing was trained
    resumed_from  the step at which the training of an earlier run went on; None where it began anew
    """

    checkpoint: str
    backend: str
    reason: str
    seconds: float
    metrics: dict
    log_path: str
    reused: bool = False
    resumed_from: int | None = None


def finished(job: dict, backend: str) -> dict | None:
    """The record of the checkpoint at a job's `output_dir` where exactly this job made it and it is whole; None otherwise.

    backend  "builtin" or "easydistill": the one that would train it now
    A damaged checkpoint is none, and that is said.
    """
    out_dir = Path(job["training"]["output_dir"])
    store.recover(out_dir)
    try:
        if checkpoint.recorded(out_dir, "resume_key") != checkpoint.resume_key(job, backend):
            return None
        return store.read_manifest(out_dir, name=RUN_RECORD)
    except DataError as error:
        say(f"the checkpoint that stands there is not used: {error}")
        return None


def run(config_path: str | Path, run_folder: Path, reason: str, limit_seconds: float | None = None) -> TrainResult:
    """Train a job with the built-in engine in a subprocess; it goes on from what lies in `run_folder/checkpoints` of the same job.

    limit_seconds  wall-clock time that it may take
    Raises BackendError that says what went wrong, with the end of the log where it is not known, where no new, complete and loadable
    checkpoint came of it; then nothing has changed at the job's `output_dir`, and the training checkpoints stay.
    """
    job, sessions = config.read_job(config_path), []
    arguments, log = ["--config", str(store.resolve(config_path)), "--run", str(run_folder)], run_folder / "train.log"
    ends_at = limit_seconds and time.monotonic() + limit_seconds

    def work(show: Callable[[dict], None]) -> BackendError:
        latest: dict = {}

        def hear(event: dict) -> None:
            latest.update(event)
            sessions.extend([event["session"]] if "session" in event else [])
            show(event)

        while True:
            latest.clear()
            kills, left = backoff.kernel_kills(), ends_at and ends_at - time.monotonic()
            ended = engine.run_module("distill.train", arguments, log, hear, left, append=bool(sessions))
            if not sessions or not backoff.ran_out(ended.status, kills, backoff.kernel_kills()):
                return _failure(ended, log, latest.get("failed"), sessions[-1]["resume_key"] if sessions else "")
            if not latest.get("in_steps"):
                return backoff.outside_of_steps(job, sessions[-1])
            step = latest.get("out_of_memory", latest).get("step", 0)  # one that the kernel killed could not say
            say(backoff.back_off(job, sessions[-1], step, run_folder / "checkpoints"))

    result = publish(job, run_folder, "builtin", reason, work)
    return replace(result, resumed_from=sessions[0]["step"] or None)


def _failure(ended, log: Path, known: str | None, key: str) -> BackendError:
    """The error for a training that failed: what the engine said of it, else how it ended and the end of its log."""
    if not known:
        return engine.failure("Training", ended, log)
    kept = resume.sealed(log.parent / "checkpoints", key)
    stays = f"\nThe last good training checkpoint is {store.shown(kept[-1])}." if kept else ""
    return BackendError(f"Training failed: {known}{stays}\nThe log: {store.shown(log)}")


def publish(job: dict, run_folder: Path, backend: str, reason: str, work: Callable[[Callable], BackendError]) -> TrainResult:
    """Have `work` train a job and publish its checkpoint; believe only the checkpoint.

    work  called with a function that shows the engine's events; returns the error to be raised where nothing new stands at the job's
          `output_dir` afterwards
    The caller holds the lock on `output_dir`.
    """
    out_dir, started = Path(job["training"]["output_dir"]), time.monotonic()
    store.recover(out_dir)
    before = checkpoint.recorded(out_dir, "run_id")
    try:
        with progress(out_dir.name) as update:
            failure = work(_progress(update))
    finally:
        store.recover(out_dir)
        shutil.rmtree(run_folder / "cache", ignore_errors=True)
    if checkpoint.recorded(out_dir, "run_id") in (None, before):  # a new, sealed checkpoint is the proof; an exit status is none
        raise failure
    record = store.read_manifest(out_dir, name=RUN_RECORD)
    return TrainResult(str(out_dir), backend, reason, time.monotonic() - started, record["metrics"], str(run_folder / "train.log"))


def _progress(update) -> Callable[[dict], None]:
    """Show the engine's events: steps done, the latest loss in training and validation, sample answers."""
    latest: dict = {}

    def show(event: dict) -> None:
        if "sample" in event:
            say(samples.sample_line(event["sample"]))
        elif "session" in event:
            for line in event["session"]["said"]:
                say(line)
        elif "step" in event:
            latest.update((name, event[key]) for key, name in (("loss", "loss"), ("eval_loss", "val")) if key in event)
            update(event["step"], total=event.get("steps"), note=", ".join(f"{name} {value:.3f}" for name, value in latest.items()))

    return show


def goes_on(session: dict) -> str:
    """What is said of a session that goes on where another stood."""
    again = session["seen"] - session["step"]
    done_again = f"; {again:,} step{'s' if again > 1 else ''} of the last session are done again" if again > 0 else ""
    return f"continues at step {session['step']:,} of {session['steps']:,}{done_again}"


# In the engine's process


def main() -> None:
    """Train the job that the command line names; exit status 0 only where its checkpoint stands at `output_dir`."""
    parser = argparse.ArgumentParser(prog="python -m distill.train", description="Train a student with the built-in engine (TRL).")
    parser.add_argument("--config", required=True, help="job JSON, as write_system1_config makes it")
    parser.add_argument("--run", help="folder for metrics and training checkpoints (default: the folder of the job's token file)")
    arguments = parser.parse_args()
    try:
        job = config.read_job(arguments.config)
        run_folder = store.resolve(arguments.run) if arguments.run else Path(job["dataset"]["labeled_path"]).parent
        with faults.naming_full_disk(run_folder):
            train(job, run_folder)
    except DistillError as error:
        message = f"{type(error).__name__}: {error}"
        engine.emit(failed=message)
        sys.exit(message)
    except Exception as error:
        if not faults.is_out_of_memory(error):
            raise
        print(f"out of memory outside of the steps: {error}")
        sys.exit(backoff.STATUS)


def train(job: dict, run_folder: Path) -> None:
    """Train a job's student and publish the best checkpoint at the job's `output_dir`; metrics and the last one stay in `run_folder`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    student, lab, checkpoints = job["models"]["student"], config.lab_settings(job), run_folder / "checkpoints"
    known = checkpoint.identity(job, "builtin")
    key = known["resume_key"]
    past = backoff.history(checkpoints, key, job["training"])
    fitted = backoff.fitted(job, past)
    found = _open_session(run_folder, known, backoff.split_of(fitted["training"]))
    chosen = _choose(fitted["training"], lab, past)
    precision = chosen["precision"]["value"]
    model, tokenizer = load_student(student, lab, precision, chosen["attention"]["value"])
    before = checkpoint.weight_hashes(load_to_train(student)[0] if lab["quantize_bits"] else model)
    tokens = Path(job["dataset"]["labeled_path"])
    rows, validation = datasets(tokens, run_folder / "cache")
    callbacks = _callbacks(validation and validation_path(tokens), lab["sample_answers"], run_folder)
    trainer = build_trainer(fitted, precision, (model, tokenizer), (rows, validation), checkpoints, callbacks, key)
    trainer.made_of = known
    outcome = backoff.train_within_memory(trainer, found, backoff.split_of(fitted["training"]))
    _free(trainer)
    _keep_last(trainer, student, tokenizer, run_folder)
    metrics, sessions = _metrics(trainer, outcome, len(rows)), {"sessions": trainer.sessions, "backed_off": past}
    out_dir = Path(job["training"]["output_dir"])
    with faults.naming_full_disk(out_dir), store.atomic_folder(out_dir) as folder:
        trained = _save(trainer.model, student, tokenizer, run_folder, folder)
        metrics["tensors_moved"] = checkpoint.verify_checkpoint(folder, before, trained)
        store.write_manifest(folder, checkpoint.record(job, run_folder, known, before, chosen, metrics) | sessions, name=RUN_RECORD)
    shutil.rmtree(checkpoints)
    say(f"checkpoint: {store.shown(out_dir)}")


def _open_session(run_folder: Path, known: dict, split: dict) -> Path | None:
    """The training checkpoint to go on from, said to the log and to the lab; what the run's journals hold beyond it is taken off."""
    found, said = resume.claim(run_folder / "checkpoints", known["resume_key"], known)
    step = resume.step_of(found) if found else 0
    seen = [resume.cut_off(run_folder / name, step) for name in ("metrics.jsonl", "samples.jsonl")]
    session = {"resume_key": known["resume_key"], "step": step, "seen": max(seen), "split": split, "capability": gpu_capability()}
    if found:
        session["steps"] = store.read_json(found / "trainer_state.json")["max_steps"]
        said.append(goes_on(session))
    elif said:
        said.append("the training begins anew, at step 0")
    for line in said:
        print(line)
    engine.emit(session={**session, "said": said})
    return found


def _choose(training: dict, lab: dict, past: list[dict]) -> dict:
    """What the engine decides by itself, printed: name → {"value", "reason"}."""
    # the packs of a batch are laid end to end
    longest = training["max_length"] * (config.split_of(training)[0] if lab["packing"] else 1)
    found = {"attention": attention_for(longest), "precision": precision_for(training)}
    if past:
        found["micro_batch"] = past[-1]["to"]["micro_batch"], f"{past[-1]['from']['micro_batch']} rows at a time ran out of memory"
    for name, (value, reason) in found.items():
        print(f"{name}: {value} ({reason})")
    print(f"method: {preflight.method(lab)}")
    return {name: {"value": value, "reason": reason} for name, (value, reason) in found.items()}


def _callbacks(validation: Path | None, count: int, run_folder: Path) -> list:
    reporter = _reporter(run_folder / "metrics.jsonl")
    return [reporter, samples.sampler(validation, count, run_folder / "samples.jsonl")] if validation and count else [reporter]


def _reporter(metrics_path: Path):
    """A trainer callback: every figure to `metrics.jsonl` and to the lab."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            engine.emit(step=state.global_step, steps=state.max_steps, in_steps=True)

        def on_train_end(self, args, state, control, **kwargs):
            engine.emit(in_steps=False)

        def on_log(self, args, state, control, logs=None, **kwargs):
            event = {"step": state.global_step, "steps": state.max_steps, **logs}
            store.append_json_line(metrics_path, {"time": time.time(), **event})
            engine.emit(**event)

    return Reporter()


def _keep_last(trainer, student: str, tokenizer, run_folder: Path) -> None:
    """Keep the last training checkpoint's model as `last/` in the run's folder."""
    last = run_folder / "checkpoints" / f"checkpoint-{trainer.state.global_step}"
    if not last.is_dir():
        raise BackendError(f"The last training checkpoint, after step {trainer.state.global_step}, is missing.")
    with store.atomic_folder(run_folder / "last") as folder:
        if (last / "adapter_config.json").is_file():
            checkpoint.save_merged(student, last, tokenizer, folder)
        else:
            shutil.copytree(last, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*resume.NOT_THE_MODEL))


def _free(trainer) -> None:
    """Let go of the optimizer's state and the gradients: what follows holds a second model, and a step must remain the peak."""
    trainer.model.zero_grad(set_to_none=True)
    for holder in (trainer, trainer.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    trainer.accelerator.free_memory()


def _save(model, student: str, tokenizer, run_folder: Path, folder: Path) -> dict:
    """Save the trained model in `folder`, an adapter merged. Returns the saved weights' hashes."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return checkpoint.save(model, tokenizer, folder)
    with faults.naming_full_disk(run_folder / "adapter"):
        model.save_pretrained(run_folder / "adapter")
    return checkpoint.save_merged(student, run_folder / "adapter", tokenizer, folder)


def _metrics(trainer, outcome, rows: int) -> dict:
    validated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    parameters = {name: parameter for name, parameter in trainer.model.named_parameters() if "lora_" not in name}
    return {
        "rows": rows,
        "steps": outcome.global_step,
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "train_loss": outcome.training_loss,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "validation_loss": validated,
        "best_validation_loss": trainer.state.best_metric,  # of the checkpoint that is published: a better one may have been lost
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "trained_parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
    }


if __name__ == "__main__":
    main()
