"""The built-in engine: TRL's SFTTrainer on a job's own tokenized rows, run as `python -m distill.train --config JOB.json`.

`run` is the lab's side: it starts the engine, shows its progress and believes only the checkpoint. The rest runs in the engine's process.
A checkpoint is published whole or not at all: it is saved under a temporary name, loaded again, compared with the student, sealed with
`distill_run.json`, and only then renamed to the job's `output_dir`.
"""

import argparse
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint, config, engine, store
from .console import progress, say
from .data import validation_path
from .errors import BackendError, DistillError
from .generation import generate
from .models import RUN_RECORD, load_to_train
from .trainer import attention_for, build_trainer, datasets, precision_for

SAVE_SECONDS = 180  # leaves two of the five minutes for a validation and the saving itself
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class TrainResult:
    """What a backend leaves: the checkpoint, which backend made it and why, how long it took, and its figures."""

    checkpoint: str
    backend: str
    reason: str
    seconds: float
    metrics: dict
    log_path: str


def run(config_path: str | Path, run_folder: Path, reason: str, limit_seconds: float | None = None) -> TrainResult:
    """Train a job with the built-in engine in a subprocess.

    limit_seconds  wall-clock time that it may take
    Raises BackendError with the end of the log where no new, complete and loadable checkpoint came of it; then nothing has changed
    at the job's `output_dir`.
    """
    log, arguments = run_folder / "train.log", ["--config", str(store.resolve(config_path)), "--run", str(run_folder)]

    def work(show: Callable[[dict], None]) -> BackendError:
        ended = engine.run_module("distill.train", arguments, log, show, limit_seconds)
        return engine.failure("Training", ended, log)

    return publish(config.read_job(config_path), run_folder, "builtin", reason, work)


def publish(job: dict, run_folder: Path, backend: str, reason: str, work: Callable[[Callable], BackendError]) -> TrainResult:
    """Have `work` train a job and publish its checkpoint; believe only the checkpoint.

    work  called with a function that shows the engine's events; returns the error to be raised where nothing new stands at the job's
          `output_dir` afterwards
    """
    out_dir, started = Path(job["training"]["output_dir"]), time.monotonic()
    with store.lock(out_dir):
        store.recover(out_dir)
        before = checkpoint.run_id(out_dir)
        try:
            with progress(out_dir.name) as update:
                failure = work(_progress(update))
        finally:
            store.recover(out_dir)
            shutil.rmtree(run_folder / "cache", ignore_errors=True)
        if checkpoint.run_id(out_dir) in (None, before):  # a new, sealed checkpoint is the proof; an exit status is none
            raise failure
        record = store.read_manifest(out_dir, name=RUN_RECORD)
    return TrainResult(str(out_dir), backend, reason, time.monotonic() - started, record["metrics"], str(run_folder / "train.log"))


def _progress(update) -> Callable[[dict], None]:
    """Show the engine's events: steps done, the latest loss in training and validation, sample answers."""
    latest: dict = {}

    def show(event: dict) -> None:
        if "sample" in event:
            say(sample_line(event["sample"]))
            return
        latest.update((name, event[key]) for key, name in (("loss", "loss"), ("eval_loss", "val")) if key in event)
        update(event["step"], total=event.get("steps"), note=", ".join(f"{name} {value:.3f}" for name, value in latest.items()))

    return show


def sample_line(sample: dict) -> str:
    """A sample answer as one line of printable text."""
    asked, answer, wanted = (_glimpse(sample[key], limit) for key, limit in (("instruction", 60), ("answer", 80), ("reference", 40)))
    cut_off = "" if sample["stopped"] else " (cut off)"
    return f"step {sample['step']}: {asked} → {answer}{cut_off}, wanted: {wanted}"


def _glimpse(text: str, limit_chars: int) -> str:
    """The beginning and the end of a text, where an answer to a long thought stands; no control characters."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    half = limit_chars // 2
    return text if len(text) <= limit_chars else f"{text[:half]} … {text[-half:]}"


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
        train(job, run_folder)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def train(job: dict, run_folder: Path) -> None:
    """Train a job's student and publish the best checkpoint at the job's `output_dir`; metrics and the last one stay in `run_folder`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    out_dir, student, lab = Path(job["training"]["output_dir"]), job["models"]["student"], config.lab_settings(job)
    chosen = _choose(job["training"], lab)
    model, tokenizer = load_to_train(student, attention=chosen["attention"]["value"])
    before = checkpoint.weight_hashes(model)
    tokens = Path(job["dataset"]["labeled_path"])
    rows, validation = datasets(tokens, run_folder / "cache")
    callbacks = _callbacks(validation and validation_path(tokens), lab["sample_answers"], run_folder)
    trainer = build_trainer(
        job, chosen["precision"]["value"], (model, tokenizer), (rows, validation), run_folder / "checkpoints", callbacks
    )
    outcome = trainer.train()
    _keep_last(trainer, student, tokenizer, run_folder)
    with store.atomic_folder(out_dir) as folder:
        if lab["lora_rank"]:
            trainer.model.save_pretrained(run_folder / "adapter")
            trained = checkpoint.save_merged(student, run_folder / "adapter", tokenizer, folder)
        else:
            trained = checkpoint.save(trainer.model, tokenizer, folder)
        moved = checkpoint.verify_checkpoint(folder, before, trained)
        metrics = {**_metrics(trainer, outcome, len(rows)), "tensors_moved": moved}
        store.write_manifest(folder, checkpoint.record(job, run_folder, before, chosen, metrics), name=RUN_RECORD)
    say(f"checkpoint: {store.shown(out_dir)}")


def _choose(training: dict, lab: dict) -> dict:
    """What the engine decides by itself, printed: name → {"value", "reason"}."""
    # the packs of a batch are laid end to end
    longest = training["max_length"] * (training.get("per_device_train_batch_size", 8) if lab["packing"] else 1)
    found = {"attention": attention_for(longest), "precision": precision_for(training)}
    for name, (value, reason) in found.items():
        print(f"{name}: {value} ({reason})")
    print(f"weights: LoRA of rank {lab['lora_rank']} on all linear layers" if lab["lora_rank"] else "weights: full fine-tuning")
    return {name: {"value": value, "reason": reason} for name, (value, reason) in found.items()}


def _callbacks(validation: Path | None, samples: int, run_folder: Path) -> list:
    reporter = _reporter(run_folder / "metrics.jsonl", validate=validation is not None)
    return [reporter, _sampler(validation, samples, run_folder / "samples.jsonl")] if validation and samples else [reporter]


def _reporter(metrics_path: Path, validate: bool):
    """A trainer callback: every figure to `metrics.jsonl` and to the lab, and a checkpoint at least every SAVE_SECONDS."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        saved_at = time.monotonic()

        def on_train_begin(self, args, state, control, **kwargs):
            metrics_path.unlink(missing_ok=True)
            self.saved_at = time.monotonic()
            engine.emit(step=0, steps=state.max_steps)

        def on_log(self, args, state, control, logs=None, **kwargs):
            event = {"step": state.global_step, "steps": state.max_steps, **logs}
            store.append_json_line(metrics_path, {"time": time.time(), **event})
            engine.emit(**event)

        def on_step_end(self, args, state, control, **kwargs):
            if time.monotonic() - self.saved_at > SAVE_SECONDS:
                # the best checkpoint is known by its validation loss, so the two go together
                control.should_save, control.should_evaluate = True, validate

        def on_save(self, args, state, control, **kwargs):
            self.saved_at = time.monotonic()

    return Reporter()


def _sampler(questions_path: Path, count: int, samples_path: Path):
    """A trainer callback: at every save, the first validation questions are answered, so that one sees the student learn."""
    from transformers import TrainerCallback

    rows, limit_tokens = sample_questions(questions_path, count)
    asked = [[token for token, supervised in zip(row["input_ids"], row["completion_mask"], strict=True) if not supervised] for row in rows]

    class Sampler(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            samples_path.unlink(missing_ok=True)

        def on_save(self, args, state, control, model, processing_class, **kwargs):
            with _undisturbed(model), _autocast(args, model):
                answers = generate(model, processing_class, asked, limit_tokens)
            for row, answer in zip(rows, answers, strict=True):
                texts = {"instruction": row["instruction"], "answer": answer.text, "reference": row["output"]}
                sample = {"step": state.global_step, **texts, "stopped": answer.stopped}
                store.append_json_line(samples_path, sample)
                print(sample_line(sample))
                engine.emit(sample=sample)

    return Sampler()


def sample_questions(path: Path, count: int) -> tuple[list[dict], int]:
    """The first `count` rows of a token file, and how many tokens an answer may have: half as many again as the longest, at most
    SAMPLE_TOKENS."""
    rows, longest = [], 0
    for row in store.read_rows(path):
        longest = max(longest, sum(row["completion_mask"]))
        rows += [row] if len(rows) < count else []
    return rows, min(SAMPLE_TOKENS, math.ceil(1.5 * longest))


@contextmanager
def _undisturbed(model) -> Iterator[None]:
    """Let a model answer in the midst of its training: its mode and every random generator are afterwards what they were."""
    import numpy
    import torch

    training, python, arrays = model.training, random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        yield
    model.train(training)
    random.setstate(python)
    numpy.random.set_state(arrays)


def _autocast(args, model):
    """Compute as the training does; peft asks the model behind the forward that the trainer has wrapped for it."""
    import torch

    half = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(model.device.type, half, enabled=args.bf16 or args.fp16)


def _keep_last(trainer, student: str, tokenizer, run_folder: Path) -> None:
    """Keep the last training checkpoint's model as `last/` in the run's folder; drop older ones."""
    checkpoints = run_folder / "checkpoints"
    last = checkpoints / f"checkpoint-{trainer.state.global_step}"
    if not last.is_dir():
        raise BackendError(f"The last training checkpoint, {store.shown(last)}, is missing.")
    (last / "training_args.bin").unlink(missing_ok=True)  # a pickle
    with store.atomic_folder(run_folder / "last") as folder:
        if (last / "adapter_config.json").is_file():
            checkpoint.save_merged(student, last, tokenizer, folder)
        else:
            shutil.copytree(last, folder, dirs_exist_ok=True)
    shutil.rmtree(checkpoints)


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
        "best_validation_loss": min(validated) if validated else None,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "trained_parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
    }


if __name__ == "__main__":
    main()
