"""The built-in engine: TRL's SFTTrainer on a job's own tokenized rows, run as `python -m distill.train --config JOB.json`.

`run` is the lab's side: it starts the engine, shows its progress and believes only the checkpoint. The rest runs in the engine's process.
A checkpoint is published whole or not at all: it is saved under a temporary name, loaded again, compared with the student, sealed with
`distill_run.json`, and only then renamed to the job's `output_dir`.
"""

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import config, engine, store
from .console import progress, say
from .data import validation_path
from .errors import BackendError, ConfigError, DataError, DistillError
from .models import load_student, stop_ids

RUN_RECORD = "distill_run.json"
SAVE_SECONDS = 180  # leaves two of the five minutes for a validation and the saving itself
POOL_BATCHES = 20
EAGER_TOKENS = 512
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "tokenizers")


@dataclass(frozen=True)
class TrainResult:
    """What a backend leaves: the checkpoint, which backend made it and why, how long it took, and its figures."""

    checkpoint: str
    backend: str
    reason: str
    seconds: float
    metrics: dict
    log_path: str


def run(config_path: str | Path, run_folder: Path, reason: str) -> TrainResult:
    """Train a job with the built-in engine in a subprocess.

    Raises BackendError with the end of the log where no new, complete and loadable checkpoint came of it; then nothing has changed
    at the job's `output_dir`.
    """
    job = config.read_job(config_path)
    out_dir = Path(job["training"]["output_dir"])
    log, started = run_folder / "train.log", time.monotonic()
    arguments = ["--config", str(store.resolve(config_path)), "--run", str(run_folder)]
    with store.lock(out_dir):
        store.recover(out_dir)
        before = _run_id(out_dir)
        try:
            with progress("Training") as update:
                status = engine.run_module("distill.train", arguments, log, _progress(update))
        finally:
            store.recover(out_dir)
            shutil.rmtree(run_folder / "cache", ignore_errors=True)
        if _run_id(out_dir) in (None, before):  # a new, sealed checkpoint is the proof; an exit status is none
            raise engine.failure("Training", status, log)
        record = store.read_manifest(out_dir, name=RUN_RECORD)
    return TrainResult(str(out_dir), "builtin", reason, time.monotonic() - started, record["metrics"], str(log))


def _run_id(out_dir: Path) -> str | None:
    """The run that made the checkpoint at `out_dir`; None where there is none."""
    place = out_dir / RUN_RECORD
    record = store.read_json(place) if store.is_file(place) else None
    return record.get("run_id") if isinstance(record, dict) else None


def _progress(update) -> Callable[[dict], None]:
    """Show the engine's events: steps done, and the latest loss in training and validation."""
    latest: dict = {}

    def show(event: dict) -> None:
        latest.update((name, event[key]) for key, name in (("loss", "loss"), ("eval_loss", "validation")) if key in event)
        update(event["step"], total=event["steps"], note=", ".join(f"{name} {value:.3f}" for name, value in latest.items()))

    return show


# In the engine's process


def main() -> None:
    """Train the job that the command line names; exit status 0 only where its checkpoint stands at `output_dir`."""
    parser = argparse.ArgumentParser(prog="python -m distill.train", description="Train a student with the built-in engine (TRL).")
    parser.add_argument("--config", required=True, help="job JSON, as write_system1_config makes it")
    parser.add_argument("--run", help="folder for metrics and training checkpoints (default: the folder of the job's token file)")
    arguments = parser.parse_args()
    engine.end_with_parent()
    try:
        job = config.read_job(arguments.config)
        run_folder = store.resolve(arguments.run) if arguments.run else Path(job["dataset"]["labeled_path"]).parent
        train(job, run_folder)
    except DistillError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def train(job: dict, run_folder: Path) -> None:
    """Train a job's student and publish the best checkpoint at the job's `output_dir`; metrics and the last one stay in `run_folder`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar's every state would be a line of the log
    out_dir, tokens = Path(job["training"]["output_dir"]), Path(job["dataset"]["labeled_path"])
    attention, reason = attention_for(job["training"]["max_length"])
    print(f"attention: {attention} ({reason}); weights: fp32, full fine-tuning")
    model, tokenizer = load_student(job["models"]["student"], attention=attention)
    before = weight_hashes(model)
    rows, validation = _datasets(tokens, run_folder / "cache")
    trainer = _trainer(job, model, tokenizer, rows, validation, run_folder)
    outcome = trainer.train()
    _keep_last(trainer, run_folder)
    with store.atomic_folder(out_dir) as folder:
        trained = _save(trainer.model, tokenizer, folder)
        moved = verify_checkpoint(folder, before, trained)
        record = _record(job, run_folder, before, _metrics(trainer, outcome, len(rows), moved))
        store.write_manifest(folder, record, name=RUN_RECORD)
    say(f"checkpoint: {store.shown(out_dir)}")


def attention_for(max_length: int) -> tuple[str, str]:
    """The implementation of attention to train with, and why."""
    import torch

    if torch.cuda.is_available():
        return "sdpa", "a GPU is visible"
    if max_length > EAGER_TOKENS:
        return "sdpa", f"rows may be longer than {EAGER_TOKENS} tokens, where plain attention takes too much memory"
    return "eager", f"on a CPU, up to {EAGER_TOKENS} tokens, its backward pass is the faster one"


def _datasets(tokens: Path, cache: Path) -> tuple:
    """Training and validation rows as TRL takes them, memory-mapped: {"input_ids", "labels"}, -100 where nothing is supervised."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    shutil.rmtree(cache, ignore_errors=True)
    split = validation_path(tokens)
    places = [tokens, split if split.is_file() else None]
    try:
        return tuple(place and Dataset.from_generator(_labels, gen_kwargs={"path": str(place)}, cache_dir=str(cache)) for place in places)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from error  # what `_labels` said, without the wrapping


def _labels(path: str):
    for row in store.read_rows(path):
        ids, mask = row.get("input_ids"), row.get("completion_mask")
        if not ids or not mask or len(ids) != len(mask) or not any(mask):
            raise DataError(f"{store.shown(path)} is no token file of the lab: write the job with write_system1_config.")
        yield {"input_ids": ids, "labels": [token if supervised else -100 for token, supervised in zip(ids, mask, strict=True)]}


def _trainer(job: dict, model, tokenizer, rows, validation, run_folder: Path):
    from trl import SFTConfig

    checkpoints = run_folder / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    arguments = SFTConfig(**sft_settings(job["training"], str(checkpoints), validate=validation is not None))
    reporter = _reporter(run_folder / "metrics.jsonl", validate=validation is not None)
    return _trainer_class(job["training"].get("group_by_length", False))(
        model=model, args=arguments, train_dataset=rows, eval_dataset=validation, processing_class=tokenizer, callbacks=[reporter]
    )


def _trainer_class(group_by_length: bool) -> type:
    """TRL's SFTTrainer; with `group_by_length`, one that draws its batches from `length_groups`."""
    from torch.utils.data import Sampler
    from trl import SFTTrainer

    class LengthGroupSampler(Sampler):
        def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
            self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self):
            return iter(length_groups(self.lengths, self.batch_size, self.seed, self.epoch))

    class LengthGroupedSFTTrainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            rows = self.train_dataset if train_dataset is None else train_dataset
            # grouped by all rows of a step, so that 8 × 1 and 1 × 8 take the same ones
            step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            return LengthGroupSampler([len(ids) for ids in rows["input_ids"]], step_rows, self.args.seed)

    return LengthGroupedSFTTrainer if group_by_length else SFTTrainer


def length_groups(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """An epoch's row numbers, such that each batch holds rows of nearly one length and the batches come in random order.

    Rows are drawn into pools of POOL_BATCHES batches, each pool sorted by length and cut into batches. transformers' own grouping leaves
    a pool's batches in order of length, so that every pool teaches its long rows first and its short ones last: that trains far worse
    where a row's length goes with its kind.
    """
    draw = random.Random(f"{seed} {epoch}")
    order = draw.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * POOL_BATCHES):
        pool = sorted(order[start : start + batch_size * POOL_BATCHES], key=lambda number: -lengths[number])
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    rest = [batches.pop()] if len(lengths) % batch_size else []  # the one short batch must come last: the loader cuts by number
    draw.shuffle(batches)
    return [number for batch in [*batches, *rest] for number in batch]


def sft_settings(training: dict, checkpoints: str, validate: bool) -> dict:
    """A job's `training` block as keyword arguments of trl's SFTConfig.

    transformers 5.15 and later have no `warmup_ratio` (a `warmup_steps` below 1 is the same share there);
    `group_by_length` is the lab's own (`length_groups`).
    """
    settings = {key: value for key, value in training.items() if key not in ("output_dir", "warmup_ratio", "group_by_length")}
    if training.get("warmup_ratio"):
        settings["warmup_steps"] = training["warmup_ratio"]
    pace = settings.setdefault("save_strategy", "steps" if "save_steps" in settings else "epoch")
    if validate:
        settings |= {"eval_strategy": pace, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        settings |= {"eval_steps": settings["save_steps"]} if pace == "steps" else {}
        settings.setdefault("per_device_eval_batch_size", settings.get("per_device_train_batch_size", 8))
    fixed = {
        "output_dir": checkpoints,
        "bf16": False,
        "completion_only_loss": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
    }
    return {"disable_tqdm": True, "gradient_checkpointing": False, "report_to": "none", "save_total_limit": 2, **settings, **fixed}


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


def _keep_last(trainer, run_folder: Path) -> None:
    """Keep the last training checkpoint's model as `last/` in the run's folder; drop optimizer states and older ones."""
    checkpoints = run_folder / "checkpoints"
    last = checkpoints / f"checkpoint-{trainer.state.global_step}"
    if not last.is_dir():
        raise BackendError(f"The last training checkpoint, {store.shown(last)}, is missing.")
    for state in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"):
        (last / state).unlink(missing_ok=True)
    with store.atomic_folder(run_folder / "last") as folder:
        shutil.copytree(last, folder, dirs_exist_ok=True)
    shutil.rmtree(checkpoints)


def _save(model, tokenizer, folder: Path) -> dict:
    """Save a checkpoint that answers and stops by itself. Returns the saved weights' hashes."""
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return weight_hashes(model)


def weight_hashes(model) -> dict:
    """SHA-256 of every parameter's values, by name: 32 bytes stand for a tensor, so a model need not be held twice."""
    import hashlib

    return {
        name: hashlib.sha256(parameter.detach().float().cpu().contiguous().numpy().data).hexdigest()
        for name, parameter in model.named_parameters()
    }


def verify_checkpoint(folder: Path, student: dict, trained: dict | None = None) -> int:
    """Load a checkpoint as any user would and compare its weights. Returns how many tensors differ from the student's.

    student  the student's `weight_hashes`
    trained  those of the model that was saved, where it is at hand: they must come back exactly
    Raises BackendError where it does not load, is not finite, does not differ, or came back otherwise than it was saved.
    """
    import torch

    model, _ = load_student(str(folder))
    hashes = weight_hashes(model)
    moved = sum(hashes[name] != student.get(name) for name in hashes)
    unsound = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if unsound:
        raise BackendError(f"The trained weights are not finite ({unsound[0]} and {len(unsound) - 1} more). Lower learning_rate.")
    if not moved:
        raise BackendError("The trained weights equal the student's: nothing was learnt. Raise learning_rate or num_train_epochs.")
    if trained is not None and hashes != trained:
        raise BackendError("The checkpoint does not hold the weights that were saved; is the disk full?")
    return moved


def _metrics(trainer, outcome, rows: int, moved: int) -> dict:
    validated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "rows": rows,
        "steps": outcome.global_step,
        "train_seconds": round(outcome.metrics["train_runtime"], 2),
        "train_loss": outcome.training_loss,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "validation_loss": validated,
        "best_validation_loss": min(validated) if validated else None,
        "parameters": trainer.model.num_parameters(),
        "tensors_moved": moved,
    }


def _record(job: dict, run_folder: Path, student: dict, metrics: dict) -> dict:
    """What `distill_run.json` says of a checkpoint, besides its files."""
    import platform
    import secrets
    from importlib.metadata import version

    plan = run_folder / "plan.json"
    planned = store.read_json(plan) if plan.is_file() else {}
    tokens = Path(job["dataset"]["labeled_path"])
    return {
        "run_id": secrets.token_hex(8),
        "backend": "builtin",
        "job": job,
        **planned,
        "settings": _with_edits(planned.get("settings", {}), job["training"]),
        "student_sha256": store.hash_json(student),
        "tokens_sha256": store.hash_file(tokens),
        "engine_sha256": store.hash_file(__file__),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "metrics": metrics,
    }


def _with_edits(planned: dict, training: dict) -> dict:
    """The planned settings with their origins; what the job says otherwise was edited there."""
    edited = {key: value for key, value in training.items() if key != "output_dir" and planned.get(key, {}).get("value") != value}
    return {**planned, **{key: {"value": value, "origin": "job file"} for key, value in edited.items()}}


def check_out_dir(out_dir: str | Path) -> None:
    """Raise ConfigError unless a checkpoint may be published at `out_dir`: writable, and no folder of somebody's other work."""
    folder = store.resolve(out_dir)
    ours = store.is_dir(folder) and (store.is_file(folder / RUN_RECORD) or not any(folder.iterdir()))
    if not ours and (store.is_dir(folder) or store.is_file(folder)):
        raise ConfigError(
            f"out_dir = {store.shown(folder)}: something stands there that is no checkpoint of the lab. Choose another place."
        )
    store.check_writable(folder)


if __name__ == "__main__":
    main()
