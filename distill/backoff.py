"""A training that ran out of memory: known as such, tried again with fewer rows at a time, and given up with the plan that would fit.

The rows of an optimizer step stay the same, and so does their order: fewer at a time is more times.
"""

import signal
import sys
from pathlib import Path

from . import config, engine, store
from .errors import BackendError, ConfigError
from .faults import is_out_of_memory
from .preflight import lighter
from .shapes import find_shape

STATUS = 77  # the engine's exit status, which means nothing else
LIMIT = 4  # of the times that it is tried again
RECORD = "backed_off.json"
KILL_COUNTERS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")  # of the container; of the machine, where it is none


def kernel_kills(counters: tuple = KILL_COUNTERS) -> int:
    """How many processes the kernel has killed for their memory; 0 where it does not tell."""
    place = next((Path(name) for name in counters if Path(name).is_file()), None)
    lines = [line.split() for line in place.read_text().splitlines()] if place else []
    return sum(int(count) for name, count in lines if name == "oom_kill")


def ran_out(status: int, kills_before: int, kills_now: int) -> bool:
    """Whether a process that ended with `status` ran out of memory, by its own word or by the kernel's."""
    return status == STATUS or (status == -signal.SIGKILL and kills_now > kills_before)


def train_within_memory(trainer, found: Path | None, split: dict):
    """Train to the end, from the training checkpoint `found` where there is one. Returns what transformers' `train` does.

    Where memory runs out, the last finished step is saved, the lab is told and the process ends with STATUS.
    """
    try:
        return trainer.train(resume_from_checkpoint=found and str(found))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines()
    # outside of the handler, whose traceback holds every tensor of the step
    print(f"out of memory after step {trainer.state.global_step}: {said[0] if said else 'MemoryError'}")
    engine.emit(out_of_memory={"step": trainer.state.global_step, **split})
    try:
        trainer.rescue()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("there was no memory for saving either: the last training checkpoint serves")
    sys.exit(STATUS)


# How a step's rows are split


def split_of(training: dict) -> dict:
    """{"micro_batch": rows at a time, "accumulation": times a step} of a job's block."""
    return dict(zip(("micro_batch", "accumulation"), config.split_of(training), strict=True))


def smaller(split: dict) -> dict | None:
    """Half of the rows at a time, twice as often; an odd number is divided by its smallest factor. None where it is one row."""
    rows = split["micro_batch"]
    factor = next((number for number in range(2, rows + 1) if rows % number == 0), None)
    return factor and {"micro_batch": rows // factor, "accumulation": split["accumulation"] * factor}


def history(checkpoints: Path, key: str, training: dict) -> list[dict]:
    """Every time that a job has backed off: [{"step", "from", "to"}]; none where its rows were asked to be split otherwise since.

    key       the job's `checkpoint.resume_key`
    training  the job's block
    """
    place = checkpoints / RECORD
    record = store.read_json(place) if place.is_file() else {}
    past = record.get("backed_off", []) if record.get("resume_key") == key else []
    return past if past and past[0]["from"] == split_of(training) else []


def fitted(job: dict, past: list[dict]) -> dict:
    """A job with its step's rows split as they fitted last."""
    if not past:
        return job
    split, training = past[-1]["to"], dict(job["training"])
    if "per_device_eval_batch_size" in training:
        share = training["per_device_eval_batch_size"] * split["micro_batch"] // split_of(training)["micro_batch"]
        training["per_device_eval_batch_size"] = max(1, share)
    training |= {"per_device_train_batch_size": split["micro_batch"], "gradient_accumulation_steps": split["accumulation"]}
    return {**job, "training": training}


def back_off(job: dict, session: dict, step: int, checkpoints: Path) -> str:
    """Note that the next session takes fewer rows at a time. Returns what is to be said of it.

    session  of the engine that ran out of memory: {"resume_key", "split", "capability"}
    step     after which it did
    Raises BackendError with what would fit, where that has been done LIMIT times or one row is too much; then the job's own split counts.
    """
    past, split = history(checkpoints, session["resume_key"], job["training"]), session["split"]
    change = {"step": step, "from": split, "to": smaller(split)}
    if not change["to"] or len(past) >= LIMIT:
        (checkpoints / RECORD).unlink(missing_ok=True)
        rows = split["micro_batch"]
        raise BackendError(
            f"Training failed: out of memory after step {step}, with {rows} row{'s' if rows > 1 else ''} at a time. {advice(job, session)}"
        )
    store.write_json(checkpoints / RECORD, {"resume_key": session["resume_key"], "backed_off": [*past, change]})
    return f"out of memory after step {step}: goes on with {shown(change['to'])} rows in place of {shown(split)}, the same in a step"


def outside_of_steps(job: dict, session: dict) -> BackendError:
    """The error for an engine that ran out of memory before its first step or after its last: fewer rows at a time would not help."""
    return BackendError(f"Training failed: out of memory where the model is loaded or published, not in a step. {advice(job, session)}")


def shown(split: dict) -> str:
    """A split in words: 8 × 4."""
    return f"{split['micro_batch']} × {split['accumulation']}"


def advice(job: dict, session: dict) -> str:
    """Settings that need less memory than a job's with its rows split as they were last, by the estimate."""
    split, capability = session["split"], session["capability"]
    rows = {"per_device_train_batch_size": split["micro_batch"], "gradient_accumulation_steps": split["accumulation"]}
    try:
        shape, _ = find_shape(job["models"]["student"])
    except ConfigError as error:
        return f"{error} Set a shorter max_length, or take a smaller student."
    return lighter({**job["training"], **config.lab_settings(job), **rows}, shape, capability and tuple(capability))
