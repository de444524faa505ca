"""A checkpoint: saved whole, loaded again, compared with the student, sealed with `distill_run.json`.

An adapter is merged into the student before it is saved, so that every checkpoint loads with plain `AutoModelForCausalLM`.
"""

import hashlib
from pathlib import Path

from . import config, stages, store
from .errors import BackendError, ConfigError, DataError
from .generation import stop_ids
from .models import RUN_RECORD, fingerprint, load_to_train

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers")
# The modules that decide what is published; a test holds the lists complete.
_EITHER = ("checkpoint.py", "generation.py", "models.py", "prompt.py", "trainer.py")
MODULES = {
    "builtin": ("train.py", "resume.py", "backoff.py", *_EITHER),
    "easydistill": ("launch.py", "workplace.py", *_EITHER),
}
# what a job says besides what is learnt: where it goes, what is shown and kept of it, and how a step is fitted into memory
_UNDECIDING = (
    "output_dir", "logging_steps", "disable_tqdm", "report_to", "save_total_limit", "gradient_checkpointing", "per_device_eval_batch_size",
    "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip


def check_out_dir(out_dir: str | Path) -> None:
    """Raise ConfigError unless a checkpoint may be published at `out_dir`: writable, and no folder of somebody's other work."""
    folder = store.resolve(out_dir)
    ours = store.is_dir(folder) and (store.is_file(folder / RUN_RECORD) or not any(folder.iterdir()))
    if not ours and (store.is_dir(folder) or store.is_file(folder)):
        raise ConfigError(
            f"out_dir = {store.shown(folder)}: something stands there that is no checkpoint of the lab. Choose another place."
        )
    store.check_writable(folder)


def recorded(out_dir: Path, name: str) -> str | None:
    """One fact of the record of the checkpoint at `out_dir`, such as "run_id" or "resume_key"; None where no record can be read."""
    place = out_dir / RUN_RECORD
    try:
        record = store.read_json(place) if store.is_file(place) else None
    except DataError:  # a damaged one must not stand in the way of the training that replaces it
        return None
    return record.get(name) if isinstance(record, dict) else None


def engine_sha256(backend: str = "builtin") -> str:
    """SHA-256 (hex) of the modules that decide a training by "builtin", or by "easydistill" as it is launched; as this process has them."""
    return stages.code(*MODULES[backend])


def resume_key(job: dict, backend: str) -> str:
    """SHA-256 (hex) of everything that decides the weights that a job trains: only the same job is continued, or taken for done.

    backend  "builtin" or "easydistill"
    Covers the settings (of batch and accumulation their product, the rows of a step), the token files, the student's files and the
    engine's code; not the device and the versions of packages, so that a training goes on in another session.
    """
    return identity(job, backend)["resume_key"]


def identity(job: dict, backend: str) -> dict:
    """What a record says of a job's `resume_key` and what that covers: {"resume_key", "backend", "tokens_sha256", "engine_sha256"}.

    To be taken before the training: files that are changed in its midst are not what it was made of.
    """
    tokens = Path(job["dataset"]["labeled_path"])
    files = [store.hash_file(place) for place in (tokens, store.validation_path(tokens)) if store.is_file(place)]
    engine = engine_sha256(backend)
    decides = {
        **decisive_settings(job),
        "tokens_sha256": files,
        "student": fingerprint(job["models"]["student"]),
        "engine_sha256": engine,
        "backend": backend,
    }
    return {"resume_key": store.hash_json(decides), "backend": backend, "tokens_sha256": files[0], "engine_sha256": engine}


def decisive_settings(job: dict) -> dict:
    """A job's settings that decide the weights it trains; of batch and accumulation their product, the rows of a step."""
    training = {name: value for name, value in job["training"].items() if name not in _UNDECIDING}
    rows, passes = config.split_of(job["training"])
    return {
        "job_type": job["job_type"],
        "training": {**training, "rows_a_step": rows * passes},
        "lab": {name: value for name, value in config.lab_settings(job).items() if name != "sample_answers"},
    }


# Saving


def save(model, tokenizer, folder: Path) -> dict:
    """Save a checkpoint that answers and stops by itself. Returns the saved weights' hashes."""
    model.generation_config.eos_token_id = stop_ids(model, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return weight_hashes(model)


def save_merged(student: str, adapter: Path, tokenizer, folder: Path) -> dict:
    """Save a student with a LoRA adapter merged into it. Returns the saved weights' hashes.

    The student is loaded anew, in fp32: the one that was trained may be held in half precision, where a merge would round away
    what was learnt.
    """
    from peft import PeftModel

    base, _ = load_to_train(student)
    return save(PeftModel.from_pretrained(base, adapter).merge_and_unload(), tokenizer, folder)


# Proof


def weight_hashes(model) -> dict:
    """SHA-256 of every parameter's values, by name: 32 bytes stand for a tensor, so a model need not be held twice."""
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

    model, _ = load_to_train(str(folder))
    hashes = weight_hashes(model)
    moved = sum(hashes[name] != student.get(name) for name in hashes)
    unsound = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if unsound:
        raise BackendError(f"The trained weights are not finite ({unsound[0]} and {len(unsound) - 1} more). Lower learning_rate.")
    if not moved:
        raise BackendError(
            "The trained weights equal the student's: nothing was learnt. Raise num_train_epochs or learning_rate; "
            "where there are only a few steps, set warmup_ratio to 0, or all of them are warm-up."
        )
    if hashes.keys() != student.keys():
        raise BackendError(f"The checkpoint has other tensors than the student: {', '.join(sorted(hashes.keys() ^ student.keys())[:4])}.")
    if trained is not None and hashes != trained:
        raise BackendError("The checkpoint does not hold the weights that were saved; is the disk full?")
    return moved


# The record


def record(job: dict, run_folder: Path, known: dict, student: dict, chosen: dict, metrics: dict, easydistill: dict | None = None) -> dict:
    """What `distill_run.json` says of a checkpoint, besides its files.

    known        the job's `identity` from before the training
    student      the student's `weight_hashes`
    chosen       what the backend chose by itself: name → {"value", "reason"}
    easydistill  what is known of the EasyDistill that trained, {"version", "origin", "versions"}; None where the built-in engine did
    """
    import platform
    import secrets
    from importlib.metadata import version

    plan = run_folder / "plan.json"
    planned = store.read_json(plan) if plan.is_file() else {}
    return {
        "run_id": secrets.token_hex(8),
        "job": job,
        **planned,
        "settings": with_edits(planned.get("settings", {}), {**job["training"], **job.get("lab", {})}),
        "chosen": chosen,
        "student_sha256": store.hash_json(student),
        **known,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        **({"easydistill": easydistill} if easydistill else {}),
        "metrics": metrics,
    }


def with_edits(planned: dict, settings: dict) -> dict:
    """The planned settings with their origins; what the job says otherwise was edited there."""
    edited = {key: value for key, value in settings.items() if key != "output_dir" and planned.get(key, {}).get("value") != value}
    removed = {key: config.LAB_DEFAULTS[key] for key in config.LAB_DEFAULTS if key in planned and key not in settings}
    edited |= {key: value for key, value in removed.items() if planned[key]["value"] != value}
    return {**planned, **{key: {"value": value, "origin": "job file"} for key, value in edited.items()}}
