"""Which of EasyDistill's known failures a run looks like, and what to do. EasyDistill 1.x ends with exit status 0 however its training
ended, so that its log, and what the lab saw itself, are all there is to go by.

Only a run that failed is diagnosed: a line that says "error" is no fault by itself.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import store
from .errors import DistillError

TRACEBACK = "Traceback (most recent call last)"
# by CUDA, torch on a CPU, cuBLAS, the system
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
FULL_BYTES = 64 * 2**20  # less than this left on the disk is a full one
FULL_DISK = (  # as Python and Rust and torch say it
    r"No space left on device|Disk quota exceeded|File too large|\(?os error (?:28|122|27)\)?|\[Errno (?:28|122|27)\]|"
    r"PytorchStreamWriter failed|unexpected pos \d+ vs"
)


@dataclass(frozen=True)
class Facts:
    """What the lab saw of a run that failed.

    status      EasyDistill's exit status, negative for a signal
    overdue     "", or which limit ended it: "limit" (wall-clock time) or "silence" (no output)
    seconds     how long it ran
    trained     whether the log says that the training reached its end
    free_bytes  left on the disk that the checkpoint goes to; None where unknown
    """

    status: int = 0
    overdue: str = ""
    seconds: float = 0.0
    trained: bool = False
    free_bytes: int | None = None


@dataclass(frozen=True)
class Fault:
    """A failure's name, fit for "it looks like …", and what to do."""

    name: str
    advice: str


_SMALLER = (
    "Full fine-tuning takes 16 bytes a parameter and room for a batch: take a smaller student, per_device_train_batch_size, max_length, "
    "or lora_rank with backend = 'builtin'."
)
_NEW_RUN = "Write the job anew with write_system1_config or write_system2_config."
_SET_UP = "Make its environment anew: `python distill_app.py setup-easydistill 1`."
_BUILT_IN = "Take backend = 'builtin', which trains it."

# (name, advice, what the log holds); the first that is found counts. `{0}` is what the first group of the pattern caught.
KNOWN = (
    ("out of memory on the GPU", _SMALLER, r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    ("out of memory", _SMALLER, r"can't allocate memory|MemoryError\b|Cannot allocate memory|\[Errno 12\]"),
    (
        "a full disk",
        "Free some space; a checkpoint takes 4 bytes a parameter, and is written up to three times.",
        FULL_DISK,
    ),
    (
        "the training was killed, as happens when memory runs out",
        _SMALLER,
        r"SIGKILL|died with .*\b9\b|returncode=(?:-9|137)\b|Killed",
    ),
    ("the training crashed", _BUILT_IN, r"died with <Signals\.(SIG\w+)|returncode=-\d+\b|Segmentation fault"),
    (
        "a training setting that its trl does not know: {0}",
        "Remove it from the job, or take backend = 'builtin'.",
        r"TypeError: .*__init__\(\) got an unexpected keyword argument '(\w+)'",
    ),
    (
        "a training setting of a value that its trl does not take: {0}",
        "Give another value, or take backend = 'builtin'.",
        r"ValueError: (\S+) is not a valid ",
    ),
    (
        "EasyDistill 2.x, which makes data and cannot train",
        "Let EASYDISTILL_HOME name a 1.x, or install one: `python distill_app.py setup-easydistill 1`.",
        r"extra_forbidden|Unknown job type|[Uu]nsupported job_type|--list-jobs",
    ),
    (
        "an EasyDistill without its trainer: the package index's empty placeholder, or a 1.x that was not installed with `pip install -e`",
        _SET_UP,
        r"No module named '?easydistill|can't open file '[^']*kd/train\.py'|No module named '?sklearn",
    ),
    ("a package that its environment lacks: {0}", _SET_UP, r"ModuleNotFoundError: No module named '([\w.]+)'"),
    ("a package that its environment lacks: {0}", _SET_UP, r"((?i:deepspeed|vllm))\b.*(?:is not installed|not found)"),
    (
        "its processes did not start",
        "Where programs in the folder for temporary files may not run (noexec), set TMPDIR to one where they may; otherwise make its "
        "environment anew: `python distill_app.py setup-easydistill 1`.",
        r"accelerate: (?:not found|command not found|Permission denied)|No module named accelerate",
    ),
    ("wandb without a key", "Set report_to to 'none' in the job.", r"wandb.*(?:api_key|API key|UsageError|login)"),
    (
        "a student that needs a newer transformers than EasyDistill's",
        _BUILT_IN,
        r"does not recognize this architecture|Unrecognized configuration class|untagged enum|"
        r"Tokenizer class \S+ does not exist|'list' object has no attribute 'keys'|Couldn't instantiate the backend tokenizer",
    ),
    (
        "a student that is not there or not whole",
        "Look at student_model: it must be a folder with config.json, safetensors weights and a tokenizer.",
        r"is not a local folder and is not a valid model|Unrecognized model in|does not appear to have a file named|"
        r"no file named .*safetensors|SafetensorError|safetensors archive|Incorrect path_or_model_id|"
        r"Can't load (?:tokenizer|the configuration|the model)",
    ),
    (
        "data that is missing or cannot be read",
        _NEW_RUN,
        r"DatasetGenerationError|DataFilesNotFoundError|FileNotFoundError|Failed to (?:load|read) (?:JSON|file)|JSON parse error",
    ),
    ("a GPU that its torch cannot use", _BUILT_IN, r"CUDA error|no kernel image|NCCL|CUDA driver|Your setup doesn't support bf16"),
    ("nothing was learnt", "Raise num_train_epochs or learning_rate, or set warmup_ratio to 0.", r"nothing was learnt"),
    ("weights that are not finite", "Lower learning_rate.", r"weights are not finite"),
    (
        "a checkpoint that is not whole",
        "Look for a full disk, and train again.",
        r"The checkpoint (?:lacks|has|does not)",
    ),
)


def diagnose(log: str, facts: Facts) -> Fault:
    """The fault of a run that failed, by its log and by what the lab saw."""
    if facts.overdue == "limit":
        return Fault(f"it ran past its time limit ({facts.seconds:.0f} s)", "Raise the limit, or train less: num_train_epochs, max_steps.")
    if facts.overdue == "silence":
        return Fault(
            f"it hangs: nothing was heard of it for long, after {facts.seconds:.0f} s in all",
            "Try again; where it hangs again, take backend = 'builtin'.",
        )
    for text in (log[log.find(TRACEBACK) :] if TRACEBACK in log else "", log):  # what was said when it broke, before all else
        for name, advice, pattern in KNOWN:
            if found := re.search(pattern, text, re.M):
                return Fault(name.format(next(filter(None, found.groups()), "")), advice)
    if facts.free_bytes is not None and facts.free_bytes < FULL_BYTES:
        return Fault("a full disk", "Free some space.")
    if facts.status < 0:
        return Fault("its command line was killed, as happens when memory runs out" if facts.status == -9 else "it was ended", _SMALLER)
    if facts.trained:
        return Fault("it trained to the end and left no checkpoint that can be used", _BUILT_IN)
    return Fault(
        f"the training ended before its end, and EasyDistill's exit status ({facts.status}) does not tell why",
        "The log's end may; otherwise take backend = 'builtin'.",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory: of the GPU, of torch on a CPU, of Python, of a file's mapping."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def naming_full_disk(place: Path) -> Iterator[None]:
    """Within the block, a full disk is the ConfigError of `store.cannot_write`, in whatever words and error a library reports it.

    place  what is said to be full where the error does not name a file
    """
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        full = next((one for one in _chain(error) if re.search(FULL_DISK, str(one))), None)
        if full is None:
            raise
        at = getattr(full, "filename2", None) or getattr(full, "filename", None) or place
        with store.cannot_write(Path(at)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    while error:
        yield error
        error = error.__cause__ or error.__context__
